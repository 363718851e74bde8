"""The command line: ``lit-bnfold fit | validate | test | predict | fold``."""

from __future__ import annotations

import errno
import inspect
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, LearningRateMonitor, ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_bnfold import __version__
from lit_bnfold.callbacks import BatchNormFolding, HistogramMonitor, UpdateRatioMonitor
from lit_bnfold.callbacks.best_checkpoint import BestCheckpoint
from lit_bnfold.callbacks.last_checkpoint import LastCheckpoint
from lit_bnfold.callbacks.monitor import OnWrittenSteps, skip_idle_hooks
from lit_bnfold.callbacks.restoring import Restoring
from lit_bnfold.callbacks.speed import SpeedMonitor
from lit_bnfold.checkpoint import MANIFEST
from lit_bnfold.fold_command import SUMMARY, find_last_checkpoint, fold
from lit_bnfold.folding import FoldingError
from lit_bnfold.folding.graph import one_line
from lit_bnfold.names.callbacks import CharacterEmbedding, SampledNames
from lit_bnfold.names.data import NamesDataModule
from lit_bnfold.names.model import BatchNormMLP
from lit_bnfold.names.sampling import Sampling
from lit_bnfold.parser import OneSentenceParser, arrange_help, first_line, read_config, use_threads
from lit_bnfold.reading import is_misfit, read_checkpoint
from lit_bnfold.writing import WholeCheckpointIO, whole_file

# Drawing the bar costs as much as a training step of the small network.
_BAR_REFRESH_STEPS = 200

# As many steps are written as TensorBoard draws of a curve; all monitors together cost some 3 percent of the training.
_TRAINER_DEFAULTS = {
    "accelerator": "cpu",  # A GPU is no faster with a network this small, and one of Apple's cannot compute the fold.
    "max_steps": 200_000,
    "val_check_interval": 5_000,
    "check_val_every_n_epoch": None,
    "log_every_n_steps": 200,
}
_UPDATE_RATIO_STEPS = 1_000

_MONITORS = (LearningRateMonitor, UpdateRatioMonitor, HistogramMonitor, SpeedMonitor)

_DESCRIPTION = "Train with BatchNorm, ship without it: a small network that makes up names, or any checkpoint of yours."

_EVALUATED = "Checkpoint, folded or not: a file, or `last` for the newest last.ckpt of the trainings here."

# For each subcommand what it does, and what its checkpoint is for.
_SUBCOMMANDS = {
    "fit": (
        "Train, fold the BatchNorms, and prove that both versions agree.",
        "Checkpoint to go on from: a file, or `last` for the newest last.ckpt of the trainings here. By default a new "
        "training begins.",
    ),
    "validate": (
        "Measure a checkpoint, folded or not, on the validation words.",
        f"{_EVALUATED} By default the network is measured before any training.",
    ),
    "test": (
        "Measure a checkpoint, folded or not, on the test words.",
        f"{_EVALUATED} By default the network is measured before any training.",
    ),
    "predict": ("Make up names with a checkpoint, folded or not.", f"{_EVALUATED} It has to be given."),
}

_HELP = {
    "seed_everything": "Seed of all random numbers; `true` for a random one, `false` for none.",
    "weights_only": "`false` to read a checkpoint at a URL that holds more than tensors and plain values; it can run "
    "any code. A file must not hold more. By default `true`.",
}

# Without a training they would warn that the directory of its checkpoints is another one.
_TRAINING_CALLBACKS = (Checkpoint, *_MONITORS)


class _ListingParser(OneSentenceParser):
    """Keeps the list of subcommands, so that ``fold`` can be in it."""

    def add_subcommands(self, *args: Any, **kwargs: Any) -> Any:
        self.listed = super().add_subcommands(*args, **kwargs)
        return self.listed


