"""The search for the layers that can take a BatchNorm: how far it goes, where it stops, and what it says then."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_bnfold.folding import BatchNormKind, FoldingPlan, Kinds, Part, fold_batchnorm, plan_folding
from lit_bnfold.folding.kinds import KINDS
from lit_bnfold.folding.search import make_plan
from lit_bnfold.folding.trial import run_as_it_is

Judge = Callable[..., FoldingPlan]
X = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def kept(model: nn.Module, example: Tensor = X, *, name: str | None = None, **kwargs: Any) -> tuple[str, str]:
    """The code and the reason with which a model keeps a BatchNorm, by default its only one."""
    reasons = {reason.batchnorm: reason for reason in plan_folding(model.eval(), (example,), **kwargs).kept}
    (reason,) = reasons.values() if name is None else [reasons[name]]
    return reason.code, reason.reason


# One BatchNorm after the other.


def test_batchnorms_in_a_row_before_a_layer_all_go_into_it(judge: Judge) -> None:
    model = nn.Sequential(nn.ReLU(), *[nn.BatchNorm1d(3) for _ in range(3)], nn.Linear(3, 4))
    judge(model, X, folds={"1": ["4"], "2": ["4"], "3": ["4"]})


# Up to the layers.


def test_output_that_is_asked_for_different_maps_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.fc(x)
        return m.bn(h) + m.bn(h.transpose(1, 2))

    judge(net(forward), torch.randn(5, 4, 3, dtype=torch.float64), kept={"bn": "two-maps"})


def twice(m: Any, x: Tensor) -> Tensor:
    return m.bn(m.bn(x) + m.conv(x)).tanh()


def read_behind_a_view(m: Any, x: Tensor) -> Tensor:
    h = m.conv(x).flatten(2)
    return m.bn(h) * h.sum()


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: m.bn(x), "it normalises an input, which no layer made"),
        (lambda m, x: m.bn(m.parameter) + x, "it normalises `parameter`, which no layer made"),
        (lambda m, x: m.bn(x.relu()), "it normalises what `relu` in the model made, which is no layer"),
        (
            lambda m, x: m.bn(nn.functional.conv2d(x, m.conv.weight)),
            "it normalises what `convolution` in the model made, outside of any layer",
        ),
        (twice, "it normalises what the BatchNorm `bn` gave, which stays"),
        (lambda m, x: m.bn(h := m.conv(x)) * h.sum(), "the output of `conv` is also read by `sum` in the model"),
        (read_behind_a_view, "what `reshape` in the model gave is also read by `sum` in the model"),
    ],
)
def test_batchnorm_that_stays_says_what_is_before_it(forward: Any, reason: str, net: Any) -> None:
    norm = nn.BatchNorm1d if forward is read_behind_a_view else nn.BatchNorm2d
    parameter = nn.Parameter(torch.randn(2, 3, 4, 4))
    model = net(forward, conv=nn.Conv2d(3, 3, 1), id=nn.BatchNorm2d(3), bn=norm(3), parameter=parameter).double()
    assert kept(model, IMAGES, name="bn")[1].split("; and ")[0] == reason


def test_value_that_is_read_twice_is_asked_once_for_its_map(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.fc(x)
        for _ in range(40):
            h = torch.cat([h[:, :1], h[:, 1:]], 1)
        return m.bn(h)

    judge(net(forward), X, folds={"bn": ["fc"]})


# Down to the layers.


def test_call_that_reads_a_value_twice_is_met_once(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.bn(x.relu())
        # From each to the next there are two ways: 2**40 in all.
        for _ in range(40):
            h = torch.cat([h[:, :1], h[:, 1:]], 1)
        return m.a(h) + m.b(h)

    judge(net(forward, bn=nn.BatchNorm1d(3), a=nn.Linear(3, 4), b=nn.Linear(3, 4)), X, folds={"bn": ["a", "b"]})


def test_part_that_no_batchnorm_went_into_may_go_anywhere(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        normalised, other = torch.cat([m.bn(x.relu()), x], 1).split([3, 3], 1)
        return m.fc(normalised) * other.sin().sum(1, keepdim=True)

    judge(net(forward, bn=nn.BatchNorm1d(3), fc=nn.Linear(3, 4)), X, folds={"bn": ["fc"]})


# What is written, and when.


@pytest.mark.parametrize("time", ["before", "between", "after"])
def test_input_that_is_written_before_the_batchnorm_or_after_the_layer_does_not_keep_it(
    time: str, judge: Judge, net: Any
) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = x.relu()
        view = h.view(-1)
        if time == "before":
            view.mul_(2)
        y = m.bn(h)
        if time == "between":
            view.mul_(2)
        z = m.fc(y)
        if time == "after":
            view.mul_(2)
        return z + view.sum()

    model = net(forward, bn=nn.BatchNorm1d(3), fc=nn.Linear(3, 4))
    if time == "between":
        judge(model, X, kept={"bn": "no-layer"})
        assert kept(model)[1].endswith("is written in place by `mul_` in the model after it was read")
    else:
        judge(model, X, folds={"bn": ["fc"]})


def test_input_that_is_reached_in_an_unknown_way_keeps_the_batchnorm(net: Any) -> None:
    block = net(lambda m, x: m.fc(m.bn(x)), bn=nn.BatchNorm1d(3), fc=nn.Linear(3, 4))

    def forward(m: Any, x: Tensor) -> Tensor:
        h = x.relu()
        other = torch.from_numpy(h.numpy())
        return m.block(h) + other.sum()

    code, reason = kept(net(forward, block=block).double())
    assert code == "other-reader"
    assert reason.endswith("; and what `relu` in the model gave is also reached through a tensor of unknown origin")


# What the run noted of memory.


@pytest.mark.parametrize(
    ("function", "owner", "takers"),
    [
        (lambda m, x: m.fc(m.bn(x.relu())), None, ["fc"]),
        (lambda m, x: (m.fc(x) + m.bn(x)).tanh(), "bn", ["fc"]),
        (lambda m, x: (m.fc(x) + m.bn(x)).tanh(), "fc", ["fc"]),
        (lambda m, x: m.bn(m.fc(x)), "fc", ["fc"]),
    ],
)
def test_value_that_may_be_reached_otherwise_keeps_the_batchnorm(
    function: Any, owner: str | None, takers: list[str], net: Any
) -> None:
    model = net(function, fc=nn.Linear(3, 3), bn=nn.BatchNorm1d(3)).double().eval()
    graph = run_as_it_is(model, (X,), {}, KINDS).graph
    assert [fold.layers for fold in make_plan(graph).folds] == [tuple(takers)]
    (call,) = graph.calls_of["bn" if owner is None else owner]
    value = graph.values[call.inputs[0] if owner is None else call.outputs[0]]
    graph.aliased[value.storage] = "is also reached through a tensor of unknown origin"
    assert make_plan(graph).folds == ()


@pytest.mark.parametrize(("gain", "noted"), [(1000.0, False), (1000.5, True)])
def test_fold_is_noted_if_it_costs_more_than_three_digits(gain: float, noted: bool, net: Any) -> None:
    graph = run_as_it_is(net(lambda m, x: m.bn(m.fc(x))).double().eval(), (X,), {}, KINDS).graph
    graph.batchnorms["bn"] = replace(graph.batchnorms["bn"], gain=gain)
    (fold,) = make_plan(graph).folds
    # A layer that takes all channels in their order is told no more than that.
    assert fold.parts == (Part("fc"),)
    assert (fold.note is not None) == noted


@pytest.mark.parametrize(
    ("gain", "dtype", "note"),
    [
        (2e4, torch.float32, "up to 2.0e+04 times larger, so that float32 loses 4 of its 7 digits"),
        (2e11, torch.float32, "float32 loses 7 of its 7 digits"),
        (2e11, torch.float64, "float64 loses 11 of its 16 digits"),
        (2e4, torch.bfloat16, "bfloat16 loses 2 of its 2 digits"),
        (math.inf, torch.float32, "a channel of it has no variance and no bias"),
    ],
)
def test_note_counts_the_digits_of_the_dtype(gain: float, dtype: torch.dtype, note: str, net: Any) -> None:
    graph = run_as_it_is(net(lambda m, x: m.bn(m.fc(x))).to(dtype).eval(), (X.to(dtype),), {}, KINDS).graph
    graph.batchnorms["bn"] = replace(graph.batchnorms["bn"], gain=gain)
    (fold,) = make_plan(graph).folds
    assert note in fold.note
    assert "inf" not in fold.note


@pytest.mark.parametrize(("dtype", "mean"), [(torch.bfloat16, 30.0), (torch.float16, 300.0), (torch.float32, 3000.0)])
def test_a_narrow_dtype_is_warned_of_earlier(dtype: torch.dtype, mean: float) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval()
    for expected, factor in ((True, 1.0), (False, 0.1)):
        nn.init.constant_(model[1].running_mean, factor * mean)
        (fold,) = plan_folding(model.to(dtype), (X.to(dtype),)).folds
        assert (fold.note is not None) == expected


def test_weights_that_float16_could_hardly_tell_apart_stay() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).half().eval()
    model[1].float()
    for var, folds in ((1e4, True), (1e13, False)):
        nn.init.constant_(model[1].running_var, var)
        assert bool(plan_folding(model, (X.half(),)).folds) == folds
    # A channel that is switched off may vanish.
    nn.init.constant_(model[1].running_var, 1.0)
    with torch.no_grad():
        model[1].weight[0] = 1e-7
    assert plan_folding(model, (X.half(),)).folds


def test_a_layer_of_zeros_in_float16_is_folded() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).half().eval()
    for parameter in model[0].parameters():
        nn.init.zeros_(parameter)
    assert plan_folding(model, (X.half(),)).folds


def test_subnormal_weights_of_float16_are_kept_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(64, 8, bias=False), nn.BatchNorm1d(8)).eval()
    nn.init.constant_(model[1].running_var, 1e6)
    model[0].half()
    x = (1e3 * torch.randn(16, 64)).half()
    folded = fold_batchnorm(model, (x,))
    torch.testing.assert_close(folded(x), model(x), rtol=0, atol=0.005)


def test_cast_to_a_narrower_dtype_before_the_layer_keeps_the_batchnorm(net: Any) -> None:
    modules = {"bn": nn.BatchNorm1d(3), "fc": nn.Linear(3, 4)}
    for narrow in (torch.float16, torch.bfloat16):
        model = net(lambda m, x, narrow=narrow: m.fc(m.bn(x.tanh()).to(narrow)), **modules)
        model.fc.to(narrow)
        code, reason = kept(model, X.float())
        assert code == "no-layer"
        assert "rounds to a narrower dtype" in reason
        model.fc.float()
    wide = net(lambda m, x: m.fc(m.bn(x.tanh().half()).float()), **modules)
    assert plan_folding(wide.eval(), (X.float(),)).folds


def test_dead_channel_is_noted_in_words() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double().eval()
    model[1].running_var[0] = 0.0
    model[1].running_mean[0] = 1.0
    (fold,) = plan_folding(model, (X,)).folds
    assert fold.note.startswith("a channel of it has no variance and no bias")


# What a BatchNorm does besides.


def test_layout_along_an_axis_of_size_1_that_a_later_view_relies_on_stays(judge: Judge, net: Any) -> None:
    model = net(lambda m, x: m.bn(m.fc(x)[::5]).view(-1, 2))
    # Of ten examples two are left, and the view would find them apart in memory.
    judge(model, X, folds={"bn": ["fc"]}, others=[(torch.randn(10, 3, dtype=torch.float64),)])
    model = net(lambda m, x: m.bn(m.conv(x)[::2]).view(-1, 4), conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4))
    judge(model, IMAGES, folds={"bn": ["conv"]}, others=[(torch.randn(4, 3, 4, 4, dtype=torch.float64),)])


def test_single_step_with_its_channels_last_is_laid_out_anew(judge: Judge, net: Any) -> None:
    model = net(lambda m, x: m.bn(m.fc(x).transpose(1, 2)).view(len(x), -1))
    others = [(torch.randn(5, 2, 3, dtype=torch.float64),)]
    judge(model, torch.randn(5, 1, 3, dtype=torch.float64), folds={"bn": ["fc"]}, others=others)


class Wide(nn.Module):
    """Normalises in float32 whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("variance", torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() - self.mean) / self.variance.sqrt()


