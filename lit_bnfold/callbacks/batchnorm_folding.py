"""The callback: when training ends, fold, validate both versions, compare, and write what was proven."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lit_bnfold.callbacks.advice import how_to_fold
from lit_bnfold.callbacks.best_weights import Best, best_of, best_score, best_weights
from lit_bnfold.callbacks.export import FILES, ExampleCall, Export, check_extras, export_files, first_call, reason_of
from lit_bnfold.callbacks.html_report import write_html
from lit_bnfold.callbacks.inference import Inference, measure_inference, runnable_copy
from lit_bnfold.callbacks.proof import GraphWitness, LayerWitness, Witness, output_error
from lit_bnfold.callbacks.reestimation import Reestimation
from lit_bnfold.callbacks.report import Report, make_report, print_report, scalars, write_report
from lit_bnfold.callbacks.restoring import Restoring
from lit_bnfold.callbacks.stages import Stages
from lit_bnfold.callbacks.tensorboard import show_in_tensorboard, tensorboard_loggers
from lit_bnfold.callbacks.tolerance import default_tolerance, dtype_tolerance
from lit_bnfold.callbacks.validation import (
    ValidationRun,
    experiments_of,
    first_training_batch,
    module_put_back,
    run_trainers_validation,
    run_validation,
    same_random_numbers,
    weights_put_back,
)
from lit_bnfold.checkpoint import (
    SHARDED_STRATEGIES,
    UnfaithfulError,
    one_file,
    progress_of_training,
    save_folded,
    stay_folded,
    take_folded,
    writing_plan,
)
from lit_bnfold.copying import eval_copy
from lit_bnfold.folding import FoldingError, FoldingPlan
from lit_bnfold.folding.graph import Obstacle, named
from lit_bnfold.folding.kinds import KINDS
from lit_bnfold.folding.rewrite import folded_in_place
from lit_bnfold.folding.tensors import address_of
from lit_bnfold.layer_sync import ordinary_batchnorms
from lit_bnfold.writing import whole_file


class _NothingToProveOnError(FoldingError):
    """There is nothing to validate on, and no example of which ``forward`` makes anything either."""


_Validate = Callable[[Sequence[Callback]], ValidationRun | None]


class BatchNormFolding(Callback):
    """Folds the BatchNorms of a trained module into its layers and proves on its own validation that nothing changed.

    When training ends, the module validates as it is and is watched on the first batch of each loader: that gives the
    plan. Then it is folded and validates again. Each folded layer is compared with BatchNorm after the unfolded layer
    on the same inputs, and the outputs of both versions are compared. If they agree, ``folded.ckpt``,
    ``folding.html`` and ``folding.json`` are written. Module and Trainer come out as they went in, unless ``replace``
    is set. Where there is nothing to validate on, or validation calls nothing, one call of ``forward`` has to do: on
    the module's ``example_input_array`` or on what a training batch begins with.

    Both validations run the module's own hooks. Loggers are silent meanwhile, and files that a hook writes over have
    their content back afterwards; new files, and what is appended to one, stay.

    The report also says what folding saves. For that, copies of both versions are run for a moment: a twentieth of the
    time that a validation takes, a little more after a short one, and never more than 2 seconds. A TensorBoardLogger
    gets both graphs, a chart with both versions of each metric, the plan and more, under ``folding``.

    Args:
        weights: Which weights are folded: those of the ``last`` step, or those of the checkpoint callback's ``best``
            model.
        tolerance: Largest error of a layer or an output that counts as agreement, in units of the largest output.
            By default it follows the dtype and the precision: 1e-4 in float32.
        on_mismatch: What happens if the versions do not agree, or there is nothing to compare them on: ``raise`` a
            FoldingError, or ``warn`` and keep the unfolded module. Nothing is written in either case. Where a hook of
            the module cannot run in these validations, its error ends the fit, or is the warning.
        reestimate_batches: From how many training batches the BatchNorm statistics are computed anew before folding:
            the true mean and variance over all of them, by running ``training_step`` without training. With 0 those
            that training left are folded. The module has its own back afterwards, unless ``replace`` is set.
        export: What else is written, any of ``onnx`` (``folded.onnx``) and ``torch_export`` (``folded.pt2``), with a
            batch of any size. Each file is first run and compared with the folded module. One that cannot be made is
            treated as ``on_mismatch`` says, when the others are there.
        dirpath: Where the files go. By default the logger's directory, or else the trainer's ``default_root_dir``.
        replace: Whether the trainer's own module is the folded one afterwards.

    Raises:
        TypeError: If an argument is of another type, such as a string as ``export``.
        ValueError: If an argument is none of its choices.

    Attributes:
        plan: What was folded and what stays, after ``fit``; None before.
        report: What the proof measured, as a plain dict; None before.
        folded_module: The folded module in eval mode, ready for use, or, with ``replace``, the trainer's own, in the
            mode it is in; None before, after a mismatch, and for a module that cannot be copied.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> folding = BatchNormFolding(weights="best")
        >>> trainer = Trainer(callbacks=[folding], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        *,
        weights: Literal["last", "best"] = "last",
        tolerance: float | None = None,
        on_mismatch: Literal["raise", "warn"] = "raise",
        reestimate_batches: int = 0,
        export: Sequence[Export] = (),
        dirpath: str | Path | None = None,
        replace: bool = False,
    ) -> None:
        for name, value, choices in (
            ("weights", weights, ("last", "best")),
            ("on_mismatch", on_mismatch, ("raise", "warn")),
        ):
            if value not in choices:
                raise ValueError(f"{name}: expected one of {choices}, got {value!r}.")
        if isinstance(tolerance, bool) or not isinstance(tolerance, (Real, type(None))):
            raise TypeError(f"tolerance: expected a number or None, got {tolerance!r}.")
        if tolerance is not None and not 0 < tolerance < math.inf:
            raise ValueError(f"tolerance: expected a finite number above 0 or None, got {tolerance!r}.")
        if not isinstance(reestimate_batches, int) or isinstance(reestimate_batches, bool):
            raise TypeError(f"reestimate_batches: expected an int, got {reestimate_batches!r}.")
        if reestimate_batches < 0:
            raise ValueError(f"reestimate_batches: expected a number of batches from 0 on, got {reestimate_batches}.")
        if isinstance(export, str) or not isinstance(export, Sequence):
            expected = (export,) if isinstance(export, str) else ("onnx",)
            raise TypeError(f"export: expected a sequence such as {expected}, got {export!r}.")
        if not isinstance(replace, bool):
            raise TypeError(f"replace: expected a bool, got {replace!r}.")
        for kind in export:
            if kind not in tuple(FILES):
                raise ValueError(f"export: expected any of {tuple(FILES)}, got {kind!r}.")
        self.weights = weights
        self.tolerance = tolerance
        self.on_mismatch = on_mismatch
        self.reestimate_batches = reestimate_batches
        self.export = tuple(dict.fromkeys(export))
        self.dirpath = dirpath
        self.replace = replace
        self.plan: FoldingPlan | None = None
        self.report: Report | None = None
        self.folded_module: LightningModule | None = None
        self._progress: dict[str, Any] = {}
        self._stages = Stages()
        # The best checkpoint that there was when training began.
        self._found_best = Best("", None)
        # The checkpoint that training went on from.
        self._resumed: str | Path | None = None
        self._load_as_before: Callable[[], None] | None = None
        self._has_tried = False
        self._has_written = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, and go to the end of the line: what the other callbacks do comes first.

        Raises:
            FoldingError: If the strategy shards the module.
            ModuleNotFoundError: If an export needs what is not installed.
            NotADirectoryError: If ``dirpath`` is a file.
            ValueError: If ``dirpath``, or else the logger's directory, is not on this machine.
        """
        self._end_taking_folded()
        # The checkpoint that this run begins from, if it is folded, is loaded next.
        self._load_as_before = take_folded(pl_module)
        if stage != "fit":
            return
        check_extras(self.export)
        self.plan = self.report = self.folded_module = self._resumed = None
        self._has_tried = False
        self._check_dirpath()
        strategy = type(trainer.strategy).__name__
        if strategy in SHARDED_STRATEGIES:
            raise FoldingError(
                f"BatchNormFolding needs whole weights on every device, and {strategy} shards them: train without it, "
                "and fold a checkpoint afterwards with `lit-bnfold fold --ckpt_path CHECKPOINT --model "
                f"some.module.Class`, which takes {SHARDED_STRATEGIES[strategy]}."
            )
        self._directory(trainer)
        others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [*others, self]  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say if there is nothing to fold or to prove it on, now that the module has built whatever it builds late."""
        self._end_taking_folded()
        self._resumed = trainer.ckpt_path
        self._found_best = best_of(trainer)
        if not _names_of_batchnorms(pl_module):
            rank_zero_warn(f"BatchNormFolding has nothing to fold: {type(pl_module).__name__} has no BatchNorm.")
        elif trainer.strategy.root_device.type == "mps":
            rank_zero_warn(
                "BatchNormFolding will fold nothing on an Apple GPU, which has no float64: fold a checkpoint later, "
                "with `lit-bnfold fold`."
            )
        elif not trainer.enable_validation and pl_module.example_input_array is None:
            rank_zero_info(
                "BatchNormFolding will find nothing to validate on, and will try `forward` on what a training batch "
                "begins with. If that is not what it takes, set `example_input_array`, or give a validation loader."
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fold and prove.

        Raises:
            FoldingError: If the versions do not agree or there is nothing to compare them on, or an export fails, and
                ``on_mismatch`` is ``raise``.
        """
        self._has_tried = True
        directory = self._directory(trainer)

        def validate(callbacks: Sequence[Callback]) -> ValidationRun | None:
            return run_validation(trainer, pl_module, callbacks, epoch)

        with (
            self._failures_as_agreed(trainer, is_folded=False),
            self._stages.shown(trainer),
            self._chosen_weights(trainer, pl_module) as (weights, epoch),
            self._as_in_the_first_process(trainer, pl_module),
            self._reestimated(trainer, pl_module, validate) as reestimated,
            ordinary_batchnorms(pl_module),
        ):
            best = None if weights == "last" else best_score(trainer)
            self._fold(trainer, pl_module, validate, directory, weights, reestimated, best)
        with self._failures_as_agreed(trainer, is_folded=True):
            self._log(trainer)
            self._tell_failed_exports()

    @contextmanager
    def _failures_as_agreed(
        self, trainer: Trainer, *, is_folded: bool, unless: Callable[[], bool] = lambda: False
    ) -> Iterator[None]:
        """Raise or warn, as for a mismatch, where something fails, such as a hook that cannot validate once more."""
        try:
            yield
        except Exception as error:
            if unless():
                raise
            # Of several processes this may be the only one that fails, and the others wait for it.
            if self.on_mismatch == "raise" or trainer.world_size > 1:
                if not isinstance(error, FoldingError):
                    rank_zero_info(
                        "This error came where BatchNormFolding validates the module by itself, while other callbacks "
                        "and loggers are silent. With `on_mismatch='warn'` it goes on without folding."
                    )
                raise
            self._stages.clear()
            if not is_folded:
                self.plan = self.report = self.folded_module = None
            written = "Its folded.ckpt is written" if self._has_written else "Nothing was written"
            rank_zero_warn(f"BatchNormFolding did not come to its end: {reason_of(error)}. {written}.")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module as it was."""
        self._end_taking_folded()

    def _end_taking_folded(self) -> None:
        if self._load_as_before is not None:
            self._load_as_before()
        self._load_as_before = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say how to fold what an interrupted training has left."""
        self._end_taking_folded()
        if trainer.state.fn == "fit" and self.plan is None and not isinstance(exception, _NothingToProveOnError):
            rank_zero_info(f"Nothing was folded. {how_to_fold(trainer, pl_module, self.weights, self._resumed)}")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say why nothing was folded, if training ended before it began: then there is no end of training either."""
        if not self._has_tried:
            rank_zero_warn(
                "BatchNormFolding folded nothing: there was no step left to train, as with `max_epochs=0`, "
                "`limit_train_batches=0` or a finished training that is resumed. "
                f"{how_to_fold(trainer, pl_module, self.weights, self._resumed, has_ended=True)}"
            )

    def fold_checkpoint(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        ckpt_path: str | Path,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Fold a checkpoint that exists, with the same proof and the same files as at the end of a training.

        Args:
            trainer: A Trainer that is doing nothing else.
            pl_module: A module of the class that was trained; it gets the checkpoint's weights.
            ckpt_path: The checkpoint: a file, or the directory that FSDP or ModelParallel wrote. The files go beside it
                unless ``dirpath`` is set.
            datamodule: Where the validation data comes from, if not from the module.
            weights_only: Whether to read nothing but tensors and plain values of the checkpoint. Only False allows
                more, and reading it can then run any code.

        Raises:
            FoldingError: If the checkpoint is folded already; if the versions do not agree or there is nothing to
                compare them on, or an export fails, and ``on_mismatch`` is ``raise``.
            ModuleNotFoundError: If an export needs what is not installed.
            NotADirectoryError: If ``dirpath`` is a file.
            ValueError: If the checkpoint is damaged, or holds more than ``weights_only`` allows.

        Example:
            >>> from lit_bnfold import BatchNormMLP, NamesDataModule
            >>> def fold(path: str) -> None:
            ...     trainer, module, data = Trainer(logger=False), BatchNormMLP(), NamesDataModule()
            ...     BatchNormFolding(dirpath="folded").fold_checkpoint(trainer, module, path, data)
        """
        check_extras(self.export)
        self._check_dirpath()
        self.plan = self.report = self.folded_module = None
        directory = _local(self.dirpath or Path(ckpt_path).parent)
        is_loaded = False

        def validate(callbacks: Sequence[Callback]) -> ValidationRun:
            nonlocal is_loaded
            if trainer.progress_bar_callback is not None:
                self._stages.clear()  # Its bar says what is done.
            run = partial(run_trainers_validation, trainer, pl_module, [*callbacks, Restoring()], datamodule=datamodule)
            if is_loaded:  # The weights stay in the module for the second run, be they folded then.
                with weights_put_back(pl_module):
                    return run()
            careful = weights_only is not False
            with one_file(ckpt_path, careful) as path, progress_of_training(pl_module) as self._progress:
                first = run(ckpt_path=path, weights_only=careful)
            is_loaded = True
            return first

        try:
            with (
                # Until then, it is the checkpoint or the validation as such that fails.
                self._failures_as_agreed(trainer, is_folded=False, unless=lambda: not is_loaded),
                self._stages.shown(trainer),
                self._reestimated(trainer, pl_module, validate) as reestimated,
            ):
                self._fold(trainer, pl_module, validate, directory, f"checkpoint {ckpt_path}", reestimated)
        finally:
            self._progress = {}
        self._tell_failed_exports()

    def _directory(self, trainer: Trainer) -> Path:
        return _local(self.dirpath or _directory_of_run(trainer))

    def _check_dirpath(self) -> None:
        if self.dirpath is not None and _local(self.dirpath).is_file():
            raise NotADirectoryError(f"dirpath: expected a directory, found a file at {self.dirpath}.")

    @contextmanager
    def _reestimated(
        self, trainer: Trainer, pl_module: LightningModule, validate: _Validate
    ) -> Iterator[dict[str, Any] | None]:
        """Put re-estimated statistics into the module for a while, if that is asked for, and say what they are."""
        if self.reestimate_batches == 0:
            yield None
            return
        reestimation = Reestimation(pl_module, self.reestimate_batches)
        self._stages.begin(f"re-estimating statistics from {self.reestimate_batches} training batches")
        before = validate([reestimation])
        if reestimation.moments is None:
            # There is nothing to validate on, so nobody has asked it to measure.
            reestimation.measure(trainer, pl_module)
        with reestimation.applied(pl_module, keep=lambda: self.folded_module is pl_module):
            yield reestimation.to_dict() | {"before": before.metrics if before else {}}

    def _fold(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        validate: _Validate,
        directory: Path,
        weights: str,
        reestimated: dict[str, Any] | None,
        best: tuple[str, float] | None = None,
        *,
        lends: bool = True,
        unsaved: frozenset[str] = frozenset(),
    ) -> None:
        """The order of events: validate and watch, plan, fold, validate again, compare, write.

        A BatchNorm stays if it is one of the ``unsaved`` ones, whose layers the module leaves out of its checkpoints.
        """
        # A checkpoint that this training went on from may have brought the report of an earlier one.
        self.report, self._has_written = None, False
        try:
            original, before = self._watch_original(trainer, pl_module, validate, lends=lends)
        except _NothingToProveOnError as error:
            if not _names_of_batchnorms(pl_module):
                return  # As was said when training began.
            if self.on_mismatch == "raise":
                raise
            rank_zero_warn(f"{error} Nothing was folded.")
            return
        self._stages.begin("trying out what can be folded")
        plan = _in_all_processes(trainer, original.plan(), pl_module)
        plan = plan.keeping(*_not_saved(), _names_of_batchnorms(pl_module), unsaved)
        folded = LayerWitness(pl_module, plan, self.tolerance)
        trained = {address_of(parameter) for parameter in pl_module.parameters()}
        self._stages.begin(f"validating with {len(plan.folds)} of {len(plan.folds) + len(plan.kept)} folded")
        unfolded, start = runnable_copy(pl_module, trainer), time.perf_counter()
        with folded_in_place(plan, pl_module):
            with folded, first_call(pl_module) as calls, writing_plan(pl_module, plan):
                after = validate([] if original.is_of_an_example else [folded])
                seconds = time.perf_counter() - start
                if original.is_of_an_example:
                    self._run_example(trainer, pl_module, folded)
            self.report = make_report(
                plan,
                [folded.error_of(fold) for fold in plan.folds],
                (before, after),
                output_error(plan, original, folded),
                weights,
                self.tolerance or default_tolerance(trainer, pl_module),
                objection=folded.objection(),
                reestimated=reestimated,
                best=best,
            )
            self.report["mismatch"] = _in_any_process(trainer, self.report["mismatch"])
            left_out: Collection[str] = ()
            if self.report["mismatch"] is None:
                measure = partial(measure_inference, trainer, unfolded, validation_seconds=seconds)
                # The module's hooks are called for that, and copies may share functions that write into the module.
                with same_random_numbers(trainer.global_rank), module_put_back(trainer, pl_module):
                    left_out = self._write(trainer, pl_module, plan, directory, calls, trained, measure)
        again = partial(self._fold, trainer, pl_module, validate, directory, weights, reestimated, best)
        if left_out:
            more = {fold.batchnorm for fold in plan.folds if not set(fold.layers).isdisjoint(left_out)}
            again(lends=lends, unsaved=unsaved | more)
            return
        if self.report["mismatch"] is not None and original.has_lent:
            # Perhaps a layer does something else if it has a bias, and had one in the first validation alone.
            again(lends=False, unsaved=unsaved)
            return
        if self.report["mismatch"] is None and trainer.state.fn == "fit":
            if tensorboard_loggers(trainer):
                self._stages.begin("drawing both versions for TensorBoard")
            show_in_tensorboard(trainer, self.report, plan, unfolded, original.first_batch, folded.first_batch)
        self.plan = plan
        self._conclude(trainer, pl_module, directory)

    def _watch_original(
        self, trainer: Trainer, pl_module: LightningModule, validate: _Validate, *, lends: bool
    ) -> tuple[GraphWitness, ValidationRun | None]:
        self._stages.begin("validating the original")
        with GraphWitness(pl_module, lends=lends) as original, GraphWitness(pl_module, lends=lends) as of_example:
            try:
                before = validate([original])
                if original.calls or (original.batches and pl_module.example_input_array is None):
                    return original, before
                return self._watch_example(trainer, pl_module, original, of_example), before
            except Exception:
                if not (original.has_lent or of_example.has_lent):
                    raise
        # Perhaps a layer has refused the bias that it was lent.
        return self._watch_original(trainer, pl_module, validate, lends=False)

    def _watch_example(
        self, trainer: Trainer, pl_module: LightningModule, original: GraphWitness, of_example: GraphWitness
    ) -> GraphWitness:
        """Watch an example where validation has called nothing; the witness of what there is to see."""
        try:
            self._run_example(trainer, pl_module, of_example)
        except _NothingToProveOnError:
            if not original.batches:
                raise
            return original
        self._stages.clear()
        why = "Validation calls nothing" if original.batches else "There is nothing to validate on"
        rank_zero_info(f"{why}: the folded module is proven on one example alone.")
        return of_example

    def _run_example(self, trainer: Trainer, pl_module: LightningModule, witness: Witness) -> None:
        """Where validation shows nothing: one call of ``forward``, and the agreement of its outputs alone."""
        example, source = pl_module.example_input_array, "its `example_input_array`"
        if example is None:
            source = "a training batch"
            # Both versions get the same batch, and training's random numbers stay as they were.
            try:
                batch = first_training_batch(trainer, pl_module)
            except FoldingError as error:
                raise _NothingToProveOnError(f"There is nothing to validate on: {error}") from error
            example = batch[0] if isinstance(batch, (list, tuple)) else batch
        call = ExampleCall.of(example)
        witness.is_of_an_example = True
        witness.note((call.args, call.kwargs))
        flags = {module: module.training for module in pl_module.modules()}
        pl_module.eval()
        try:
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                witness.watch()
                pl_module(*call.args, **call.kwargs)
        except Exception as error:
            set_it = "Set" if pl_module.example_input_array is None else "Set another"
            self._stages.clear()
            raise _NothingToProveOnError(
                f"There is nothing to validate on, and `forward` does not run on {source}: {named(error)}. {set_it} "
                "`example_input_array`, or give a validation loader."
            ) from error
        finally:
            for module, flag in flags.items():
                module.training = flag

    def _write(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        plan: FoldingPlan,
        directory: Path,
        calls: Sequence[ExampleCall],
        trained: Collection[int | None],
        measure: Callable[[LightningModule | None, Sequence[ExampleCall]], Inference],
    ) -> Collection[str]:
        """Write the files while the module is folded, and keep a copy of it.

        Returns:
            Names of folded layers that would be missing in the checkpoint, which is not written then.
        """
        assert self.report is not None
        folded = _copy(pl_module, trained)
        # A `fast_dev_run` leaves no files, and must not replace those of a real one.
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            report, page = directory / "folding.json", directory / "folding.html"
            # The report comes last and goes first: where it lies, it tells of the files beside it.
            outdated = [report, page, *(directory / name for name in FILES.values())]
            self._stages.begin("writing folded.ckpt")
            try:
                save_folded(trainer, pl_module, plan, directory / "folded.ckpt", self._progress, outdated)
            except UnfaithfulError as error:
                self.report["mismatch"] = str(error)
                return error.left_out
            self._has_written = True
            with _calls_seen(pl_module) as seen:
                self._export_and_measure(trainer, pl_module, folded, calls, directory, measure)
            if seen:
                rank_zero_warn(
                    "A copy of the module calls the module itself, as where a function that it keeps holds on to that. "
                    "BatchNormFolding has no folded_module; load_folded makes one of the file."
                )
                folded, self.report["inference"] = None, measure(None, calls)
            with whole_file(page, trainer) as part:
                if trainer.is_global_zero:
                    write_html(self.report, part)
            with whole_file(report, trainer) as part:
                if trainer.is_global_zero:
                    write_report(self.report, part)
        self.folded_module = folded
        return ()

    def _export_and_measure(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        folded: LightningModule | None,
        calls: Sequence[ExampleCall],
        directory: Path,
        measure: Callable[[LightningModule | None, Sequence[ExampleCall]], Inference],
    ) -> None:
        """Add to the report what running the copies gives."""
        assert self.report is not None
        tolerance = self.tolerance or dtype_tolerance(pl_module)
        self.report["exports"] = export_files(
            self.export, trainer, folded, calls, directory, tolerance, self._stages.begin
        )
        self._stages.begin("measuring how fast both versions are")
        self.report["inference"] = measure(folded, calls)

    def _tell_failed_exports(self) -> None:
        """Raise or warn, as for a mismatch, when everything else is done."""
        exports = {} if self.report is None else self.report["exports"]
        failures = [f"{FILES[kind]}: {result['failure']}" for kind, result in exports.items() if "failure" in result]
        if failures:
            message = f"Exporting the folded module failed, {'; '.join(failures)}. Its folded.ckpt is written."
            if self.on_mismatch == "raise":
                raise FoldingError(message)
            rank_zero_warn(message)

    def _conclude(self, trainer: Trainer, pl_module: LightningModule, directory: Path) -> None:
        assert self.report is not None
        assert self.plan is not None
        self._stages.clear()
        if self.report["mismatch"] is not None:
            message = f"The folded module does not do what the original does: {self.report['mismatch']}."
            if self.on_mismatch == "raise":
                raise FoldingError(message)
            rank_zero_warn(f"{message} The unfolded module stands; nothing was written.")
        elif self.replace:
            self.plan.apply(pl_module, inplace=True)
            stay_folded(pl_module, self.plan)
            self.folded_module = pl_module
        if self.report["moved"] and self.report["mismatch"] is None:
            moved = ", ".join(self.report["moved"])
            rank_zero_warn(
                f"Folding moved {moved} by more than rounding explains; look at the report before you use it."
            )
        score = self.report["best_score"]
        if score is not None and not score["agrees"]:
            rank_zero_warn(
                f"The best weights validate with a {score['monitor']} of {score['validated']:.6g}; the checkpoint "
                f"callback noted {score['noted']:.6g} for them. Unless this validation draws random numbers or reads "
                "other data each time, the checkpoint does not hold the weights that were validated."
            )
        if trainer.is_global_zero:
            print_report(self.report)
        if self.report["mismatch"] is None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            exported = [FILES[kind] for kind, result in self.report["exports"].items() if "failure" not in result]
            names = ", ".join(["folded.ckpt", *exported])
            rank_zero_info(f"Wrote {names}, folding.html and folding.json to {directory.absolute()}")

    def _log(self, trainer: Trainer) -> None:
        if self.report is None:
            return
        numbers = scalars(self.report)
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=trainer.global_step)
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in numbers.items()})

    @contextmanager
    def _chosen_weights(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[tuple[str, int | None]]:
        """Put the weights to be folded into the module for a while; which they are, in words, and of which epoch."""
        best = best_of(trainer)
        if self.weights == "last" or not best.path:
            if self.weights == "best":
                rank_zero_warn("BatchNormFolding found no best checkpoint; it folds the last weights.")
            # The current epoch is the next by now.
            yield "last", max(0, trainer.current_epoch - 1)
            return
        with best_weights(
            trainer, pl_module, best, self._found_best, unless=lambda: self.folded_module is pl_module
        ) as epoch:
            yield f"best: {best.path}", epoch

    @contextmanager
    def _as_in_the_first_process(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
        """Give every process the statistics of the first, whose checkpoint is written, and validate without a wrapper.

        A wrapper such as DDP's would turn each step into a call of the module itself, of which nobody sees the inside.
        """
        strategy = trainer.strategy
        buffers = dict(pl_module.named_buffers()) if trainer.world_size > 1 else {}
        wrapped, own = strategy.model, {name: buffer.clone() for name, buffer in buffers.items()}
        first = strategy.broadcast({name: buffer.cpu() for name, buffer in own.items()})
        try:
            strategy.model = pl_module
            _copy_numbers(first, buffers)
            yield
        finally:
            strategy.model = wrapped
            if self.folded_module is not pl_module:
                _copy_numbers(own, buffers)

    @property
    def state_key(self) -> str:
        """What tells the states of two of these callbacks apart, one for the last and one for the best weights."""
        return "BatchNormFolding" if self.weights == "last" else f"BatchNormFolding(weights={self.weights!r})"

    def state_dict(self) -> dict[str, Any]:
        """The report, so that checkpoints of a folded run hold it."""
        return self.report or {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the report of an earlier run."""
        self.report = state_dict or None


def _names_of_batchnorms(pl_module: LightningModule) -> list[str]:
    return [name for name, module in pl_module.named_modules() if KINDS.batchnorm(module)]


def _not_saved() -> Obstacle:
    return "not-saved", "the module leaves its layer out of its checkpoints, and would load it unfolded"


def _directory_of_run(trainer: Trainer) -> str:
    """Where the first logger writes; of one that does not tell, where checkpoints of its run would go."""
    logger = trainer.logger
    own = getattr(logger, "log_dir", None)
    if logger is None or own is not None or logger.save_dir is None:
        return str(trainer.strategy.broadcast(own) or trainer.log_dir or trainer.default_root_dir)
    # All processes have to agree on it, and the version may hold the time.
    version = trainer.strategy.broadcast(logger.version)
    parts = [str(logger.name), version if isinstance(version, str) else f"version_{version}"]
    return str(Path(logger.save_dir, *parts))


def _local(directory: str | Path) -> Path:
    """A directory of this machine, which may be given as a URL."""
    path = str(directory).removeprefix("file://")
    if "://" in path:
        raise ValueError(
            f"BatchNormFolding writes to a directory of this machine, got {directory}; give one as `dirpath`, and copy "
            "the files from there."
        )
    return Path(path)


def _copy_numbers(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(source[name])


def _copy(pl_module: LightningModule, trained: Collection[int | None]) -> LightningModule | None:
    """A copy in eval mode, without the Trainer; None for a module that cannot be copied, such as one with a lock.

    It takes over what the fold made, which the module itself is about to drop, and copies what was ``trained``.
    """
    made = (parameter for parameter in pl_module.parameters() if address_of(parameter) not in trained)
    try:
        return eval_copy(pl_module, made, pl_module.trainer, experiments_of(pl_module.trainer.loggers))
    except FoldingError as error:
        rank_zero_warn(f"{error} BatchNormFolding has no folded_module; load_folded makes one of the file.")
        return None


@contextmanager
def _calls_seen(pl_module: LightningModule) -> Iterator[list[nn.Module]]:
    """The modules that are called in here."""
    seen: list[nn.Module] = []
    with ExitStack() as hooks:
        for module in pl_module.modules():
            if not isinstance(module, torch.jit.ScriptModule):
                hooks.callback(module.register_forward_pre_hook(lambda module, _: seen.append(module)).remove)
        yield seen


def _in_all_processes(trainer: Trainer, plan: FoldingPlan, pl_module: LightningModule) -> FoldingPlan:
    """The plan of the first process, if the others have seen nothing on their data that speaks against it."""
    plans = [trainer.strategy.broadcast(plan, src=rank) for rank in range(trainer.world_size)]
    if all(other.folds == plans[0].folds for other in plans):
        return plans[0]
    order = _names_of_batchnorms(pl_module)
    return plans[0].keeping("other-call", "the processes of this fit take different paths through the model", order)


def _in_any_process(trainer: Trainer, mismatch: str | None) -> str | None:
    """What the first process says that has something to say, so that all of them write or none does."""
    said = (trainer.strategy.broadcast(mismatch, src=rank) for rank in range(trainer.world_size))
    return next((sentence for sentence in said if sentence is not None), None)
