"""``lit-bnfold fold``: fold a checkpoint of anyone's module.

Nothing is known of the module but its class. That is named on the command line or in the ``config.yaml`` of a project's
own LightningCLI, or it stands in the checkpoint. Its arguments are those of the checkpoint, then those of the
configuration, then those of the command line. So the parser is made anew for each command, from the classes at hand.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import reprlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.parsing import AttributeDict

from lit_bnfold.callbacks import BatchNormFolding
from lit_bnfold.checkpoint import read_unfolded
from lit_bnfold.folding.graph import one_line
from lit_bnfold.names.data import NamesDataModule
from lit_bnfold.names.model import BatchNormMLP
from lit_bnfold.parser import (
    ShortHelpFormatter,
    arrange_help,
    first_line,
    options_of,
    read_config,
    sentence,
    use_threads,
)
from lit_bnfold.reading import is_misfit

SUMMARY = "Fold the BatchNorms of a checkpoint, with the same proof and the same files as at the end of ``fit``."

_DESCRIPTION = f"""{SUMMARY}
For a module of your own: --model some.module.Class [--model.ARGUMENT VALUE ...], and --data some.module.DataClass
[--data.ARGUMENT VALUE ...] unless the module has a val_dataloader. The classes are imported as from a script in the
current directory; what the command line does not say of their arguments is taken from --config, then from the
checkpoint."""

# Besides the classes and the seed. Everything else in a configuration is about training: optimizers, callbacks,
# loggers, how many devices.
_CONFIGURED = {"folding": None, "trainer": {"precision"}}

# What makes no sense here: one checkpoint has one set of weights, `--output` is where the files go, and there is no
# training to write anything else.
_NOT_OFFERED = {
    "folding": {"weights", "replace", "dirpath"},
    "trainer": {"logger", "callbacks", "enable_checkpointing"},
}


@dataclass(frozen=True)
class _Description:
    """What a configuration says of the module or the data: a class, its arguments, or both."""

    class_path: str | None = None
    init_args: Mapping[str, Any] = field(default_factory=dict)
    # Arguments that no signature shows, only a `**kwargs`.
    dict_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Config:
    """What counts of a configuration."""

    file: str = ""
    descriptions: Mapping[str, _Description] = field(default_factory=dict)
    others: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Part:
    """The module or the data: its class, and what is known of its arguments before the command line is read."""

    key: str
    of_class: type[Any]
    saved: Mapping[str, Any] = field(default_factory=dict)
    # If the hyperparameters of the checkpoint make up one argument, its name.
    saved_as: str | None = None
    configured: _Description = _Description()

    @property
    def path(self) -> str:
        return f"{self.of_class.__module__}.{self.of_class.__qualname__}"

    @property
    def lightning(self) -> Any:
        """The package that its class builds on, which may be the older ``pytorch_lightning``."""
        return _lightning(self.of_class)


def fold(args: Sequence[str]) -> None:
    """Run ``lit-bnfold fold``.

    Args:
        args: The arguments behind ``fold``.

    Raises:
        FoldingError: If the checkpoint is folded already, or the folded module does not do what the original does.
        OSError: If a file cannot be read or written.
        ValueError: If an argument, a class or the checkpoint is not what it has to be.
    """
    if any(argument.partition("=")[0] == "--folding.dirpath" for argument in args):
        raise ValueError("Expected `--output`, which says for this command what `--folding.dirpath` says for `fit`.")
    options: list[str] = []
    try:
        early, rest = _early_parser().parse_known_args(args)
        if early.ckpt_path == "last":
            early.ckpt_path = str(find_last_checkpoint(Path(early.root)))
        with _modules_of_the_current_directory():
            checkpoint = {} if early.ckpt_path is None else read_unfolded(early.ckpt_path, early.weights_only)
            config = _Config() if early.config is None else _read_sections(early.config)
            parts = _find_parts(early, checkpoint, config)
            parser = _parser(parts)
            options = options_of(parser)
            given = parser.parse_args(rest, _parse_config(parser, config, parts), defaults=False)
            if early.ckpt_path is None:
                raise ValueError("Expected `--ckpt_path`, the checkpoint to fold.")
            _fold(early, parts, given, parser.instantiate_classes(given))
    except (ArgumentError, argparse.ArgumentError) as error:
        raise ValueError(sentence(str(error), options)) from error


def find_last_checkpoint(root: Path) -> Path:
    """The newest ``last.ckpt`` of the trainings in a directory.

    Args:
        root: The Trainer's ``default_root_dir``.

    Raises:
        FileNotFoundError: If there is none.
    """
    # Without a logger there is no `lightning_logs`.
    paths = [*root.glob("lightning_logs/*/checkpoints/last.ckpt"), *root.glob("checkpoints/last.ckpt")]
    if not paths:
        raise FileNotFoundError(
            f"Found no lightning_logs/*/checkpoints/last.ckpt in {root.absolute()}: no training has saved anything "
            "there. Begin one without `--ckpt_path`, or pass --ckpt_path FILE."
        )
    return max(paths, key=lambda path: path.stat().st_mtime)


# The command line.


def _early_parser() -> argparse.ArgumentParser:
    """Reads what has to be known before the other arguments can be understood."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    _add_own_arguments(parser, _true_or_false)
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--trainer.default_root_dir", dest="root", default=".")
    return parser


