import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lit_bnfold.names.data import (
    Examples,
    NamesDataModule,
    RandomBatches,
    SequentialBatches,
    bundled_words,
    encode_words,
    read_words,
)
from lit_bnfold.names.model import BatchNormMLP
from lit_bnfold.names.sampling import BLOCK, Sampling

pytestmark = [
    # Resumed runs have no checkpoint callback of their own, or one that writes beside the old one.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def notebook_splits(words: list[str], block_size: int) -> list[tuple[Tensor, Tensor]]:
    """The notebook's cells: shuffle, cut, and two loops over words and characters."""
    stoi = {s: i + 1 for i, s in enumerate(sorted(set("".join(words))))}
    stoi["."] = 0
    random.Random(42).shuffle(words)
    n1, n2 = int(0.8 * len(words)), int(0.9 * len(words))
    splits = []
    for part in (words[:n1], words[n1:n2], words[n2:]):
        contexts, targets = [], []
        for word in part:
            context = [0] * block_size
            for character in word + ".":
                contexts.append(context)
                targets.append(stoi[character])
                context = [*context[1:], stoi[character]]
        splits.append((torch.tensor(contexts), torch.tensor(targets)))
    return splits


def spelled(data: NamesDataModule, split: str) -> list[str]:
    """The words that the targets of a split spell."""
    _, targets = data.splits[split][:]
    return "".join(data.itos[index] for index in targets.tolist()).removesuffix(".").split(".")


# The splits


def test_the_splits_match_the_notebooks_shuffle() -> None:
    words = bundled_words().read_text().splitlines()
    data = NamesDataModule()
    expected = notebook_splits(words.copy(), block_size=3)
    random.Random(42).shuffle(words)

    assert data.vocab_size == 27
    assert [len(examples) for examples in data.splits.values()] == [182_625, 22_655, 22_866]
    assert [spelled(data, split)[:3] for split in data.splits] == [
        words[:3],
        words[25_626:25_629],
        words[28_829:28_832],
    ]
    for examples, (contexts, targets) in zip(data.splits.values(), expected, strict=True):
        torch.testing.assert_close(examples[:], (contexts, targets), rtol=0, atol=0)


@pytest.mark.parametrize("block_size", [1, 2, 8, 40])
def test_any_block_size_gives_the_notebooks_contexts(tmp_path: Path, block_size: int) -> None:
    words = bundled_words().read_text().splitlines()[:97]
    data = NamesDataModule(write(tmp_path / "words.txt", "\n".join(words)), block_size=block_size)
    for examples, expected in zip(data.splits.values(), notebook_splits(words, block_size), strict=True):
        torch.testing.assert_close(examples[:], expected, rtol=0, atol=0)


@pytest.mark.parametrize("count", [10, 11, 19, 29, 101, 1_237])
def test_the_cuts_are_the_notebooks_for_any_number_of_words(tmp_path: Path, count: int) -> None:
    data = NamesDataModule(write(tmp_path / "words.txt", "a\n" * count))
    cuts = [0, int(0.8 * count), int(0.9 * count), count]
    assert [len(spelled(data, split)) for split in data.splits] == [cuts[i + 1] - cuts[i] for i in range(3)]


def test_a_sum_of_fractions_that_floats_round_down_loses_no_word(tmp_path: Path) -> None:
    assert 0.7 + 0.1 < 0.8
    data = NamesDataModule(write(tmp_path / "words.txt", "a\n" * 10), fractions=(0.7, 0.1, 0.2))
    assert [len(spelled(data, split)) for split in data.splits] == [7, 1, 2]


def test_the_splits_keep_one_byte_a_character_together_and_four_bytes_an_example() -> None:
    splits = NamesDataModule().splits.values()
    assert {examples.windows.dtype for examples in splits} == {torch.uint8}
    assert {examples.windows.data_ptr() for examples in splits} == {next(iter(splits)).windows.data_ptr()}
    letters = sum(map(len, splits)) - 32_033
    assert next(iter(splits)).windows.untyped_storage().nbytes() == letters + 3 * (32_033 + 1)
    assert all(examples.starts.untyped_storage().nbytes() == 4 * len(examples) for examples in splits)


# Words files


PLAIN = ["anna", "bo", "c", "dora", "eve", "finn", "gus", "hal", "ida", "jo"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param("\n".join(PLAIN), PLAIN, id="no newline at the end"),
        pytest.param("\n".join(PLAIN) + "\n\n\n", PLAIN, id="blank lines at the end"),
        pytest.param("\r\n".join(PLAIN) + "\r\n", PLAIN, id="CRLF"),
        pytest.param("\r".join(PLAIN), PLAIN, id="CR"),
        pytest.param(" \n\t".join(PLAIN) + " \r\n  \n", PLAIN, id="blanks and tabs around words"),
        pytest.param("Anna\nanna\nanna\nR2 D2", ["Anna", "anna", "anna", "R2 D2"], id="case, digits, one word twice"),
        pytest.param("anna", ["anna"], id="one word"),
        pytest.param("\ufeff" + "\n".join(PLAIN), PLAIN, id="byte order mark"),
        pytest.param("žofie\nåse\n李\n🙂🙃", ["žofie", "åse", "李", "🙂🙃"], id="UTF-8"),
        pytest.param("mary ann\njean\u2028luc", ["mary ann", "jean\u2028luc"], id="odd characters inside"),
        pytest.param("a" * 100_000 + "\nb", ["a" * 100_000, "b"], id="a long word"),
    ],
)
def test_a_words_file_may_be_odd(tmp_path: Path, content: str, words: list[str]) -> None:
    assert read_words(Path(write(tmp_path / "words.txt", content))) == "\n".join(words)