class NamesCLI(LightningCLI):
    """The names example with everything a user has by default: folding, checkpoints, monitors and a progress bar."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = kwargs.get("args")
        self._needed = _subcommands_needed(sys.argv[1:] if given is None else given)
        super().__init__(*args, **kwargs)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The subcommands whose options are needed, each with the arguments that the command line does not ask for."""
        offered = LightningCLI.subcommands()
        offered["predict"].add("return_predictions")
        return {name: offered[name] for name in self._needed}

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        """Make the parser, and list the other subcommands too: ``fold`` has a parser for each class."""
        super().setup_parser(*args, **kwargs)
        assert isinstance(self.parser, _ListingParser)
        for choice in self.parser.listed._choices_actions:
            choice.help = _SUBCOMMANDS[choice.dest][0]
        for name, parser in self.parser.listed.choices.items():
            parser.description = _SUBCOMMANDS[name][0]
            arrange_help(parser, first="names" if name == "predict" else None)
            own = {**_HELP, "ckpt_path": _SUBCOMMANDS[name][1]}
            for action in parser._actions:
                action.help = own.get(action.dest, action.help)
        for name, (summary, _) in _SUBCOMMANDS.items():
            if name not in self._needed:
                self.parser.listed.add_subcommand(name, LightningArgumentParser(), help=summary)
        self.parser.listed.add_subcommand("fold", LightningArgumentParser(), help=SUMMARY)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callbacks, and take from the data what the network has to know of it."""
        parser.add_argument(
            "--num_threads",
            type=int,
            default=1,
            help="CPU threads of torch; one is the fastest for a small network. Two runs with one seed and as many "
            "threads end with the same bits; another number of threads rounds sums in another order.",
        )
        parser.add_lightning_class_args(BatchNormFolding, "folding")
        parser.add_lightning_class_args(BestCheckpoint, "checkpoint")
        parser.add_lightning_class_args(LastCheckpoint, "last_checkpoint")
        parser.add_lightning_class_args(LearningRateMonitor, "learning_rate")
        parser.add_lightning_class_args(SpeedMonitor, "speed")
        parser.add_lightning_class_args(UpdateRatioMonitor, "update_ratio")
        parser.add_lightning_class_args(HistogramMonitor, "histograms")
        parser.add_class_arguments(Sampling, "names")
        parser.set_defaults(
            {
                "checkpoint.monitor": "val/loss",
                "checkpoint.filename": "best",
                "checkpoint.enable_version_counter": False,
                "update_ratio.every_n_steps": _UPDATE_RATIO_STEPS,
            }
        )
        parser.link_arguments("data.block_size", "model.block_size")
        parser.link_arguments("data.vocab_size", "model.vocab_size", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and take from a checkpoint the data that it was trained on, as Lightning takes the network.

        ``--ckpt_path last`` is found here too: Lightning looks for it in the directory of the run that is about to
        begin, where there is none yet.
        """
        given = list(sys.argv[1:] if args is None else args)
        configurations = [read_config(file) for file in _configurations(given)]
        super().parse_arguments(parser, args)
        if self.config.subcommand == "fold":
            raise ValueError("Expected `fold` before its arguments: lit-bnfold fold --ckpt_path FILE.")
        config = self.config[self.config.subcommand]
        path = config.ckpt_path
        if path == "last":
            path = str(find_last_checkpoint(Path(config.trainer.default_root_dir or ".")))
        is_on_disk = path is not None and "://" not in path
        if self.config.subcommand == "fit" and is_on_disk and not Path(path).exists():
            # Lightning would find that out when the files of the run are there.
            raise FileNotFoundError(f"Expected a checkpoint at {path}, found nothing.")
        if path is None and self.config.subcommand == "predict":
            raise ValueError("Expected a checkpoint to sample names from; pass --ckpt_path FILE, or --ckpt_path last.")
        if path is not None and Path(path).is_file():
            checkpoint = read_checkpoint(Path(path), weights_only=True)
            _require_names_example(path, checkpoint)
            explicit = _arguments_of_the_network(given, configurations) & vars(config.model).keys()
            _tell_overridden(path, checkpoint.get("hyper_parameters", {}), {k: config.model[k] for k in explicit})
            # Before everything else on the command line, so that what is said there or in a configuration counts.
            place = given.index(self.config.subcommand) + 1
            self.config = parser.parse_args([*given[:place], *_data_arguments(path, checkpoint), *given[place:]])
        self.config[self.config.subcommand].ckpt_path = path
        # Lightning's default allows any code in a checkpoint that it loads from the net.
        self.config[self.config.subcommand].weights_only = config.weights_only is not False

    def before_instantiate_classes(self) -> None:
        """Set the number of threads before anything computes."""
        use_threads(self.config[self.subcommand].num_threads)

    def instantiate_classes(self) -> None:
        """Make everything, and say in one sentence what is wrong with an argument."""
        try:
            super().instantiate_classes()
        except (ArithmeticError, MemoryError, OSError, RuntimeError, TypeError, ValueError) as error:
            # Of a layer that no memory holds, torch tells a long story behind the first line.
            _leave(first_line(error))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer, with a progress bar that is drawn now and then."""
        config = self.config_init[self.subcommand].trainer
        callbacks = config.callbacks if isinstance(config.callbacks, list) else [config.callbacks]
        callbacks = [each for each in callbacks if each is not None]
        if self.subcommand == "predict":
            kwargs["enable_progress_bar"] = bool(config.enable_progress_bar)
            if config.devices == "auto":
                # A few names are not worth a second process.
                kwargs["devices"] = 1
        elif config.enable_progress_bar is not False and not any(isinstance(each, ProgressBar) for each in callbacks):
            callbacks.append(TQDMProgressBar(refresh_rate=_BAR_REFRESH_STEPS))
        if self.subcommand in ("fit", "predict"):
            callbacks += [SampledNames(self.config_init[self.subcommand].names), CharacterEmbedding()]
        kwargs["callbacks"] = [*callbacks, Restoring()]
        if self.subcommand != "fit" and config.logger is None:
            # There would be nothing in its directory.
            kwargs["logger"] = False
        has_checkpoints = config.enable_checkpointing is not False
        if not has_checkpoints:
            kwargs["enable_checkpointing"] = True  # Else Lightning refuses the callbacks, which are taken out below.
        trainer = super().instantiate_trainer(**kwargs)
        is_written = trainer.loggers and not trainer.fast_dev_run  # type: ignore[attr-defined]
        unwanted: tuple[type[Callback], ...] = () if is_written else _MONITORS
        unwanted += () if has_checkpoints else (Checkpoint,)
        if self.subcommand != "fit":
            unwanted = _TRAINING_CALLBACKS
        callbacks = [each for each in trainer.callbacks if not isinstance(each, unwanted)]  # type: ignore[attr-defined]
        for callback in callbacks:
            skip_idle_hooks(callback)
        callbacks += [OnWrittenSteps(each) for each in callbacks if isinstance(each, LearningRateMonitor)]
        trainer.callbacks = callbacks  # type: ignore[attr-defined]
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpointIO()
        return trainer


class SaveFitConfig(SaveConfigCallback):
    """Writes ``config.yaml`` beside what a training wrote; the other commands leave no file of their own."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write it, when training begins."""
        if stage != "fit" or self.already_saved:
            return
        # Lightning writes to the file under its own name, where half of it would be read as all of it.
        with whole_file(Path(trainer.log_dir or trainer.default_root_dir) / self.config_filename, trainer) as part:
            if trainer.is_global_zero:
                part.write_text(self.parser.dump(self.config, skip_none=False), encoding="utf-8")
        self.already_saved = True

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Name the directory of a file that could not be written, if the system does not name the file."""
        if isinstance(exception, OSError) and exception.errno is not None and exception.filename is None:
            exception.filename = str(Path(trainer.log_dir or trainer.default_root_dir).absolute())


def main(args: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: The arguments; by default those of the process.
    """
    _silence_noise()
    given = sys.argv[1:] if args is None else args
    if given == ["--version"]:
        print(f"lit-bnfold {__version__}")
        return
    try:
        if given[:1] == ["fold"]:
            fold(given[1:])
            return
        with _warnings_only() if given[:1] == ["predict"] else nullcontext():
            NamesCLI(
                BatchNormMLP,
                NamesDataModule,
                save_config_callback=SaveFitConfig,
                save_config_kwargs={"overwrite": True},
                parser_class=_ListingParser,
                trainer_defaults=_TRAINER_DEFAULTS,
                seed_everything_default=42,
                parser_kwargs={"prog": "lit-bnfold", "description": _DESCRIPTION},
                args=args,
            )
    except SIGTERMException:
        # As it is, it would end the process with the code of a success.
        sys.stderr.write("lit-bnfold: stopped by SIGTERM.\n")
        sys.exit(128 + signal.SIGTERM)
    except BrokenPipeError:
        # Whoever reads what is printed has enough; Python would complain once more when it closes the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (FoldingError, MisconfigurationException, ModuleNotFoundError, OSError, ValueError) as error:
        _leave(error)
    except RuntimeError as error:
        if not is_misfit(error):
            raise
        _leave(error)


