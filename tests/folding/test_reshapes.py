"""Reshapes and layouts that only the sizes of the example make harmless."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_bnfold.folding import FoldingPlan, plan_folding
from lit_bnfold.folding.rewrite import LaidOut, LaidOutZero

Judge = Callable[..., FoldingPlan]
X = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
SEQUENCE = torch.randn(5, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


MATRIX = torch.randn(2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    "later",
    [lambda y: y.view(y.shape[0], -1), lambda y: y.as_strided((3,), (1,)), lambda y: y.view(torch.int64),
     lambda y: y.relu().view(y.shape[0], -1), lambda y: (y.tanh() + y.cos()).view(y.shape[0], -1), lambda y: y.ravel(),
     lambda y: y.transpose(1, 2).contiguous().view(-1, 4), lambda y: F.elu(y).transpose(1, 2).contiguous(),
     lambda y: torch.einsum("ij,bcj->bci", MATRIX, y), lambda y: y @ MATRIX, lambda y: F.linear(y, MATRIX),
     lambda y: torch.tensordot(y, MATRIX, 1), lambda y: F.group_norm(y, 2), lambda y: y.relu_(), lambda y: y],
)  # fmt: skip
def test_layout_that_others_may_rely_on_is_that_of_the_batchnorm(later: Any, judge: Judge, net: Any) -> None:
    model = net(lambda m, x: later(m.bn(m.fc(x).transpose(1, 2))))
    plan = judge(model, SEQUENCE, folds={"bn": ["fc"]})
    assert plan.folds[0].contiguous
    assert type(model.bn) is LaidOut


def transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


def written_through_a_reshape(m: Any, x: Tensor) -> Tensor:
    y = m.bn(x)
    y += m.conv(x)
    y.reshape(len(y), 3, -1)[:, 0].relu_()  # a view where the BatchNorm has laid it out in order, else a copy
    return y


IMAGES = torch.randn(2, 3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize(
    ("function", "layers", "example"),
    [
        (lambda m, x: m.fc(m.bn(x).view(len(x), -1)), [nn.Linear(6, 4), nn.BatchNorm1d(2)], SEQUENCE),
        (lambda m, x: m.fc(m.bn(x.relu()).view(len(x), -1)), [nn.Linear(6, 4), nn.BatchNorm1d(2)], SEQUENCE),
        (lambda m, x: m.fc(m.bn(x).view(len(x), -1)), [nn.Linear(60, 4), nn.BatchNorm2d(3)], IMAGES),
        *(
            (lambda m, x, f=f: m.fc(m.bn(f(x)).view(len(x), -1)), [nn.Linear(60, 4), nn.BatchNorm2d(3)], IMAGES)
            for f in (
                lambda x: x + x.mean(3, keepdim=True),
                torch.clone,
                torch.detach,
                lambda x: x.flip(2),
                lambda x: x[:, :, torch.arange(5)],
                lambda x: 0 + x,
                lambda x: x.clone().add_(1),
            )
        ),
        (lambda m, x: m.bn(m.fc(x)).tanh().view(len(x), -1), [nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3)], SEQUENCE),
    ],
)
def test_input_that_is_laid_out_otherwise_is_normalised_alike(
    function: Any, layers: list[nn.Module], example: Tensor, judge: Judge, net: Any
) -> None:
    model = net(function, fc=layers[0], bn=layers[1])
    others = [(2 * example[:3],), (transposed(example),), (transposed(example[:1]),)]
    assert judge(model, example, folds={"bn": ["fc"]}, others=others).folds[0].contiguous


@pytest.mark.parametrize(
    "later",
    [
        lambda y: y.view(len(y), -1).tanh(),
        lambda y: torch.view_as_complex(y.unflatten(2, (-1, 2))).angle(),
        lambda y: (y.contiguous().relu_(), y * 2)[1],
        lambda y: (y.flatten(1).relu_(), y * 2)[1],
    ],
)
def test_sum_with_the_input_is_laid_out_as_the_batchnorm_does(later: Any, judge: Judge, net: Any) -> None:
    model = net(lambda m, x: later(m.bn(x + m.conv(x))), conv=nn.Conv1d(4, 4, 1), bn=nn.BatchNorm1d(4))
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    judge(model, x, folds={"bn": ["conv"]}, others=[(2 * x,), (transposed(x),)])


def test_zeros_lie_in_memory_as_what_the_batchnorm_gave(judge: Judge, net: Any) -> None:
    model = net(written_through_a_reshape, conv=nn.Conv2d(3, 3, 3, padding=1), bn=nn.BatchNorm2d(3))
    last = IMAGES.contiguous(memory_format=torch.channels_last)
    judge(model, IMAGES, folds={"bn": ["conv"]}, others=[(IMAGES,), (transposed(IMAGES),), (last,)])


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (2, 3, 4, 5), (2, 1, 4, 5), (2, 3, 2, 4, 5)])
@pytest.mark.parametrize("left", [LaidOut(), LaidOutZero()])
def test_what_is_left_lays_out_any_input_as_the_batchnorm_does(shape: tuple[int, ...], left: nn.Module) -> None:
    numbers = torch.zeros(shape[1]), torch.ones(shape[1])
    for order in itertools.permutations(range(len(shape))):
        back = [order.index(axis) for axis in range(len(shape))]
        x = torch.randn([shape[axis] for axis in order]).permute(back)
        for input in (x, x[:, :, 1:] if len(shape) == 3 else x[1:]):
            assert left(input).stride() == F.batch_norm(input, *numbers).stride(), (order, input.stride())


def test_layout_that_stays_leaves_an_identity(judge: Judge, net: Any) -> None:
    model = net(lambda m, x: m.bn(m.fc(x)).view(-1))
    assert not judge(model, X, folds={"bn": ["fc"]}).folds[0].contiguous
    assert type(model.bn) is nn.Identity


def test_sequence_of_one_step_shows_how_longer_ones_are_laid_out(judge: Judge, net: Any) -> None:
    model = net(lambda m, x: m.bn(m.fc(x).transpose(1, 2)).relu().view(len(x), -1))
    judge(model, SEQUENCE[:, :1], folds={"bn": ["fc"]}, others=[(SEQUENCE,)])


def test_sum_of_sequences_of_one_step_shows_how_longer_ones_are_laid_out(judge: Judge, net: Any) -> None:
    layers = {"fc": nn.Linear(3, 4), "other": nn.Linear(3, 4), "bn": nn.BatchNorm1d(4)}
    model = net(lambda m, x: m.bn(m.fc(x).mT + m.other(x).mT).relu().view(len(x), -1), **layers)
    judge(model, SEQUENCE[:, :1], folds={"bn": ["fc", "other"]}, others=[(SEQUENCE,)])


@pytest.mark.parametrize("width", [2, 1000])
def test_layout_reaches_the_layers_behind_whatever_there_is_room_to_remember(
    width: int, judge: Judge, net: Any
) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        image = F.gelu(m.bn(m.fc(x).transpose(1, 2))).unflatten(2, (3, 3))
        return m.head(m.conv(image).relu().view(len(x), -1))

    model = net(forward, fc=nn.Linear(3, 4), bn=nn.BatchNorm1d(4), conv=nn.Conv2d(4, 5, 2), head=nn.Linear(20, width))
    judge(model, torch.randn(2, 9, 3, dtype=torch.float64), folds={"bn": ["fc"]})


@pytest.mark.parametrize(("shape", "is_forward"), [((2, 12, 1), False), ((2, 12, 1), True), ((2, 4, 3, 1), True)])
def test_single_channel_that_lay_last_is_laid_out_first(
    shape: tuple[int, ...], is_forward: bool, judge: Judge, net: Any
) -> None:
    kind, norm = (nn.Conv1d, nn.BatchNorm1d) if len(shape) == 3 else (nn.Conv2d, nn.BatchNorm2d)

    def forward(m: Any, x: Tensor) -> Tensor:
        images = x.movedim(-1, 1)
        return (m.conv(m.bn(images)) if is_forward else m.bn(m.conv(images))).relu().view(len(x), -1)

    model = net(forward, conv=kind(1, 8, 3, padding=1 - is_forward), bn=norm(1 if is_forward else 8))
    judge(model, torch.randn(shape, dtype=torch.float64), folds={"bn": ["conv"]})


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(3, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.fc(x).transpose(1, 2)).relu().view(len(x), -1)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_convolution_of_a_transposed_sequence_is_followed_on_sequences_of_any_length(
    steps: int, judge: Judge, net: Any
) -> None:
    # What it makes of a single step lies otherwise in memory than what it makes of several.
    model = net(
        lambda m, x: m.bn(m.conv(x.transpose(1, 2))).tanh().view(len(x), -1),
        conv=nn.Conv1d(3, 4, 3, padding=2),
        bn=nn.BatchNorm1d(4),
    )
    others = [(torch.randn(2, length, 3, dtype=torch.float64),) for length in (1, 2, 4)]
    judge(model, torch.randn(3, steps, 3, dtype=torch.float64), folds={"bn": ["conv"]}, others=others)


def test_layout_survives_a_file(randomised: Any) -> None:
    model = randomised(Sequence().double()).eval()
    plan = plan_folding(model, (SEQUENCE,))
    again = FoldingPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    folded = pickle.loads(pickle.dumps(again.apply(copy.deepcopy(model))))
    torch.testing.assert_close(folded(SEQUENCE), model(SEQUENCE), rtol=0, atol=1e-12)


BESIDE = {"c": nn.Conv1d(3, 3, 1), "bn": nn.BatchNorm1d(3)}


@pytest.mark.parametrize(
    "add",
    [lambda m, t: (m.bn(t) + m.c(t)).relu(), lambda m, t: m.bn(t).add_(m.c(t)).relu_(),
     lambda m, t: m.c(t).add_(m.bn(t)).relu_(), lambda m, t: m.c(t) + m.bn(t)],
)  # fmt: skip
def test_layout_beside_a_layer_survives_a_file_too(add: Any, judge: Judge, net: Any) -> None:
    modules = {name: copy.deepcopy(module) for name, module in BESIDE.items()}
    model = net(lambda m, x: add(m, x.transpose(1, 2)).view(len(x), -1), **modules)
    plan = judge(model, torch.randn(2, 5, 3, dtype=torch.float64), folds={"bn": ["c"]})
    assert FoldingPlan.from_dict(plan.to_dict()) == plan


def test_images_that_may_lie_in_two_ways_do_so_behind_a_fold(judge: Judge, net: Any) -> None:
    modules = {"conv": nn.Conv2d(3, 5, 4), "bn": nn.BatchNorm2d(5)}
    model = net(lambda m, x: m.bn(m.conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1).reshape(-1, 5), **modules)
    judge(model, torch.randn(2, 4, 4, 3).double(), folds={"bn": ["conv"]}, others=[(torch.randn(2, 8, 8, 3).double(),)])
    modules = {"conv": nn.Conv2d(3, 4, 1), "bn": nn.BatchNorm2d(2)}
    model = net(lambda m, x: m.bn(m.conv(x).chunk(2, 1)[0]).relu(), **modules)
    image = torch.randn(2, 3, 4, 4, dtype=torch.float64).to(memory_format=torch.channels_last)
    judge(model, image, folds={"bn": ["conv"]}, others=[(2 * image[:1],)])


@pytest.mark.parametrize(
    ("forward", "shape", "other"),
    [
        (lambda m, x: m.bn(m.fc(x).transpose(0, 1).reshape(-1, 4)).view(x.shape[1], -1), (2, 5, 3), (1, 5, 3)),
        (lambda m, x: m.bn(m.fc(x).transpose(0, 1).flatten(0, 1)).view(x.shape[1], -1), (2, 5, 3), (1, 5, 3)),
        (lambda m, x: m.bn(m.fc(x)[:16]).relu_().view(-1), (16, 3), (20, 3)),
        (lambda m, x: m.bn(m.fc(x).view(-1, 4, 1).expand(-1, -1, len(x) // 5)).relu_(), (5, 3), (10, 3)),
    ],
)
def test_layout_that_depends_on_sizes_is_that_of_the_batchnorm(
    forward: Any, shape: tuple[int, ...], other: tuple[int, ...], judge: Judge, net: Any
) -> None:
    others = [(torch.randn(other, dtype=torch.float64),)]
    judge(net(forward), torch.randn(shape, dtype=torch.float64), folds={"bn": ["fc"]}, others=others)


def test_strides_by_which_torch_knows_that_channels_come_last_are_kept(judge: Judge, net: Any) -> None:
    modules = {"conv": nn.Conv2d(4, 4, 3, padding=1, groups=4), "bn": nn.BatchNorm2d(4)}
    model = net(lambda m, x: m.bn(m.conv(x)).permute(0, 2, 3, 1).view(-1, 4), **modules)
    model = model.to(memory_format=torch.channels_last)
    plan = judge(model, torch.randn(2, 4, 6, 6, dtype=torch.float64), folds={"bn": ["conv"]})
    assert not plan.folds[0].contiguous
    assert model.conv.weight.stride() == (9, 1, 3, 1)


def test_batch_of_one_does_not_hide_that_a_view_mixes_examples_and_channels(judge: Judge, net: Any) -> None:
    model = net(lambda m, x: m.bn(m.fc(x).view(4, -1).t()))
    judge(model, X[:1], kept={"bn": "not-transparent"}, others=[(X,)])


def test_sequence_of_one_step_does_not_hide_that_a_view_mixes_steps_and_channels(judge: Judge, net: Any) -> None:
    model = net(lambda m, x: m.bn(m.fc(x).view(x.shape[0], 4, -1)))
    judge(model, SEQUENCE[:, :1], kept={"bn": "not-transparent"}, others=[(SEQUENCE,)])


def test_batch_of_one_through_harmless_views_is_folded(judge: Judge, net: Any) -> None:
    model = net(lambda m, x: m.bn(m.fc(x).view(-1, 4).view(-1, 4, 1)))
    judge(model, X[:1], folds={"bn": ["fc"]})


def test_squeeze_of_nothing_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        nothing = m.fc(x[:0]).unsqueeze(-1)
        return m.other(m.bn(nothing).squeeze(-1)), m.last(m.head(x))

    first, last = nn.Linear(3, 4), nn.Linear(3, 4)
    norms = {"bn": nn.BatchNorm1d(4), "last": nn.BatchNorm1d(4)}
    model = net(forward, fc=first, other=nn.Linear(4, 2), head=last, **norms)
    plan = judge(model, X, folds={"last": ["head"]}, kept={"bn": "not-transparent"})
    assert "`unsqueeze` in the model before it was seen without any elements" in plan.kept[0].reason


def test_batch_without_examples_keeps_the_batchnorm(judge: Judge) -> None:
    judge(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), X[:0], kept={"1": "kept-alive"}, others=[(X,)])


def test_square_batch_does_not_confuse_examples_and_channels(judge: Judge, net: Any) -> None:
    x = torch.randn(4, 3, dtype=torch.float64)
    model = net(lambda m, x: m.bn(m.fc(x).t()))
    judge(model, x, kept={"bn": "channel-axis"}, others=[(2 * x,)])


def test_old_style_empty_tensor_in_a_concatenation_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    model = net(lambda m, x: m.bn(torch.cat([torch.empty(0, dtype=x.dtype), m.fc(x)], 1)))
    judge(model, X, kept={"bn": "not-transparent"})


def test_view_of_a_batch_without_examples_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    model = net(lambda m, x: m.bn(m.fc(x).view(2 * x.shape[0], 2)), fc=nn.Linear(3, 4), bn=nn.BatchNorm1d(2))
    judge(model, X[:0], kept={"bn": "not-transparent"})


def test_batch_of_one_through_two_views_does_not_hide_that_they_mix_examples_and_channels(
    judge: Judge, net: Any
) -> None:
    model = net(lambda m, x: m.bn(m.fc(x).view(-1).view(4, -1).t()))
    judge(model, X[:1], kept={"bn": "not-transparent"}, others=[(X,)])


def swapped(m: Any, x: Tensor) -> Tensor:
    h = m.fc(x)
    shape = h.shape
    return m.bn(h.t().reshape(shape).t().reshape(shape)).tanh()


def swapped_beside_an_axis_of_size_1(m: Any, x: Tensor) -> Tensor:
    h = m.fc(x)
    shape = (*h.shape, 1)
    return m.bn(h.t().reshape(shape).squeeze(-1).t().reshape(shape).squeeze(-1)).tanh()


@pytest.mark.parametrize(
    ("forward", "examples", "channels"),
    [
        (swapped, 4, 4),
        (swapped, 2, 2),
        (swapped_beside_an_axis_of_size_1, 4, 4),
    ],
)
def test_reshapes_that_only_as_many_examples_as_channels_make_nothing_of_are_seen_through(
    forward: Any, examples: int, channels: int, judge: Judge, net: Any
) -> None:
    model = net(forward, fc=nn.Linear(3, channels), bn=nn.BatchNorm1d(channels))
    judge(model, torch.randn(examples, 3, dtype=torch.float64), kept={"bn": "not-transparent"})


def axes_joined_in_between(m: Any, x: Tensor) -> Tensor:
    h = m.conv(x)
    n, c = h.shape[:2]
    return m.bn(h.transpose(0, 1).reshape(n, c, -1).transpose(0, 1).reshape(h.shape)).tanh()


def test_unflattening_says_itself_what_it_does(judge: Judge) -> None:
    model = nn.Sequential(nn.Linear(3, 32), nn.Unflatten(1, (8, 2, 2)), nn.BatchNorm2d(8), nn.ReLU())
    judge(model, torch.randn(2, 3, dtype=torch.float64), folds={"2": ["0"]})


def channels_split_in_between(m: Any, x: Tensor) -> Tensor:
    h = m.conv(x).mean((2, 3))
    return m.bn(h.t().reshape(-1, 2, 2).permute(1, 2, 0).reshape(*h.shape, 1, 1)).tanh()


def stacked_anew(m: Any, x: Tensor) -> Tensor:
    h = torch.stack(m.conv(x).unbind(0), 1)
    c, n = h.shape[:2]
    return m.bn(torch.stack(h.reshape(n, c, -1).unbind(0), 1).reshape(x.shape[0], c, *x.shape[2:])).tanh()


def flattened_and_unflattened(m: Any, x: Tensor) -> Tensor:
    h = m.conv(x)
    for _ in range(2):
        h = h.transpose(0, 1).flatten(0, 1).unflatten(0, (len(x), 4))
    return m.bn(h).tanh()


def examples_and_steps_swapped(m: Any, x: Tensor) -> Tensor:
    h = m.conv(x)[:, :3]
    return m.three(h.permute(2, 1, 0, 3).reshape(len(x), 3, *x.shape[2:])).tanh()


def examples_and_pixels_swapped(m: Any, x: Tensor) -> Tensor:
    h = m.conv(x[..., :1])[:, :3]
    return m.three(h.squeeze(3).permute(2, 1, 0).reshape(len(x), 3, 2, 2)).tanh()


def sliced_behind(m: Any, x: Tensor) -> Tensor:
    h = m.conv(x)
    n, c = h.shape[:2]
    return m.narrow(h.view(c, n, -1)[:, :2]).tanh()


def rows_as_examples(m: Any, x: Tensor) -> Tensor:
    return m.bn(m.conv(x).flatten(1).reshape(x.shape[2], 4, -1, 1)).tanh()


def flattened_with_the_channels_first(m: Any, x: Tensor) -> Tensor:
    h = m.conv(x)[:, :3].permute(1, 2, 3, 0).flatten(0, 2).t()
    return m.three(h.reshape(x.shape[2], 3, 1, -1)).tanh()


def stacked_along_another_axis(m: Any, x: Tensor) -> Tensor:
    h = torch.stack(m.conv(x)[:, :3].permute(3, 0, 2, 1).flatten(1).unbind(0), 1)
    return m.three(h.reshape(len(x) ** 2, 3, -1, 1)).tanh()


@pytest.mark.parametrize(
    ("forward", "norm"),
    [
        (rows_as_examples, "bn"),
        (flattened_with_the_channels_first, "three"),
        (stacked_along_another_axis, "three"),
        (axes_joined_in_between, "bn"),
        (channels_split_in_between, "bn"),
        (stacked_anew, "bn"),
        (flattened_and_unflattened, "bn"),
        (examples_and_steps_swapped, "three"),
        (examples_and_pixels_swapped, "three"),
        (sliced_behind, "narrow"),
    ],
)
def test_reshape_that_may_mix_axes_that_are_equally_long_by_chance_keeps_the_batchnorm(
    forward: Any, norm: str, judge: Judge, net: Any
) -> None:
    norms = {"bn": nn.BatchNorm2d(4), "three": nn.BatchNorm2d(3), "narrow": nn.BatchNorm1d(2)}
    model = net(forward, conv=nn.Conv2d(3, 4, 1), **{norm: norms[norm]})
    example = torch.randn(4, 3, 4, 2, dtype=torch.float64)
    # With another number of examples, some of these do not even run.
    judge(model, example, kept={norm: "not-transparent"}, others=[(example.cos(),)])


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.bn(m.conv(x).view(*x.shape[:1], 4, -1).unsqueeze(-1)).tanh(),
        lambda m, x: m.bn(m.conv(x).view(4, len(x), -1).view(len(x), 4, *x.shape[2:])).tanh(),
        lambda m, x: m.bn(m.conv(x).transpose(2, 3).contiguous().mean(3, keepdim=True)).tanh(),
        lambda m, x: m.bn(m.conv(x).mean((2, 3)).view(len(x), -1)[..., None, None]).tanh(),
        lambda m, x: m.bn(m.conv(x).flatten(2).transpose(1, 2).transpose(1, 2)[..., None]).tanh(),
    ],
)
def test_reshapes_that_move_nothing_fold_with_as_many_examples_as_channels(
    forward: Any, judge: Judge, net: Any
) -> None:
    model = net(forward, conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4))
    judge(model, torch.randn(4, 3, 5, 2, dtype=torch.float64), folds={"bn": ["conv"]})


def test_flattening_as_many_examples_as_channels_says_itself_what_it_does(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.bn(m.conv(x).mean((2, 3), keepdim=True).flatten(1)).tanh()

    model = net(forward, conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm1d(4))
    judge(model, torch.randn(4, 3, 2, 2, dtype=torch.float64), folds={"bn": ["conv"]})


def test_reshape_of_other_axes_than_as_many_examples_and_channels_is_folded(judge: Judge, net: Any) -> None:
    model = net(lambda m, x: m.bn(m.conv(x).view(len(x), 4, -1)), conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm1d(4))
    judge(model, torch.randn(4, 3, 2, 3, dtype=torch.float64), folds={"bn": ["conv"]})


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.fc(m.bn(x.tanh()).transpose(1, 2).flatten(1)),
        lambda m, x: m.fc(m.bn(x.tanh()).transpose(1, 2).reshape(len(x), -1)),
    ],
)
def test_features_with_axes_on_both_sides_of_the_channels_keep_the_batchnorm(
    forward: Any, judge: Judge, net: Any
) -> None:
    # A linear layer takes them from images of 5 x 2 and of 2 x 5 pixels, and means other channels by each.
    model = net(forward, bn=nn.BatchNorm2d(3), fc=nn.Linear(30, 4))
    wide, high = torch.randn(2, 3, 5, 2, dtype=torch.float64), torch.randn(2, 3, 2, 5, dtype=torch.float64)
    judge(model, wide, kept={"bn": "no-layer"}, others=[(high,)])
    assert "has the channels and other axes in one" in plan_folding(model, (wide,)).kept[0].reason


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, z: m.bn(m.fc(z).unflatten(1, m.sizes).transpose(1, 2)).tanh(),
        lambda m, z: m.bn(m.fc(z).view(len(z), *m.sizes).transpose(1, 2)).tanh(),
    ],
)
def test_features_that_become_axes_on_both_sides_of_the_channels_keep_the_batchnorm(
    forward: Any, judge: Judge, net: Any
) -> None:
    model = net(forward, bn=nn.BatchNorm2d(3), fc=nn.Linear(4, 30))
    model.sizes = (5, 3, 2)
    judge(model, torch.randn(7, 4, dtype=torch.float64), kept={"bn": "not-transparent"})


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.fc(m.bn(x).flatten(1)[:, :8]),
        lambda m, x: m.fc(m.bn(x).reshape(len(x), -1)[:, :8]),
        lambda m, x: m.fc(m.bn(x).flatten(1).split(8, 1)[0]),
    ],
)
def test_slice_of_an_axis_that_channels_share_with_pixels_keeps_the_batchnorm(
    forward: Any, judge: Judge, net: Any
) -> None:
    # Of images of four pixels it holds two channels, and of larger ones a part of the first.
    model = net(forward, bn=nn.BatchNorm2d(3), fc=nn.Linear(8, 4))
    small, large = torch.randn(5, 3, 2, 2, dtype=torch.float64), torch.randn(5, 3, 4, 3, dtype=torch.float64)
    plan = judge(model, small, kept={"bn": "no-layer"}, others=[(large,)])
    assert "has the channels and other axes in one" in plan.kept[0].reason


def test_features_with_axes_on_one_side_of_the_channels_fold(judge: Judge, net: Any) -> None:
    model = net(lambda m, x: m.fc(m.bn(x).permute(0, 2, 3, 1).flatten(1)), bn=nn.BatchNorm2d(3), fc=nn.Linear(30, 4))
    judge(model, torch.randn(2, 3, 5, 2, dtype=torch.float64), folds={"bn": ["fc"]})


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.fc(m.bn(x).permute(0, 2, 1, 3).flatten(2).flatten(1)),
        lambda m, x: m.fc(m.bn(x).permute(0, 2, 1, 3).flatten(1, 2).flatten(1)),
        lambda m, x: m.fc(torch.cat([column.flatten(1) for column in m.bn(x).unbind(3)], 1)),
    ],
)
def test_channels_between_rows_and_columns_keep_the_batchnorm_however_they_came_there(
    forward: Any, judge: Judge, net: Any
) -> None:
    # Images of two rows and those of three have as many features.
    model = net(forward, bn=nn.BatchNorm2d(4), fc=nn.Linear(48, 3))
    wide, square = torch.randn(3, 4, 2, 6, dtype=torch.float64), torch.randn(3, 4, 3, 4, dtype=torch.float64)
    judge(model, wide, kept={"bn": "no-layer"}, others=[(square,)])


def test_squeeze_of_an_axis_that_is_longer_in_the_example_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    # An image of one column loses that axis, and what is left is taken for one image without a batch.
    model = net(lambda m, x: m.conv(m.bn(x).squeeze(3)).tanh(), bn=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 4, 1))
    image, column = torch.randn(5, 4, 8, 8, dtype=torch.float64), torch.randn(4, 4, 4, 1, dtype=torch.float64)
    judge(model, image, kept={"bn": "no-layer"}, others=[(column,)])


def test_join_of_scalars_behind_channels_is_no_axis_around_them(judge: Judge, net: Any) -> None:
    model = net(lambda m, x: m.fc(torch.stack(m.bn(x)[0, :, 0].unbind(0))), bn=nn.BatchNorm1d(3), fc=nn.Linear(3, 2))
    judge(model, torch.randn(5, 3, 4, dtype=torch.float64), folds={"bn": ["fc"]})
