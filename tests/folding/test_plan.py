"""What is folded and what is kept: the cases on which other tools are wrong, and the ones users meet."""

from __future__ import annotations

import copy
import json
import pickle
import re
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError, asdict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

from lit_bnfold.folding import Fold, FoldingError, FoldingPlan, Kept, Part, fold_batchnorm, plan_folding

Judge = Callable[..., FoldingPlan]
X = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
SEQUENCE = torch.randn(5, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


# The table of what other tools get wrong.


def test_batchnorm_over_the_steps_of_a_sequence_is_kept_even_if_there_are_as_many_as_channels(judge: Judge) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    judge(model, SEQUENCE, kept={"1": "channel-axis"})


def test_one_layer_called_twice_with_two_batchnorms_keeps_both(judge: Judge, net: Any) -> None:
    model = net(
        lambda m, x: (m.bn1(m.fc(x)), m.bn2(m.fc(2 * x))),
        fc=nn.Linear(3, 4), bn1=nn.BatchNorm1d(4), bn2=nn.BatchNorm1d(4),
    )  # fmt: skip
    judge(model, X, kept={"bn1": "other-call", "bn2": "other-call"})


def test_two_batchnorms_on_the_same_output_are_kept(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        h = m.fc(x)
        return m.bn1(h), m.bn2(h)

    model = net(forward, fc=nn.Linear(3, 4), bn1=nn.BatchNorm1d(4), bn2=nn.BatchNorm1d(4))
    judge(model, X, kept={"bn1": "other-reader", "bn2": "other-reader"})


def test_one_layer_called_twice_and_normalised_once_keeps_its_batchnorm(judge: Judge, net: Any) -> None:
    judge(net(lambda m, x: m.bn(m.fc(x)) + m.fc(2 * x)), X, kept={"bn": "other-call"})


def test_one_layer_called_twice_and_normalised_twice_is_folded(judge: Judge, net: Any) -> None:
    judge(net(lambda m, x: m.bn(m.fc(x)) + m.bn(m.fc(2 * x)).relu()), X, folds={"bn": ["fc"]})


def test_one_batchnorm_after_two_layers_is_folded_into_both(judge: Judge, net: Any) -> None:
    model = net(
        lambda m, x: m.bn(m.a(x)) * m.bn(m.b(x)).tanh(), a=nn.Linear(3, 4), b=nn.Linear(3, 4), bn=nn.BatchNorm1d(4)
    )
    judge(model, X, folds={"bn": ["a", "b"]})


def test_parameter_shared_by_two_layers_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    model = net(
        lambda m, x: m.bn(m.a(x)) + m.b(x), a=nn.Linear(3, 4), b=nn.Linear(3, 4, bias=False), bn=nn.BatchNorm1d(4)
    )
    model.b.weight = model.a.weight
    plan = judge(model, X, kept={"bn": "shared-parameter"})
    assert "`a.weight` is also `b.weight`" in plan.kept[0].reason


def test_parameter_that_shares_memory_with_another_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    model = net(lambda m, x: m.bn(m.a(x)) + m.b(x), a=nn.Linear(3, 4), b=nn.Linear(3, 4), bn=nn.BatchNorm1d(4)).double()
    model.b.weight = nn.Parameter(model.a.weight.detach())
    judge(model, X, kept={"bn": "aliased"})


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_affine_or_not_and_bias_or_not_batchnorm_is_folded(judge: Judge, affine: bool, bias: bool) -> None:
    judge(nn.Sequential(nn.Linear(3, 4, bias=bias), nn.BatchNorm1d(4, affine=affine)), X, folds={"1": ["0"]})


def test_layer_declared_before_its_batchnorm_but_used_after_it_is_folded_forward(judge: Judge, net: Any) -> None:
    model = net(lambda m, x: m.fc(m.bn(x)), fc=nn.Linear(3, 3), bn=nn.BatchNorm1d(3))
    assert judge(model, X, folds={"bn": ["fc"]}).folds[0].direction == "forward"


def test_python_branch_on_a_tensor_in_the_same_module_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.fc(x)
        return m.bn(h) if x.sum() > -1e9 else h

    far = torch.full((5, 3), -1e10, dtype=torch.float64)
    judge(net(forward), X, kept={"bn": "python-value"}, others=[(far,)])


def test_python_branch_around_a_block_does_not_keep_its_batchnorm(judge: Judge, net: Any) -> None:
    block = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model = net(lambda m, x: m.block(x) if x.sum() > 0 else m.block(-x) * 2, block=block)
    judge(model, X, folds={"block.1": ["block.0"]}, others=[(-X,), (X.abs(),)])


def test_python_branch_in_another_module_does_not_keep_the_batchnorm(judge: Judge, net: Any) -> None:
    fork = net(lambda m, x: x if x.sum() > 0 else -x, none=None)
    model = net(lambda m, x: m.block(m.fork(x)), fork=fork, block=nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    judge(model, X, folds={"block.1": ["block.0"]}, others=[(-X,)])


def test_block_that_is_told_the_outcome_of_a_branch_keeps_its_batchnorm(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor, normalise: bool) -> Tensor:
        h = m.fc(x)
        return m.bn(h) if normalise else h

    for tell in (lambda m, x: m.block(x, bool(x.sum() > -1e9)), lambda m, x: m.block(x, normalise=bool(x[0, 0] < 1e9))):
        judge(net(tell, block=net(forward)), X, kept={"block.bn": "python-value"}, others=[(X * 1e10,), (X * -1e10,)])


@pytest.mark.parametrize("layer", [nn.GRU, nn.LSTM, nn.RNN])
def test_recurrent_layer_that_counts_the_sequences_of_a_packed_batch_is_no_branch(
    layer: Any, judge: Judge, net: Any
) -> None:
    def forward(m: Any, words: PackedSequence) -> Tensor:
        tokens = torch.tanh(m.norm(m.project(words.data)))
        states, _ = pad_packed_sequence(m.rnn(words._replace(data=tokens))[0], batch_first=True)
        return m.bn(m.fc(states).transpose(1, 2))

    def model() -> Any:
        parts = {"project": nn.Linear(3, 4), "norm": nn.BatchNorm1d(4), "rnn": layer(4, 5)}
        return net(forward, fc=nn.Linear(5, 2), bn=nn.BatchNorm1d(2), **parts)

    folds = {"norm": ["project"], "bn": ["fc"]}
    judge(model(), packed(3, 2), folds=folds, others=[(packed(4, 4, 1),), (packed(1),)])
    # Code of somebody else's around it may ask more, and tell.
    hooked, asked = model(), []
    hooked.rnn.register_forward_hook(lambda module, args, output: asked.append(bool(output[0].data.sum() > 0)))
    judge(hooked, packed(3, 2), kept=dict.fromkeys(folds, "python-value"), others=[])


def test_lengths_of_a_packed_batch_are_no_constants(judge: Judge, net: Any) -> None:
    def forward(m: Any, words: PackedSequence) -> Tensor:
        h = m.fc(words.data)
        _, lengths = pad_packed_sequence(words)
        return m.bn(h) if lengths.max() < 4 else h

    judge(net(forward), packed(3, 2), kept={"bn": "python-value"}, others=[(packed(5, 2),)])


def packed(*lengths: int) -> PackedSequence:
    return pack_sequence([torch.randn(length, 3, dtype=torch.float64) for length in lengths])


def test_block_that_was_called_before_the_branch_does_not_keep_its_batchnorm(judge: Judge, net: Any) -> None:
    block = net(lambda m, x, scale: m.bn(m.fc(x * scale)))
    model = net(lambda m, x: (y := m.block(x, 2.0)) * (1 if y.sum() > 0 else -1), block=block)
    judge(model, X, folds={"block.bn": ["block.fc"]}, others=[(-X,)])


def test_branch_on_a_constant_does_not_keep_the_batchnorm(judge: Judge, net: Any) -> None:
    judge(net(lambda m, x: m.bn(m.fc(x)) if torch.arange(3).sum().item() == 3 else x), X, folds={"bn": ["fc"]})


def test_branch_on_a_constant_that_was_written_through_a_view_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        flags = torch.zeros(2, dtype=x.dtype)
        flags[0] = (x[0, 0] > -1e9).double()
        h = m.fc(x)
        return m.bn(h) if flags.sum().item() > 0 else h

    judge(net(forward), X, kept={"bn": "python-value"}, others=[(X - 1e10,)])


@pytest.mark.parametrize(
    "draw",
    [lambda: torch.rand(1), lambda: torch.empty(1).uniform_(), lambda: torch.bernoulli(torch.full((1,), 0.5)),
     lambda: torch.empty(1).exponential_(), lambda: torch.zeros(1).normal_()],
)  # fmt: skip
def test_branch_on_a_random_number_keeps_the_batchnorm(net: Any, draw: Callable[[], Tensor]) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.fc(x)
        return m.bn(h) if draw().item() >= -100 else h

    plan = plan_folding(net(forward), (X.float(),))
    assert [kept.code for kept in plan.kept] == ["python-value"]


@pytest.mark.parametrize(
    "escape",
    [lambda t: t.tolist(), lambda t: t.numpy().sum(), lambda t: t.sum().item(), lambda t: float(t.sum()),
     lambda t: bool(t.any()), lambda t: t.nonzero().shape[0], lambda t: t[t > 0].shape[0], lambda t: int(t.argmax()),
     lambda t: torch.equal(t, t), lambda t: t.untyped_storage()[0], lambda t: t.unique().shape, lambda t: repr(t)],
)  # fmt: skip
def test_every_way_from_a_tensor_to_a_python_value_counts_as_a_branch(
    judge: Judge, net: Any, escape: Callable[[Tensor], Any]
) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        escape(x)
        return m.bn(m.fc(x))

    judge(net(forward), X, kept={"bn": "python-value"})


def test_normalised_output_also_added_unnormalised_is_kept(judge: Judge, net: Any) -> None:
    judge(net(lambda m, x: (h := m.fc(x)) + m.bn(h)), X, kept={"bn": "other-reader"})


def test_output_returned_before_normalisation_is_kept(judge: Judge, net: Any) -> None:
    plan = judge(net(lambda m, x: (m.bn(h := m.fc(x)), h)), X, kept={"bn": "kept-alive"})
    assert plan.kept[0].reason.startswith("the output of `fc` is returned by the model; and ")


def test_output_returned_in_a_dict_before_normalisation_is_kept(judge: Judge, net: Any) -> None:
    judge(net(lambda m, x: {"h": (h := m.fc(x)), "y": m.bn(h)}), X, kept={"bn": "kept-alive"})


def test_output_kept_on_self_before_normalisation_is_kept(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.hidden = m.fc(x)
        return m.bn(m.hidden)

    model = net(forward)
    judge(model, X, kept={"bn": "kept-alive"})


def test_weight_read_elsewhere_in_forward_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    plan = judge(net(lambda m, x: m.bn(m.fc(x)) + m.fc.weight.sum()), X, kept={"bn": "parameter-read"})
    assert plan.kept[0].reason.startswith("`fc.weight` is also read by `sum` in the model; and ")


def test_bias_read_elsewhere_in_forward_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    judge(net(lambda m, x: m.bn(m.fc(x)) + m.fc.bias), X, kept={"bn": "parameter-read"})


def test_weight_used_by_another_layer_s_function_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    model = net(lambda m, x: m.bn(m.fc(x)) + nn.functional.linear(x, m.fc.weight))
    judge(model, X, kept={"bn": "parameter-read"})


# What folds.


def test_every_batchnorm_of_a_deep_model_is_folded(judge: Judge) -> None:
    blocks = [nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()) for _ in range(3)]
    model = nn.Sequential(nn.Linear(3, 4), *blocks)
    judge(model, X, folds={f"{i}.1": [f"{i}.0"] for i in (1, 2, 3)})


def test_batchnorm_behind_batchnorm_is_folded_too(judge: Judge) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.Tanh())
    plan = judge(model, X, folds={"1": ["0"], "2": ["0"], "3": ["0"]})
    assert [fold.batchnorm for fold in plan.folds] == ["1", "2", "3"]


def test_batchnorm_called_twice_in_a_row_is_kept(judge: Judge, net: Any) -> None:
    judge(net(lambda m, x: m.bn(m.bn(m.fc(x)))), X, kept={"bn": "behind-batchnorm"})


def test_sum_of_two_layers_takes_the_scale_twice_and_the_shift_once(judge: Judge, net: Any) -> None:
    for add in (lambda a, b: a + b, lambda a, b: a - b, lambda a, b: torch.add(a, b, alpha=2)):
        model = net(
            lambda m, x, add=add: m.bn(add(m.a(x), m.b(x))), a=nn.Linear(3, 4), b=nn.Linear(3, 4), bn=nn.BatchNorm1d(4)
        )
        plan = judge(model, X, folds={"bn": ["a", "b"]})
        assert [part.shift for part in plan.folds[0].parts] == [1.0, 0.0]


def test_sum_of_a_layer_and_its_input_goes_into_the_layer(judge: Judge, net: Any) -> None:
    model = net(lambda m, x: m.bn(m.fc(x) + x), fc=nn.Linear(3, 3), bn=nn.BatchNorm1d(3))
    judge(model, X, folds={"bn": ["fc"]})


def test_sum_of_a_layer_with_itself_is_kept(judge: Judge, net: Any) -> None:
    judge(net(lambda m, x: m.bn((h := m.fc(x)) + h)), X, kept={"bn": "not-transparent"})


def test_two_calls_of_one_layer_in_one_sum_are_kept(judge: Judge, net: Any) -> None:
    # One call would have to take the shift, and the other not.
    judge(net(lambda m, x: m.bn(m.fc(x) + m.fc(x.exp()))), X, kept={"bn": "two-maps"})


def test_sum_with_a_number_is_kept(judge: Judge, net: Any) -> None:
    judge(net(lambda m, x: m.bn(m.fc(x) + 1.0)), X, kept={"bn": "not-transparent"})


@pytest.mark.parametrize(
    ("function", "layers"),
    [
        (lambda m, x, c: m.conv(x) + m.fc(c)[:, :, None, None], ["conv", "fc"]),
        (lambda m, x, c: m.fc(c)[..., None, None] - m.conv(x), ["fc", "conv"]),
        (lambda m, x, c: m.conv(x) - m.fc(c[0])[:, None, None], ["conv", "fc"]),
        (lambda m, x, c: m.conv(x).add_(m.fc(c)[:, :, None, None]), ["conv", "fc"]),
        (lambda m, x, c: m.fc(c)[:, :, None, None] + m.conv(x).mean(3, keepdim=True), ["fc", "conv"]),
    ],
)
def test_sum_of_several_shapes_folds_into_all(function: Any, layers: list[str], judge: Judge, net: Any) -> None:
    """As where a network is told the time, or the speaker."""
    model = net(lambda m, x, c: m.bn(function(m, x, c)), conv=nn.Conv2d(3, 4, 2), fc=nn.Linear(6, 4))
    model.bn = nn.BatchNorm2d(4)
    images, told = torch.randn(2, 3, 5, 6, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    others = [(images[:1, :, :4], 3 * told[:1]), (torch.cat([images, images]), torch.cat([told, -told]))]
    judge(model, images, told, folds={"bn": layers}, others=others)


def written_sum(m: Any, x: Tensor) -> Tensor:
    y = m.identity(x)
    y += m.conv(x)
    return m.bn(y)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.bn(m.conv(x) + m.identity(x)),
        lambda m, x: m.bn(m.identity(x) + m.conv(x)),
        lambda m, x: m.bn(m.identity(x) - m.conv(x)),
        lambda m, x: m.bn(m.small(x) + m.identity(x) + m.conv(x)),
        lambda m, x: m.bn(m.identity(x) + (m.conv(x) - m.small(x))).relu(),
        written_sum,
    ],
)
def test_batchnorm_behind_a_sum_with_one_that_is_folded_beside_a_layer(function: Any, judge: Judge, net: Any) -> None:
    layers = {"identity": nn.BatchNorm2d(3), "conv": nn.Conv2d(3, 3, 3, padding=1), "bn": nn.BatchNorm2d(3)}
    model = net(function, **layers, small=nn.Conv2d(3, 3, 1))
    images = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    plan = plan_folding(model.double(), (images,))
    assert [(fold.batchnorm, fold.direction) for fold in plan.folds] == [("identity", "parallel"), ("bn", "backward")]
    judge(model, images, folds={fold.batchnorm: fold.layers for fold in plan.folds})


def test_shift_that_zeros_would_take_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    layers = {"identity": nn.BatchNorm2d(3), "conv": nn.Conv2d(3, 3, 1), "bn": nn.BatchNorm2d(3)}
    model = net(lambda m, x: m.bn(sum([m.identity(x), m.conv(x)])).relu(), **layers)
    images = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    judge(model, images, folds={"identity": ["conv"]}, kept={"bn": "behind-batchnorm"})


def test_batchnorm_behind_a_sum_with_one_that_went_into_its_layer(judge: Judge, net: Any) -> None:
    layers = {"first": nn.BatchNorm2d(3), "conv": nn.Conv2d(3, 3, 1), "other": nn.Conv2d(3, 3, 1)}
    model = net(lambda m, x: m.bn(m.first(m.other(x)) + m.conv(x)).relu(), **layers, bn=nn.BatchNorm2d(3))
    images = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    judge(model, images, folds={"first": ["other"], "bn": ["other", "conv"]})


def test_sum_along_the_channels_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    layers = {"conv": nn.Conv2d(3, 5, 1), "mask": nn.Conv2d(3, 1, 1), "bn": nn.BatchNorm2d(5)}
    images = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    judge(net(lambda m, x: m.bn(m.conv(x) + m.mask(x)), **layers), images, kept={"bn": "not-transparent"})
    layers = {"conv": nn.Conv2d(3, 5, 1), "place": nn.Linear(5, 5), "bn": nn.BatchNorm2d(5)}
    # As many channels as pixels in a row.
    model = net(lambda m, x: m.bn(m.conv(x) + m.place(x[0, 0])), **layers)
    judge(model, images, kept={"bn": "not-transparent"})


def test_embeddings_of_words_and_places_are_layers_alike(judge: Judge, net: Any) -> None:
    model = net(
        lambda m, x: m.bn((m.word(x) + m.place(torch.arange(x.shape[1]))).transpose(1, 2)),
        word=nn.Embedding(9, 4),
        place=nn.Embedding(20, 4),
        bn=nn.BatchNorm1d(4),
    )
    words = torch.randint(9, (3, 7))
    judge(model, words, folds={"bn": ["word", "place"]}, others=[(words[:2, :5],)])


def test_concatenated_layers_take_a_slice_each(judge: Judge, net: Any) -> None:
    model = net(
        lambda m, x: m.bn(torch.cat([m.b(x), m.a(x)], 1)), a=nn.Linear(3, 4), b=nn.Linear(3, 2), bn=nn.BatchNorm1d(6)
    )
    plan = judge(model, X, folds={"bn": ["b", "a"]})
    assert [part.channels for part in plan.folds[0].parts] == [(0, 1), (2, 3, 4, 5)]


def test_part_of_a_layer_is_folded_and_the_rest_stays_as_it_is(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        normalised, rest = m.fc(x).split([2, 2], 1)
        return torch.cat([m.bn(normalised), rest.relu()], 1)

    plan = judge(net(forward, fc=nn.Linear(3, 4), bn=nn.BatchNorm1d(2)), X, folds={"bn": ["fc"]})
    assert plan.folds[0].parts[0].channels == (0, 1, -1, -1)


def test_part_of_a_concatenation_that_no_layer_made_does_not_matter_if_it_is_not_normalised(
    judge: Judge, net: Any
) -> None:
    judge(net(lambda m, x: m.bn(torch.cat([m.fc(x), x], 1)[:, :4])), X, folds={"bn": ["fc"]})


@pytest.mark.parametrize(
    "part",
    [
        lambda h: h.split([2, len(h) - 2])[1],
        lambda h: h.unsqueeze(1).expand(-1, 2, -1).unbind(1)[1],
    ],
)
def test_parts_that_nobody_reads_do_not_matter(part: Any, judge: Judge, net: Any) -> None:
    others = [(torch.randn(n, 3, dtype=torch.float64),) for n in (3, 7)]
    judge(net(lambda m, x: m.bn(part(m.fc(x))).tanh()), X, folds={"bn": ["fc"]}, others=others)


@pytest.mark.parametrize(
    ("use", "code"),
    [
        (lambda part: part, "kept-alive"),
        (lambda part: part.exp(), "channel-axis"),
        (lambda part: part.mul_(2).sum(), "written"),
    ],
)
def test_parts_that_somebody_reads_matter(use: Any, code: str, judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        first, second = m.fc(x).split([2, len(x) - 2])
        return m.bn(second).tanh(), use(first)

    others = [(torch.randn(n, 3, dtype=torch.float64),) for n in (3, 7)]
    judge(net(forward), X, kept={"bn": code}, others=others)


def test_average_that_is_returned_matters(judge: Judge, net: Any) -> None:
    model = net(lambda m, x: (m.bn(h := m.fc(x)).tanh(), h.mean(0)))
    judge(model, X, kept={"bn": "other-reader"})


def test_chunks_normalised_by_one_batchnorm_are_folded(judge: Judge, net: Any) -> None:
    model = net(
        lambda m, x: torch.stack([m.bn(part) for part in m.fc(x).chunk(2, 1)]), fc=nn.Linear(3, 4), bn=nn.BatchNorm1d(2)
    )
    plan = judge(model, X, folds={"bn": ["fc"]})
    assert plan.folds[0].parts[0].channels == (0, 1, 0, 1)


def test_chunks_normalised_by_two_batchnorms_are_folded(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        a, b = m.fc(x).chunk(2, 1)
        return m.bn1(a) * m.bn2(b)

    model = net(forward, fc=nn.Linear(3, 4), bn1=nn.BatchNorm1d(2), bn2=nn.BatchNorm1d(2))
    judge(model, X, folds={"bn1": ["fc"], "bn2": ["fc"]})


def test_last_step_of_a_sequence_is_folded(judge: Judge, net: Any) -> None:
    judge(net(lambda m, x: m.bn(m.fc(x)[:, -1])), SEQUENCE, folds={"bn": ["fc"]})


# Older versions slice all axes before they pick of one, and what is sliced is read by two.
@pytest.mark.skipif(torch.__version__ < "2.13", reason="an older torch picks of an axis in two steps")
def test_last_step_is_kept_if_another_one_is_read_as_it_is(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.fc(x)
        return m.bn(h[:, -1]) + h[:, 0].tanh()

    judge(net(forward), SEQUENCE, kept={"bn": "channel-axis"})


@pytest.mark.skipif(torch.__version__ < "2.13", reason="an older torch picks of an axis in two steps")
@pytest.mark.parametrize("pick", [lambda h: (h[:, 0], h[:, 1]), lambda h: h.unbind(1)])
def test_step_of_a_stack_is_folded_whatever_the_others_are(pick: Any, judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        normalised, other = pick(torch.stack([m.fc(x), x.new_ones(len(x), 4)], 1))
        return m.bn(normalised) * other.tanh()

    judge(net(forward), X, folds={"bn": ["fc"]})


def test_flattened_steps_of_a_sequence_are_folded(judge: Judge, net: Any) -> None:
    model = net(lambda m, x: m.bn(m.fc(x).flatten(0, 1)).view(*x.shape[:2], 4))
    judge(model, SEQUENCE, folds={"bn": ["fc"]}, others=[(torch.randn(2, 7, 3).double(),)])


def test_transposed_sequence_is_folded(judge: Judge, net: Any) -> None:
    model = net(lambda m, x: m.bn(m.fc(x).transpose(1, 2)).relu())
    judge(model, SEQUENCE, folds={"bn": ["fc"]}, others=[(torch.randn(2, 7, 3).double(),)])


def test_sequence_averaged_over_its_steps_is_folded(judge: Judge, net: Any) -> None:
    model = net(lambda m, x: m.bn(m.fc(x).mean(1)))
    judge(model, SEQUENCE, folds={"bn": ["fc"]}, others=[(torch.randn(2, 7, 3).double(),)])


@pytest.mark.parametrize("average", [lambda h: h.mean((2, 3), keepdim=True), nn.AdaptiveAvgPool2d(1)])
@pytest.mark.parametrize("view", [lambda h: h.flatten(1), lambda h: h.view(-1, 4), lambda h: h.view(len(h), 4)])
def test_image_averaged_to_one_place_and_flattened_is_folded(average: Any, view: Any, judge: Judge, net: Any) -> None:
    model = net(lambda m, x: m.bn(view(average(m.conv(x)))), conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm1d(4))
    others = [(torch.randn(shape).double(),) for shape in ((1, 3, 4, 4), (2, 3, 2, 5), (3, 3, 1, 1))]
    judge(model, torch.randn(2, 3, 4, 2).double(), folds={"bn": ["conv"]}, others=others)


def test_image_averaged_to_one_row_and_flattened_is_folded(judge: Judge, net: Any) -> None:
    pooled = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d((1, 3)), nn.Flatten(2), nn.BatchNorm1d(4))
    others = [(torch.randn(shape).double(),) for shape in ((1, 3, 4, 4), (2, 3, 1, 1))]
    judge(pooled, torch.randn(2, 3, 4, 5).double(), folds={"3": ["0"]}, others=others)


def test_window_averaged_to_one_place_may_leave_more_of_another_image(judge: Judge, net: Any) -> None:
    model = net(
        lambda m, x: m.bn(nn.functional.avg_pool2d(m.conv(x), 4).reshape(-1, 4)),
        conv=nn.Conv2d(3, 4, 1),
        bn=nn.BatchNorm1d(4),
    )
    small, large = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 3, 8, 8).double()
    judge(model, small, kept={"bn": "not-transparent"}, others=[(small,), (large,)])


@pytest.mark.parametrize(
    "average",
    [
        lambda h: h.mean(2, keepdim=True),
        lambda h: h.mean(2),
        lambda h: nn.functional.adaptive_avg_pool2d(h, (1, None)),
    ],
)
def test_axis_of_one_that_was_not_averaged_away_may_grow_into_the_channels(
    average: Any, judge: Judge, net: Any
) -> None:
    model = net(lambda m, x: m.bn(average(m.conv(x)).reshape(-1, 4)), conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm1d(4))
    narrow, wide = torch.randn(2, 3, 4, 1).double(), torch.randn(2, 3, 4, 2).double()
    judge(model, narrow, kept={"bn": "not-transparent"}, others=[(narrow,), (wide,)])


@pytest.mark.parametrize(
    "flatten",
    [lambda h: h.reshape(-1, 12), lambda h: h.flatten(1).view(-1, 12), lambda h: h.reshape(len(h), 12, h.shape[2])],
)
def test_axis_of_one_between_two_axes_of_channels_may_grow_into_them(flatten: Any, judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.bn(flatten(m.fc(x).view(*x.shape[:2], 4, 3).transpose(1, 2)))  # (N, 4, T, 3), and T is 1

    short, long = torch.randn(2, 1, 3).double(), torch.randn(2, 2, 3).double()
    kept = {"bn": "not-transparent"}
    judge(net(forward, fc=nn.Linear(3, 12), bn=nn.BatchNorm1d(12)), short, kept=kept, others=[(short,), (long,)])


def test_average_over_the_channels_is_kept(judge: Judge, net: Any) -> None:
    model = net(lambda m, x: m.bn(m.fc(x).mean(2)))
    judge(model, SEQUENCE, kept={"bn": "channel-axis"})


def test_every_second_channel_of_two_steps_is_kept(judge: Judge, net: Any) -> None:
    # Each channel of the BatchNorm is made of a step and a channel; no weight of the layer knows of steps.
    model = net(lambda m, x: m.bn(m.fc(x).flatten(1)), fc=nn.Linear(3, 4), bn=nn.BatchNorm1d(16))
    judge(model, SEQUENCE, kept={"bn": "channel-axis"})


def test_channels_repeated_by_a_view_are_folded(judge: Judge, net: Any) -> None:
    model = net(lambda m, x: m.bn(m.fc(x).view(-1, 2, 3)), fc=nn.Linear(3, 6), bn=nn.BatchNorm1d(2))
    plan = judge(model, X, folds={"bn": ["fc"]})
    assert plan.folds[0].parts[0].channels == (0, 0, 0, 1, 1, 1)


def test_dropout_and_identity_between_are_passed(judge: Judge) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Identity(), nn.Flatten(), nn.BatchNorm1d(4))
    judge(model, X, folds={"4": ["0"]})


def test_activation_between_is_not_passed(judge: Judge) -> None:
    judge(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.BatchNorm1d(4)), X, kept={"2": "no-layer"})


def test_one_channel_is_folded(judge: Judge) -> None:
    judge(nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1)), X, folds={"1": ["0"]})
    judge(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(1)), SEQUENCE[:, :1], folds={"1": ["0"]})


