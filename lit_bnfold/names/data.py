"""Words in, batches of contexts and next characters out: the notebook's data set, for any file of words."""

from __future__ import annotations

import hashlib
import os
import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil, isclose, prod
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_bnfold.names.sampling import BLOCK, Sampling, generator_of

# The character that ends a word and fills the context before its first letter. Its index is 0.
END = "."

# Number of examples that are drawn at once for training, 2,048 batches of 32, so that drawing costs a step nothing.
DRAW = 65_536

# Number of characters that are encoded at a time, so that only a few of them take four bytes at once.
PIECE = 1 << 20

# Bytes of memory that it takes to build the examples of one byte of a words file, most of them for a moment. Measured:
# 16 with names, which have six letters each, 20 where they have blanks around them, 23 to 34 with one or two letters.
MEMORY_PER_BYTE = 30

# Contexts (B, block_size) and the characters that follow them (B,), both int64.
Batch = tuple[Tensor, Tensor]


def bundled_words() -> Path:
    """Return the path of names.txt: beside this module in an installed package, at the top level in a checkout."""
    installed = Path(__file__).with_name("names.txt")
    return installed if installed.exists() else Path(__file__).parents[2] / "names.txt"


def memory_of_machine() -> int | None:
    """Return the bytes of memory of this machine; None where the system does not tell."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", ()):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def read_words(path: Path) -> str:
    """Read a UTF-8 file with one word per line.

    A byte order mark, CRLF, blanks and tabs around a word and empty lines at the end do not matter.

    Args:
        path: The words file.

    Returns:
        The words in the order of the file, none of them empty, with a newline between two. As strings of their own
        they would take ten times the memory.

    Raises:
        FileNotFoundError: If nothing is there.
        ValueError: If it is no file, is too large for the memory of this machine, is not UTF-8, holds no word or an
            empty line, or a word contains `END`.
    """
    if not path.exists():
        raise FileNotFoundError(f"Expected a words file at {path}, found nothing; give the path of a text file.")
    if not path.is_file():
        raise ValueError(f"Expected a words file at {path}, found a directory; give the path of a text file.")
    needed, memory = MEMORY_PER_BYTE * path.stat().st_size, memory_of_machine()
    if memory is not None and needed > memory:
        raise ValueError(
            f"{path}: expected words whose examples fit into the {memory / 1e9:.1f} GB of memory of this machine, got "
            f"a file of which it takes about {needed / 1e9:.1f} GB to build them; give a part of the words."
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = len(error.object[: error.start + 1].splitlines())
        byte = error.object[error.start]
        raise ValueError(f"{path}, line {line}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8.") from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if " " in text or "\t" in text:
        text = "\n".join(line.strip(" \t") for line in text.split("\n"))
    text = text.rstrip("\n")
    if not text:
        raise ValueError(f"{path}, line 1: expected a word, found an empty file; write one word per line.")
    if text.startswith("\n") or "\n\n" in text:
        line = text.split("\n").index("") + 1
        raise ValueError(f"{path}, line {line}: expected a word, found an empty line; remove the line.")
    if END in text:
        line = text.count("\n", 0, text.index(END)) + 1
        word = text.split("\n")[line - 1]
        word = word if len(word) <= 80 else f"{word[:80]}..."
        raise ValueError(f"{path}, line {line}: {word!r} contains {END!r}, which ends a word; remove it.")
    return text


def encode_words(text: str, stoi: dict[str, int], block_size: int) -> Tensor:
    r"""Write words down as one stream of character indices, with `block_size` end marks before, between and after.

    Args:
        text: The words, none of them empty, with a newline between two.
        stoi: The index of every character in them.
        block_size: Number of characters of a context.

    Returns:
        The stream (M,), uint8 where the alphabet fits, int32 where it does not.

    Example:
        >>> encode_words("ab\nb", {".": 0, "a": 1, "b": 2}, block_size=2).tolist()
        [0, 0, 1, 2, 0, 0, 2, 0, 0]
    """
    lookup = torch.zeros(ord(max(stoi)) + 1, dtype=torch.uint8 if len(stoi) <= 256 else torch.int32)
    lookup[[ord(character) for character in stoi]] = torch.tensor(list(stoi.values()), dtype=lookup.dtype)
    padding = END * block_size

    def encode(piece: str) -> Tensor:
        # UTF-32 gives every character four bytes in native order, after four that say which order it is.
        codes = torch.frombuffer(bytearray(piece.replace("\n", padding), "utf-32"), dtype=torch.int32, offset=4)
        return lookup.index_select(0, codes)  # five times faster than lookup[codes]

    pieces = (text[first : first + PIECE] for first in range(0, len(text), PIECE))
    return torch.cat([encode(padding), *map(encode, pieces), encode(padding)])


@dataclass(frozen=True, eq=False)
class Examples:
    """The examples of one split, as windows over a stream of characters.

    Args:
        windows: Every window of the stream (M - block_size, block_size + 1), a view that takes no memory of its own.
        starts: The windows that are examples (N,).
    """

    windows: Tensor
    starts: Tensor

    @classmethod
    def of_words(cls, windows: Tensor, firsts: Tensor, counts: Tensor) -> Examples:
        """Make the examples of some words.

        Args:
            windows: Every window of the stream (M - block_size, block_size + 1).
            firsts: The first window of each word (W,), an int type that holds their number.
            counts: How many windows each of them has (W,), likewise: one for each letter, and one for its end.

        Returns:
            The examples (N,), in the order of the words.
        """
        ends = counts.cumsum(0)
        # From one example to the next it is one window, and from the last one of a word a jump to the next word.
        jumps = firsts.clone()
        jumps[1:] -= firsts[:-1] + counts[:-1] - 1
        steps = torch.ones(int(ends[-1]), dtype=firsts.dtype).index_copy_(0, ends - counts, jumps)
        return cls(windows, torch.cumsum(steps, 0, dtype=steps.dtype, out=steps))

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: Tensor | slice) -> Batch:
        """Return the contexts (..., block_size) and the next characters (...) of examples (...), both int64."""
        window = self.windows[self.starts[index]].long()  # (..., block_size + 1)
        return window[..., :-1], window[..., -1]


class RandomBatches:
    """Training batches, drawn from an endless stream.

    Batch number n of the stream depends on the seed and on n alone. A run that goes on after n batches therefore sees
    what it would have seen, whatever stopped it, and nothing about it needs to be saved. Of several processes, each
    takes every `world_size`-th batch.

    It is a plain iterable, as there is nothing to collate and nothing for workers to do. Lightning leaves it as it is.

    Args:
        examples: The examples to draw from.
        batch_size: Examples in a batch of one process.
        seed: Seed of the stream.
        rank: Number of this process.
        world_size: Number of processes.
        replacement: Draw each example anew from all of them. Otherwise the stream is one shuffle of the examples after
            the other, cut into batches that are all full, so that each example comes equally often.
        batches_done: Returns the number of batches that this process has trained on. It is asked when the first batch
            of an epoch is drawn; the default starts every epoch at the beginning of the stream.
    """

    def __init__(
        self,
        examples: Examples,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        replacement: bool = True,
        batches_done: Callable[[], int] = lambda: 0,
    ) -> None:
        self.examples = examples
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.replacement = replacement
        self.batches_done = batches_done
        # Those of the latest block, as the next one goes on with them.
        self._shuffles: dict[int, Tensor] = {}

    def __len__(self) -> int:
        """Return the number of batches in an epoch of one process."""
        return ceil(len(self.examples) / (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[Batch]:
        # As a generator this runs at the first draw. Lightning asks for the iterator earlier than that, before it has
        # put its progress in order.
        first = self.batches_done()
        rows = ceil(DRAW / self.batch_size)
        drawn = None
        for step in range(first, first + len(self)):
            block, row = divmod(step * self.world_size + self.rank, rows)
            if drawn != block:
                # The examples of a whole block, because to look them up batch by batch takes ten times as long.
                contexts, targets = self.examples[self._draw(block, rows)]
                drawn = block
            yield contexts[row], targets[row]

    def _draw(self, block: int, rows: int) -> Tensor:
        """Return the indices (rows, batch_size) of one block of batches."""
        shape, examples = (rows, self.batch_size), len(self.examples)
        if self.replacement:
            return torch.randint(examples, shape, generator=self._generator(block))
        start, stop = block * prod(shape), (block + 1) * prod(shape)  # in the stream of all shuffles
        shuffles = range(start // examples, ceil(stop / examples))
        self._shuffles = {number: self._shuffle(number) for number in shuffles}
        stream = torch.cat(list(self._shuffles.values()))
        return stream[start - shuffles[0] * examples :][: prod(shape)].view(shape)

    def _shuffle(self, number: int) -> Tensor:
        """Return all indices (N,) in the order of one shuffle."""
        known = self._shuffles.get(number)
        return torch.randperm(len(self.examples), generator=self._generator(number)) if known is None else known

    def _generator(self, number: int) -> torch.Generator:
        """Return the generator of a block, or of a shuffle."""
        return generator_of(self.seed, number)

    def state_dict(self) -> dict[str, int]:
        """Return what decides, besides the trainer's count of batches, which ones come next.

        Lightning takes a loader that has a state for one that can be resumed in the middle of an epoch.
        """
        return {
            "seed": self.seed,
            "examples": len(self.examples),
            "batch_size": self.batch_size,
            "world_size": self.world_size,
            "replacement": self.replacement,
        }

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Warn if a resumed run will not see the batches that it would have seen without the stop.

        Args:
            state_dict: What ``state_dict`` gave for the run that was stopped.
        """
        # Checkpoints of earlier versions do not say how they drew, as there was one way.
        state_dict = {**state_dict, "replacement": state_dict.get("replacement", True)}
        if state_dict != self.state_dict():
            rank_zero_warn(
                f"The resumed run drew its batches with {state_dict} and goes on with {self.state_dict()}, so it will "
                "not end where it would have ended without the stop; pass the old values if it should."
            )


