"""The parser of the command line: its help fits a terminal, and it says in one sentence what is wrong."""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Iterable
from difflib import get_close_matches
from math import inf
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml  # type: ignore[import-untyped]
from jsonargparse import DefaultHelpFormatter
from lightning.pytorch.cli import LightningArgumentParser

from lit_bnfold.folding.graph import one_line

# What no configuration has, and what takes forever to write out: a few lines of aliases stand for any number of values.
_MOST_VALUES, _MOST_LEVELS = 100_000, 50

# More than any machine has; what torch does with a number that has more than 31 bits is its own affair.
_MOST_THREADS = 65_536
# The titles of the groups whose options begin so; they stand in this order behind ours, which have their own.
_TITLES = {
    "ckpt_path": "The checkpoint",
    "checkpoint": "The best checkpoint (Lightning's ModelCheckpoint)",
    "learning_rate": "The curve of the learning rate (Lightning's LearningRateMonitor)",
    "optimizer": "Another optimizer than the network's own (torch.optim)",
    "lr_scheduler": "Another schedule of the learning rate (torch.optim.lr_scheduler)",
    "trainer": "Everything else about the run (Lightning's Trainer)",
}


class ShortHelpFormatter(DefaultHelpFormatter):
    """Explains every option and repeats none of them in the usage; writes defaults as the command line takes them."""

    def start_section(self, heading: str | None) -> None:
        """Begin a group of options, under a title that may be longer than a line."""
        super().start_section(heading and textwrap.fill(_plain(heading), self._width))

    def _format_usage(self, usage: str | None, actions: Any, groups: Any, prefix: str | None) -> str:
        actions = list(actions)
        # With a prefix, argparse asks for the name of the command, not for what is printed.
        if prefix is not None or any(isinstance(action, argparse._SubParsersAction) for action in actions):
            return super()._format_usage(usage, actions, groups, prefix)
        return f"usage: {without_options(self._prog)} [-c CONFIG] [--OPTION VALUE ...]\n\n"

    def _format_text(self, text: str) -> str:
        return super()._format_text(_plain(text))

    def _expand_help(self, action: argparse.Action) -> str:
        default = action.default
        try:
            if isinstance(default, (bool, list, tuple)) or default == "":
                action.default = json.dumps(default, ensure_ascii=False, default=str)
            return _plain(super()._expand_help(action))
        finally:
            action.default = default


def _plain(text: str) -> str:
    """A docstring's text without what only a documentation tool needs."""
    return text.replace("``", "`")


class OneSentenceParser(LightningArgumentParser):
    """Takes no abbreviations, and answers a mistake with one sentence instead of the list of all options.

    Args:
        *args: Those of LightningCLI's own parser.
        **kwargs: Likewise.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # An abbreviation of today is an option of its own tomorrow.
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": ShortHelpFormatter, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Leave with a sentence and the code 2.

        Args:
            message: What is wrong, in jsonargparse's words.
            ex: Where it comes from.
        """
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        said = sentence(message, options_of(parser))
        sys.stderr.write(f"lit-bnfold: {said}\n`{without_options(parser.prog)} --help` explains every option.\n")
        self.exit(2)


def arrange_help(parser: LightningArgumentParser, first: str | None = None) -> None:
    """Put the options that are ours before Lightning's, and these under titles that say what they are.

    Args:
        parser: A parser that has all its options.
        first: What the options of the group begin with that stands before all others.
    """
    order = {"": 0, first: -1} | {key: place for place, key in enumerate(_TITLES, start=1)}

    def key_of(group: Any) -> str:
        """What the options of a group begin with, if it has a place of its own."""
        keys = {action.dest.partition(".")[0] for action in group._group_actions}
        return next((key for key in keys if key in order), "")

    # The first two of argparse hold what is in no group, such as --help.
    ungrouped, groups = list(parser._action_groups[:2]), parser._action_groups[2:]
    for group in groups:
        group.title = _TITLES.get(key_of(group), group.title)
    parser._action_groups = ungrouped + sorted(groups, key=lambda group: order[key_of(group)])


def without_options(prog: str) -> str:
    """The name of a command, without the options that may stand before its subcommand."""
    return prog.replace(" [options]", "")


def options_of(parser: argparse.ArgumentParser) -> list[str]:
    """The long options that a parser takes."""
    return [option for option in parser._option_string_actions if option.startswith("--")]


