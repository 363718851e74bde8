"""Folded checkpoints: Lightning checkpoints with the folding plan beside the folded weights.

The state dict of a folded network fits a network that was folded in the same way, and no other. So the plan travels in
the file, under ``"batchnorm_folding"``, and loading gives the new network that structure before any number is loaded.
One more key in the state dict is there for whoever loads the file in the ordinary way: torch's error message names it.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial, wraps
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lit_bnfold.copying import eval_copy
from lit_bnfold.folding import FoldingError, FoldingPlan
from lit_bnfold.folding.graph import named
from lit_bnfold.folding.kinds import Rest
from lit_bnfold.folding.rewrite import Zero, fold_structure
from lit_bnfold.reading import cannot_be_loaded, check_is_undamaged, naming_the_checkpoint, read_checkpoint
from lit_bnfold.writing import whole_file

MANIFEST = "batchnorm_folding"
"""Key of the plan in a folded checkpoint."""

SIGNPOST = "this checkpoint is folded: load it with lit_bnfold.load_folded(ModelClass, path)"
"""Key in the state dict of a folded checkpoint that makes an ordinary, strict load fail and say what to do."""

_Module = TypeVar("_Module", bound=LightningModule)

_Undo = Callable[[], None]
_Hook = Callable[[dict[str, Any]], None]

SHARDED_STRATEGIES = {
    "FSDPStrategy": "the sharded directory as it is, or the file that "
    "`python -m lightning.pytorch.utilities.consolidate_checkpoint` makes of it",
    # Lightning's command does not know what ModelParallel writes.
    "ModelParallelStrategy": "the sharded directory as it is",
    "DeepSpeedStrategy": "the file that `lightning.pytorch.utilities.deepspeed."
    "convert_zero_checkpoint_to_fp32_state_dict` makes of the directory",
}
"""The strategies under which no process has the whole module, and what of theirs can be folded afterwards."""


class _CarefulLoad:
    """Lightning's ``load_from_checkpoint``, after a look at the file, and without running code that lies in it."""

    def __get__(self, instance: Any, owner: type[Any]) -> Callable[..., Any]:
        # Lightning refuses to be called on an instance, and says so when it is.
        load = super(FoldedLoading, owner if instance is None else instance).load_from_checkpoint  # type: ignore[misc]

        @wraps(load)
        def load_from_checkpoint(
            checkpoint_path: Any,
            map_location: Any = None,
            hparams_file: Any = None,
            strict: bool | None = None,
            weights_only: bool | None = None,
            **kwargs: Any,
        ) -> Any:
            if isinstance(checkpoint_path, (str, Path)) and Path(checkpoint_path).is_file():
                check_is_undamaged(Path(checkpoint_path))
            careful = weights_only is not False
            with naming_the_checkpoint(checkpoint_path):
                return load(checkpoint_path, map_location, hparams_file, strict, weights_only=careful, **kwargs)

        return load_from_checkpoint


