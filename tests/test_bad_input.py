"""Bad input of every kind: it is named in a sentence, and never makes a traceback, an endless run or a wrong model.

Each kind of input has a short form for every day and a long one, `pytest -m long tests/test_bad_input.py`, which
together makes 10,000 cases.
"""

# An error that may be raised, and must say something if it is, is no `pytest.raises`.
# ruff: noqa: PT017

from __future__ import annotations

import copy
import io
import json
import re
import signal
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from torch import Tensor

from lit_bnfold import BatchNormFolding, BatchNormMLP, FoldingError, NamesDataModule, load_folded
from lit_bnfold.checkpoint import MANIFEST, SIGNPOST
from lit_bnfold.cli import NamesCLI, main
from lit_bnfold.folding import Fold, FoldingPlan, Kept, Part
from lit_bnfold.names.data import END
from lit_bnfold.reading import read_checkpoint

EVERYTHING = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false", "--trainer.logger=false"]

# Seconds after which something is taken to run forever.
FOREVER = 60


@contextmanager
def ending() -> Iterator[None]:
    """Fail if something does not end."""

    def stop(*_: Any) -> None:
        raise AssertionError(f"it did not end in {FOREVER} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(FOREVER)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run_cases(test: Callable[[Any], None], cases: st.SearchStrategy[Any], count: int, *examples: Any) -> None:
    """Run a test on so many cases, and before that on those that once went wrong."""
    is_short = count <= 60

    @settings(max_examples=count, derandomize=is_short, **EVERYTHING)
    @given(cases)
    def every(case: Any) -> None:
        with ending(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            test(case)

    for each in examples:
        every = example(each)(every)
    every()


def command(*args: object) -> str | None:
    """Run a command, and return what it says if it refuses to; None if it does what it was asked for."""
    errors = io.StringIO()
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(errors):
            main([*map(str, args)])
    except SystemExit as left:
        said = left.code if isinstance(left.code, str) else errors.getvalue()
        assert left.code not in (0, None)
        assert said.startswith("lit-bnfold: ") or "\nlit-bnfold: " in said, said
        assert "Traceback" not in said
        return said
    return None


# Words files ----------------------------------------------------------------------------------------------------------

ENDS = st.sampled_from(["\n", "\r\n", "\r", "\n\n", "\u2028", "\x85", "\x0b", " \n", "\t\r\n"])
LETTERS = st.sampled_from([*"abcABC .", "\0", "\ufeff", "\u0301", "ß", "李", "🙂", "\x1b", "\xa0", "\u200b"])


@st.composite
def words_files(draw: st.DrawFn) -> bytes:
    """Bytes of any kind, most of them near to words."""
    kind = draw(st.sampled_from(["bytes", "words", "words", "words", "letters", "long", "alphabet", "end", "broken"]))
    if kind == "bytes":
        return draw(st.binary(max_size=80))
    if kind == "long":
        return draw(st.sampled_from([b"a", b"ab\0", "é".encode(), b"."])) * draw(st.sampled_from([1_000, 500_000]))
    if kind == "alphabet":
        first, count = draw(st.integers(0, 0x10FFFF)), draw(st.sampled_from([3, 255, 256, 300, 70_000]))
        codes = range(first, min(first + count, 0x110000))
        return "\n".join(chr(code) for code in codes).encode("utf-8", "surrogatepass")
    if kind == "end":
        return END.encode() * draw(st.integers(1, 5)) + draw(st.sampled_from([b"", b"\n", b"\n..\n"]))
    characters = st.characters() if kind == "letters" else LETTERS
    words = draw(st.lists(st.text(characters, max_size=6), max_size=25))
    text = "".join(word + draw(ENDS) for word in words)
    encoding = draw(st.sampled_from(["utf-8"] * 6 + ["utf-8-sig", "utf-16", "utf-32", "latin-1", "utf-7"]))
    content = text.encode(
        encoding, "surrogatepass" if encoding.startswith("utf-") and "7" not in encoding else "ignore"
    )
    if kind == "broken" and content:
        place = draw(st.integers(0, len(content) - 1))
        content = content[:place] + draw(st.binary(max_size=3)) + content[place + draw(st.integers(0, 2)) :]
    return content


def lines_of(content: bytes) -> list[str]:
    """The words of a good file, read in another way than the package reads them."""
    text = content.decode("utf-8").removeprefix("\ufeff")
    lines = [line.strip(" \t") for line in re.split("\r\n|\r|\n", text)]
    while lines and not lines[-1]:
        lines.pop()
    return lines


@pytest.mark.parametrize("count", [60, pytest.param(4_080, marks=pytest.mark.long)])
def test_any_words_file_is_read_as_it_is_or_refused_with_its_line(count: int, tmp_path: Path) -> None:
    path = tmp_path / "words.txt"

    def case(content: bytes) -> None:
        path.write_bytes(content)
        data = NamesDataModule(str(path), block_size=1 + len(content) % 4)
        try:
            data.prepare_data()
            data.setup("predict")
        except ValueError as error:
            assert re.match(rf"{re.escape(str(path))}, line \d+: .*; (save|write|remove) [^\n]*\.$", str(error)), error
            return
        words = lines_of(content)
        assert data.stoi == {each: index for index, each in enumerate([END, *sorted(set("".join(words)))])}
        try:
            data.setup()
        except ValueError as error:
            assert str(error).startswith(f"{path}: expected words for every split, got {len(words)} word")
            return
        itos, spelled = data.itos, list[str]()
        for examples in data.splits.values():
            contexts, targets = examples[:]
            assert contexts.shape == (len(targets), data.block_size)
            spelled += "".join(itos[index] for index in targets.tolist()).removesuffix(END).split(END)
        assert sorted(spelled) == sorted(words)

    run_cases(case, words_files(), count, b"", b"\xef\xbb\xbf", b"a\n\xed\xa0\x80\n", b"..", b"\0\n" * 30)


@pytest.mark.parametrize("count", [1, pytest.param(70, marks=pytest.mark.long)])
def test_any_words_file_is_trained_on_or_refused(count: int, tmp_path: Path) -> None:
    path = tmp_path / "words.txt"

    def case(content: bytes) -> None:
        if len(set(content)) > 100:
            return  # A network for so many letters takes long to train, and is no other case.
        path.write_bytes(content)
        arguments = ["--model.n_hidden", "[4]", "--trainer.fast_dev_run", "true", *QUIET]
        said = command("fit", "--data.words", path, "--trainer.default_root_dir", tmp_path, *arguments)
        assert said is None or "words.txt" in said

    run_cases(case, words_files(), count, b"\0\n" * 30)


@pytest.mark.parametrize("count", [1, pytest.param(80, marks=pytest.mark.long)])
def test_any_words_file_is_predicted_with_or_refused(count: int, saved: Any, tmp_path: Path) -> None:
    path = tmp_path / "words.txt"

    def case(content: bytes) -> None:
        path.write_bytes(content)
        said = command("predict", "--ckpt_path", saved.folded, "--data.words", path, "--names.number", 3, *QUIET)
        if said is None:
            assert set("".join(lines_of(content))) == set("".join(lines_of(saved.words.read_bytes())))
        else:
            assert "words" in said

    run_cases(case, words_files(), count, saved.words.read_bytes(), b"\xff")


# Configurations -------------------------------------------------------------------------------------------------------

SECTIONS = {
    "model": ["lr", "n_embd", "n_hidden", "milestones", "gamma", "block_size", "vocab_size"],
    "data": ["words", "block_size", "batch_size", "seed", "fractions", "eval_batch_size"],
    "trainer": [
        *("max_steps", "max_epochs", "limit_val_batches", "precision", "val_check_interval", "accelerator", "devices"),
        *("callbacks", "logger", "gradient_clip_val", "accumulate_grad_batches", "plugins", "strategy", "profiler"),
    ],
    "folding": ["weights", "tolerance", "on_mismatch", "reestimate_batches", "export", "dirpath", "replace"],
    "names": ["number", "temperature", "seed", "prefix", "min_length", "max_length"],
    "checkpoint": ["monitor", "filename", "save_top_k", "mode"],
    "update_ratio": ["every_n_steps"],
    "last_checkpoint": ["every_n_train_steps"],
    "optimizer": ["lr"],
}
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 40),
    # What takes no memory, or more than there is anywhere.
    st.sampled_from([2**31, 2**63, -(2**63), 10**30, 10**400]),
    st.floats(),
    st.sampled_from(
        ["", "3", "nan", "-.inf", "null", "a\0b", "val/loss", "best", "min", "cpu", "bf16-true", "[", "{}"]
    ),
    st.text(max_size=5),
    st.just({"class_path": "lightning.pytorch.callbacks.Timer"}),
    st.just({"class_path": "no.such.Thing", "init_args": {"a": 1}}),
)
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2)
)