# The plan itself.


def test_plan_prints_as_a_table(net: Any) -> None:
    plan = plan_folding(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.BatchNorm1d(4)), (X.float(),))
    assert str(plan) == (
        "1  folded backward into 0\n"
        "3  kept: it normalises what `relu` in `2` made, which is no layer; "
        "and the output of `3` is returned by the model"
    )
    assert str(FoldingPlan()) == "no BatchNorm"


def test_kept_are_in_the_order_of_named_modules(net: Any) -> None:
    model = net(lambda m, x: m.b(m.a(x.relu()).tanh()), b=nn.BatchNorm1d(3), a=nn.BatchNorm1d(3), c=nn.BatchNorm1d(3))
    assert [kept.batchnorm for kept in plan_folding(model, (X.float(),)).kept] == ["b", "a", "c"]


def test_plan_of_an_unknown_version_or_shape_is_refused() -> None:
    good = FoldingPlan((Fold("bn", (Part("fc", (0, 1)),)),), (Kept("b", "because", "code"),)).to_dict()
    for bad in (
        [], None, "plan", {}, good | {"version": 99}, good | {"folds": None}, good | {"folds": [{}]},
        good | {"kept": [3]},
        good | {"folds": [good["folds"][0] | {"direction": "sideways"}]}, good | {"kept": [{"batchnorm": "b"}]},
        good | {"folds": [good["folds"][0] | {"parts": [{"layer": "fc", "channels": ["x"], "shift": 1}]}]},
    ):  # fmt: skip
        with pytest.raises(FoldingError, match=r"folding plan of version 1 to 2|FoldingPlan.to_dict"):
            FoldingPlan.from_dict(bad)  # type: ignore[arg-type]
    with pytest.raises(FoldingError, match="of version 1 to 2, got version 99"):
        FoldingPlan.from_dict(good | {"version": 99})
    with pytest.raises(FoldingError, match="of version 1 to 2, got list"):
        FoldingPlan.from_dict([])  # type: ignore[arg-type]
    with pytest.raises(FoldingError, match="of version 1 to 2, got version 0"):
        FoldingPlan.from_dict(good | {"version": 0})