class SequentialBatches:
    """Every example of a split once, in a few large batches of nearly equal size.

    Of several processes, each takes every `world_size`-th example. No example is repeated to fill a batch, and all
    processes have the same number of batches, as their collective operations need.

    Args:
        examples: The examples.
        batch_size: Examples in a batch of one process; with several processes it can be one more.
        rank: Number of this process.
        world_size: Number of processes.

    Raises:
        ValueError: If there are fewer examples than processes.
    """

    def __init__(self, examples: Examples, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        if len(examples) < world_size:
            raise ValueError(
                f"examples: expected at least one for each of the {world_size} processes, got {len(examples)}; add "
                "words or use fewer devices."
            )
        self.examples = examples
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        """Return the number of batches of one process."""
        # Counted for the process with the fewest examples, so that none has an empty batch.
        return ceil(len(self.examples) // self.world_size / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for index in torch.arange(self.rank, len(self.examples), self.world_size).tensor_split(len(self)):
            yield self.examples[index]


class NameNumbers:
    """The numbers of the names to sample, in batches (B,) of int64; every process has all of them.

    Args:
        count: Number of names.
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        """Return the number of batches."""
        return ceil(self.count / BLOCK)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(self.count).split(BLOCK))


class NamesDataModule(LightningDataModule):
    """Words as examples of a context of characters and the character that follows, split as in the notebook.

    Training draws its batches from an endless stream; an epoch is as many batches as the training split fills. A run
    that is resumed from a checkpoint, wherever it was stopped, sees the batches it would have seen without the stop.

    So on one machine a training ends with the same bits each time, in one go or stopped and resumed at any step, with
    the same seeds, versions and number of CPU threads. Another number of threads adds in another order: 2 threads gave
    the same bits as 2, and differed from 1 by 5e-7 in a weight after 150 steps. There are no worker processes, whose
    number could matter. More than one training process draws other batches.

    Args:
        words: Path of a UTF-8 file with one word per line; by default the bundled names.txt, 32,033 names.
        block_size: Number of characters of a context.
        batch_size: Examples in a training batch of one process.
        seed: Seed of the shuffle before the split, and of the training batches.
        fractions: Parts of the words for training, validation and test, each above 0; their sum is 1.
        eval_batch_size: Examples in a validation or test batch of one process.
        replacement: Draw each training example from all of them, as the notebook does; false shuffles them, and all
            have their turn before one comes again.

    Attributes:
        sampling: Which names to sample, when a Trainer predicts.

    Raises:
        TypeError: If a size or the seed is not an int.
        ValueError: If a size is below 1, or the fractions are not parts of a whole.

    Example:
        >>> data = NamesDataModule()
        >>> data.vocab_size
        27
        >>> {name: len(examples) for name, examples in data.splits.items()}
        {'train': 182625, 'val': 22655, 'test': 22866}
        >>> contexts, targets = next(iter(data.train_dataloader()))
        >>> contexts.shape, targets.shape
        (torch.Size([32, 3]), torch.Size([32]))
    """

    def __init__(
        self,
        words: str | None = None,
        block_size: int = 3,
        batch_size: int = 32,
        seed: int = 42,
        fractions: Sequence[float] = (0.8, 0.1, 0.1),
        eval_batch_size: int = 8192,
        replacement: bool = True,
    ) -> None:
        super().__init__()
        sizes = {"block_size": block_size, "batch_size": batch_size, "eval_batch_size": eval_batch_size}
        for name, value in {**sizes, "seed": seed}.items():
            if not isinstance(value, int):
                raise TypeError(f"{name}: expected an int, got {value!r}; pass a whole number.")
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}; pass a positive number.")
        # A list, because a tuple makes a hparams.yaml that only Python can read.
        fractions = list(fractions)
        if len(fractions) != 3 or min(fractions) <= 0 or not isclose(sum(fractions), 1):
            raise ValueError(
                f"fractions: expected three parts above 0 that sum to 1, got {fractions}; try 0.8, 0.1, 0.1."
            )
        self.save_hyperparameters()
        self.path = Path(words) if words is not None else bundled_words()
        self.block_size = block_size
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.seed = seed
        self.fractions = fractions
        self.replacement = replacement
        self.sampling = Sampling()

    @staticmethod
    def of(trainer: Trainer) -> NamesDataModule:
        """Return the data of a trainer.

        Args:
            trainer: A Trainer that is at work.

        Raises:
            TypeError: If it has none, or other data.
        """
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, NamesDataModule):
            raise TypeError(f"Expected a NamesDataModule, which knows the characters, got {data!r}; pass one.")
        return data

    @cached_property
    def _text(self) -> str:
        return read_words(self.path)

    @cached_property
    def _hash(self) -> str:
        return hashlib.sha256(self._text.encode()).hexdigest()

    @cached_property
    def stoi(self) -> dict[str, int]:
        """The index of every character: `END` is 0, the others follow sorted. The file is read when this is asked."""
        return {character: index for index, character in enumerate([END, *sorted(set(self._text) - {"\n"})])}

    @property
    def itos(self) -> dict[int, str]:
        """The character of every index."""
        return {index: character for character, index in self.stoi.items()}

    @property
    def vocab_size(self) -> int:
        """Number of characters, `END` included."""
        return len(self.stoi)

    def _split_numbers(self) -> dict[str, Tensor]:
        """Return the numbers of the words (W,) of each split, shuffled as the notebook shuffles the words."""
        # An array holds them as torch does, and is shuffled faster than a list, whose numbers lie all over the memory.
        numbers = array("q", range(self._text.count("\n") + 1))
        random.Random(self.seed).shuffle(numbers)
        train, val, _ = self.fractions
        # The notebook cuts at 0.8 and 0.9. The rounding makes a sum of fractions the number that one would write down.
        cuts = [int(train * len(numbers)), int(round(train + val, 9) * len(numbers))]
        parts = torch.frombuffer(numbers, dtype=torch.int64).tensor_split(cuts)
        return dict(zip(("train", "val", "test"), parts, strict=True))

    @cached_property
    def training_words(self) -> frozenset[str]:
        """The different words that training sees."""
        words = self._text.split("\n")
        return frozenset(words[number] for number in self._split_numbers()["train"].tolist())

    @cached_property
    def splits(self) -> dict[str, Examples]:
        """The examples of the splits "train", "val" and "test"; asking for them builds them.

        Raises:
            ValueError: If there are too few words for every split to have one.
        """
        numbers = self._split_numbers()
        if not all(map(len, numbers.values())):
            count = sum(map(len, numbers.values()))
            raise ValueError(
                f"{self.path}: expected words for every split, got {count} word{'s' * (count > 1)}, of which the "
                f"fractions {self.fractions} leave one split none; add words or change the fractions."
            )
        stream = encode_words(self._text, self.stoi, self.block_size)
        windows, is_letter = stream.unfold(0, self.block_size + 1, 1), stream != 0
        # A word's first window ends with a letter behind an end mark; between two words are `block_size` end marks.
        firsts = (is_letter[self.block_size :] > is_letter[self.block_size - 1 : -1]).nonzero().flatten()
        firsts = firsts.to(torch.int32 if len(stream) < 2**31 else torch.int64)
        counts = firsts.diff(append=firsts.new_tensor([len(windows)])) - (self.block_size - 1)
        return {
            name: Examples.of_words(windows, firsts.index_select(0, chosen), counts.index_select(0, chosen))
            for name, chosen in numbers.items()
        }

    def prepare_data(self) -> None:
        """Read the words, so that a bad file is reported before anything else starts."""
        _ = self.stoi

    def setup(self, stage: str | None = None) -> None:
        """Build the splits, which are the same for every stage, and refuse one that is too small for the processes."""
        if stage != "predict":
            self._in_order("test" if stage == "test" else "val")

    def train_dataloader(self) -> RandomBatches:
        """Return batches drawn at random, from where the trainer's run stands."""
        return RandomBatches(
            self.splits["train"],
            self.batch_size,
            self.seed,
            *self._process(),
            replacement=self.replacement,
            batches_done=self._batches_done,
        )

    def val_dataloader(self) -> SequentialBatches:
        """Return every validation example once."""
        return self._in_order("val")

    def test_dataloader(self) -> SequentialBatches:
        """Return every test example once."""
        return self._in_order("test")

    def predict_dataloader(self) -> NameNumbers:
        """Return the numbers of the names to sample."""
        return NameNumbers(self.sampling.number)

    def _in_order(self, split: str) -> SequentialBatches:
        """Return every example of a split once."""
        examples = self.splits[split]
        try:
            return SequentialBatches(examples, self.eval_batch_size, *self._process())
        except ValueError as error:
            raise ValueError(f"{self.path}, split {split!r}: {error}") from error

    def _process(self) -> tuple[int, int]:
        """Return the rank of this process and the number of processes."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _batches_done(self) -> int:
        """Return the number of training batches that the run has behind it."""
        if self.trainer is None:
            return 0
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        # Overfitting means the same batches in every epoch, so there only the place within the epoch counts.
        if self.trainer.overfit_batches:  # type: ignore[attr-defined]
            return progress.current.ready
        # A batch is processed once the optimizer has used it. Lightning's other counters, and a count of the batches
        # that were drawn, would include one that an exception interrupted.
        return progress.total.processed  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        """Return the vocabulary, because a checkpoint's weights mean nothing with another one, and the words' hash."""
        return {"vocabulary": "".join(self.stoi), "words": self._hash}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare the vocabulary of a checkpoint with that of the words; warn if only the words are others.

        Raises:
            ValueError: If the vocabularies differ.
        """
        expected, got = set(state_dict["vocabulary"]), set(self.stoi)
        if expected != got:
            raise ValueError(
                f"{self.path}: expected the {len(expected)} characters of the checkpoint, got {len(got)} (missing "
                f"{sorted(expected - got)}, new {sorted(got - expected)}); pass the words it was trained on."
            )
        # Checkpoints of earlier versions have no hash.
        if state_dict.get("words") not in (None, self._hash):
            rank_zero_warn(f"{self.path} holds other words than those that the checkpoint was trained on.")