@st.composite
def configurations(draw: st.DrawFn) -> bytes:
    """A configuration, most of the time with one thing or another that is wrong with it."""
    kind = draw(st.sampled_from(["options"] * 6 + ["tree", "bytes", "broken"]))
    if kind == "bytes":
        return draw(st.binary(max_size=60))
    if kind == "tree":
        return yaml.safe_dump(draw(TREES), allow_unicode=True).encode("utf-8", "surrogatepass")
    config: dict[str, Any] = {}
    for section in draw(st.lists(st.sampled_from([*SECTIONS]), min_size=1, max_size=3, unique=True)):
        names = st.sampled_from(SECTIONS[section]) | st.text("abc_.", max_size=4)
        options = draw(st.dictionaries(names, TREES | SCALARS | SCALARS, max_size=2))
        config[section] = draw(TREES) if draw(st.integers(0, 9)) == 0 else options
    content = yaml.safe_dump(config, allow_unicode=draw(st.booleans())).encode("utf-8", "surrogatepass")
    if kind == "broken":
        place = draw(st.integers(0, len(content)))
        return content[:place] + draw(st.binary(max_size=3)) + content[place + draw(st.integers(0, 3)) :]
    return content


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n + 1}: &a{n + 1} [*a{n}, *a{n}, *a{n}, *a{n}]\n" for n in range(25))
ODD_CONFIGURATIONS = [
    b"",
    b"null",
    b"- 1",
    b"model: &m {lr: .nan, gamma: *m}",
    b"model: {lr: .nan}",
    b"model: {lr: 0.1, lr: 0.2}",
    b"model: {<<: *nothing}",
    b"base: &b {lr: 0.2}\nmodel: {<<: *b}",
    b"model:\n  ? [1, 2]\n  : 3",
    b"model: !!python/object/apply:os.mkdir [it_ran]",
    b"seed_everything: 2001-13-45",
    b"trainer: {max_steps: 1" + b"0" * 5_000 + b"}",
    b"model: {n_hidden: [" * 300,
    b"model: " + b"[" * 3_000 + b"]" * 3_000,
    b"model: " + b"{a: " * 3_000 + b"1" + b"}" * 3_000,
    LAUGHS.encode(),
    LAUGHS.encode() + b"model: {n_hidden: *a25}",
    b"\xff\xfem\0o\0",
    b"model: {n_hidden: [10000000000000]}",
    b"model: {n_embd: 1000000000000000000000000}",
    b"num_threads: 0",
    b"num_threads: -1",
    b"num_threads: 1000000000000000000000",
    b"seed_everything: -1",
    b"seed_everything: 100000000000000000000000",
    b"config: x.yaml",
    b"fit: {model: {lr: 0.1}}",
    b"model: {lr: 1e400}",
    b"trainer: {callbacks: [3]}",
    b'names: {prefix: "\\0"}',
]