PART = {"layer": "fc", "channels": [0, 1], "shift": 1.0, "baked": False, "function": None}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"direction": "sideways"}, "folds[0].direction: expected one of backward, forward, parallel, found 'side"),
        ({"direction": "a" * 78}, "found '" + "a" * 78 + "'. Take"),
        ({"direction": "a" * 79}, "found '" + "a" * 79 + ".... Take"),
        ({"direction": 10**5000}, "found int with a number that is too long to write. Take"),
        ({"parts": []}, "folds[0].parts: expected layers beside 'bn', each once, found []"),
        ({"parts": [PART, PART]}, "folds[0].parts: expected layers beside 'bn', each once, found ['fc', 'fc']"),
        ({"parts": [PART | {"layer": "bn"}]}, "folds[0].parts: expected layers beside 'bn', each once, found ['bn']"),
        ({"parts": [PART | {"channels": [0, "x"]}]}, "folds[0].parts[0].channels: expected numbers of channels, or -1"),
        ({"parts": [PART | {"channels": [0, -2]}]}, "folds[0].parts[0].channels: expected numbers of channels, or -1"),
        ({"parts": [PART | {"channels": [2**63]}]}, "folds[0].parts[0].channels: expected numbers of channels, or -1"),
        ({"parts": [PART | {"shift": 10**400}]}, "folds[0].parts[0].shift: expected a finite number, found 1000"),
        ({"eps": float("nan")}, "folds[0].eps: expected a finite number, found nan"),
        ({"eps": -1e-9}, "folds[0].eps: expected a number from 0 on, found -1e-09"),
        ({"written": True}, "folds[0].written: expected False where the fold is not parallel, found True"),
    ],
)
def test_fold_that_cannot_be_is_refused_where_it_is_wrong(change: dict[str, Any], said: str) -> None:
    plan = FoldingPlan((Fold("bn", (Part("fc", (0, 1)),)),)).to_dict()
    with pytest.raises(FoldingError, match=re.escape(said)):
        FoldingPlan.from_dict(plan | {"folds": [plan["folds"][0] | change]})