def _add_own_arguments(parser: argparse.ArgumentParser, boolean: Callable[[str], bool]) -> None:
    parser.add_argument(
        "--ckpt_path",
        help="The checkpoint: a file, the directory that FSDP or ModelParallel wrote, or `last` for the last one here. "
        "It has to be given.",
    )
    parser.add_argument("--output", help="Directory for the files; by default the one that the checkpoint is in.")
    parser.add_argument(
        "-c",
        "--config",
        help="The config.yaml that a LightningCLI saved. Of it count `model`, `data`, `folding`, `seed_everything` and "
        "`trainer.precision`; all else is about training.",
    )
    parser.add_argument(
        "--weights_only",
        type=boolean,
        default=True,
        help="`false` to read a checkpoint that holds more than tensors and plain values; it can run any code.",
    )


def _true_or_false(value: str) -> bool:
    if value not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {value!r}")
    return value == "true"


def _parser(parts: Sequence[_Part]) -> LightningArgumentParser:
    """Reads all other arguments; as ``fit`` does, with the classes at hand."""
    parser = LightningArgumentParser(
        prog="lit-bnfold fold",
        description=_DESCRIPTION,
        exit_on_error=False,
        formatter_class=ShortHelpFormatter,
    )
    _add_own_arguments(parser, bool)
    parser.add_argument("--seed_everything", type=int, default=42, help="Seed of all random numbers.")
    parser.add_argument("--num_threads", type=int, help="CPU threads of torch. By default as many as torch takes.")
    classes = {part.key: part.of_class for part in parts} | {"folding": BatchNormFolding, "trainer": Trainer}
    for key, of_class in classes.items():
        parser.add_class_arguments(
            of_class, key, fail_untyped=False, instantiate=False, sub_configs=True, skip=_NOT_OFFERED.get(key)
        )
    # What is required may be in the checkpoint.
    for action in parser._actions:
        action.required = False
    arrange_help(parser)
    return parser


def _parse_config(parser: LightningArgumentParser, config: _Config, parts: Sequence[_Part]) -> Namespace:
    options = {part.key: dict(part.configured.init_args) for part in parts} | dict(config.others)
    try:
        return parser.parse_object(options, defaults=False)
    except ArgumentError as error:
        raise ValueError(f"{config.file}: {sentence(str(error), options_of(parser))}") from error


# The configuration.


def _read_sections(file: str) -> _Config:
    config = read_config(Path(file))
    descriptions = {key: _description(config.get(key), f"{file}, {key}") for key in ("model", "data")}
    others: dict[str, Any] = {}
    for key, names in _CONFIGURED.items():
        section = _options(config.get(key), f"{file}, {key}")
        counts = [name for name in section if name in (names or section) and name not in _NOT_OFFERED[key]]
        # A LightningCLI writes down every option, also where nothing was said.
        others[key] = {name: section[name] for name in counts if section[name] is not None}
    seed = config.get("seed_everything")
    # To a LightningCLI, `true` is a random seed and `false` none.
    if seed is not None and not isinstance(seed, bool):
        others["seed_everything"] = seed
    return _Config(file, descriptions, others)