@pytest.fixture
def without_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that make everything and stop there, and that make their parser once."""
    monkeypatch.setattr(Trainer, "fit", wraps(Trainer.fit)(lambda *args, **kwargs: None))
    made: list[Any] = []
    setup_parser = NamesCLI.setup_parser

    def setup_once(self: NamesCLI, *args: Any, **kwargs: Any) -> None:
        if not made:
            setup_parser(self, *args, **kwargs)
            made.append((self.parser, self._subcommand_parsers, self._subcommand_method_arguments))
        self.parser, self._subcommand_parsers, self._subcommand_method_arguments = made[0]

    monkeypatch.setattr(NamesCLI, "setup_parser", setup_once)


@pytest.mark.usefixtures("without_fit")
@pytest.mark.parametrize("count", [6, pytest.param(350, marks=pytest.mark.long)])
def test_any_configuration_is_taken_or_refused_in_a_sentence(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path, threads = tmp_path / "config.yaml", torch.get_num_threads()

    def case(content: bytes) -> None:
        path.write_bytes(content)
        command("fit", "--config", "config.yaml", *QUIET)
        torch.set_num_threads(threads)
        assert not (tmp_path / "it_ran").exists()

    run_cases(case, configurations(), count, *ODD_CONFIGURATIONS)


ODD_SECTIONS = [
    yaml.safe_dump(section).encode()
    for odd in (3, 0.5, True, "x", "..", "", [], [1], {}, {1: 2}, {"a": {"b": [1]}}, None)
    for section in (
        *({key: odd} for key in ("model", "data", "folding", "trainer", "seed_everything")),
        *({key: {"class_path": odd}} for key in ("model", "data")),
        *({"model": {"class_path": "lit_bnfold.BatchNormMLP", key: odd}} for key in ("init_args", "dict_kwargs")),
        *({"folding": {key: odd}} for key in ("tolerance", "reestimate_batches", "export")),
    )
]


@pytest.mark.parametrize("count", [6, pytest.param(350, marks=pytest.mark.long)])
def test_a_fold_with_any_configuration_is_done_or_refused_in_a_sentence(
    count: int, saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(BatchNormFolding, "fold_checkpoint", lambda *args: None)

    def case(content: bytes) -> None:
        Path("config.yaml").write_bytes(content)
        command("fold", "--ckpt_path", saved.last, "--config", "config.yaml")
        assert not Path("it_ran").exists()

    run_cases(case, configurations(), count, *ODD_CONFIGURATIONS, *ODD_SECTIONS)


# Checkpoints ----------------------------------------------------------------------------------------------------------

CONTEXTS = torch.randint(7, (11, 3), generator=torch.Generator().manual_seed(1))


@st.composite
def damages(draw: st.DrawFn) -> tuple[str, float, bytes]:
    """What happens to a file: the kind, the place as a share of its length, and bytes."""
    kind = draw(st.sampled_from(["flip", "flip", "flip", "cut", "cut", "overwrite", "insert", "delete", "append"]))
    return kind, draw(st.floats(0, 1, exclude_max=True)), draw(st.binary(min_size=1, max_size=40))


def damaged(content: bytes, damage: tuple[str, float, bytes]) -> bytes:
    kind, share, noise = damage
    place = int(share * len(content))
    before, after = content[:place], content[place:]
    if kind == "flip":
        return before + bytes([after[0] ^ 1 << noise[0] % 8]) + after[1:]
    if kind == "cut":
        return before
    if kind == "append":
        return content + noise
    return before + (b"" if kind == "delete" else noise) + (after if kind == "insert" else after[len(noise) :])


def outputs_of(module: BatchNormMLP) -> Tensor:
    with torch.no_grad():
        return module.eval()(CONTEXTS)


def loaded(read: Callable[[], Any], path: Path) -> Any:
    """What a function makes of a file; None if it refuses it and says why."""
    try:
        return read()
    except (FoldingError, OSError, TypeError, ValueError) as error:
        assert str(error).strip()
        assert isinstance(error, (FoldingError, TypeError)) or path.name in str(error) or "haracters" in str(error), (
            error
        )
        return None
    except RuntimeError as error:
        assert "Error(s) in loading state_dict for BatchNormMLP" in str(error), error
        return None


@pytest.mark.parametrize("count", [25, pytest.param(1_700, marks=pytest.mark.long)])
def test_a_damaged_checkpoint_is_refused_or_loads_as_it_was(count: int, saved: Any, tmp_path: Path) -> None:
    """Damage to what nobody reads, such as the padding between two parts, does not matter."""
    path = tmp_path / "damaged.ckpt"
    content, expected = saved.folded.read_bytes(), outputs_of(load_folded(BatchNormMLP, saved.folded))

    def case(damage: tuple[str, float, bytes]) -> None:
        path.write_bytes(damaged(content, damage))
        ways = [lambda: load_folded(BatchNormMLP, path), lambda: BatchNormMLP.load_from_checkpoint(path)]
        for way in ways:
            module = loaded(way, path)
            assert module is None or torch.equal(outputs_of(module), expected)
        loaded(lambda: read_checkpoint(path), path)

    run_cases(case, damages(), count, ("cut", 0.0, b"x"), ("cut", 0.5, b"x"), ("append", 0.0, b"x"))


def places(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something is in a tree of dicts and lists."""
    for key, inner in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield (*at, key)
        yield from places(inner, (*at, key))