def test_plan_at_the_limits_of_what_can_be_is_taken_in_whatever_order_its_keys_are() -> None:
    parts = (Part("fc", (-1, 2**63 - 1), shift=sys.float_info.max),)
    plan = FoldingPlan((Fold("bn", parts, eps=0.0), Fold("other", parts, eps=sys.float_info.max)))
    assert FoldingPlan.from_dict(dict(reversed(plan.to_dict().items()))) == plan


def test_columns_of_the_table_are_as_wide_as_the_longest_name() -> None:
    plan = FoldingPlan((Fold("b", (Part("x"), Part("y")), note="it costs"),), (Kept("longest", "because", "code"),))
    assert str(plan) == "b        folded backward into x, y; it costs\nlongest  kept: because"


def test_plan_without_news_is_one_that_earlier_releases_know() -> None:
    plan = FoldingPlan((Fold("bn", (Part("fc"),)),)).to_dict()
    assert plan["folds"][0].keys() == {"batchnorm", "parts", "direction", "note", "eps"}
    assert plan["folds"][0]["parts"][0].keys() == {"layer", "channels", "shift", "baked", "function"}


def test_part_of_an_older_plan_is_neither_baked_nor_a_function() -> None:
    plan = FoldingPlan((Fold("bn", (Part("fc", (0, 1)),)),)).to_dict() | {"version": 1}
    fold = plan["folds"][0]
    del plan["sha256"]
    del fold["note"], fold["eps"], fold["parts"][0]["baked"], fold["parts"][0]["function"]
    assert FoldingPlan.from_dict(plan) == FoldingPlan((Fold("bn", (Part("fc", (0, 1)),)),))