@pytest.mark.parametrize("reader", [nn.Tanh(), nn.Linear(4, 2)])
def test_normalisation_that_gives_another_dtype_is_kept(reader: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(3, 4).bfloat16(), Wide(), reader)
    kinds = Kinds(batchnorms=(BatchNormKind(Wide, "mean", "variance"),))
    code, reason = kept(model, X.bfloat16(), kinds=kinds)
    assert code == "layout"
    assert reason.startswith("it turns torch.bfloat16 into torch.float32")


class Branching(nn.Module):
    """A layer and its BatchNorm, and a decision."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(3, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn(self.fc(x))
        return h if x.sum() < 1e9 else -h  # type: ignore[no-any-return]


@pytest.mark.parametrize("place", ["the model", "`block`"])
def test_decision_about_a_tensor_is_told_with_its_place(place: str, net: Any) -> None:
    model = Branching() if place == "the model" else net(lambda m, x: m.block(x), block=Branching())
    code, reason = kept(model.double())
    assert code == "python-value"
    cause = f"`item` in {place} makes a Python value of a tensor"
    assert reason.startswith(f"{cause}, and {place} may take another path next time")


def test_what_may_decide_next_time_is_named(net: Any) -> None:
    def failing(m: Any, x: Tensor) -> Tensor:
        with suppress(RuntimeError):
            torch.multinomial(x, 1)
        return m.bn(m.fc(x))  # type: ignore[no-any-return]

    ways = {
        "`item` in the model makes a Python value of a tensor": lambda m, x: m.bn(m.fc(x)) * float(x[0, 0].item()),
        "`multinomial` in the model fails": failing,
        "`index` in the model picks by a mask": lambda m, x: m.bn(m.fc(x[x[:, 0] < 9])),
    }
    for cause, way in ways.items():
        code, reason = kept(net(way).double())
        assert (code, reason.partition(", and ")[0]) == ("python-value", cause)


def test_module_that_is_told_says_so(net: Any) -> None:
    inner = net(lambda m, x, flag: m.bn(m.fc(x)) if flag else m.fc(x))
    code, reason = kept(net(lambda m, x: m.inner(x, bool((x < 9).all())), inner=inner).double())
    assert code == "python-value"
    cause = "`item` in the model makes a Python value of a tensor"
    assert reason.startswith(f"{cause}, and `inner` may take another path next time")


# Beside a layer.


class Beside(nn.Module):
    """A BatchNorm and a convolution of one input, and what a test makes of the two."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.conv, self.id = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.bn, self.other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


