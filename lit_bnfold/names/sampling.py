"""Names out of a network: the notebook's sampling loop, for many names at once."""

from __future__ import annotations

import random
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor, nn

# Names that share a generator of random numbers, and the most that are sampled together.
BLOCK = 1_024


def generator_of(seed: int, number: int) -> torch.Generator:
    """Make the generator of one of many streams of random numbers.

    Args:
        seed: The seed that all of them share.
        number: The number of the stream.
    """
    # The sum of both would give one seed the streams of the next. Python hashes a text, and torch takes 32 bits.
    return torch.Generator().manual_seed(random.Random(f"{seed}, {number}").getrandbits(32))


@dataclass(frozen=True)
class Sampling:
    """Which names to sample, in ``predict`` and at each validation of ``fit``.

    Args:
        number: Number of names; fewer of them are the first ones of more.
        temperature: Divisor of the logits: 1 leaves the probabilities as the network learned them, towards 0 the
            likeliest character always comes, and far above 1 all are equally likely.
        seed: Seed of the random numbers.
        prefix: What every name begins with.
        min_length: Least number of characters of a name, the prefix included; before that it does not end.
        max_length: Largest number of characters of a name, the prefix included; there it is cut off.

    Raises:
        TypeError: If a number of something, or the seed, is not an int.
        ValueError: If a number makes no sense.

    Example:
        >>> Sampling(number=3, prefix="mar").encode_prefix({".": 0, "a": 1, "m": 2, "r": 3})
        [2, 1, 3]
    """

    number: int = 20
    temperature: float = 1.0
    seed: int = 42
    prefix: str = ""
    min_length: int = 1
    max_length: int = 100

    def __post_init__(self) -> None:
        for name in ("number", "seed", "min_length", "max_length"):
            if not isinstance(getattr(self, name), int):
                raise TypeError(f"{name}: expected an int, got {getattr(self, name)!r}; pass a whole number.")
        if self.number < 1:
            raise ValueError(f"number: expected at least 1 name, got {self.number}; pass a positive number.")
        if not (self.temperature > 0 and isfinite(self.temperature)):
            raise ValueError(f"temperature: expected a finite number above 0, got {self.temperature}; try 1.")
        # An empty word is none.
        if self.min_length < 1:
            raise ValueError(f"min_length: expected at least 1 character, got {self.min_length}.")
        least = max(self.min_length, len(self.prefix))
        if self.max_length < least:
            raise ValueError(
                f"max_length: expected at least the {least} characters that min_length and prefix ask for, got "
                f"{self.max_length}."
            )

    def encode_prefix(self, stoi: dict[str, int]) -> list[int]:
        """Return the index of every character of the prefix.

        Args:
            stoi: The index of every character; that of the end mark is 0.

        Raises:
            ValueError: If the prefix has a character that no word has.
        """
        unknown = sorted({character for character in self.prefix if not stoi.get(character)})
        if unknown:
            known = f"the {len(stoi) - 1} characters of the words"
            raise ValueError(f"prefix: {self.prefix!r} has {unknown}, which no word has; use {known}.")
        return [stoi[character] for character in self.prefix]