@pytest.mark.parametrize("direction", ["backward", "forward", "parallel"])
def test_everything_in_a_plan_comes_back_with_its_type(direction: str) -> None:
    part = Part("fc", (0, -1), shift=0.5, baked=True, function="linear", residual=-1.0)
    written = direction == "parallel"
    whole = FoldingPlan((Fold("bn", (part,), direction, "it costs", 0.0, written),), (Kept("b", "because", "code"),))
    again = FoldingPlan.from_dict(whole.to_dict())
    assert again == whole
    assert repr(again) == repr(whole)
    assert re.fullmatch("[0-9a-f]{64}", again.to_dict()["sha256"])
    assert again.to_dict() == {
        "version": 2,
        "folds": [
            {
                "batchnorm": "bn",
                "parts": [asdict(part) | {"channels": [0, -1]}],
                "direction": direction,
                "note": "it costs",
                "eps": 0.0,
                **({"written": True} if written else {}),
            }
        ],
        "kept": [{"batchnorm": "b", "reason": "because", "code": "code"}],
        "sha256": whole.to_dict()["sha256"],
    }


@pytest.mark.parametrize(
    ("direction", "part"),
    [
        ("forward", {}),
        ("parallel", {}),
        ("backward", {"channels": [1, 0]}),
        ("backward", {"channels": None}),
        ("backward", {"shift": 0.5}),
        ("backward", {"baked": True}),
        ("backward", {"function": "linear"}),
        ("backward", {"layer": "fc2"}),
        ("backward", {"residual": 1.0}),
    ],
)
def test_plan_that_was_changed_after_it_was_made_is_refused(direction: str, part: dict[str, Any]) -> None:
    plan = FoldingPlan((Fold("bn", (Part("fc", (0, 1)),)),)).to_dict()
    [fold] = plan["folds"]
    changed = plan | {"folds": [fold | {"direction": direction, "parts": [fold["parts"][0] | part]}]}
    with pytest.raises(FoldingError, match=r"the plan\.sha256: expected the checksum of the rest, which was changed, "):
        FoldingPlan.from_dict(changed)
    # A plan of the first version says nothing that would tell, and is no such plan as long as it does.
    with pytest.raises(FoldingError, match="the plan: expected nothing but version, folds, kept, found 'sha256'"):
        FoldingPlan.from_dict(changed | {"version": 1})
    del changed["sha256"]
    assert FoldingPlan.from_dict(changed | {"version": 1}).folds[0].direction == direction
    with pytest.raises(FoldingError, match="the plan: expected the key 'sha256'"):
        FoldingPlan.from_dict(changed)


def test_plan_that_keeps_all_is_in_the_order_that_is_asked_for() -> None:
    plan = FoldingPlan((Fold("c", (Part("x"),)), Fold("a", (Part("y"),))), (Kept("b", "because", "code"),))
    assert plan.keeping("other", "why", ["a", "b", "c"]) == FoldingPlan(
        kept=(Kept("a", "why", "other"), Kept("b", "because", "code"), Kept("c", "why", "other"))
    )


@pytest.mark.parametrize("record", [Part("fc"), Fold("bn", ()), Kept("bn", "because", "code"), FoldingPlan()])
def test_plan_cannot_be_changed(record: Any) -> None:
    with pytest.raises(FrozenInstanceError):
        setattr(record, next(iter(vars(record))), "other")


def test_model_without_batchnorms_has_an_empty_plan(judge: Judge) -> None:
    assert judge(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), X) == FoldingPlan()


def test_bare_batchnorm_is_kept(judge: Judge) -> None:
    judge(nn.BatchNorm1d(3), X, kept={"": "no-layer"})


LENGTHS = torch.tensor([2, 1, 3, 3, 1, 2, 2])  # of the sequences of a batch


@pytest.mark.parametrize(
    "pick",
    [lambda h: h[torch.arange(len(h)), LENGTHS[: len(h)] - 1], lambda h: h[:, LENGTHS - 1].flatten(0, 1),
     lambda h: h.gather(1, (LENGTHS[: len(h), None, None] - 1).expand(-1, -1, 4)).squeeze(1),
     lambda h: h.index_select(1, LENGTHS - 1).mean(1), lambda h: h.repeat(1, 2, 1).flatten(0, 1),
     lambda h: h.transpose(0, 2)[:, LENGTHS - 1, torch.arange(7) % len(h)].t()],
)  # fmt: skip
def test_positions_that_tensors_pick_between_layer_and_batchnorm_are_followed(
    pick: Any, judge: Judge, net: Any
) -> None:
    sequences = torch.randn(5, 3, 3, dtype=torch.float64)
    judge(net(lambda m, x: m.bn(pick(m.fc(x)))), sequences, folds={"bn": ["fc"]})
    model = net(
        lambda m, x: m.head(pick(m.bn(x.tanh().transpose(1, 2)).transpose(1, 2))),
        bn=nn.BatchNorm1d(4),
        head=nn.Linear(4, 2),
    )
    judge(model, torch.randn(5, 3, 4, dtype=torch.float64), folds={"bn": ["head"]})