@pytest.mark.parametrize(
    "read",
    [torch.zeros_like, torch.empty_like, lambda y: torch.full_like(y, 2.0), lambda y: y.new_zeros(y.shape),
     lambda y: y.new_ones(1)],
)  # fmt: skip
def test_reader_of_the_shape_alone_does_not_keep_the_batchnorm(read: Any, judge: Judge, net: Any) -> None:
    judge(net(lambda m, x: m.bn(y := m.fc(x)).relu() + 0 * read(y).nan_to_num()), X, folds={"bn": ["fc"]})


def test_reader_of_the_layout_of_what_was_folded_beside_a_layer_keeps_it(judge: Judge) -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        y = m.id(x)
        is_plain = torch.zeros_like(y).is_contiguous()
        return (y + m.conv(x)) * (2 if is_plain else 3)

    model = Beside(function)
    del model.bn, model.other
    judge(model, IMAGES, kept={"id": "other-reader"}, others=[(IMAGES.to(memory_format=torch.channels_last),)])


def called_twice(m: Any, x: Tensor) -> Tensor:
    return (m.conv(x) + m.id(x)).tanh() * m.id(x)


def kept_by_somebody(m: Any, x: Tensor) -> Any:
    y = m.id(x)
    return (m.conv(x) + y).tanh(), y