def changed(tree: Any, place: tuple[Any, ...], change: Any) -> Any:
    """A copy of a tree with something else at a place."""
    tree = copy.deepcopy(tree)
    inner = tree
    for key in place[:-1]:
        inner = inner[key]
    kind, value = change
    if kind == "delete":
        del inner[place[-1]]
    elif kind == "add" and isinstance(inner, dict):
        inner[value if isinstance(value, str) else "more"] = value
    else:
        inner[place[-1]] = value
    return tree


TENSORS = st.builds(
    lambda shape, dtype: torch.zeros(shape, dtype=dtype),
    st.lists(st.sampled_from([0, 1, 3, 6, 7, 9]), max_size=3),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64]),
)
CHANGES = st.tuples(
    st.sampled_from(["replace", "replace", "delete", "add"]),
    SCALARS.filter(lambda value: value != 10**400) | TENSORS | st.just([]) | st.just({}) | st.just({3: 4}),
)


def write(checkpoint: Any, path: Path) -> bool:
    try:
        torch.save(checkpoint, path)
    except Exception:  # A text that is none, for example.
        return False
    return True


@pytest.mark.parametrize("count", [15, pytest.param(1_100, marks=pytest.mark.long)])
def test_a_checkpoint_of_other_content_is_refused_or_is_another_checkpoint(
    count: int, saved: Any, tmp_path: Path
) -> None:
    """What is told of weights and hyperparameters counts; whatever else is changed, the network is the same."""
    path = tmp_path / "changed.ckpt"
    checkpoint, expected = read_checkpoint(saved.folded), outputs_of(load_folded(BatchNormMLP, saved.folded))
    cases = st.tuples(st.sampled_from([*places(checkpoint)]), CHANGES)

    def case(drawn: tuple[tuple[Any, ...], Any]) -> None:
        if not write(changed(checkpoint, *drawn), path):
            return
        place = drawn[0]
        for way in (lambda: load_folded(BatchNormMLP, path), lambda: BatchNormMLP.load_from_checkpoint(path)):
            module = loaded(way, path)
            if module is not None and place[0] not in ("state_dict", "hyper_parameters"):
                assert torch.equal(outputs_of(module), expected)
            if module is not None and place[0] == MANIFEST and len(place) > 1:
                assert changed(checkpoint, *drawn)[MANIFEST] == checkpoint[MANIFEST]
            is_weight = place[0] == "state_dict" and len(place) == 2 and place[1] != SIGNPOST
            if module is not None and is_weight and drawn[1][0] == "replace":
                assert isinstance(drawn[1][1], Tensor)
                assert drawn[1][1].is_floating_point() or checkpoint["state_dict"][place[1]].numel() == 0

    integers = torch.zeros(6, dtype=torch.int64)
    run_cases(
        case,
        cases,
        count,
        (("state_dict",), ("delete", None)),
        (("hyper_parameters",), ("replace", [])),
        (("hyper_parameters", "vocab_size"), ("replace", None)),
        (("pytorch-lightning_version",), ("replace", "")),
        (("state_dict", "net.linear1.bias"), ("replace", integers)),
        ((MANIFEST, "folds", 0, "eps"), ("replace", 10**30)),
        ((MANIFEST, "folds", 0, "direction"), ("replace", "forward")),
        ((MANIFEST, "folds", 0, "parts", 0, "shift"), ("replace", 0.5)),
        ((MANIFEST, "folds", 0, "parts", 0, "shift"), ("replace", 1)),
        ((MANIFEST, "folds", 0, "parts", 0, "channels"), ("replace", [0])),
        ((MANIFEST,), ("delete", None)),
        ((MANIFEST,), ("replace", None)),
    )