class FoldedLoading:
    """Mixin for LightningModules: ``load_from_checkpoint`` and ``ckpt_path`` take folded checkpoints as well.

    It has to stand before ``LightningModule`` among the bases.

    Example:
        >>> class Network(FoldedLoading, LightningModule):
        ...     pass
    """

    load_from_checkpoint: Any = _CarefulLoad()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give this module the structure of the checkpoint, if that is folded.

        Args:
            checkpoint: The checkpoint that is being loaded.

        Raises:
            FoldingError: If training is to go on from a folded checkpoint, or its plan does not fit this module.
        """
        assert isinstance(self, nn.Module)
        _take_structure_early(self, checkpoint)
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        _take_structure(self, checkpoint)


def load_folded(model_class: type[_Module], path: str | Path, **kwargs: Any) -> _Module:
    """Load a folded checkpoint into a LightningModule of any class.

    Args:
        model_class: The class that was trained.
        path: A ``folded.ckpt``.
        **kwargs: What ``model_class.load_from_checkpoint`` takes: ``map_location``, and arguments of the class that the
            checkpoint does not hold. With ``weights_only=False`` a file that you trust may hold any objects; reading
            it can run any code.

    Returns:
        The folded module, in eval mode.

    Raises:
        FileNotFoundError: If there is no such file.
        FoldingError: If the checkpoint is not folded, or its plan does not fit the class.
        RuntimeError: If its weights do not fit the class.
        TypeError: If ``model_class`` is no class of LightningModules.
        ValueError: If the file is damaged, no checkpoint of Lightning, or holds more than tensors and plain values.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from lightning.pytorch import Trainer
        >>> from lit_bnfold import BatchNormFolding, BatchNormMLP, NamesDataModule
        >>> quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        >>> quiet |= {"enable_model_summary": False, "accelerator": "cpu"}
        >>> with TemporaryDirectory() as directory:
        ...     folding = BatchNormFolding(dirpath=directory)
        ...     trainer = Trainer(max_steps=1, limit_val_batches=1, callbacks=[folding], **quiet)
        ...     trainer.fit(BatchNormMLP(), NamesDataModule())  # doctest: +ELLIPSIS
        ...     folded = load_folded(BatchNormMLP, f"{directory}/folded.ckpt")
        BatchNorm folding: 3 of 3 folded...
        >>> folded.net.norm1
        Identity()
    """
    if not isinstance(model_class, type) or not hasattr(model_class, "load_from_checkpoint"):
        raise TypeError(
            f"model_class: expected the LightningModule class that was trained, got {model_class!r}; pass the class "
            "first, then the path."
        )
    if not Path(path).is_file():
        raise FileNotFoundError(f"Expected a folded checkpoint at {path}, found no file.")

    weights_only = kwargs.pop("weights_only", None) is not False
    checkpoint = read_checkpoint(Path(path), weights_only)
    if MANIFEST not in checkpoint:
        raise FoldingError(f"{path} is not folded; {model_class.__name__}.load_from_checkpoint loads it.")
    # Lightning's own load does everything by its rules and by those of the class; it only meets another structure.
    with _taking_folded({model_class, _class_in(checkpoint, model_class)}), naming_the_checkpoint(path):
        module: _Module = model_class.load_from_checkpoint(path, weights_only=weights_only, **kwargs)
    take_folded(module)
    return module.eval()


def _class_in(checkpoint: Mapping[str, Any], model_class: type[_Module]) -> type[_Module]:
    """The class that a LightningCLI has named in a checkpoint, if it is a kind of ``model_class``."""
    module, _, name = str(checkpoint.get("hyper_parameters", {}).get("_class_path", "")).rpartition(".")
    named = getattr(sys.modules.get(module), name, None)
    return named if isinstance(named, type) and issubclass(named, model_class) else model_class


@contextmanager
def _taking_folded(classes: Collection[Any]) -> Iterator[None]:
    """Have classes take folded checkpoints: Lightning makes the module itself, and allows no class it cannot import."""
    with ExitStack() as stack:
        for of_class in classes:
            stack.callback(_add_to_class(of_class))
        yield


def _add_to_class(of_class: Any) -> _Undo:
    own, is_inherited = of_class.on_load_checkpoint, "on_load_checkpoint" not in vars(of_class)

    def on_load_checkpoint(self: LightningModule, checkpoint: dict[str, Any]) -> None:
        _take_structure_early(self, checkpoint)
        own(self, checkpoint)
        _take_structure(self, checkpoint)

    def undo() -> None:
        if is_inherited:
            del of_class.on_load_checkpoint
        else:
            of_class.on_load_checkpoint = own

    of_class.on_load_checkpoint = on_load_checkpoint
    return undo


def save_folded(
    trainer: Trainer,
    pl_module: LightningModule,
    plan: FoldingPlan,
    path: Path,
    progress: Mapping[str, Any] | None = None,
    outdated: Sequence[Path] = (),
) -> None:
    """Save a module that is folded at this moment; the file appears whole or not at all. To be called on all ranks.

    Args:
        trainer: The Trainer of the module.
        pl_module: The folded module.
        plan: The plan by which it was folded.
        path: Where the file goes.
        progress: What the file says of the training, such as its ``global_step``, if that was not the Trainer's own.
        outdated: Files that tell of an older one, or were made with it: they go when it does.

    Raises:
        UnfaithfulError: If what the module writes leads to another one when it is loaded; then nothing is written.
        OSError: If the file cannot be written.
    """
    objection: UnfaithfulError | None = None

    def add(checkpoint: dict[str, Any]) -> None:
        nonlocal objection
        _add_manifest(plan, checkpoint)
        checkpoint.update(progress or {})
        if trainer.is_global_zero:  # Others may give nothing, as nothing of them is written.
            objection = _objection_to(checkpoint, pl_module, plan)

    undo = _add_to_hook(pl_module, "on_save_checkpoint", add)
    try:
        with whole_file(path, trainer, outdated) as part:
            trainer.save_checkpoint(part, weights_only=True)
            # All processes raise, or none: they meet where the file is written.
            objection = trainer.strategy.broadcast(objection)
            if objection is not None:
                raise objection
    finally:
        undo()


@contextmanager
def writing_plan(pl_module: LightningModule, plan: FoldingPlan) -> Iterator[None]:
    """Have a module that is folded for a while write its plan into the checkpoints that are saved meanwhile.

    Args:
        pl_module: The module.
        plan: The plan by which it is folded.
    """
    undo = _add_to_hook(pl_module, "on_save_checkpoint", partial(_add_manifest, plan))
    try:
        yield
    finally:
        undo()


def stay_folded(pl_module: LightningModule, plan: FoldingPlan) -> None:
    """Have a folded module write its plan into every checkpoint from now on, and take folded checkpoints alone.

    Args:
        pl_module: A module that was folded for good.
        plan: The plan by which it was folded.
    """
    _remember(plan, pl_module)
    take_folded(pl_module)


def _remember(plan: FoldingPlan, module: nn.Module) -> None:
    """Have a module write a plan beside those that it writes already, but no fold twice: it may be built anew."""
    parts = {
        name: getattr(vars(module).get(name), "parts", []) for name in ("on_save_checkpoint", "on_load_checkpoint")
    }
    plans = [part.args[0] for part in parts["on_save_checkpoint"] if getattr(part, "func", None) is _add_manifest]
    known = {fold.batchnorm for each in plans for fold in each.folds}
    new = FoldingPlan(tuple(fold for fold in plan.folds if fold.batchnorm not in known), plan.kept)
    _add_to_hook(module, "on_save_checkpoint", partial(_add_manifest, new))
    if _check_is_folded not in parts["on_load_checkpoint"]:
        _add_to_hook(module, "on_load_checkpoint", _check_is_folded, first=True)


def _check_is_folded(checkpoint: Mapping[str, Any]) -> None:
    if MANIFEST not in checkpoint:
        raise FoldingError(
            "This module is folded, and the checkpoint is not: load it into a new module, or pass a folded.ckpt, or no "
            "checkpoint at all to go on with the weights that the module has."
        )


def take_folded(pl_module: LightningModule) -> _Undo:
    """Have a module of any class take folded checkpoints, or refuse to be trained from them, as ``FoldedLoading`` does.

    That is done to those which inherit from it as well: their own ``on_load_checkpoint`` may not call it.

    Args:
        pl_module: The module.

    Returns:
        A function that makes it load as its class does.
    """
    undo_first = _add_to_hook(pl_module, "on_load_checkpoint", partial(_take_structure_early, pl_module), first=True)
    undo_last = _add_to_hook(pl_module, "on_load_checkpoint", partial(_take_structure, pl_module))

    def undo() -> None:
        undo_first()
        undo_last()

    return undo


@contextmanager
def progress_of_training(pl_module: LightningModule) -> Iterator[dict[str, Any]]:
    """Watch a module load a checkpoint, which must not be folded.

    Args:
        pl_module: The module.

    Yields:
        A dict that will hold what the checkpoint says of the training, such as its ``global_step``.
    """
    progress: dict[str, Any] = {}

    def watch(checkpoint: dict[str, Any]) -> None:
        _check_is_unfolded(checkpoint, "This checkpoint")
        progress.update({key: checkpoint[key] for key in ("epoch", "global_step", "loops") if key in checkpoint})

    # A class that takes folded checkpoints would have taken the structure by then.
    undo = _add_to_hook(pl_module, "on_load_checkpoint", watch, first=True)
    try:
        yield progress
    finally:
        undo()


def read_unfolded(path: str | Path, weights_only: bool = True) -> dict[str, Any]:
    """Read what an unfolded checkpoint says of its training: the hyperparameters, the step, and so on.

    Args:
        path: As for ``read_checkpoint``.
        weights_only: Likewise.

    Returns:
        The checkpoint.

    Raises:
        FileNotFoundError: If there is nothing at ``path``.
        FoldingError: If the checkpoint is folded.
        ValueError: If it is no checkpoint of Lightning, or holds more than ``weights_only`` allows.
    """
    checkpoint = read_checkpoint(Path(path), weights_only)
    _check_is_unfolded(checkpoint, path)
    return checkpoint


@contextmanager
def one_file(path: str | Path, weights_only: bool = True) -> Iterator[str]:
    """Give a checkpoint as one file, which Lightning can load in one process.

    Lightning's own command (``python -m lightning.pytorch.utilities.consolidate_checkpoint``) does this for FSDP, and
    not for ModelParallel.

    Args:
        path: A checkpoint; for the directory of a sharded strategy a file is made for as long as the context lasts.
        weights_only: Whether to read nothing but tensors and plain values.

    Yields:
        The path of the file.

    Raises:
        ValueError: If a file is damaged, or holds more than ``weights_only`` allows.
    """
    if not Path(path).is_dir():
        # Lightning says itself what is wrong with a path.
        if Path(path).is_file():
            check_is_undamaged(Path(path))
        yield str(path)
        return
    rest = read_unfolded(path, weights_only)
    state = _weights_of_shards(Path(path), weights_only)
    with tempfile.TemporaryDirectory() as directory:
        whole = Path(directory) / "whole.ckpt"
        torch.save({**rest, "state_dict": state}, whole)
        del state
        yield str(whole)


def _weights_of_shards(path: Path, weights_only: bool) -> dict[str, Any]:
    # Nobody else has to wait for it to load.
    from lit_bnfold.sharded import read_shards

    try:
        return read_shards(path, weights_only)
    # A damaged directory can end the reading in any way.
    except Exception as error:
        raise ValueError(cannot_be_loaded(path, error)) from error


def _check_is_unfolded(checkpoint: Mapping[str, Any], name: str | Path) -> None:
    if MANIFEST in checkpoint:
        raise FoldingError(f"{name} is folded already; fold the checkpoint that it was made of.")


class _LongerHook:
    """A hook of one module that does more than its class says; it is copied and pickled along with its module."""

    def __init__(self, own: _Hook) -> None:
        self.own = own
        self.parts = [own]

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        for part in tuple(self.parts):
            part(checkpoint)


def _add_to_hook(pl_module: nn.Module, name: str, added: _Hook, *, first: bool = False) -> _Undo:
    """Make a hook do one thing more; what was added can be taken away in any order."""
    shadowed = vars(pl_module).get(name)
    hook = shadowed if isinstance(shadowed, _LongerHook) else _LongerHook(getattr(pl_module, name))
    hook.parts.insert(0 if first else len(hook.parts), added)
    setattr(pl_module, name, hook)

    def undo() -> None:
        hook.parts.remove(added)
        if hook.parts == [hook.own]:
            delattr(pl_module, name)
            if hook.own != getattr(pl_module, name):
                # The module had one of its own, which its class does not know.
                setattr(pl_module, name, hook.own)

    return undo


def _add_manifest(plan: FoldingPlan, checkpoint: dict[str, Any]) -> None:
    if MANIFEST in checkpoint:
        # The module had been folded before: the one plan goes on where the other ended.
        before = FoldingPlan.from_dict(checkpoint[MANIFEST])
        plan = FoldingPlan((*before.folds, *plan.folds), plan.kept)
    checkpoint[MANIFEST] = plan.to_dict()
    checkpoint["state_dict"][SIGNPOST] = torch.zeros(0)


class UnfaithfulError(FoldingError):
    """A module writes checkpoints from which another one is loaded.

    Args:
        message: What is wrong, in a sentence.
        left_out: Names of the layers that took a BatchNorm and are not in the checkpoint, such as a frozen teacher.
    """

    def __init__(self, message: str, left_out: Collection[str] = ()) -> None:
        super().__init__(message)
        self.left_out = frozenset(left_out)


def _objection_to(
    checkpoint: Mapping[str, Any], pl_module: LightningModule, plan: FoldingPlan
) -> UnfaithfulError | None:
    """What is in the way of loading each folded layer from a checkpoint as it is; None if nothing is."""
    loads_itself = any(_is_overridden(pl_module, name) for name in ("on_load_checkpoint", "load_state_dict"))
    holds_all = _first_loss(pl_module, plan, checkpoint["state_dict"]) is None
    if holds_all and not loads_itself:
        return None
    # Perhaps the module writes under other names, and knows them when it loads.
    try:
        copied = eval_copy(pl_module, (), _trainer_of(pl_module))
    except FoldingError:
        return None  # Nobody can tell.
    for _, tensor in _folded_tensors(copied, plan):
        tensor.fill_(torch.nan)
    try:
        loaded = copy.deepcopy(dict(checkpoint))
        _take_structure_early(copied, loaded)
        copied.on_load_checkpoint(loaded)
        _take_structure(copied, loaded)
        copied.load_state_dict(loaded["state_dict"], strict=copied.strict_loading)
    except Exception as error:
        if holds_all:  # It may want something that only a real load has, such as a Trainer.
            return None
        return UnfaithfulError(f"its folded.ckpt could not be loaded again: {named(error)}")
    lost = _first_loss(pl_module, plan, dict(_folded_tensors(copied, plan)))
    if lost is None:
        return None
    return UnfaithfulError(
        f"its folded.ckpt would not hold `{lost}` as it is folded, for the module's `state_dict` or "
        "`on_save_checkpoint` leaves it out or changes it",
        {name.rpartition(".")[0] for name, tensor in _folded_tensors(copied, plan) if tensor.isnan().all()},
    )


def _is_overridden(pl_module: LightningModule, name: str) -> bool:
    """Whether a class of somebody else's, or the module itself, has a method of its own in place of Lightning's."""
    owners = [base.__module__.partition(".")[0] for base in type(pl_module).__mro__ if name in vars(base)]
    return name in vars(pl_module) or not {"lightning", "pytorch_lightning", "torch", "lit_bnfold"}.issuperset(owners)


def _first_loss(pl_module: nn.Module, plan: FoldingPlan, state: Mapping[str, Any]) -> str | None:
    """The name of the first tensor that a state lacks or has otherwise, or has of a BatchNorm that is gone."""
    gone = tuple(f"{fold.batchnorm}." for fold in plan.folds)
    whole = {name for name, _ in pl_module.named_parameters(remove_duplicate=False)}
    whole |= {name for name, _ in pl_module.named_buffers(remove_duplicate=False)}
    for name in state:
        if name.startswith(gone) and name not in whole and not name.endswith("._extra_state"):
            return name
    for name, tensor in _folded_tensors(pl_module, plan):
        saved = state.get(name)
        if not isinstance(saved, torch.Tensor) or (saved.shape, saved.dtype) != (tensor.shape, tensor.dtype):
            return name
        if not torch.allclose(saved.to(tensor.device), tensor, rtol=0.0, atol=0.0, equal_nan=True):
            return name
    return None


def _folded_tensors(module: nn.Module, plan: FoldingPlan) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights and biases of the layers that took a BatchNorm, by name."""
    modules = dict(module.named_modules())
    for layer in dict.fromkeys(layer for fold in plan.folds for layer in fold.layers):
        for key in ("weight", "bias"):
            tensor = modules[layer]._parameters.get(key)
            if tensor is not None:
                yield f"{layer}.{key}", tensor.detach()