def sum_kept_by_somebody(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    return (y + m.id(x)).tanh(), y


def inner_sum_kept_by_somebody(m: Any, x: Tensor) -> Any:
    y = m.conv(x) + x
    return (y + m.id(x)).tanh(), y


@pytest.mark.parametrize(
    "function",
    [
        called_twice,
        kept_by_somebody,
        sum_kept_by_somebody,
        inner_sum_kept_by_somebody,
        lambda m, x: (m.conv(x) + (m.id(x) + 1.0)).tanh(),
        lambda m, x: m.conv(x) + 2 * m.id(x),
        # Sums of other shapes than the summands have.
        lambda m, x: ((m.conv(x) + x[:1]) + m.id(x)).tanh(),
    ],
)
def test_batchnorm_beside_a_layer_is_kept_where_either_shows(function: Any, judge: Judge) -> None:
    model = Beside(function)
    del model.bn, model.other
    judge(model, IMAGES, kept={"id": "other-reader"})


@pytest.mark.parametrize(
    "function",
    [lambda m, x: m.id(x).add_(m.conv(x)).relu_(), lambda m, x: m.conv(x).add_(m.id(x)).relu_(),
     lambda m, x: m.id(x).add_(m.conv(x))],
)  # fmt: skip
def test_sum_whose_memory_is_that_of_what_is_returned_is_folded(function: Any, judge: Judge) -> None:
    model = Beside(function)
    del model.bn, model.other
    judge(model, IMAGES, folds={"id": ["conv"]})


def test_part_of_what_was_written_over_that_is_still_seen_keeps_the_batchnorm(judge: Judge) -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        y = m.id(x)
        y[:, :, 1:].add_(m.conv(x)[:, :, 1:])
        return y

    model = Beside(function)
    del model.bn, model.other
    judge(model, IMAGES, kept={"id": "other-reader"})


def test_input_of_both_that_is_written_between_them_keeps_the_batchnorm(judge: Judge) -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        h = x.relu()
        y = m.conv(h)
        h.view(-1).mul_(2)
        return (y + m.id(h)).tanh()

    model = Beside(function)
    del model.bn, model.other
    judge(model, IMAGES, kept={"id": "other-reader"})


@pytest.mark.parametrize(
    "combine",
    [lambda y, z: y * z, torch.maximum, torch.atan2, lambda y, z: torch.add(y, z, alpha=2),
     lambda y, z: torch.sub(z, y, alpha=2), lambda y, z: torch.hypot(y, z)],
)  # fmt: skip
def test_batchnorm_beside_a_layer_is_kept_where_the_two_are_not_added(combine: Any, judge: Judge) -> None:
    model = Beside(lambda m, x: combine(m.conv(x), m.id(x)).tanh())
    del model.bn, model.other
    judge(model, IMAGES, kept={"id": "other-reader"})


def test_batchnorm_beside_a_layer_that_is_called_again_is_kept(judge: Judge) -> None:
    model = Beside(lambda m, x: (m.conv(x) + m.id(x)).tanh() * m.conv(x.sin()))
    del model.bn, model.other
    judge(model, IMAGES, kept={"id": "other-reader"})


def test_batchnorm_beside_a_layer_over_another_axis_is_kept(judge: Judge, net: Any) -> None:
    model = net(lambda m, x: (m.fc(x) + m.bn(x)).tanh(), fc=nn.Linear(4, 4), bn=nn.BatchNorm1d(4))
    others = [(torch.randn(n, 4, 4, dtype=torch.float64),) for n in (1, 7)]
    judge(model, torch.randn(5, 4, 4, dtype=torch.float64), kept={"bn": "other-reader"}, others=others)


def test_batchnorm_that_is_subtracted_from_a_difference_goes_into_the_subtrahend(judge: Judge) -> None:
    model = Beside(lambda m, x: (x - m.conv(x)) - m.id(x))
    del model.bn, model.other
    plan = judge(model, IMAGES, folds={"id": ["conv"]})
    assert plan.folds[0].parts[0].shift == 1.0


@pytest.mark.parametrize("function", [lambda m, x: [m.conv(x), m.id(x)], lambda m, x: [m.id(x), m.conv(x)]])
def test_sum_of_a_list_begins_with_nothing(function: Any, judge: Judge) -> None:
    model = Beside(lambda m, x: sum(function(m, x)).tanh())
    del model.bn, model.other
    judge(model, IMAGES, folds={"id": ["conv"]})


def test_batchnorm_beside_a_layer_waits_for_the_one_behind_that(judge: Judge) -> None:
    model = Beside(lambda m, x: (m.id(x) + m.bn(m.conv(x))).tanh())
    del model.other
    judge(model, IMAGES, folds={"bn": ["conv"], "id": ["conv"]})


def test_batchnorm_beside_a_layer_does_not_mind_another_summand_that_stays(judge: Judge) -> None:
    model = Beside(lambda m, x: (m.id(x) + (m.other(x.sin()) + m.conv(x))).tanh())
    del model.bn
    judge(model, IMAGES, folds={"id": ["conv"]}, kept={"other": "no-layer"})


def test_batchnorm_beside_a_sum_that_is_written_in_place_goes_into_its_layer(judge: Judge) -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        h = m.conv(x)
        h += x.sin()
        return (m.id(x) + h).tanh()

    model = Beside(function)
    del model.bn, model.other
    judge(model, IMAGES, folds={"id": ["conv"]})


def test_batchnorm_beside_a_sum_waits_for_one_in_it(judge: Judge) -> None:
    model = Beside(lambda m, x: (m.id(x) + (m.bn(m.conv(x)) + x.sin())).tanh())
    del model.other
    judge(model, IMAGES, folds={"bn": ["conv"], "id": ["conv"]})


def test_batchnorm_beside_a_long_sum_goes_into_its_layer(judge: Judge, net: Any) -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        h = m.fc(x)
        for _ in range(1200):
            h = h + x
        return (m.id(x) + h).tanh()

    model = net(function, fc=nn.Linear(4, 4), id=nn.BatchNorm1d(4))
    judge(model, torch.randn(5, 4, dtype=torch.float64), folds={"id": ["fc"]})


# Around a layer.


class Around(nn.Module):
    """Layers, and a BatchNorm over what a test adds up."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.conv, self.point = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.Conv2d(3, 3, 1, groups=3)
        self.inner, self.bn = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


@pytest.mark.parametrize(
    ("function", "layers", "residual"),
    [
        (lambda m, x: m.bn(m.conv(x) + x).tanh(), ["conv"], 1.0),
        (lambda m, x: m.bn(x + m.conv(x)).tanh(), ["conv"], 1.0),
        (lambda m, x: m.bn(m.conv(x) - x).tanh(), ["conv"], -1.0),
        (lambda m, x: m.bn(x - m.conv(x)).tanh(), ["conv"], -1.0),
        (lambda m, x: m.bn((m.conv(x) - x) - x).tanh(), ["conv"], -2.0),
        (lambda m, x: m.bn((x - m.conv(x)) - x).tanh(), ["conv"], 0.0),
        (lambda m, x: m.bn(x + m.conv(x) + m.point(x)).tanh(), ["conv", "point"], 1.0),
        (lambda m, x: m.bn(x - (m.conv(x) - m.point(x))).tanh(), ["conv", "point"], -1.0),
        (lambda m, x: m.bn(sum([m.conv(x), x])).tanh(), ["conv"], 1.0),
        (lambda m, x: m.bn(sum([x, m.conv(x)])).tanh(), ["conv"], 1.0),
        (lambda m, x: m.bn(x - (0 + m.conv(x))).tanh(), ["conv"], -1.0),
        # Whoever else sees the input sees what it was.
        (lambda m, x: (m.bn(m.conv(x) + x), x), ["conv"], 1.0),
        (lambda m, x: m.bn(m.conv(h := x.relu()) + h) * h.exp(), ["conv"], 1.0),
    ],
)
def test_layer_takes_over_the_scaling_of_its_input_that_is_added(
    function: Any, layers: list[str], residual: float, judge: Judge
) -> None:
    model = Around(function)
    del model.inner
    plan = judge(model, IMAGES, folds={"bn": layers})
    assert plan.folds[0].parts[0].residual == residual
    assert FoldingPlan.from_dict(plan.to_dict()) == plan


def test_layer_with_a_batchnorm_of_its_own_takes_over_the_scaling_of_its_input(judge: Judge) -> None:
    model = Around(lambda m, x: m.bn(m.inner(m.conv(x)) + x).tanh())
    judge(model, IMAGES, folds={"inner": ["conv"], "bn": ["conv"]})


def test_inner_batchnorm_whose_output_is_returned_keeps_the_one_around(judge: Judge) -> None:
    def function(m: Any, x: Tensor) -> Any:
        y = m.inner(m.conv(x))
        return m.bn(y + x).tanh(), y

    judge(Around(function), IMAGES, folds={"inner": ["conv"]}, kept={"bn": "other-reader"})


def test_input_that_another_layer_made_is_added_as_it_is(judge: Judge) -> None:
    model = Around(lambda m, x: m.bn((h := m.point(x)) + m.conv(h)).tanh())
    del model.inner
    judge(model, IMAGES, folds={"bn": ["conv"]})


def test_long_sum_of_nothing_but_inputs_and_layers_folds(judge: Judge, net: Any) -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        h = m.fc(x)
        for _ in range(1200):
            h = h + x
        return m.bn(h).tanh()

    model = net(function, fc=nn.Linear(4, 4), bn=nn.BatchNorm1d(4))
    plan = judge(model, torch.randn(5, 4, dtype=torch.float64), folds={"bn": ["fc"]})
    assert plan.folds[0].parts[0].residual == 1200.0


def written_in_between(m: Any, x: Tensor) -> Tensor:
    h = x.relu()
    y = m.conv(h)
    h.mul_(2)
    return m.bn(y + h).tanh()


def written_through_a_view_in_between(m: Any, x: Tensor) -> Tensor:
    h = x.relu()
    y = m.conv(h)
    h.view(-1).mul_(2)
    return m.bn(y + h).tanh()


def added_in_place(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    y += x
    return m.bn(y).tanh()


def sum_in_place_seen_through_a_view(m: Any, x: Tensor) -> Any:
    h = x.relu()
    view = h.view(-1)
    h += m.conv(h)
    return m.bn(h).tanh(), view.exp()


def sum_of_sums_in_place(m: Any, x: Tensor) -> Tensor:
    return m.bn((m.conv(x) + x).add_(m.point(x) + x)).tanh()


def sum_is_returned(m: Any, x: Tensor) -> Any:
    y = m.conv(x) + x
    return m.bn(y).tanh(), y


def inner_sum_is_read(m: Any, x: Tensor) -> Any:
    y = m.conv(x) + x
    return m.bn(y + x) * y.exp()


def output_is_read(m: Any, x: Tensor) -> Any:
    y = m.conv(x)
    return m.bn(y + x) * y.exp()


@pytest.mark.parametrize(
    ("function", "code"),
    [
        (written_in_between, "no-layer"),
        (written_through_a_view_in_between, "other-reader"),
        (added_in_place, "other-reader"),
        (sum_in_place_seen_through_a_view, "other-reader"),
        (sum_of_sums_in_place, "other-reader"),
        (sum_is_returned, "other-reader"),
        (inner_sum_is_read, "other-reader"),
        (output_is_read, "other-reader"),
        (lambda m, x: m.bn(m.conv(x) + x.tanh()), "no-layer"),
        (lambda m, x: m.bn(m.conv(x) + x[:1]), "other-reader"),
        (lambda m, x: m.bn(torch.add(m.conv(x), x, alpha=2)), "other-reader"),
        (lambda m, x: m.bn(m.conv(x) + 2 * x), "no-layer"),
        (lambda m, x: m.bn(m.conv(x) * x), "no-layer"),
        (lambda m, x: m.bn(m.conv(x) + x) * m.conv(x.cos()), "other-reader"),
        (lambda m, x: m.bn(m.conv(x) + x) * m.bn(x + m.conv(x)), "other-reader"),
        (lambda m, x: m.bn(x + x), "not-transparent"),
    ],
)
def test_batchnorm_over_a_sum_with_an_input_is_kept(function: Any, code: str, judge: Judge) -> None:
    model = Around(function)
    del model.inner
    judge(model, IMAGES, kept={"bn": code})


@pytest.mark.parametrize(
    "layer",
    [
        nn.ConvTranspose2d(3, 3, 3, padding=1),
        nn.Conv2d(3, 3, (3, 1), padding=(2, 0), dilation=(2, 1), stride=(1, 1)),
        nn.Conv2d(3, 3, 2, padding=1, dilation=2),
    ],
    ids=str,
)
def test_taps_on_the_same_place_take_over_and_no_others(layer: nn.Module, judge: Judge, net: Any) -> None:
    model = net(lambda m, x: m.bn(m.layer(x) + x), layer=layer, bn=nn.BatchNorm2d(3))
    if layer.kernel_size == (3, 1):
        judge(model, IMAGES, folds={"bn": ["layer"]})
    else:
        judge(model, IMAGES, kept={"bn": "other-reader"})


def test_layer_whose_channels_lie_on_another_axis_takes_over_nothing(judge: Judge, net: Any) -> None:
    model = net(lambda m, x: m.bn(m.fc(x) + x), fc=nn.Linear(4, 4), bn=nn.BatchNorm1d(4))
    x = torch.randn(5, 4, 4, dtype=torch.float64)
    judge(model, x, kept={"bn": "other-reader"}, others=[(x[:1],), (x.cos(),)])


def test_layer_that_rounds_its_input_first_takes_over_nothing(net: Any) -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = m.fc(x)
        return m.bn(y + x)

    model = net(function, fc=nn.Linear(3, 3), bn=nn.BatchNorm1d(3))
    assert kept(model, X.float())[0] == "other-reader"


def test_residual_that_would_drown_in_rounding_errors_keeps_the_batchnorm() -> None:
    model = Around(lambda m, x: m.bn(m.conv(x) + x).tanh()).double().eval()
    for var, code in ((63.0, None), (65.0, "rounding")):
        model.bn.running_var.fill_(var)
        kept = {each.batchnorm: each.code for each in plan_folding(model, (IMAGES,)).kept}
        assert kept.get("bn") == code
    [reason] = [each.reason for each in plan_folding(model, (IMAGES,)).kept if each.batchnorm == "bn"]
    assert reason == "what is added before it would be rounded 8.1 times more coarsely"
    for var, weight in ((1.0, 0.0), (0.0, 1.0)):
        nn.init.constant_(model.bn.weight, weight)
        model.bn.running_var.fill_(var)
        model.bn.running_mean.zero_()
        [reason] = [each.reason for each in plan_folding(model, (IMAGES,)).kept if each.batchnorm == "bn"]
        assert reason == "what is added before it would drown in rounding errors"


def test_single_pixel_with_its_channels_last_is_laid_out_as_larger_images_are(agree: Any, randomised: Any) -> None:
    """Of a single pixel torch cannot tell where its channels lie, and a BatchNorm puts them first."""
    layers = nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.ReLU(inplace=True)
    model = randomised(nn.Sequential(*layers)).double().eval().to(memory_format=torch.channels_last)
    images = IMAGES.to(memory_format=torch.channels_last)
    assert model[:2](images).stride() != model[:3](images).stride()
    folded = fold_batchnorm(model, (images,))
    assert isinstance(folded[2], nn.Identity)
    agree(model, folded, [(images,)])