def test_an_alphabet_of_three_hundred_letters_keeps_its_letters(tmp_path: Path) -> None:
    letters = [chr(0x4E00 + 7 * number) for number in range(300)]
    words = ["".join(random.Random(number).choices(letters, k=5)) for number in range(300)] + letters
    data = NamesDataModule(write(tmp_path / "words.txt", "\n".join(words)))
    assert data.vocab_size == 301
    for examples, expected in zip(data.splits.values(), notebook_splits(words, block_size=3), strict=True):
        torch.testing.assert_close(examples[:], expected, rtol=0, atol=0)


def test_the_largest_alphabet_that_fits_a_byte_uses_one() -> None:
    stoi = {character: index for index, character in enumerate([".", *map(chr, range(0x100, 0x1FF))])}
    assert encode_words("\u01fe", stoi, block_size=1).tolist() == [0, 255, 0]
    assert encode_words("\u01fe", stoi, block_size=1).dtype == torch.uint8
    assert encode_words("\u01ff", {**stoi, "\u01ff": 256}, block_size=1).tolist() == [0, 256, 0]


@pytest.mark.parametrize("piece", [1, 2, 3, 5])
def test_words_that_are_encoded_in_pieces_are_the_same_stream(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    words, stoi = "ab\nb\naab", {".": 0, "a": 1, "b": 2}
    monkeypatch.setattr("lit_bnfold.names.data.PIECE", piece)
    assert encode_words(words, stoi, block_size=2).tolist() == [0, 0, 1, 2, 0, 0, 2, 0, 0, 1, 1, 2, 0, 0]


def test_a_file_larger_than_memory_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    with path.open("wb") as file:
        file.truncate(2**42)  # four TiB of nothing, which take no room on the disk
    with pytest.raises(ValueError, match=r"words.txt: expected words .* memory of this machine, got a file .* a part"):
        NamesDataModule(str(path)).prepare_data()


def test_where_the_size_of_the_memory_is_unknown_words_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sysconf_names", {})
    assert read_words(bundled_words()).count("\n") == 32_032


def test_the_words_stand_beside_the_module_or_at_the_top_of_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_words(bundled_words()).startswith("emma\nolivia\nava\n")
    module = tmp_path / "lit_bnfold" / "names" / "data.py"
    module.parent.mkdir(parents=True)
    monkeypatch.setattr("lit_bnfold.names.data.__file__", str(module))
    assert bundled_words() == tmp_path / "names.txt"
    (module.parent / "names.txt").touch()
    assert bundled_words() == module.parent / "names.txt"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "words.txt, line 1: expected a word, found an empty file; write one word per line."),
        (b"\xef\xbb\xbf\r\n\n", "words.txt, line 1: expected a word, found an empty file; write one word per line."),
        (b"anna\n\nbo\n", "words.txt, line 2: expected a word, found an empty line; remove the line."),
        (b"\nanna", "words.txt, line 1: expected a word, found an empty line; remove the line."),
        (b"anna\r\nbo\r\n\r\nc", "words.txt, line 3: expected a word, found an empty line; remove the line."),
        (b"anna\n \t\nbo\n", "words.txt, line 2: expected a word, found an empty line; remove the line."),
        (b"anna\nj.r.\n", "words.txt, line 2: 'j.r.' contains '.', which ends a word; remove it."),
        (b".", "words.txt, line 1: '.' contains '.', which ends a word; remove it."),
        (b"anna\nren\xe9e\nbo", "words.txt, line 2: byte 0xe9 is not UTF-8; save the file as UTF-8."),
        (b"\xef\xbb\xbfanna\r\nbo\r\n\xff", "words.txt, line 3: byte 0xff is not UTF-8; save the file as UTF-8."),
        ("anna\n".encode("utf-16"), "words.txt, line 1: byte 0xff is not UTF-8; save the file as UTF-8."),
    ],
)
def test_a_bad_words_file_is_refused_with_its_line_and_a_remedy(tmp_path: Path, content: bytes, message: str) -> None:
    data = NamesDataModule(write(tmp_path / "words.txt", content))
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path))}/{re.escape(message)}$"):
        data.prepare_data()


