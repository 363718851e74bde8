"""Random models: whatever is folded, the outputs stay, on other inputs, other batch sizes and other statistics.

A model is a random program over a list of values. It knows layers, BatchNorms, elementwise functions, sums, pieces,
views, writes in place and branches, uses layers and BatchNorms more than once, and returns or keeps some of its values.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lit_bnfold.folding import FoldingPlan, plan_folding

# The batch axis has a size that is not known; ``-k`` stands for ``k`` times the size of the batch.
Shape = tuple[int, ...]
Step = tuple[str, tuple[Any, ...]]
ELEMENTWISE = ("relu", "tanh", "neg", "double", "shift", "copy", "same", "detach", "data")
IN_PLACE = ("relu_", "add_", "zero_part_", "set_first_")


class Nameless(nn.Module):
    """A layer of no class that anybody knows."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.randn(out_features))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class Program(nn.Module):
    """Runs steps on a list of values, which begins with the inputs."""

    def __init__(self, steps: list[Step], returned: list[int], modules: dict[str, nn.Module]) -> None:
        super().__init__()
        self.steps, self.returned = steps, returned
        for name, module in modules.items():
            self.add_module(name, module)

    def extra_repr(self) -> str:
        return "\n".join(f"{name}{arguments}" for name, arguments in self.steps) + f"\nreturn {self.returned}"

    def forward(self, x: Tensor) -> list[Tensor]:
        values = [x]
        for name, arguments in self.steps:
            values += getattr(self, f"do_{name}")(values, *arguments)
        self.last = None
        return [values[index] for index in self.returned]

    def do_call(self, values: list[Tensor], module: str, v: int, past_hooks: bool) -> list[Tensor]:
        called: Any = self.get_submodule(module)
        return [called.forward(values[v]) if past_hooks else called(values[v])]

    def do_map(self, values: list[Tensor], function: str, v: int) -> list[Tensor]:
        x = values[v]
        functions: dict[str, Callable[[], Tensor]] = {
            "relu": x.relu, "tanh": x.tanh, "neg": x.neg, "double": lambda: x * 2, "shift": lambda: x + 1,
            "copy": x.clone, "same": lambda: x, "detach": x.detach, "data": lambda: x.data,
        }  # fmt: skip
        return [functions[function]()]

    def do_write(self, values: list[Tensor], function: str, v: int) -> list[Tensor]:
        x = values[v]
        functions: dict[str, Callable[[], Any]] = {
            "relu_": x.relu_, "add_": lambda: x.add_(1), "zero_part_": lambda: x.narrow(0, 0, 1).zero_(),
            "set_first_": lambda: x.__setitem__((..., 0), 1.0),
        }  # fmt: skip
        functions[function]()
        return []

    def do_add(self, values: list[Tensor], a: int, b: int, factor: float) -> list[Tensor]:
        return [torch.add(values[a], values[b], alpha=factor)]

    def do_multiply(self, values: list[Tensor], a: int, b: int) -> list[Tensor]:
        return [values[a] * values[b].tanh()]

    def do_cat(self, values: list[Tensor], chosen: list[int], axis: int) -> list[Tensor]:
        return [torch.cat([values[v] for v in chosen], axis)]

    def do_split(self, values: list[Tensor], v: int, sizes: list[int], axis: int) -> list[Tensor]:
        return list(values[v].split(sizes, axis))

    def do_slice(self, values: list[Tensor], v: int, axis: int, start: int, step: int) -> list[Tensor]:
        index = [slice(None)] * values[v].dim()
        index[axis] = slice(start, None, step)
        return [values[v][tuple(index)]]

    def do_reshape(self, values: list[Tensor], v: int, shape: Shape) -> list[Tensor]:
        # The one axis that depends on the batch is left to torch.
        return [values[v].reshape([size if size > 0 else -1 for size in shape])]

    def do_permute(self, values: list[Tensor], v: int, axes: list[int]) -> list[Tensor]:
        return [values[v].permute(axes)]

    def do_mean(self, values: list[Tensor], v: int, axis: int) -> list[Tensor]:
        return [values[v].mean(axis)]

    def do_branch(self, values: list[Tensor], v: int, a: int, b: int) -> list[Tensor]:
        return [values[a] if values[v].sum() > 0 else values[b]]

    def do_keep(self, values: list[Tensor], v: int) -> list[Tensor]:
        self.kept = values[v]
        return []