OTHER_FIELDS = {
    "direction": {"direction": "parallel"},
    "channels": {"parts": [{"layer": "net.linear1", "channels": [0, 2, 1], "shift": 1.0}]},
    "shift": {"parts": [{"layer": "net.linear1", "channels": None, "shift": -1.0}]},
    "parts": {"parts": [{"layer": "net.linear2", "channels": None, "shift": 1.0}]},
    "batchnorm": {"batchnorm": "net.norm9"},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("field", OTHER_FIELDS)
def test_whatever_reads_a_folded_checkpoint_refuses_a_manifest_that_was_changed(
    field: str, saved: Any, tmp_path: Path
) -> None:
    """It is written anew with valid checksums of the file; the sentence names the file, the place and the remedy."""
    path = tmp_path / "changed.ckpt"
    checkpoint = torch.load(saved.folded, weights_only=True)
    fold, *others = checkpoint[MANIFEST]["folds"]
    whole = {"baked": False, "function": None}
    other = {
        key: [whole | part for part in value] if key == "parts" else value for key, value in OTHER_FIELDS[field].items()
    }
    checkpoint[MANIFEST]["folds"] = [fold | other, *others]
    torch.save(checkpoint, path)
    sentence = (
        rf"{re.escape(str(path))} cannot be loaded: .* the plan\.sha256: .*which was changed.* fold the model again"
    )
    with pytest.raises(FoldingError, match=sentence):
        load_folded(BatchNormMLP, path)
    with pytest.raises(FoldingError, match=sentence):
        BatchNormMLP.load_from_checkpoint(path)
    said = command("test", "--ckpt_path", path, "--trainer.default_root_dir", tmp_path, *QUIET)
    assert re.match(f"lit-bnfold: {sentence}", said or "")


@pytest.mark.parametrize("count", [2, pytest.param(120, marks=pytest.mark.long)])
def test_commands_name_what_is_wrong_with_a_checkpoint(count: int, saved: Any, tmp_path: Path) -> None:
    path = tmp_path / "changed.ckpt"
    files = {name: getattr(saved, name) for name in ("last", "folded")}
    contents = {name: file.read_bytes() for name, file in files.items()}
    checkpoints = {name: torch.load(file, weights_only=True) for name, file in files.items()}
    changes = {
        name: st.tuples(st.just(name), damages() | st.tuples(st.sampled_from([*places(checkpoint)]), CHANGES))
        for name, checkpoint in checkpoints.items()
    }
    commands = st.sampled_from(["fit", "validate", "test", "predict", "fold"])

    def case(drawn: tuple[str, tuple[str, Any]]) -> None:
        name, (file, change) = drawn
        if len(change) == 3:
            path.write_bytes(damaged(contents[file], change))
        elif not write(changed(checkpoints[file], *change), path):
            return
        arguments = ["--names.number", 2] if name == "predict" else []
        if name == "fit":
            arguments = ["--trainer.max_steps", 10, "--trainer.limit_val_batches", 0]
        root = ["--output", tmp_path / "out"] if name == "fold" else ["--trainer.logger=false"]
        silent = ["--trainer.default_root_dir", tmp_path, *QUIET[:4]]
        said = command(name, "--ckpt_path", path, *arguments, *root, *silent)
        assert said is None or "Lightning" not in said or "changed.ckpt" in said, said

    run_cases(case, st.tuples(commands, st.one_of(*changes.values())), count)


# Manifests ------------------------------------------------------------------------------------------------------------

PLAN = FoldingPlan(
    (
        Fold("net.norm1", (Part("net.linear1"),)),
        Fold("b", (Part("c", (0, 2, -1), 0.5, True, "linear"), Part("d", None, 0.5)), "parallel", "note", 1e-5),
    ),
    (Kept("e", "because", "code"),),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
)


def is_within(one: Any, other: Any) -> bool:
    """Whether nothing of a tree is missing in another, or another thing there."""
    if isinstance(one, dict):
        return all(key in other and is_within(inner, other[key]) for key, inner in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(is_within, one, other))
    return bool(one == other) and isinstance(one, bool) is isinstance(other, bool)


@pytest.mark.parametrize("count", [60, pytest.param(2_500, marks=pytest.mark.long)])
def test_any_manifest_is_a_plan_or_refused_with_the_place(count: int) -> None:
    manifest = PLAN.to_dict()
    # What has no checksum is a plan as long as it looks like one.
    first = {key: value for key, value in manifest.items() if key != "sha256"} | {"version": 1}
    changes = st.tuples(st.sampled_from([*places(manifest)]), st.tuples(st.sampled_from(["replace", "delete"]), JSON))
    added = st.tuples(st.sampled_from([*places(first)]), st.tuples(st.just("add"), JSON))

    def case(drawn: Any) -> None:
        if not isinstance(drawn, tuple):
            check(drawn)
            return
        if drawn[0] != ("sha256",):
            check(changed(first, *drawn))
        given = changed(manifest, *drawn)
        # To Python, 1 is 1.0.
        assert not check(given) or repr(given) == repr(manifest)

    def check(given: Any) -> bool:
        try:
            plan = FoldingPlan.from_dict(given)
        except FoldingError as error:
            assert re.match(
                r"Expected a folding plan of version 1 to 2, got .*; .*\.$|"
                r"Expected a dict as `FoldingPlan.to_dict` gives it; (the plan|folds|kept)[\w.\[\]]*: expected .*, fou",
                str(error),
                flags=re.DOTALL,
            )
            assert len(str(error)) < 400
            return False
        # What it takes, it understands: nothing that was given is left out, and nothing is made of another type.
        assert FoldingPlan.from_dict(json.loads(json.dumps(plan.to_dict(), allow_nan=False))) == plan
        assert is_within(given, plan.to_dict() if given["version"] > 1 else plan.to_dict() | {"version": 1})
        return True

    examples = [
        (("folds", 1, "eps"), ("replace", 10**400)),
        (("folds", 1, "parts", 0, "baked"), ("replace", 1)),
        (("folds", 0, "batchnorm"), ("replace", "b")),
        (("kept", 0, "batchnorm"), ("replace", "b")),
        (("version",), ("replace", True)),
        (("version",), ("replace", 10**400)),
        (("version",), ("replace", 1)),
        (("folds", 1, "parts", 0, "shift"), ("replace", 1)),
        (("folds", 0, "direction"), ("replace", "forward")),
    ]
    # Older versions of hypothesis write down what is given to them, and this cannot be written.
    for place in (("version",), ("folds", 1, "parts", 0, "channels", 0)):
        case((place, ("replace", 10**5000)))
    run_cases(case, changes | added | JSON, count, *examples)


def test_a_checkpoint_without_checksums_is_read(saved: Any, tmp_path: Path) -> None:
    checkpoint = torch.load(saved.folded, weights_only=True)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(checkpoint, tmp_path / "folded.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(tmp_path / "folded.ckpt") as file:
        assert not any(part.CRC for part in file.infolist())
    assert torch.equal(
        outputs_of(load_folded(BatchNormMLP, tmp_path / "folded.ckpt")),
        outputs_of(load_folded(BatchNormMLP, saved.folded)),
    )