def _subcommands_needed(args: Sequence[str]) -> Collection[str]:
    """Those whose options it takes to read a command line; to find the options of all takes a tenth of the start."""
    if args and args[0] in ("-h", "--help"):
        return ()
    return args[:1] if args and args[0] in _SUBCOMMANDS else _SUBCOMMANDS


def _configurations(args: list[str]) -> list[Path]:
    """The files that are given as ``--config``."""
    values = [value for flag, value in pairwise(args) if flag in ("-c", "--config")]
    values += [argument.partition("=")[2] for argument in args if argument.startswith("--config=")]
    return [path for path in map(Path, values) if path.is_file()]


def _require_names_example(path: str, checkpoint: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of other classes here, where nobody has typed what would be wrong with an option."""
    for what, of_class, saved in (
        ("model", BatchNormMLP, checkpoint.get("hyper_parameters", {})),
        ("data", NamesDataModule, checkpoint.get("datamodule_hyper_parameters", {})),
    ):
        known, class_path = inspect.signature(of_class).parameters, saved.get("_class_path")
        others = [name for name in saved if name not in known and not name.startswith("_")]
        found = f"one of another {what} class, with {', '.join(others)}" if others else None
        # Lightning hands on the arguments of a class with a path in a way that a command with one class does not take.
        if class_path is not None and (what == "model" or class_path.rpartition(".")[2] != of_class.__name__):
            found = f"one of a LightningCLI with the {what} class {class_path}"
        if found is not None:
            fold_it = f"lit-bnfold fold --ckpt_path {path} --model some.module.Class --data some.module.DataClass"
            remedy = (
                "it is folded, and `load_folded` loads it" if MANIFEST in checkpoint else f"to fold it: `{fold_it}`"
            )
            raise ValueError(f"{path}: expected a checkpoint that `lit-bnfold fit` wrote, got {found}; {remedy}.")


def _data_arguments(path: str, checkpoint: Mapping[str, Any]) -> list[str]:
    """The arguments of the data that a checkpoint was trained on."""
    saved = checkpoint.get("datamodule_hyper_parameters", {})
    arguments = {name: value for name, value in saved.items() if not name.startswith("_")}
    try:
        NamesDataModule(**arguments)
        return [
            f"--data.{name}={value if isinstance(value, str) else json.dumps(value)}"
            for name, value in arguments.items()
        ]
    # A tensor, for one, is no argument, and its truth may be ambiguous.
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}, `datamodule_hyper_parameters`: {one_line(error)}.") from error


def _arguments_of_the_network(args: Sequence[str], configurations: Sequence[Mapping[str, Any]]) -> set[str]:
    """Names of those that are given, be it in a configuration."""
    sections = [config.get("model") for config in configurations]
    names = {name for section in sections if isinstance(section, dict) for name in section}
    flags = (argument.partition("=")[0] for argument in args if argument.startswith("--model."))
    return names | {flag.removeprefix("--model.") for flag in flags}


def _tell_overridden(path: str, saved: Mapping[str, Any], explicit: Mapping[str, Any]) -> None:
    """Say which arguments of the network are left out: Lightning takes those that the checkpoint was trained with."""
    for name, value in explicit.items():
        if name in saved and saved[name] != value:
            rank_zero_warn(f"{path} was trained with model.{name}={saved[name]}, which counts; {value} is left out.")


def _silence_noise() -> None:
    """Keep from the terminal what does not concern its reader: advertisements, and torch's word to Lightning."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
    # The commands that only read a checkpoint go without the callbacks of the training that wrote it.
    warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`, callbacks used to create")
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip: For seamless" not in record.getMessage()


@contextmanager
def _warnings_only() -> Iterator[None]:
    """Keep from the terminal what Lightning does step by step."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "Make room for it"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "Allow it"),
}


def _leave(error: Exception | str) -> NoReturn:
    told: BaseException | str | None = error
    # Closing the files of a training can fail for the same reason, and with fewer words.
    while isinstance(told, OSError) and told.filename is None and told.__context__ is not None:
        told = told.__context__
    told = told if isinstance(told, OSError) and told.filename is not None else error
    if isinstance(told, OSError) and isinstance(told.filename, bytes):
        # TensorBoard opens its files so.
        told = OSError(told.errno, told.strerror, os.fsdecode(told.filename))
    remedy = _REMEDIES.get(told.errno or 0) if isinstance(told, OSError) else None
    sys.exit(f"lit-bnfold: {told}" + (f". {remedy}, or choose another place." if remedy else ""))