class Writer:
    """Writes a random program that runs on every batch size.

    Args:
        draw: Draws from a strategy.
    """

    def __init__(self, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
        self.draw = draw
        self.steps: list[Step] = []
        self.modules: dict[str, nn.Module] = {}
        self.used: set[int] = set()
        first = self.pick([3, 4])
        self.shapes: list[Shape] = [self.pick([(-1, first), (-1, self.pick([2, 3, 4]), first)])]

    def pick(self, choices: Any) -> Any:
        return self.draw(st.sampled_from(list(choices)))

    def value(self, wanted: Callable[[Shape], bool] = lambda shape: True) -> int | None:
        """A value, sooner one that nobody has used yet: those that are used twice are seldom foldable."""
        fitting = [index for index, shape in enumerate(self.shapes) if wanted(shape)][::-1]
        fresh = [index for index in fitting if index and index not in self.used]
        if not fitting:
            return None
        chosen: int = self.pick(fresh[:2] if fresh and self.draw(st.integers(0, 7)) < 7 else fitting)
        self.used.add(chosen)
        return chosen

    def step(self, name: str, arguments: tuple[Any, ...], *shapes: Shape) -> None:
        self.steps.append((name, arguments))
        self.shapes.extend(shapes)

    def call(self, name: str, v: int, shape: Shape) -> None:
        self.step("call", (name, v, self.draw(st.integers(0, 7)) == 7), shape)

    def module(self, fitting: Callable[[nn.Module], bool], make: Callable[[], nn.Module]) -> tuple[str, nn.Module]:
        """A module that is there already, or a new one."""
        there = [name for name, module in self.modules.items() if fitting(module)]
        if there and self.draw(st.integers(0, 3)) == 0:
            name = self.pick(there)
            return name, self.modules[name]
        name = f"{'bn' if isinstance(new := make(), nn.BatchNorm1d) else 'fc'}{len(self.modules)}"
        self.modules[name] = new
        return name, new

    def linear(self) -> None:
        v = self.value(lambda shape: shape[-1] > 0)
        if v is not None:
            size = self.shapes[v][-1]
            name, layer = self.module(
                lambda m: isinstance(m, (nn.Linear, Nameless)) and m.in_features == size,
                lambda: self.layer(size, self.pick([2, 3, 4, 6])),
            )
            self.call(name, v, (*self.shapes[v][:-1], layer.out_features))

    def layer(self, i: int, o: int) -> nn.Module:
        kind = self.pick(["torch's"] * 5 + ["nameless", "weight_norm", "spectral_norm"])
        if kind == "nameless":
            return Nameless(i, o)
        layer = nn.Linear(i, o, bias=self.draw(st.booleans()))
        return layer if kind == "torch's" else getattr(nn.utils.parametrizations, kind)(layer)

    def block(self) -> None:
        """Layers, something transparent perhaps, and a BatchNorm."""
        for _ in range(self.pick([1, 1, 2])):
            self.linear()
        for _ in range(self.pick([0, 0, 0, 1, 1, 2])):
            self.pick([self.add, self.cat, self.pieces, self.reshape, self.permute, self.mean])()
        for _ in range(self.pick([1, 1, 1, 2])):
            self.batchnorm()

    def residual(self) -> None:
        """A layer whose own input is added to its output, and a BatchNorm."""
        v = self.value(lambda shape: len(shape) == 2 and shape[1] > 0)
        if v is None:
            return
        size = self.shapes[v][1]
        name, _ = self.module(
            lambda m: isinstance(m, (nn.Linear, Nameless)) and m.in_features == m.out_features == size,
            lambda: self.layer(size, size),
        )
        self.call(name, v, self.shapes[v])
        summands = self.pick([(len(self.shapes) - 1, v), (v, len(self.shapes) - 1)])
        self.step("add", (*summands, self.pick([1, 1, -1, 2])), self.shapes[v])
        self.batchnorm(len(self.shapes) - 1)

    def batchnorm(self, v: int | None = None) -> None:
        v = self.value(lambda shape: len(shape) in (2, 3) and shape[1] > 0) if v is None else v
        if v is None or len(self.shapes[v]) not in (2, 3) or self.shapes[v][1] < 0:
            return
        size = self.shapes[v][1]
        name, _ = self.module(
            lambda m: isinstance(m, nn.BatchNorm1d) and m.num_features == size,
            lambda: nn.BatchNorm1d(size, affine=self.draw(st.booleans())),
        )
        self.call(name, v, self.shapes[v])

    def elementwise(self) -> None:
        v = self.value()
        self.step("map", (self.pick(ELEMENTWISE), v), self.shapes[v or 0])

    def write(self) -> None:
        self.step("write", (self.pick(IN_PLACE), self.value()))

    def add(self) -> None:
        a = self.value()
        b = self.value(lambda shape: shape == self.shapes[a or 0])
        if self.draw(st.booleans()):
            self.step("add", (a, b, self.pick([1, -1, 2])), self.shapes[a or 0])
        else:
            self.step("multiply", (a, b), self.shapes[a or 0])

    def cat(self) -> None:
        a = self.value() or 0
        axis = self.pick(range(len(self.shapes[a])))
        rest = [size for i, size in enumerate(self.shapes[a]) if i != axis]
        b = self.value(lambda s: len(s) == len(self.shapes[a]) and [x for i, x in enumerate(s) if i != axis] == rest)
        shape, total = list(self.shapes[a]), self.shapes[a][axis] + self.shapes[b or 0][axis]
        shape[axis] = total
        if abs(total) <= 12:
            self.step("cat", ([a, b], axis), tuple(shape))

    def pieces(self) -> None:
        v = self.value() or 0
        axes = [axis for axis, size in enumerate(self.shapes[v]) if size > 1]
        if axes:
            axis = self.pick(axes)
            size = self.shapes[v][axis]
            if self.draw(st.booleans()):
                first = self.pick(range(1, size))
                sizes = [first, size - first]
                self.step("split", (v, sizes, axis), *(self.with_size(v, axis, part) for part in sizes))
            else:
                start, step = self.pick(range(size - 1)), self.pick([1, 2])
                self.step("slice", (v, axis, start, step), self.with_size(v, axis, len(range(start, size, step))))

    def with_size(self, v: int, axis: int, size: int) -> Shape:
        shape = self.shapes[v]
        return (*shape[:axis], size, *shape[axis + 1 :])

    def reshape(self) -> None:
        v = self.value() or 0
        shape = self.shapes[v]
        if self.draw(st.booleans()) and len(shape) > 1:  # join two neighbours
            axis = self.pick(range(len(shape) - 1))
            joined = shape[axis] * shape[axis + 1]
            new = (*shape[:axis], joined, *shape[axis + 2 :])
        else:  # split one axis
            axis = self.pick(range(len(shape)))
            size = shape[axis]
            factor = self.pick([f for f in range(1, abs(size) + 1) if size % f == 0])
            new = (*shape[:axis], size // factor, factor, *shape[axis + 1 :])
            if size > 0 and self.draw(st.booleans()):
                new = (*shape[:axis], factor, size // factor, *shape[axis + 1 :])
        if sum(size < 0 for size in new) == 1 and math.prod(abs(size) for size in new) <= 64 and len(new) <= 4:
            self.step("reshape", (v, new), new)

    def permute(self) -> None:
        v = self.value() or 0
        axes = self.draw(st.permutations(range(len(self.shapes[v]))))
        self.step("permute", (v, axes), tuple(self.shapes[v][axis] for axis in axes))

    def mean(self) -> None:
        v = self.value(lambda shape: len(shape) > 2)
        if v is not None:
            axes = [axis for axis, size in enumerate(self.shapes[v]) if size > 0]
            axis = self.pick(axes)
            self.step("mean", (v, axis), (*self.shapes[v][:axis], *self.shapes[v][axis + 1 :]))

    def branch(self) -> None:
        a = self.value() or 0
        b = self.value(lambda shape: shape == self.shapes[a])
        self.step("branch", (self.value(), a, b), self.shapes[a])

    def keep(self) -> None:
        self.step("keep", (self.value(),))

    def program(self) -> Program:
        some = [self.linear, self.batchnorm, self.elementwise, self.add, self.cat, self.pieces, self.reshape]
        for _ in range(self.draw(st.integers(1, 6))):
            self.pick([*[self.block] * 6, self.residual, *some, self.permute, self.mean])()
            if self.draw(st.integers(0, 9)) == 9:
                self.pick([self.write, self.write, self.branch, self.keep])()
        returned = [len(self.shapes) - 1]
        if self.draw(st.integers(0, 3)) == 3:
            returned.append(self.value() or 0)
        return Program(self.steps, returned, self.modules)


@st.composite
def programs(draw: Callable[[st.SearchStrategy[Any]], Any]) -> tuple[Program, Shape]:
    writer = Writer(draw)
    return writer.program(), writer.shapes[0]


def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [output.clone() for output in model(x.clone())]


def assert_agree(model: nn.Module, folded: nn.Module, inputs: list[Tensor]) -> None:
    for x in inputs:
        for expected, found in zip(run(model, x), run(folded, x), strict=True):
            assert found.shape == expected.shape
            scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * scale, equal_nan=True)


def examine(
    program: Program, shape: Shape, example_size: int, randomise: Callable[[nn.Module], nn.Module]
) -> FoldingPlan:
    """Fold a program, and compare it with itself in every way."""
    torch.manual_seed(len(program.steps))
    for parameter in program.parameters():
        nn.init.normal_(parameter)  # Those of the drawing depend on what was drawn before.
    model = randomise(program.double()).eval()
    inputs = [torch.randn(size, *shape[1:], dtype=torch.float64) for size in (example_size, 5, 2, 1)]
    plan = plan_folding(model, (inputs[0],))
    # The trial of a plan is the last line of defence: it should never have to find what the rules have missed.
    assert not {kept.code for kept in plan.kept} & {"unexplained", "structure-read"}
    named = [fold.batchnorm for fold in plan.folds] + [kept.batchnorm for kept in plan.kept]
    assert sorted(named) == sorted(name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm1d))
    assert_agree(model, plan.apply(model), [*inputs, 100 * inputs[1], -inputs[1]])
    # In fewer digits the same is folded, and each number keeps its dtype.
    dtype = (torch.float32, torch.bfloat16)[example_size % 2]
    rounded = copy.deepcopy(model).to(dtype)
    narrow = plan_folding(rounded, (inputs[0].to(dtype),))
    assert [fold.batchnorm for fold in narrow.folds] == [fold.batchnorm for fold in plan.folds]
    assert {parameter.dtype for parameter in narrow.apply(rounded).parameters()} <= {dtype}
    # This knows nothing of graphs: whatever the numbers of the BatchNorms become, the same plan must follow them.
    for _ in range(2):
        assert_agree(model, plan.apply(randomise(model)), inputs)
    return plan


EVERYTHING = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
Randomised = Callable[[nn.Module], nn.Module]


@settings(max_examples=120, derandomize=True, **EVERYTHING)
@given(programs(), st.integers(2, 4))
def test_folding_a_random_model_changes_nothing(
    randomised: Randomised, drawn: tuple[Program, Shape], size: int
) -> None:
    examine(*drawn, size, randomised)


@pytest.mark.long
def test_folding_thousands_of_random_models_changes_nothing(randomised: Randomised) -> None:
    verdicts: Counter[str] = Counter()

    @settings(max_examples=5000, **EVERYTHING)
    @given(programs(), st.integers(2, 4))
    def try_many(drawn: tuple[Program, Shape], size: int) -> None:
        plan = examine(*drawn, size, randomised)
        verdicts.update(["models", *("folds" for _ in plan.folds), *(kept.code for kept in plan.kept)])

    try_many()
    print(dict(verdicts.most_common()))
