"""How many steps a training takes in a second."""

from __future__ import annotations

from time import perf_counter

from lightning.pytorch import LightningModule, Trainer

from lit_bnfold.callbacks.monitor import Monitor, steps_to_written


class SpeedMonitor(Monitor):
    """Writes ``train/steps_per_second``: the steps since it was last written, over the seconds that they took.

    It is written on the Trainer's ``log_every_n_steps``, on rank 0, to every logger. The time of validations in between
    does not count, so that the number says how fast training is.

    Lightning's own ``ThroughputMonitor`` works on each step, waits for the GPU there, and asks for a batch size.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[SpeedMonitor()], logger=False, accelerator="cpu")
    """

    def __init__(self) -> None:
        super().__init__()
        # Where and when the steps began that are being measured, None before the first.
        self._since: tuple[int, float] | None = None
        self._validation_start = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count."""
        super().on_train_start(trainer, pl_module)
        self._since = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._validation_start = perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the clock go on."""
        if self._since is not None:
            step, start = self._since
            self._since = step, start + perf_counter() - self._validation_start

    def _steps_left(self, trainer: Trainer, step: int) -> int:
        if self._since is None:
            self._since = step, perf_counter()
        return steps_to_written(trainer, step)

    def _reach(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        assert self._since is not None
        since, start = self._since
        now = perf_counter()
        if step > since:
            for logger in trainer.loggers:
                logger.log_metrics({"train/steps_per_second": (step - since) / (now - start)}, step=step)
            self._since = step, now