def summed_in_place(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    y += m.b(x)
    y -= m.c(x)
    return m.bn(y).relu()


def summed_from_zero(m: Any, x: Tensor) -> Tensor:
    y: Any = 0
    for layer in (m.a, m.b, m.c):
        y += layer(x)
    return m.bn(y)


def layers_of_a_sum(**changed: nn.Module) -> dict[str, nn.Module]:
    layers: dict[str, nn.Module] = {name: nn.Linear(3, 4) for name in "abc"}
    return {**layers, "bn": nn.BatchNorm1d(4), **changed}


@pytest.mark.parametrize("forward", [summed_in_place, summed_from_zero])
def test_sums_that_are_written_in_place_are_followed(forward: Any, judge: Judge, net: Any) -> None:
    judge(net(forward, **layers_of_a_sum()), X, folds={"bn": ["a", "b", "c"]})


def one_after_the_other(m: Any, *inputs: Tensor) -> Tensor:
    y = m.bn(inputs[0])
    for other in inputs[1:]:
        y += m.bn(other)
    return m.head(y)


def of_two_lengths(m: Any, *inputs: Tensor) -> Tensor:
    first, second = (m.bn(x).transpose(1, 2).reshape(-1, 3) for x in inputs)
    first += second
    return m.head(first)


@pytest.mark.parametrize(
    ("forward", "shapes"), [(one_after_the_other, [(4, 3)]), (of_two_lengths, [(4, 3, 5), (4, 3, 1)])]
)
def test_a_sum_into_what_the_batchnorm_gave_is_not_one_into_its_input(
    forward: Any, shapes: Any, judge: Judge, net: Any
) -> None:
    model = net(forward, bn=nn.BatchNorm1d(3), head=nn.Linear(3, 2))
    inputs = [tuple(torch.randn(shape, dtype=torch.float64) for _ in range(2)) for shape in shapes]
    # Twice with the same inputs: whoever writes into them gives something else the second time.
    judge(model, *inputs[0], kept={"bn": "no-layer"}, others=inputs * 2)


def term_is_seen(m: Any, x: Tensor) -> list[Tensor]:
    y = m.a(x)
    seen = y.exp()
    y += m.b(x)
    return [m.bn(y), seen, m.c(x)]


def term_is_viewed(m: Any, x: Tensor) -> list[Tensor]:
    y = m.a(x)
    view = y[:1]
    y += m.b(x)
    return [m.bn(y), view, m.c(x)]


def term_is_kept(m: Any, x: Tensor) -> list[Tensor]:
    y = m.a(x)
    m.kept = y
    y += m.b(x)
    return [m.bn(y), m.kept, m.c(x)]


def sum_is_written_otherwise(m: Any, x: Tensor) -> list[Tensor]:
    y = m.a(x)
    y += m.b(x)
    y.relu_()
    return [m.bn(y), m.c(x)]


def written_behind(m: Any, x: Tensor) -> list[Tensor]:
    y = m.a(x)
    y += m.b(x)
    z = m.bn(y)
    y.zero_()
    return [z, y, m.c(x)]


@pytest.mark.parametrize(
    ("forward", "code"),
    [(term_is_seen, "other-reader"), (term_is_viewed, "kept-alive"), (term_is_kept, "kept-alive"),
     (sum_is_written_otherwise, "no-layer"), (written_behind, "other-reader")],
)  # fmt: skip
def test_sums_in_place_that_somebody_else_sees_keep_the_batchnorm(
    forward: Any, code: str, judge: Judge, net: Any
) -> None:
    judge(net(forward, **layers_of_a_sum()), X, kept={"bn": code})


def test_what_a_constant_mask_picks_is_followed_to_its_layer(judge: Judge, net: Any) -> None:
    model = net(lambda m, x: m.bn(m.fc(x)[:, torch.arange(6) % 3 != 1].flatten(0, 1)))
    judge(model, torch.randn(4, 6, 3, dtype=torch.float64), folds={"bn": ["fc"]})


OTHER_IMAGES = [(torch.randn(n, 3, *size, dtype=torch.float64),) for n, size in ((1, (8, 10)), (4, (10, 8)))]


@pytest.mark.parametrize(
    "move",
    [lambda h: F.channel_shuffle(h, 2), lambda h: h.rot90(1, (2, 3)), lambda h: h.unfold(2, 2, 2).mean(-1),
     lambda h: h.repeat_interleave(2, 2), lambda h: h.repeat_interleave(repeats=2, dim=-1)],
)  # fmt: skip
def test_elements_that_move_between_layer_and_batchnorm_are_followed(move: Any, judge: Judge, net: Any) -> None:
    images = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    model = net(lambda m, x: m.bn(move(m.conv(x))), conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4))
    judge(model, images, folds={"bn": ["conv"]}, others=OTHER_IMAGES)
    model = net(lambda m, x: m.conv(move(m.bn(m.other(x)))), conv=nn.Conv2d(4, 3, 1), bn=nn.BatchNorm2d(4),
                other=nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))  # fmt: skip
    judge(model, images, folds={"bn": ["conv"]}, others=OTHER_IMAGES)


@pytest.mark.parametrize(
    ("spread", "head"),
    [(lambda h: F.pixel_unshuffle(h, 2), nn.Conv2d(12, 4, 1)), (lambda h: F.unfold(h, 2), nn.Conv1d(12, 4, 1)),
     (lambda h: F.unfold(h, 2, stride=2).transpose(1, 2), nn.Linear(12, 4)),
     (lambda h: h.repeat_interleave(4, 1), nn.Conv2d(12, 4, 1))],
)  # fmt: skip
def test_layer_takes_a_batchnorm_whose_channels_come_several_times(
    spread: Any, head: nn.Module, judge: Judge, net: Any
) -> None:
    images = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    model = net(lambda m, x: m.head(spread(m.bn(x.tanh()))), head=head, bn=nn.BatchNorm2d(3))
    judge(model, images, folds={"bn": ["head"]}, others=OTHER_IMAGES)


def test_channels_repeated_as_often_as_an_axis_is_long_keep_the_batchnorm(judge: Judge, net: Any) -> None:
    model = net(
        lambda m, x: m.conv(m.bn(x).repeat_interleave(x.shape[2], 1)[:, :6]),
        bn=nn.BatchNorm1d(6),
        conv=nn.Conv1d(6, 2, 1),
    )
    others = [(torch.randn(4, 6, length, dtype=torch.float64),) for length in (2, 3, 5)]
    judge(model, torch.randn(4, 6, 3, dtype=torch.float64), kept={"bn": "no-layer"}, others=others)


def test_windows_with_padding_keep_the_batchnorm(judge: Judge, net: Any) -> None:
    model = net(lambda m, x: m.fc(F.unfold(m.bn(x.tanh()), 3, padding=1).mean(-1)), fc=nn.Linear(27, 4),
                bn=nn.BatchNorm2d(3))  # fmt: skip
    judge(model, torch.randn(2, 3, 6, 6, dtype=torch.float64), kept={"bn": "no-layer"})


@pytest.mark.parametrize(
    "join",
    [lambda h: torch.cat([h, h[:, :0]], 1), lambda h: torch.cat([h[:, 4:], h], 1),
     lambda h: torch.cat(h.split([1, 0, 3], 1), 1), lambda h: torch.cat([h, h[:0]])],
)  # fmt: skip
def test_parts_without_elements_keep_the_batchnorm(join: Any, judge: Judge, net: Any) -> None:
    judge(net(lambda m, x: m.bn(join(m.fc(x)))), X, kept={"bn": "not-transparent"})
    model = net(lambda m, x: m.head(join(m.bn(m.fc(x).tanh()))), fc=nn.Linear(3, 4), bn=nn.BatchNorm1d(4),
                head=nn.Linear(4, 2))  # fmt: skip
    judge(model, X, kept={"bn": "no-layer"})