@torch.no_grad()
def sample_names(
    net: nn.Module, stoi: dict[str, int], block_size: int, sampling: Sampling, indices: Tensor | None = None
) -> list[str]:
    """Sample names from a network, on the device where it is.

    The random numbers of a name depend on the seed, its number, the position and the character alone, so it is the same
    among however many names, in whatever batch and on whatever device. Each character is the one with the largest sum
    of logit and Gumbel noise: that is a draw from the softmax, and two networks make the same draw unless the two best
    sums are closer to each other than their logits are. So a network and its folded version nearly always give the same
    names.

    No way of sampling makes it certain. If d is the total variation distance between what two networks expect next,
    they cannot draw the same character more often than with probability 1 - d, and rounding both first makes the
    differences rarer and larger by the same factor. What can be done is to keep d small: a copy of the network computes
    in float64, where batches and devices differ by 1e-14, and all that is left is that the folded weights were rounded.
    For the notebook's network after 40,000 steps d is 2.3e-8, and a character differs with probability 3.0e-8, any of
    1,000 names with 2e-4. In float32 a character would differ with 2.0e-7, and with 1.2e-6 if one uniform number were
    compared with the cumulative probabilities. Lower temperatures, and weights of fewer digits, make it likelier.

    Args:
        net: Gives the logits (B, vocab_size) of the characters after contexts (B, block_size) of indices.
        stoi: The index of every character; that of the end mark is 0.
        block_size: Number of characters of a context.
        sampling: Which names.
        indices: The numbers of the names that are wanted (B,), of any size; all of `sampling` by default.

    Returns:
        B names.

    Raises:
        ValueError: If the prefix has a character that no word has, or the network's logits are not finite.

    Example:
        >>> from lit_bnfold import BatchNormMLP
        >>> stoi = {".": 0, "a": 1, "b": 2, "c": 3}
        >>> net = BatchNormMLP(vocab_size=4).net
        >>> names = sample_names(net, stoi, 3, Sampling(number=1000, prefix="ab", min_length=5))
        >>> len(names), all(name.startswith("ab") and len(name) >= 5 for name in names)
        (1000, True)
        >>> sample_names(net, stoi, 3, Sampling(number=3, prefix="ab", min_length=5)) == names[:3]
        True
    """
    start = sampling.encode_prefix(stoi)
    indices = torch.arange(sampling.number) if indices is None else indices.cpu()
    logits_of = in_float64(net)
    itos = {index: character for character, index in stoi.items()}
    itos[0] = ""  # What follows the end is empty, too.
    return [
        "".join(itos[index] for index in name)
        for batch in indices.split(BLOCK)
        for name in _sample(logits_of, start, block_size, len(stoi), sampling, batch).tolist()
    ]


def _sample(
    logits_of: nn.Module, start: list[int], block_size: int, vocab_size: int, sampling: Sampling, indices: Tensor
) -> Tensor:
    """Return names as indices (B, T), each with zeros from where it ends."""
    device = next(logits_of.parameters()).device
    # The end marks before a word, the prefix, and then one column after the other.
    names = torch.tensor([0] * block_size + start, device=device).repeat(len(indices), 1)  # (B, block_size + length)
    ended = torch.zeros(len(indices), dtype=torch.bool, device=device)  # (B,)
    noises = gumbel_noise(sampling.seed, indices, vocab_size)
    for length in range(len(start), sampling.max_length):
        logits = logits_of(names[:, -block_size:])  # (B, vocab_size)
        scores = logits + sampling.temperature * next(noises).to(logits)
        if not scores.isfinite().all():
            raise ValueError("Expected finite logits, got others; the network's weights are no longer numbers.")
        if length < sampling.min_length:
            scores[:, 0] = -torch.inf
        character = scores.argmax(1).masked_fill(ended, 0)  # (B,)
        names = torch.column_stack((names, character))
        ended |= character == 0
        if ended.all():
            break
    return names[:, block_size:]


def gumbel_noise(seed: int, indices: Tensor, vocab_size: int) -> Iterator[Tensor]:
    """Draw, position after position, a number of the standard Gumbel distribution for every name and character.

    Args:
        seed: Seed of the random numbers.
        indices: The numbers of the names (B,).
        vocab_size: Number of characters.

    Yields:
        The numbers (B, vocab_size) of a position, float64, on the CPU, whose generator draws the same everywhere.
    """
    blocks, rows = indices // BLOCK, indices % BLOCK
    generators = {block: generator_of(seed, block) for block in blocks.unique().tolist()}
    while True:
        uniform = torch.empty(len(indices), vocab_size, dtype=torch.float64)
        for block, generator in generators.items():
            # A whole block, however many of its names are wanted, so that all have the numbers that they always have.
            drawn = torch.rand(BLOCK, vocab_size, generator=generator, dtype=torch.float64)
            uniform[blocks == block] = drawn[rows[blocks == block]]
        # A draw can be 0, whose logarithm is infinite.
        yield -(-uniform.clamp_min_(torch.finfo(torch.float64).tiny).log_()).log_()


def in_float64(net: nn.Module) -> nn.Module:
    """Return a copy of a network in eval mode and in float64, or in float32 where the device has nothing finer.

    Args:
        net: The network, which stays as it is.
    """
    on_apple = any(parameter.device.type == "mps" for parameter in net.parameters())
    return deepcopy(net).to(torch.float32 if on_apple else torch.float64).eval()