def test_a_missing_words_file_and_a_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no\.txt, found nothing; give the path of a text file\.$"):
        NamesDataModule(str(tmp_path / "no.txt")).prepare_data()
    with pytest.raises(ValueError, match=r"found a directory; give the path of a text file\.$"):
        NamesDataModule(str(tmp_path)).prepare_data()


def test_too_few_words_for_three_splits_are_refused(tmp_path: Path) -> None:
    data = NamesDataModule(write(tmp_path / "words.txt", "anna\nbo\nc"))
    with pytest.raises(ValueError, match=r"words\.txt: expected words for every split, got 3 words.*add words"):
        data.setup()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"block_size": 0}, ValueError, "block_size: expected at least 1, got 0; pass a positive number."),
        ({"batch_size": -1}, ValueError, "batch_size: expected at least 1, got -1; pass a positive number."),
        ({"eval_batch_size": 0}, ValueError, "eval_batch_size: expected at least 1, got 0; pass a positive number."),
        ({"batch_size": 32.0}, TypeError, "batch_size: expected an int, got 32.0; pass a whole number."),
        ({"seed": "42"}, TypeError, "seed: expected an int, got '42'; pass a whole number."),
        (
            {"fractions": (0.8, 0.2)},
            ValueError,
            "fractions: expected three parts above 0 that sum to 1, got [0.8, 0.2]; try 0.8, 0.1, 0.1.",
        ),
        ({"fractions": (0.8, 0.2, 0.0)}, ValueError, "fractions: expected three parts above 0 that sum to 1, got"),
        ({"fractions": (0.8, 0.1, 0.2)}, ValueError, "fractions: expected three parts above 0 that sum to 1, got"),
    ],
)
def test_an_argument_that_makes_no_sense_is_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        NamesDataModule(**arguments)


# Batches


def stream(count: int, first: int = 0, **arguments: Any) -> list[Tensor]:
    """Batches of a stream over 100,000 examples whose targets are their own numbers."""
    examples = Examples(torch.arange(-1, 100_000).unfold(0, 2, 1), torch.arange(100_000))
    arguments = {"batch_size": 8, "seed": 1, "batches_done": lambda: first, **arguments}
    batches = iter(RandomBatches(examples, **arguments))
    return [next(batches)[1] for _ in range(count)]


def test_a_training_batch_is_a_pair_of_int64_tensors_from_the_training_split() -> None:
    data = NamesDataModule(batch_size=64)
    contexts, targets = next(iter(data.train_dataloader()))
    assert (contexts.shape, contexts.dtype) == ((64, 3), torch.int64)
    assert (targets.shape, targets.dtype) == ((64,), torch.int64)
    train = set(map(tuple, torch.column_stack(data.splits["train"][:]).tolist()))
    assert set(map(tuple, torch.column_stack((contexts, targets)).tolist())) <= train