def behind_a_memory(m: Any, x: Tensor, memory: Tensor) -> Tensor:
    return m.head(torch.cat([memory, m.bn(x)]))


def behind_a_part(m: Any, x: Tensor, memory: Tensor) -> Tensor:
    old, new = m.fc(torch.cat([memory, x])).split([len(memory), len(x)])
    return torch.cat([m.bn(old), new])


def before_a_part(m: Any, x: Tensor, memory: Tensor) -> list[Tensor]:
    old, new = m.bn(x).split([len(memory), len(x) - len(memory)])
    return [m.head(new), old]


def beside_a_part(m: Any, x: Tensor, memory: Tensor) -> list[Tensor]:
    old, new = m.fc(torch.cat([memory, x])).split([len(memory), len(x)])
    return [m.bn(new), old]


@pytest.mark.parametrize("forward", [behind_a_memory, behind_a_part, before_a_part, beside_a_part])
def test_a_memory_that_is_empty_on_the_example_keeps_the_batchnorm(forward: Any, judge: Judge, net: Any) -> None:
    model = net(forward, fc=nn.Linear(3, 3), bn=nn.BatchNorm1d(3), head=nn.Linear(3, 2))
    others = [(torch.randn(5, 3, dtype=torch.float64), torch.randn(n, 3, dtype=torch.float64)) for n in (0, 1, 3)]
    with torch.no_grad():
        plan = plan_folding(model.double().eval(), others[0])
    assert not plan.folds
    judge(model, *others[0], kept={"bn": plan.kept[0].code}, others=others)


def test_channels_that_a_tensor_picks_keep_the_batchnorm(judge: Judge, net: Any) -> None:
    # The numbers in it may be others next time.
    order = torch.tensor([2, 0, 3, 1])
    for pick in (lambda h: h[:, order], lambda h: h.index_select(1, order), lambda h: h.gather(1, order.expand_as(h))):
        judge(net(lambda m, x, pick=pick: m.bn(pick(m.fc(x)))), X, kept={"bn": "not-transparent"})


def test_slice_of_a_layer_that_is_reshaped_behind_its_batchnorm_is_folded(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).split([4, 2, 3], 1)
        q = m.bn(q).reshape(len(x), 2, 2, -1)
        return torch.cat([q.flatten(1), k.flatten(1), torch.reshape(v, (len(x), -1))], 1)

    model = net(forward, qkv=nn.Conv1d(3, 9, 1), bn=nn.BatchNorm1d(4))
    others = [(torch.randn(n, 3, length, dtype=torch.float64),) for n, length in ((1, 5), (3, 5), (2, 7))]
    judge(model, torch.randn(2, 3, 5, dtype=torch.float64), folds={"bn": ["qkv"]}, others=others)