def read_config(path: Path) -> dict[str, Any]:
    """Read a configuration.

    Args:
        path: A YAML file.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"Expected a configuration at {path}, found no file.")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        too_large = _size(config, {}) > _MOST_VALUES
    # Numbers and dates that are none are ValueErrors, as are bytes that are no text.
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"Expected YAML in {path}: {one_line(error)}.") from error
    except RecursionError as error:
        raise ValueError(f"Expected a configuration in {path}, which is two or three levels deep, got more.") from error
    if too_large:
        raise ValueError(f"Expected a configuration in {path}, got over {_MOST_VALUES:,} values; look at its aliases.")
    if not isinstance(config, dict):
        raise ValueError(f"Expected a configuration with `model` and `data` in {path}, got {type(config).__name__}.")
    return config


def _size(tree: Any, sizes: dict[int, float], depth: int = 0) -> float:
    """The number of values in a tree when each alias in it is written out; infinity if one is within itself.

    Raises:
        RecursionError: If the tree is deeper than any configuration is; those who take it from here go deeper, too.
    """
    if depth > _MOST_LEVELS:
        raise RecursionError
    if not isinstance(tree, (dict, list)):
        return 1
    if id(tree) not in sizes:
        sizes[id(tree)] = inf
        inner = tree.values() if isinstance(tree, dict) else tree
        sizes[id(tree)] = 1 + sum(_size(each, sizes, depth + 1) for each in inner)
    return sizes[id(tree)]


def use_threads(number: int) -> None:
    """Set the number of CPU threads of torch.

    Args:
        number: The number of threads.

    Raises:
        ValueError: If there cannot be so many.
    """
    if not 0 < number <= _MOST_THREADS:
        raise ValueError(f"num_threads: expected a number from 1 to {_MOST_THREADS}, got {number}.")
    torch.set_num_threads(number)


def sentence(message: str, options: Iterable[str]) -> str:
    """Say in one sentence what jsonargparse says in many lines.

    Args:
        message: A message of jsonargparse.
        options: The options that there are.

    Example:
        >>> sentence("unrecognized arguments: --model.n_hiden 3", ["--model.n_embd", "--model.n_hidden"])
        'There is no option --model.n_hiden; did you mean --model.n_hidden?'
        >>> sentence("argument --model.lr: expected one argument", [])
        '--model.lr: expected one argument.'
        >>> sentence("Group 'model' does not accept option 'n_hiden'", ["--model.n_embd", "--model.n_hidden"])
        'There is no option --model.n_hiden; did you mean --model.n_hidden?'
    """
    unknown = re.search(r"unrecognized arguments: (.*)", message)
    if unknown is not None:
        return _of_unknown(unknown[1].split(), list(options))
    # So it speaks of a key in a configuration.
    unknown = re.search(r"(?:Group '(.*)' )?does not accept option '?(.*?)'?$", message)
    if unknown is not None:
        return _of_unknown(["--" + ".".join(filter(None, unknown.groups()))], list(options))
    message = re.sub(r'^Parser key "(.+?)":', r"--\1:", message)
    message = re.sub(r"^argument (?:subcommand: )?", "", message)
    key = message.split(":")[0]
    lacking = re.search(r"given class_path '(?:.*\.)?(\w+)':\s+the following arguments are required: (.*)", message)
    if lacking is not None:
        return f"{key}: {lacking[1]} needs {', '.join(f'{key}.{name}' for name in lacking[2].split(', '))}."
    nested = re.search(r"Given value: NestedArg\(key='(.*?)', val=(.*)\)", message)
    kinds = nested and re.search(rf"Parser key \"{re.escape(nested[1])}\":[\s\S]*?Subtypes: \[(.*)\]", message)
    if nested and kinds:
        return f"{key}.{nested[1]}: expected {_in_words(kinds[1])}, got {nested[2]}."
    if nested:
        return f"{key}.{nested[1]}: expected {key} before it, the class that takes it."
    union = re.search(r"Subtypes: \[(.*)\]\n[\s\S]*Given value: (.*)", message)
    wrong = union or re.search(r"Expected an? (.*?)\. Got value: (.*)", message)
    if wrong is not None:
        return f"{key}: expected {_in_words(wrong[1])}, got {wrong[2]}."
    return " ".join(message.split()).rstrip(".") + "."


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its class if it says nothing.

    Args:
        error: The error.
    """
    return str(error).partition("\n")[0] or type(error).__name__


def _of_unknown(arguments: list[str], options: list[str]) -> str:
    names = ["--" + argument.partition("=")[0].lstrip("-") for argument in arguments if argument.startswith("-")]
    if not names:
        return f"Nothing is expected at {' '.join(arguments)}; an option begins with --."
    near = _nearest(names[0], options)
    return f"There is no option {names[0]}" + ("." if near is None else f"; did you mean {near}?")


def _nearest(name: str, options: list[str]) -> str | None:
    """The option of nearly that name, be it in another group."""
    close = get_close_matches(name, options, n=1, cutoff=0.8)
    if not close:
        last_parts = {option.rpartition(".")[2].lstrip("-"): option for option in options}
        found = get_close_matches(name.rpartition(".")[2].lstrip("-"), last_parts, n=1, cutoff=0.8)
        close = [last_parts[part] for part in found]
    return next(iter(close), None)


def _in_words(kinds: str) -> str:
    """What types are called on the command line."""
    kinds = re.sub(r"<class '(.+?)'>", r"\1", kinds)
    kinds = re.sub(r"\b(?:\w+\.)+(?=\w)", "", kinds)  # the modules that they are from
    return kinds.replace("NoneType", "null").replace("Literal", "one of ")