def test_training_draws_evenly_and_with_replacement() -> None:
    batches = stream(125, batch_size=800)
    per_hundred = (torch.cat(batches) // 100).bincount(minlength=1_000)  # Expected: 100.
    assert per_hundred.shape == (1_000,)
    assert 50 < per_hundred.min() < per_hundred.max() < 150
    assert 9 < per_hundred.float().std() < 11
    assert any(len(batch.unique()) < 800 for batch in batches)


def test_a_batch_depends_on_the_seed_and_its_number_alone() -> None:
    # 65,536 / 700 is no whole number, and batch 94 is the first one of the second draw.
    batches = stream(2, batch_size=700) + stream(2, first=93, batch_size=700)
    assert not any(torch.equal(a, b) for i, a in enumerate(batches) for b in batches[:i])
    for first in (92, 93, 94):
        assert torch.equal(stream(95 - first, first=first, batch_size=700)[-1], batches[-1])
    assert not torch.equal(stream(1, seed=2)[0], stream(1, seed=1)[0])


def test_neighbouring_seeds_share_no_batches() -> None:
    # Batches of 8 are drawn 8,192 at a time.
    first, second = ({tuple(b.tolist()) for n in range(10) for b in stream(1, n * 8192, seed=s)} for s in (1, 2))
    assert len(first) == len(second) == 10
    assert not first & second


def test_without_replacement_all_examples_have_their_turn_before_one_comes_again() -> None:
    # 100,000 / 700 is no whole number: the last batch of the first epoch has examples of the second shuffle.
    batches = stream(143, batch_size=700, replacement=False) + stream(143, first=143, batch_size=700, replacement=False)
    assert {len(batch) for batch in batches} == {700}
    first, second = torch.cat(batches)[:200_000].view(2, 100_000)
    assert torch.equal(first.sort().values, torch.arange(100_000))
    assert torch.equal(second.sort().values, torch.arange(100_000))
    assert not torch.equal(first, second)
    for number in (0, 93, 94, 142, 143, 285):
        assert torch.equal(stream(1, first=number, batch_size=700, replacement=False)[0], batches[number])


def test_a_batch_may_hold_all_examples_several_times() -> None:
    [whole] = stream(1, batch_size=250_000, replacement=False)
    assert whole.bincount().unique().tolist() == [2, 3]


@pytest.mark.parametrize("replacement", [True, False])
def test_the_processes_share_out_one_stream_of_batches(replacement: bool) -> None:
    whole = stream(6, replacement=replacement)
    for rank in (0, 1):
        part = stream(3, rank=rank, world_size=2, replacement=replacement)
        assert all(torch.equal(a, b) for a, b in zip(part, whole[rank::2], strict=True))


@pytest.mark.parametrize(("world_size", "batches"), [(1, 16), (2, 8), (3, 6)])
def test_an_epoch_is_as_many_batches_as_the_examples_fill(world_size: int, batches: int) -> None:
    loader = RandomBatches(Examples(torch.zeros(123, 4), torch.arange(123)), 8, 1, 0, world_size)
    assert len(loader) == len(list(loader)) == batches


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("batch_size", [1, 2, 10, 1_000])
@pytest.mark.parametrize("count", [7, 8, 20, 101])
def test_every_evaluation_example_comes_exactly_once(count: int, batch_size: int, world_size: int) -> None:
    windows = torch.arange(count)[:, None].expand(count, 4)
    ranks = [
        SequentialBatches(Examples(windows, torch.arange(count)), batch_size, r, world_size) for r in range(world_size)
    ]
    batches = [[targets for _, targets in loader] for loader in ranks]
    assert {len(of_rank) for of_rank in batches} == {len(loader) for loader in ranks} == {len(ranks[0])}
    assert all(0 < len(batch) <= batch_size + (world_size > 1) for of_rank in batches for batch in of_rank)
    assert sorted(torch.cat([torch.cat(of_rank) for of_rank in batches]).tolist()) == list(range(count))


def test_fewer_evaluation_examples_than_processes_are_refused() -> None:
    examples = Examples(torch.zeros(3, 4), torch.arange(3))
    assert len(list(SequentialBatches(examples, 8, rank=2, world_size=3))) == 1
    with pytest.raises(ValueError, match=r"^examples: expected at least one for each of the 4 processes, got 3; add"):
        SequentialBatches(examples, 8, rank=0, world_size=4)


@pytest.mark.parametrize(("stage", "split"), [("fit", "val"), ("validate", "val"), ("test", "test")])
def test_a_split_that_is_too_small_for_the_processes_is_named_before_anything_starts(
    stage: str, split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = NamesDataModule(write(tmp_path / "words.txt", "ab\n" * 10))
    data.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    monkeypatch.setattr(Trainer, "world_size", 4)
    with pytest.raises(
        ValueError, match=rf"words\.txt, split '{split}': examples: .* 4 processes, got 3; add words or"
    ):
        data.setup(stage)
    data.setup("predict")


def test_every_loader_has_its_own_split_and_knows_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    data = NamesDataModule()
    data.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    monkeypatch.setattr(Trainer, "global_rank", 1)
    monkeypatch.setattr(Trainer, "world_size", 2)
    loaders = [data.train_dataloader(), data.val_dataloader(), data.test_dataloader()]
    assert [loader.examples for loader in loaders] == list(data.splits.values())
    assert {(loader.rank, loader.world_size) for loader in loaders} == {(1, 2)}


# With a trainer


class Recorder(Callback):
    """Writes down the batches of a fit and can stop it at a step."""

    def __init__(self, stop_at: int = -1, during: str = "") -> None:
        self.stop_at = stop_at
        self.during = during
        self.batches: list[Tensor] = []

    def _stop(self, trainer: Trainer, during: str) -> None:
        if during == self.during and trainer.global_step >= self.stop_at and not trainer.sanity_checking:
            raise RuntimeError("stop")

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._stop(trainer, "the next batch")

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(torch.column_stack(batch))
        self._stop(trainer, "the end of a batch")

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._stop(trainer, "validation")


class Run:
    """Fits of one small model on one small file of words; an epoch has 13 batches."""

    def __init__(self, path: Path) -> None:
        rng = random.Random(1)
        self.path = path
        self.words = write(
            path / "w.txt", "\n".join("".join(rng.choices("abcde", k=rng.randint(1, 6))) for _ in range(60))
        )

    def fit(self, *callbacks: Callback, ckpt_path: Path | None = None, data: Any = None, **options: Any) -> Trainer:
        seed_everything(3, verbose=False)
        trainer = Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=list(callbacks),
            **{"max_epochs": 3, **options},
        )
        model = BatchNormMLP(vocab_size=6, n_hidden=8, milestones=[17])
        data = data or NamesDataModule(self.words, batch_size=16)
        trainer.fit(model, data, ckpt_path=ckpt_path)
        return trainer

    def checkpoint(self, saved: dict[str, Any], stop_at: int, during: str, **options: Any) -> Path:
        """Start a fit, stop it and return its last checkpoint."""
        folder = self.path / "checkpoints"
        recorder = Recorder(stop_at, during)
        if during == "max_steps":
            options["max_steps"] = stop_at
            self.fit(recorder, ModelCheckpoint(folder, save_last=True, **saved), **options)
        else:
            with pytest.raises(RuntimeError, match="stop"):
                self.fit(recorder, ModelCheckpoint(folder, save_last=True, **saved), **options)
        return folder / "last.ckpt"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def assert_same_run(resumed: Trainer, whole: Trainer) -> None:
    assert resumed.global_step == whole.global_step
    assert resumed.current_epoch == whole.current_epoch
    states = zip(
        resumed.lightning_module.state_dict().items(), whole.lightning_module.state_dict().items(), strict=True
    )
    assert [name for (name, tensor), (_, expected) in states if not torch.equal(tensor, expected)] == []
    assert resumed.callback_metrics == whole.callback_metrics


EVERY_STEP = {"every_n_train_steps": 1}
EVERY_EPOCH = {"every_n_train_steps": 13}
ON_EXCEPTION = {"save_on_exception": True}


@pytest.mark.parametrize(
    ("options", "saved", "stop_at", "during"),
    [
        pytest.param({}, EVERY_STEP, 7, "max_steps", id="max_steps in the middle of an epoch"),
        pytest.param({}, EVERY_STEP, 13, "max_steps", id="max_steps at the end of an epoch"),
        pytest.param({}, {"every_n_train_steps": 5}, 19, "the end of a batch", id="some batches after the checkpoint"),
        pytest.param({}, EVERY_STEP, 20, "the next batch", id="a batch that was drawn and not used"),
        pytest.param({}, ON_EXCEPTION, 20, "the next batch", id="saved while a batch was drawn and not used"),
        pytest.param({}, ON_EXCEPTION, 20, "the end of a batch", id="saved after a batch was used"),
        pytest.param({}, EVERY_EPOCH, 14, "the end of a batch", id="a checkpoint of the last batch of an epoch"),
        pytest.param({}, {}, 20, "the end of a batch", id="a checkpoint of the end of an epoch"),
        pytest.param({"val_check_interval": 4}, EVERY_STEP, 8, "validation", id="validation in an epoch"),
        pytest.param({"val_check_interval": 4}, ON_EXCEPTION, 21, "validation", id="saved in validation in an epoch"),
        pytest.param({"max_epochs": -1, "max_steps": 32}, EVERY_STEP, 19, "max_steps", id="a run counted in steps"),
        pytest.param({"limit_train_batches": 7}, EVERY_STEP, 10, "the end of a batch", id="shorter epochs"),
        pytest.param({"accumulate_grad_batches": 3}, EVERY_STEP, 7, "the end of a batch", id="accumulated gradients"),
    ],
)
def test_a_stopped_and_resumed_run_ends_with_the_same_weights(
    run: Run, options: dict[str, Any], saved: dict[str, Any], stop_at: int, during: str
) -> None:
    whole_batches, resumed_batches = Recorder(), Recorder()
    whole = run.fit(whole_batches, **options)
    ckpt_path = run.checkpoint(saved, stop_at, during, **options)
    resumed = run.fit(resumed_batches, ckpt_path=ckpt_path, **options)

    assert_same_run(resumed, whole)
    rest = whole_batches.batches[-len(resumed_batches.batches) :]
    assert 0 < len(rest) < len(whole_batches.batches)
    assert all(torch.equal(a, b) for a, b in zip(resumed_batches.batches, rest, strict=True))


def test_a_run_can_be_stopped_twice(run: Run) -> None:
    whole = run.fit()
    first = run.checkpoint(EVERY_STEP, 5, "the next batch")
    saving = ModelCheckpoint(run.path / "second", save_last=True, save_on_exception=True)
    with pytest.raises(RuntimeError, match="stop"):
        run.fit(Recorder(17, "the next batch"), saving, ckpt_path=first)
    assert_same_run(run.fit(ckpt_path=run.path / "second" / "last.ckpt"), whole)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_run_that_is_stopped_again_and_again_ends_with_the_same_bits(
    run: Run, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At random steps, so also in the middle of a block of batches, and right at its end, a milestone, a validation."""
    monkeypatch.setattr("lit_bnfold.names.data.DRAW", 5 * 16)  # examples, five batches
    stops = sorted({5, 8, 17, *random.Random(seed).sample(range(1, 36), 3)})
    assert {True, False} == {stop % 5 == 0 for stop in stops}
    options = {"max_steps": 39, "val_check_interval": 4, "check_val_every_n_epoch": None}
    whole = run.fit(**options)
    path = None
    for stop in stops:
        saving = ModelCheckpoint(run.path / "stopped", save_last=True, every_n_train_steps=1)
        run.fit(saving, ckpt_path=path, **{**options, "max_steps": stop})
        path = Path(saving.last_model_path)
    assert_same_run(run.fit(ckpt_path=path, **options), whole)


def test_an_interrupted_run_can_be_resumed(run: Run) -> None:
    class Interrupt(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 9:
                raise KeyboardInterrupt

    saving = ModelCheckpoint(run.path, save_last=True, save_on_exception=True)
    with pytest.raises(SystemExit):
        run.fit(Interrupt(), saving)
    assert_same_run(run.fit(ckpt_path=run.path / "last.ckpt"), run.fit())


def test_a_run_that_goes_on_for_more_epochs_equals_a_longer_run(run: Run) -> None:
    saving = ModelCheckpoint(run.path, save_last=True)
    run.fit(saving, max_epochs=2)
    assert_same_run(run.fit(ckpt_path=run.path / "last.ckpt", max_epochs=4), run.fit(max_epochs=4))


def test_a_run_resumed_with_other_batches_says_so(run: Run) -> None:
    ckpt_path = run.checkpoint(EVERY_STEP, 5, "the next batch")
    with pytest.warns(UserWarning, match=r"drew its batches with .*'batch_size': 16.* goes on with .*'batch_size': 8"):
        run.fit(ckpt_path=ckpt_path, data=NamesDataModule(run.words, batch_size=8))


def test_a_state_of_a_version_that_knew_no_shuffles_is_one_with_replacement() -> None:
    loader = NamesDataModule().train_dataloader()
    state = {key: value for key, value in loader.state_dict().items() if key != "replacement"}
    loader.load_state_dict(state)
    shuffled = NamesDataModule(replacement=False).train_dataloader()
    with pytest.warns(UserWarning, match=r"drew its batches with .*'replacement': True.* with .*'replacement': False"):
        shuffled.load_state_dict(state)


def test_two_fits_with_one_seed_are_equal_and_draw_new_batches_in_every_epoch(run: Run) -> None:
    first, second = Recorder(), Recorder()
    assert_same_run(run.fit(first), run.fit(second))
    assert len({tuple(batch.flatten().tolist()) for batch in first.batches}) == len(first.batches) == 39


def test_other_passes_over_the_loader_do_not_change_the_run(run: Run) -> None:
    class Look(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
            assert len(list(trainer.train_dataloader)) == 13

        def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
            if not trainer.sanity_checking:
                next(iter(trainer.train_dataloader))

    assert_same_run(run.fit(Look(), val_check_interval=4), run.fit(val_check_interval=4))


def test_overfitting_repeats_the_same_batches_in_every_epoch(run: Run) -> None:
    recorder = Recorder()
    run.fit(recorder, overfit_batches=2, limit_val_batches=0)
    assert len(recorder.batches) == 6
    assert all(torch.equal(batch, recorder.batches[number % 2]) for number, batch in enumerate(recorder.batches))
    assert not torch.equal(*recorder.batches[:2])


def test_a_checkpoint_of_another_vocabulary_is_refused(run: Run, tmp_path: Path) -> None:
    ckpt_path = run.checkpoint(EVERY_STEP, 5, "the next batch")
    other = NamesDataModule(write(tmp_path / "other.txt", "\n".join("abcdx" for _ in range(20))))
    message = (
        "other.txt: expected the 6 characters of the checkpoint, got 6 (missing ['e'], new ['x']); pass the words it"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        run.fit(ckpt_path=ckpt_path, data=other)


def test_other_words_of_the_same_characters_are_told_of(run: Run, tmp_path: Path) -> None:
    ckpt_path = run.checkpoint(EVERY_STEP, 5, "the next batch")
    words = read_words(Path(run.words)).split("\n")
    shorter = NamesDataModule(write(tmp_path / "other.txt", "\n".join(words[1:])), batch_size=16)
    predicting = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    model = BatchNormMLP(vocab_size=6, n_hidden=8)
    with pytest.warns(UserWarning, match=r"other\.txt holds other words than those that the checkpoint was trained on"):
        predicting.predict(model, shorter, ckpt_path=ckpt_path)
    # A byte order mark makes no other words, and a checkpoint of an earlier version has no hash.
    same = NamesDataModule(write(tmp_path / "same.txt", "\ufeff" + "\r\n".join(words)), batch_size=16)
    predicting.predict(model, same, ckpt_path=ckpt_path)
    shorter.load_state_dict({"vocabulary": ".abcde"})


def test_the_training_words_are_those_of_the_training_split() -> None:
    data = NamesDataModule()
    assert data.training_words == set(spelled(data, "train"))
    assert not data.training_words >= set(spelled(data, "test"))


def test_predicting_needs_no_splits(tmp_path: Path) -> None:
    data = NamesDataModule(write(tmp_path / "words.txt", "anna"))
    data.setup("predict")
    data.sampling = Sampling(number=2 * BLOCK + 1)
    batches = list(data.predict_dataloader())
    assert len(data.predict_dataloader()) == len(batches) == 3
    assert torch.equal(torch.cat(batches), torch.arange(2 * BLOCK + 1))
    with pytest.raises(ValueError, match=r"got 1 word, of which"):
        data.setup("fit")


def test_the_hyperparameters_rebuild_the_data(run: Run) -> None:
    data = NamesDataModule(run.words, block_size=5, batch_size=16)
    hparams = dict(data.hparams)
    assert {type(value) for value in hparams.values()} == {str, int, list, bool}
    build: Callable[..., NamesDataModule] = NamesDataModule
    torch.testing.assert_close(build(**hparams).splits["val"][:], data.splits["val"][:])