def test_slice_of_a_layer_that_is_viewed_behind_its_batchnorm_is_folded(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k = m.qkv(x).split([4, 2], 1)
        return torch.cat([m.bn(q).view(len(x), -1), k.flatten(1)], 1)

    model = net(forward, qkv=nn.Conv1d(3, 6, 1), bn=nn.BatchNorm1d(4))
    judge(model, torch.randn(2, 3, 5, dtype=torch.float64), folds={"bn": ["qkv"]})


@pytest.mark.parametrize(
    "reshape",
    [
        lambda h, n: torch.flatten(input=h, start_dim=1),
        lambda h, n: torch.reshape(input=h, shape=(len(h), -1)),
        lambda h, n: h.reshape(len(h), 8),
        lambda h, n: h.reshape([len(h), 8]),
        lambda h, n: h.flatten(-2),
        lambda h, n: h.flatten(start_dim=1, end_dim=2),
    ],
)
def test_output_that_is_reshaped_and_read_before_its_batchnorm_is_kept(reshape: Any, judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.conv(x)
        return m.bn(h).flatten(1) + reshape(h, 8).relu()

    model = net(forward, conv=nn.Conv1d(3, 4, 1), bn=nn.BatchNorm1d(4))
    judge(model, torch.randn(5, 3, 2, dtype=torch.float64), kept={"bn": "other-reader"})


def test_size_out_of_a_tensor_counts_as_a_branch(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        parts = (x > -1e9).any().long()
        return m.bn(m.fc(x)) if x.reshape(len(x), parts, -1).shape[1] == 1 else m.fc(x)

    judge(net(forward), X, kept={"bn": "python-value"}, others=[(2 * X,)])


# Beside a layer.


def in_place(m: Any, x: Tensor) -> Tensor:
    y = m.bn(m.conv(x))
    y += m.id(x)
    return y.relu()


def in_place_into_the_identity(m: Any, x: Tensor) -> Tensor:
    y = 0 + m.id(x)
    y += m.bn(m.conv(x))
    return y.relu()


def written_into_the_identity(m: Any, x: Tensor) -> Tensor:
    y = m.id(x)
    y -= m.bn(m.conv(x))
    y += m.other(x)
    return y.relu()


def subtracted(m: Any, x: Tensor) -> Tensor:
    return x + m.scale * (m.bn(m.conv(x)) - m.id(x))


def subtracted_from(m: Any, x: Tensor) -> Tensor:
    return (m.id(x) - m.bn(m.conv(x))).relu()


def deep_in_a_sum(m: Any, x: Tensor) -> Tensor:
    return ((x - (m.other(x) - m.bn(m.conv(x)))) - m.id(x)).relu()


def of_sums(m: Any, x: Tensor) -> Tensor:
    return sum([m.id(x), m.bn(m.conv(x)), m.other(x)]).relu()


@pytest.mark.parametrize(
    "forward",
    [
        in_place,
        in_place_into_the_identity,
        written_into_the_identity,
        subtracted,
        subtracted_from,
        deep_in_a_sum,
        of_sums,
    ],
)
def test_batchnorm_beside_a_convolution_goes_into_it_whatever_the_sum(forward: Any, judge: Judge, net: Any) -> None:
    model = net(
        forward,
        conv=nn.Conv2d(3, 3, 3, padding=1),
        bn=nn.BatchNorm2d(3),
        id=nn.BatchNorm2d(3),
        other=nn.Conv2d(3, 3, 1, groups=3),
        scale=nn.Parameter(torch.randn(3, 1, 1)),
    )
    images = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    others = [(torch.randn(n, 3, 4, 6, dtype=torch.float64),) for n in (1, 2, 3)]
    taker = "other" if forward is deep_in_a_sum else "conv"
    plan = judge(model, images, folds={"bn": ["conv"], "id": [taker]}, others=others)
    assert [fold.written for fold in plan.folds] == [False, forward is written_into_the_identity]
    assert FoldingPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


class WithActivation(nn.BatchNorm2d):
    """A BatchNorm that brings the activation behind it along, as those of timm do, here with none."""

    def __init__(self, num_features: int, activation: nn.Module) -> None:
        super().__init__(num_features)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        numbers = (self.running_mean, self.running_var, self.weight, self.bias)
        return self.activation(nn.functional.batch_norm(input, *numbers, training=False, eps=self.eps))


@pytest.mark.parametrize("forward", [in_place, written_into_the_identity])
def test_identity_branch_of_a_batchnorm_with_a_forward_of_its_own_goes_into_the_convolution(
    forward: Any, judge: Judge, net: Any
) -> None:
    norm = WithActivation(3, nn.Identity())
    other = nn.Conv2d(3, 3, 1, groups=3)
    model = net(forward, conv=nn.Conv2d(3, 3, 3, padding=1), bn=nn.BatchNorm2d(3), id=norm, other=other)
    images = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    plan = judge(copy.deepcopy(model), images, folds={"bn": ["conv"], "id": ["conv"]})
    folded = plan.apply(model.double().eval())
    for other in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
        assert not other.id(images).any()
        assert torch.equal(other(images), folded(images))


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Sigmoid()])
def test_identity_branch_with_an_activation_behind_its_batchnorm_is_kept(
    activation: nn.Module, judge: Judge, net: Any
) -> None:
    model = net(in_place, conv=nn.Conv2d(3, 3, 3, padding=1), bn=nn.BatchNorm2d(3), id=WithActivation(3, activation))
    images = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    judge(model, images, folds={"bn": ["conv"]}, kept={"id": "other-reader"})


def test_identity_that_is_read_by_more_than_the_sum_is_kept(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.id(x)
        return (m.conv(x) + y).relu() * y.tanh()

    model = net(forward, conv=nn.Conv2d(3, 3, 3, padding=1), id=nn.BatchNorm2d(3))
    judge(model, torch.randn(2, 3, 5, 5, dtype=torch.float64), kept={"id": "other-reader"})


def test_sum_that_somebody_saw_before_it_was_complete_keeps_the_identity(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        seen = y[:, :1]
        y += m.id(x)
        return y.relu() + seen

    model = net(forward, conv=nn.Conv2d(3, 3, 3, padding=1), id=nn.BatchNorm2d(3))
    judge(model, torch.randn(2, 3, 5, 5, dtype=torch.float64), kept={"id": "other-reader"})


# A BatchNorm that stays is a layer to its neighbours.


def test_batchnorm_before_one_that_stays_goes_into_it(judge: Judge) -> None:
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.Tanh())
    plan = judge(model, X, folds={"1": ["2"]}, kept={"2": "no-layer"})
    assert plan.folds[0].direction == "forward"


@pytest.mark.parametrize("affine", [(True, False), (False, True), (False, False)])
def test_batchnorm_without_weight_takes_another_one(judge: Judge, affine: tuple[bool, bool]) -> None:
    first, second = (nn.BatchNorm1d(3, affine=each) for each in affine)
    model = nn.Sequential(nn.ReLU(), first, second, nn.Tanh())
    judge(model, X, folds={"1": ["2"]}, kept={"2": "no-layer"})
    assert model[2].weight.requires_grad == affine[1]
    assert model[2].weight.shape == model[2].bias.shape == (3,)


def test_three_batchnorms_in_a_row_become_one(judge: Judge) -> None:
    norms = [nn.BatchNorm1d(3) for _ in range(3)]
    judge(nn.Sequential(nn.ReLU(), *norms, nn.Tanh()), X, folds={"1": ["2"], "3": ["2"]}, kept={"2": "no-layer"})


def test_batchnorm_that_has_taken_another_one_stays(judge: Judge, net: Any) -> None:
    model = net(lambda m, x: m.a(m.b(m.a(m.fc(x)))), fc=nn.Linear(3, 4), a=nn.BatchNorm1d(4), b=nn.BatchNorm1d(4))
    plan = judge(model, X, folds={"a": ["fc", "b"]}, kept={"b": "behind-batchnorm"})
    assert plan.kept[0].reason == "it has taken another BatchNorm, and stays for that"


def test_batchnorm_behind_a_sum_goes_into_a_layer_and_a_batchnorm(judge: Judge, net: Any) -> None:
    model = net(
        lambda m, x: m.last(m.fc(x) + m.norm(x.relu())).tanh(),
        fc=nn.Linear(3, 3),
        norm=nn.BatchNorm1d(3),
        last=nn.BatchNorm1d(3),
    )
    judge(model, X, folds={"last": ["fc", "norm"]}, kept={"norm": "no-layer"})


def test_batchnorms_before_a_concatenation_take_a_slice_of_the_one_behind_it(judge: Judge, net: Any) -> None:
    model = net(
        lambda m, x: m.last(torch.cat([m.a(x.relu()), x, m.b(x.tanh())], 1)).tanh(),
        a=nn.BatchNorm1d(3),
        b=nn.BatchNorm1d(3),
        last=nn.BatchNorm1d(9),
    )
    judge(model, X, folds={"a": ["last"], "b": ["last"]}, kept={"last": "no-layer"})


def test_channels_before_flattened_features_go_into_them(judge: Judge) -> None:
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(2), nn.Flatten(), nn.BatchNorm1d(18), nn.Tanh())
    judge(model, torch.randn(5, 2, 3, 3, dtype=torch.float64), folds={"1": ["3"]}, kept={"3": "no-layer"})


@pytest.mark.parametrize("hinder", ["hook", "share", "read", "train", "twice"])
def test_batchnorm_that_cannot_change_takes_no_other(hinder: str, judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        if hinder == "train":
            m.second.train()
        h = m.second(m.first(x.relu())).tanh()
        if hinder == "twice":
            h = h + m.second(x)
        return m.third(h) * m.second.weight.sum() if hinder == "read" else m.third(h)

    model = net(forward, first=nn.BatchNorm1d(3), second=nn.BatchNorm1d(3), third=nn.BatchNorm1d(3))
    if hinder == "hook":
        model.second.register_forward_hook(lambda *_: None)
    if hinder == "share":
        model.third.weight = model.second.weight
    codes = {
        "hook": {"first": "no-layer", "second": "hook", "third": "no-layer"},
        "share": {"first": "no-layer", "third": "no-layer"},
        "read": {"first": "no-layer", "second": "parameter-read", "third": "no-layer"},
        "train": {"first": "before-batchnorm", "second": "batch-statistics", "third": "no-layer"},
        "twice": {"first": "no-layer", "second": "other-reader", "third": "no-layer"},
    }
    others = [(X[:3],)] if hinder == "train" else None
    # The other way round is possible where it is not the second one that changes.
    judge(model, X, folds={"second": ["first"]} if hinder == "share" else {}, kept=codes[hinder], others=others)


def test_batchnorm_that_would_not_use_a_weight_takes_no_other_but_is_taken(judge: Judge) -> None:
    class Plain(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.batch_norm(x, self.running_mean, self.running_var, eps=self.eps)

    model = nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3), Plain(3, affine=False), nn.Tanh())
    judge(model, X, folds={"2": ["1"]}, kept={"1": "no-layer"})


# Notes.


@pytest.mark.parametrize(
    ("var", "weight", "mean", "noted"),
    [
        (1.0, 1.0, 0.5, False),
        (1e-9, 1.0, 0.0, True),
        (1.0, 5e3, 0.0, True),
        (1.0, 1.0, 5e3, True),
        (0.0, 0.0, 0.0, False),
    ],
)
def test_fold_that_costs_digits_says_so(var: float, weight: float, mean: float, noted: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, eps=1e-12)).double().eval()
    with torch.no_grad():
        model[1].running_var[1], model[1].weight[1], model[1].running_mean[1] = var, weight, mean
    plan = plan_folding(model, (X,))
    assert ("digits" in str(plan)) == noted
    assert (plan.folds[0].note is not None) == noted
    assert FoldingPlan.from_dict(plan.to_dict()) == plan


def test_batchnorm_before_zero_padding_says_so(judge: Judge, net: Any) -> None:
    images = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    padded = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1))
    judge(padded, images, kept={"1": "zero-padding"})
    read = net(
        lambda m, x: m.next(m.bn(h := m.conv(x))) + h,
        conv=nn.Conv2d(3, 3, 1), bn=nn.BatchNorm2d(3), next=nn.Conv2d(3, 3, 3, padding=1),
    )  # fmt: skip
    judge(read, images, kept={"bn": "other-reader"})


def test_default_device_does_not_matter(randomised: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    model = randomised(model.extend([nn.BatchNorm1d(5), nn.Tanh()])).double()
    images = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    expected = plan_folding(model, (images,))
    assert [fold.layers for fold in expected.folds] == [("0",), ("4",)]
    with torch.device("meta"):
        assert plan_folding(model, (images,)) == expected
        assert not any(parameter.is_meta for parameter in fold_batchnorm(model, (images,)).parameters())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": nn.Linear}, "model: expected an nn.Module, got type"),
        ({"kinds": None}, "kinds: expected Kinds, got NoneType"),
    ],
)
def test_plan_is_applied_to_models_alone(given: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        FoldingPlan().apply(**({"model": nn.Linear(3, 4)} | given))