def _take_structure_early(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Fold before the module's own hook, which may load weights itself; unless that builds what is to be folded."""
    _check_to_be_taken(module, checkpoint)
    if MANIFEST in checkpoint:
        with suppress(FoldingError):
            _fold_what_is_left(FoldingPlan.from_dict(checkpoint[MANIFEST]), module)


def _check_to_be_taken(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Refuse to train from a folded checkpoint, or to take a damaged one, and take its signpost away."""
    if MANIFEST not in checkpoint:
        return
    if _is_being_fitted(module):
        raise FoldingError(
            "Training cannot go on from a folded checkpoint: its BatchNorms are gone. Go on from the checkpoint that "
            "was folded."
        )
    path = _being_loaded(module)
    is_taken = checkpoint["state_dict"].pop(SIGNPOST, None) is None
    if path is not None and not is_taken:
        check_is_undamaged(path)


def _take_structure(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    _check_to_be_taken(module, checkpoint)
    if MANIFEST not in checkpoint:
        return
    path = _being_loaded(module)
    with nullcontext() if path is None else naming_the_checkpoint(path):
        _fold_what_is_left(FoldingPlan.from_dict(checkpoint[MANIFEST]), module)
        _check_dtypes(module, checkpoint["state_dict"])


def _fold_what_is_left(plan: FoldingPlan, module: nn.Module) -> None:
    """Fold a module by a plan, of which a part may be folded, and the rest built anew by its own hook."""
    modules = dict(module.named_modules())
    gone = (nn.Identity, Zero, Rest)
    left = tuple(fold for fold in plan.folds if not isinstance(modules.get(fold.batchnorm), gone))
    if left:
        fold_structure(FoldingPlan(left), module)
        _remember(plan, module)


def _being_loaded(module: Any) -> Path | None:
    """The file that the Trainer of a module is loading; None if it is no file, or there is no Trainer."""
    path = getattr(_trainer_of(module), "ckpt_path", None)
    return Path(path) if path is not None and Path(path).is_file() else None


def _check_dtypes(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Make sure that no weight would be made of integers, and nothing cut to some: torch converts without a word."""
    parameters = {name for name, _ in module.named_parameters()}
    for name, own in module.state_dict().items():
        saved = state.get(name)
        # Extra state may be anything.
        if not (isinstance(own, torch.Tensor) and isinstance(saved, torch.Tensor)):
            continue
        # What a module counts with, or fits by itself, may begin as something else than what it became.
        is_held = torch.can_cast(saved.dtype, own.dtype) and name not in parameters
        if _kind(own) != _kind(saved) and not is_held:
            raise FoldingError(
                f"The checkpoint has `{name}` in {saved.dtype}, and the module has it in {own.dtype}; fold the "
                "checkpoint that it was made of again."
            )


def _kind(tensor: torch.Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()


def _is_being_fitted(module: Any) -> bool:
    trainer = _trainer_of(module)
    return trainer is not None and bool(trainer.state.fn == "fit")


def _trainer_of(module: Any) -> Trainer | None:
    with suppress(RuntimeError):  # A module without a Trainer raises when it is asked for it.
        trainer: Trainer = module.trainer
        return trainer
    return None