def _description(section: Any, place: str) -> _Description:
    if isinstance(section, str):
        return _Description(section)
    options = _options(section, place)
    if "class_path" not in options:
        return _Description(init_args=options)
    path = options["class_path"]
    if not isinstance(path, str):
        raise ValueError(f"{place}.class_path: {_no_class(path)}")
    arguments = [_options(options.get(key), f"{place}.{key}") for key in ("init_args", "dict_kwargs")]
    return _Description(path, *arguments)


def _options(section: Any, place: str) -> dict[str, Any]:
    if section is None:
        return {}
    if not isinstance(section, dict) or not all(isinstance(name, str) for name in section):
        raise ValueError(
            f"{place}: expected names of options with their values, got {reprlib.repr(section)}; write each as "
            "`name: value`, or leave them out."
        )
    return section


# The classes.


@contextmanager
def _modules_of_the_current_directory() -> Iterator[None]:
    """Import as ``python script.py`` and ``python -m`` do; an installed command does not by itself."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _find_parts(early: argparse.Namespace, checkpoint: Mapping[str, Any], config: _Config) -> tuple[_Part, ...]:
    model = _find_part("model", early.model, LightningModule, BatchNormMLP, checkpoint, config)
    assert model is not None
    own_data = NamesDataModule if issubclass(model.of_class, BatchNormMLP) else None
    data = _find_part("data", early.data, LightningDataModule, own_data, checkpoint, config)
    return (model,) if data is None else (model, data)


def _find_part(
    key: str,
    path: str | None,
    base: Any,
    default: type[Any] | None,
    checkpoint: Mapping[str, Any],
    config: _Config,
) -> _Part | None:
    configured = config.descriptions.get(key, _Description())
    in_config = configured.class_path
    saved = checkpoint.get(base.CHECKPOINT_HYPER_PARAMS_KEY, {})
    in_checkpoint = saved.get("_class_path")
    if path is not None and in_config is not None and _name(path) != _name(in_config):
        raise ValueError(f"--{key}: expected the class of the configuration, {in_config}, got {path}.")
    places = {f"--{key}": path, f"{config.file}, {key}": in_config, f"the checkpoint's {key}": in_checkpoint}
    named = [(place, name) for place, name in places.items() if name is not None]
    of_class = _find_class(key, *named[0], base.__name__) if named else default
    if of_class is None:
        return None
    if key == "data" and in_checkpoint is not None and _name(in_checkpoint) != of_class.__name__:
        saved = {}  # Other data to validate on.
    return _Part(
        key,
        of_class,
        saved,
        checkpoint.get(base.CHECKPOINT_HYPER_PARAMS_NAME),
        configured,
    )


def _name(path: str) -> str:
    return path.rpartition(".")[2]


def _find_class(key: str, place: str, path: str, base: str) -> type[Any]:
    module_name, _, name = path.rpartition(".")
    # To Python, a path with an empty part is one that begins at some package.
    if not module_name or not all(path.split(".")):
        raise ValueError(f"{place}: {_no_class(path)}")
    if module_name == "__main__":
        raise ValueError(f"{place}: {path} is in the script that trained it; name it as --{key} script.{name}.")
    try:
        found = getattr(importlib.import_module(module_name), name, None)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{place}: {path} cannot be imported from {Path.cwd()}: {one_line(error)}.") from error
    if found is None:
        raise ValueError(f"{place}: the module {module_name} has no class {name}.")
    if (
        not isinstance(found, type)
        or _lightning(found) is None
        or base not in {each.__name__ for each in found.__mro__}
    ):
        raise ValueError(f"{place}: expected a {base}, but {path} is not one.")
    return found


def _no_class(found: Any) -> str:
    return f"expected a class as some.module.Class, got {reprlib.repr(found)}; write its module and its name."


def _lightning(of_class: type[Any]) -> Any:
    for name in ("lightning.pytorch", "pytorch_lightning"):
        package = sys.modules.get(name)
        if package is not None and issubclass(of_class, (package.LightningModule, package.LightningDataModule)):
            return package
    return None


# The fold.


def _fold(early: argparse.Namespace, parts: Sequence[_Part], given: Namespace, made: Namespace) -> None:
    seed_everything(given.get("seed_everything", 42), workers=True, verbose=False)
    if "num_threads" in given:
        use_threads(given.num_threads)
    folding = BatchNormFolding(**_as_dict(made, "folding"), dirpath=early.output)
    model, *data = [_build(part, _as_dict(given, part.key), _as_dict(made, part.key)) for part in parts]
    base = parts[0].lightning
    if not data and type(model).val_dataloader is base.LightningModule.val_dataloader:
        raise ValueError(
            f"{parts[0].path} has no val_dataloader: name what it was validated on, --data some.module.Class."
        )
    arguments = {"devices": 1, "enable_model_summary": False} | _as_dict(made, "trainer")
    if torch.backends.mps.is_available():  # Nothing is folded there.
        arguments.setdefault("accelerator", "cpu")
    trainer = base.Trainer(logger=False, enable_checkpointing=False, default_root_dir=early.root, **arguments)
    try:
        folding.fold_checkpoint(trainer, model, early.ckpt_path, data[0] if data else None, early.weights_only)
    except RuntimeError as error:
        if not is_misfit(error):
            raise
        raise ValueError(
            f"{early.ckpt_path} is no checkpoint of {parts[0].path}, whose weights are others "
            f"({_first_difference(str(error))}); name its class: --model some.module.Class."
        ) from error


def _first_difference(message: str) -> str:
    # Behind the title, a line of torch's message is about one key or a list of them in quotes.
    line = message.split("\n")[1].strip().rstrip(".")
    return line if '", "' not in line else line.split('", "')[0] + '"'


def _as_dict(namespace: Namespace, key: str) -> dict[str, Any]:
    branch = namespace.get(key)
    return {} if branch is None else vars(branch)


def _build(part: _Part, given: Mapping[str, Any], made: Mapping[str, Any]) -> Any:
    """Make the module or the data, with the rules of ``load_from_checkpoint`` for what is in the checkpoint.

    Args:
        part: What to make.
        given: The arguments of the command line and the configuration, as they were given.
        made: The same, with the objects that they describe.
    """
    parameters = inspect.signature(part.of_class).parameters.values()
    names = {each.name for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)}
    takes_others = any(each.kind == each.VAR_KEYWORD for each in parameters)
    own = {name: value for name, value in part.saved.items() if name not in ("_instantiator", "_class_path")}
    if part.saved_as in names:
        saved = {part.saved_as: AttributeDict(part.saved) if type(part.saved) is dict else part.saved}
    else:
        saved = {name: value for name, value in own.items() if takes_others or name in names}
    arguments = {**saved, **part.configured.dict_kwargs, **made}
    missing = [each.name for each in parameters if each.name in names - arguments.keys() and each.default is each.empty]
    if missing:
        flags = ", ".join(f"--{part.key}.{name}" for name in missing)
        raise ValueError(f"{part.path} needs what is neither in the checkpoint nor given: {flags}.")
    try:
        if "_instantiator" not in part.saved:
            return part.of_class(**arguments)
        return _build_as_configured(part, {**saved, **part.configured.dict_kwargs, **given}, own)
    except (ArgumentError, TypeError, ValueError) as error:
        raise ValueError(f"{part.path} cannot be made: {one_line(error)}") from error
    except (ArithmeticError, MemoryError, RuntimeError) as error:
        # Of a layer that no memory holds, torch tells a long story behind the first line.
        raise ValueError(f"{part.path} cannot be made: {first_line(error)}") from error


def _build_as_configured(part: _Part, arguments: Mapping[str, Any], own: Mapping[str, Any]) -> Any:
    """Make what a LightningCLI made, whose hyperparameters may describe objects, and let it keep them as they were."""
    class_path = {"_class_path": part.path} if "_class_path" in part.saved else {}
    made_by = {"_instantiator": part.saved["_instantiator"], **class_path}
    config = {key: value.as_dict() if isinstance(value, Namespace) else value for key, value in arguments.items()}
    instantiate = importlib.import_module(f"{part.lightning.__name__}.cli").instantiate_module
    with warnings.catch_warnings():
        # The objects among the hyperparameters are replaced by their descriptions below.
        warnings.filterwarnings("ignore", message="Attribute .* is an instance of `nn.Module`")
        built = instantiate(part.of_class, config | class_path)
    built.hparams.update({name: config.get(name, value) for name, value in own.items()} | made_by)
    return built
