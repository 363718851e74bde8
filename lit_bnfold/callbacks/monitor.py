"""What the monitors share: they choose steps, and cost the others next to nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from lit_bnfold.checkpoint import SHARDED_STRATEGIES

# The hooks that Lightning calls on each training step.
_STEP_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


def skip_idle_hooks(callback: Callback) -> None:
    """Spare the training steps the hooks that do nothing in ``callback``.

    On each step Lightning calls every hook of every callback, and that takes some microseconds also where the hook is
    empty: a small network waits longer for five empty callbacks than for its optimizer. A hook that is None is passed
    over.

    Args:
        callback: Any callback; it does what it did before.
    """
    for name in _STEP_HOOKS:
        if name not in vars(callback) and _is_idle(callback, name):
            vars(callback)[name] = None


def _is_idle(callback: Callback, name: str) -> bool:
    return getattr(type(callback), name) is getattr(Callback, name)


def logged_step(trainer: Trainer, pl_module: LightningModule) -> int:
    """Return the step, counted from 0, under which Lightning writes what is logged in the batch that is about to run.

    With manual optimisation that is the number of the batch, because a batch may hold several optimizer steps or none.
    """
    return trainer.global_step if pl_module.automatic_optimization else trainer.fit_loop.total_batch_idx


def steps_to_written(trainer: Trainer, step: int, every_n_steps: int | None = None) -> int:
    """Return how many steps there are to the next that is written, 0 if it is this one.

    Args:
        trainer: The trainer.
        step: The step, counted from 0.
        every_n_steps: Steps between two that are written; None for the trainer's ``log_every_n_steps``, of which 0
            writes nothing, ever.
    """
    every: int = every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
    return -(step + 1) % every if every else 1


def check_every_n_steps(every_n_steps: int, name: str = "every_n_steps") -> None:
    """Refuse what is no number of steps.

    Args:
        every_n_steps: The number.
        name: Name of the argument.

    Raises:
        TypeError: If it is no int.
        ValueError: If it is below 1.
    """
    if not isinstance(every_n_steps, int) or isinstance(every_n_steps, bool):
        raise TypeError(f"{name}: expected an int, got {every_n_steps!r}; pass a number of steps.")
    if every_n_steps < 1:
        raise ValueError(f"{name}: expected at least 1, got {every_n_steps}; pass a number of steps.")


class Monitor(Callback):
    """Does something on chosen steps of a training, on rank 0, and costs the others next to nothing.

    Until a chosen step comes, only the counting in ``on_train_batch_start`` runs, in the first of a Trainer's monitors
    for all of them: the other hooks of a step are hidden behind a None, which Lightning passes over. A subclass says
    which steps it wants in ``_steps_left`` and what it does there in ``_reach``.
    """

    def __init__(self) -> None:
        self._batches_left = 0
        self._hide_hooks()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count, if this is the first monitor."""
        self._batches_left = 0
        vars(self).pop("on_train_batch_start", None)
        if next(_monitors(trainer), self) is not self:
            vars(self)["on_train_batch_start"] = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count, and let those monitors act that have chosen this step."""
        # A batch is at most one step, so that it is enough to look at the number of the step when this has run down.
        if self._batches_left:
            self._batches_left -= 1
        elif trainer.is_global_zero and trainer.loggers:
            step = logged_step(trainer, pl_module)
            steps_left = {monitor: monitor._steps_left(trainer, step) for monitor in _monitors(trainer)}
            self._batches_left = max(min(steps_left.values()) - 1, 0)
            for monitor in (monitor for monitor, left in steps_left.items() if left == 0):
                monitor._reach(trainer, pl_module, step)

    def _hide_hooks(self) -> None:
        vars(self).update(dict.fromkeys(_STEP_HOOKS[1:]))

    def _show_hooks(self) -> None:
        for name in _STEP_HOOKS[1:]:
            if not _is_idle(self, name):
                vars(self).pop(name, None)

    def _steps_left(self, trainer: Trainer, step: int) -> int:
        """Return how many steps there are from this one to the next that is chosen, 0 if it is this one."""
        raise NotImplementedError

    def _reach(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Act before a batch of a chosen step, which has several where gradients accumulate."""
        raise NotImplementedError


class OnWrittenSteps(Monitor):
    """Calls another callback's ``on_train_batch_start`` on the steps that are written, and on no other.

    Lightning's ``LearningRateMonitor`` looks itself whether a step is written, and even that costs the small network
    half a percent of its time.

    Args:
        callback: A callback that does nothing there on other steps, and makes no use of the batch.
    """

    def __init__(self, callback: Callback) -> None:
        super().__init__()
        self.callback = callback
        vars(callback)["on_train_batch_start"] = None

    def _steps_left(self, trainer: Trainer, step: int) -> int:
        return steps_to_written(trainer, step)

    def _reach(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        type(self.callback).on_train_batch_start(self.callback, trainer, pl_module, None, 0)


def _monitors(trainer: Trainer) -> Iterator[Monitor]:
    return (each for each in trainer.callbacks if isinstance(each, Monitor))  # type: ignore[attr-defined]


class StepMonitor(Monitor):
    """Watches chosen steps from before the first batch until after the optimizer's step.

    A subclass notes what it needs in ``_begin``, writes in ``_write`` and lets go of everything in ``_end``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._stepped = False
        # It is there while a step is watched.
        self._post_hook: RemovableHandle | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a strategy under which rank 0 does not have the whole module.

        Raises:
            MisconfigurationException: If the strategy shards the module.
        """
        strategy = type(trainer.strategy).__name__
        if stage == "fit" and strategy in SHARDED_STRATEGIES:
            raise MisconfigurationException(
                f"{type(self).__name__} needs whole parameters on every device; {strategy} shards them. "
                "Take it out of the callbacks."
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write, if an optimizer has stepped: not while gradients accumulate, nor where a scaler left a step out."""
        if self._stepped:
            try:
                # The optimizer's step is counted by now, the batch is not.
                self._write(trainer, logged_step(trainer, pl_module) - pl_module.automatic_optimization)
            finally:
                self._stop()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of a step that was never taken."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the step that failed."""
        self._stop()

    def _reach(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        if self._post_hook is None:
            self._show_hooks()
            self._post_hook = register_optimizer_step_post_hook(self._note_step)
            self._begin(trainer, pl_module)

    def _note_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._stepped = True

    def _stop(self) -> None:
        if self._post_hook is not None:
            self._post_hook.remove()
            self._post_hook = None
            self._stepped = False
            self._hide_hooks()
            self._end()

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what is needed of the module before the step."""
        raise NotImplementedError

    def _write(self, trainer: Trainer, step: int) -> None:
        """Write what the step came to."""
        raise NotImplementedError

    def _end(self) -> None:
        """Let go of everything, also after an exception."""
        raise NotImplementedError
