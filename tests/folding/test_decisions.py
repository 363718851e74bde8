"""A model that decides something by its numbers or its modules may decide otherwise next time, or once it is folded."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_bnfold.folding import FoldingPlan, plan_folding

Judge = Callable[..., FoldingPlan]
X = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "look",
    [lambda m: isinstance(m.bn, nn.BatchNorm1d), lambda m: type(m.bn).__name__ == "BatchNorm1d",
     lambda m: hasattr(m.bn, "running_mean"), lambda m: len(list(m.parameters())) > 2,
     lambda m: len(m.state_dict()) > 2,
     lambda m: "bn.weight" in dict(m.named_parameters()), lambda m: "BatchNorm" in str(m)],
)  # fmt: skip
def test_model_that_looks_at_its_modules_keeps_its_batchnorm(
    judge: Judge, net: Any, look: Callable[[Any], Any]
) -> None:
    plan = plan_folding(net(lambda m, x: m.bn(m.fc(x)) * (2 if look(m) else 3)), (X.float(),))
    assert [kept.code for kept in plan.kept] in (["structure-read"], ["parameter-read"])
    judge(net(lambda m, x: m.bn(m.fc(x)) * (2 if look(m) else 3)), X, kept={"bn": plan.kept[0].code})


def test_loop_that_treats_batchnorms_in_another_way_is_seen(judge: Judge) -> None:
    class Loop(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for module in self:
                x = module(x).relu() if isinstance(module, nn.BatchNorm1d) else module(x)
            return x

    judge(Loop(nn.Linear(3, 4), nn.BatchNorm1d(4)), X, kept={"1": "structure-read"})


def test_attribute_of_a_batchnorm_that_would_be_gone_keeps_it(judge: Judge, net: Any) -> None:
    model = net(lambda m, x: m.bn(m.fc(x)) if m.bn.weight is not None else x)
    judge(model, X, kept={"bn": "structure-read"})


def test_error_of_an_operation_that_is_caught_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h: Tensor = m.fc(x)
        try:
            return torch.multinomial(h, 1).to(h)
        except RuntimeError:  # Some are negative.
            return m.bn(h)  # type: ignore[no-any-return]

    model = net(forward)
    judge(model, X, kept={"bn": "other-reader"}, others=[(-X,)])


def test_error_that_is_caught_is_a_branch(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        try:
            torch.multinomial(x, 1)
        except RuntimeError:  # Some are negative.
            return m.bn(m.fc(x))  # type: ignore[no-any-return]
        return m.fc(x)  # type: ignore[no-any-return]

    judge(net(forward), X, kept={"bn": "python-value"}, others=[(X.abs(),)])


def test_error_of_a_layer_that_is_caught_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    def forward(m: Any, indices: Tensor) -> Tensor:
        try:
            return m.emb(indices)  # type: ignore[no-any-return]
        except IndexError:
            return m.bn(m.emb(indices % 3))  # type: ignore[no-any-return]

    model = net(forward, emb=nn.Embedding(3, 4), bn=nn.BatchNorm1d(4))
    judge(model, torch.tensor([1, 2, 3]), kept={"bn": "parameter-read"}, others=[(torch.tensor([0, 1, 2]),)])


def test_custom_operation_on_constants_may_give_something_else_next_time(judge: Judge, net: Any) -> None:
    @torch.library.custom_op("lit_bnfold_tests::count", mutates_args=())
    def count(x: Tensor) -> Tensor:
        return x + 1

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.bn(m.fc(x)) if count(torch.zeros(1)).item() else x  # type: ignore[no-any-return]

    judge(net(forward), X, kept={"bn": "python-value"})


@pytest.mark.parametrize(
    "ask",
    [
        lambda m: 2 if m.fc.bias is None else 1,
        lambda m: len(list(m.fc.parameters())),
    ],
)
def test_model_that_asks_whether_its_layer_has_a_bias_keeps_the_batchnorm(ask: Any, judge: Judge, net: Any) -> None:
    model = net(lambda m, x: m.bn(m.fc(x)) * ask(m), fc=nn.Linear(3, 4, bias=False), bn=nn.BatchNorm1d(4))
    judge(model, X, kept={"bn": "structure-read"})


@pytest.mark.parametrize("ask", [lambda m: m.second.weight is None, lambda m: not m.second.affine])
def test_model_that_asks_whether_a_batchnorm_has_a_weight_keeps_the_one_before_it(
    ask: Any, judge: Judge, net: Any
) -> None:
    parts = {"first": nn.BatchNorm1d(3), "second": nn.BatchNorm1d(3, affine=False)}
    model = net(lambda m, x: m.second(m.first(x)).tanh() * (2 if ask(m) else 1), **parts)
    judge(model, X, kept={"first": "structure-read", "second": "no-layer"})


@torch.library.custom_op("lit_bnfold_tests::positive", mutates_args=())
def positive(x: Tensor) -> Tensor:
    """The positive numbers of a tensor, so many as there are."""
    return x[x > 0].clone()


def packed(x: Tensor) -> Any:
    lengths = 1 + (x[:2, 0] > 0).long() * 2
    return nn.utils.rnn.pack_padded_sequence(x[:3].expand(2, -1, -1), lengths, batch_first=True, enforce_sorted=False)


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.filterwarnings("ignore:.*deprecated:UserWarning")
@pytest.mark.parametrize(
    "gate",
    [
        lambda x: len(positive(x)) > 0,
        lambda x: x.relu().to_sparse()._nnz() > 0,
        lambda x: len(x.relu().to_sparse().coalesce().values()) > 0,
        lambda x: x.relu().to_sparse().coalesce().indices().shape[1] > 0,
        lambda x: x.relu().to_sparse()._values().numel() > 0,
        lambda x: x.relu().to_sparse()._indices().numel() > 0,
        lambda x: x.relu().to_sparse_csr().col_indices().numel() > 0,
        lambda x: x.relu().to_sparse_csr().values().numel() > 0,
        lambda x: x.relu().to_sparse_csc().row_indices().numel() > 0,
        lambda x: torch.sparse_coo_tensor((x[:1] > 0).long() * 3, x[0]).shape[0] > 2,
        lambda x: packed(x).data.shape[0] > 2,
        lambda x: len(packed(x).batch_sizes) > 1,
        lambda x: torch._nested_tensor_from_mask_left_aligned(x[None], (x[:, 0] > 0)[None]),
        lambda x: torch.quantize_per_tensor_dynamic(x.float(), torch.quint8, False).q_zero_point() < 5,
        lambda x: torch.FloatTensor([x.sum()]) > 0,
        lambda x: torch.LongTensor([x.sum().long() + 1]) > 0,
    ],
)
def test_decision_on_what_an_operation_tells_of_its_numbers_keeps_the_batchnorm(
    gate: Callable[[Tensor], Any], judge: Judge, net: Any
) -> None:
    model = net(lambda m, x: m.bn(m.fc(x)) if gate(x) else m.fc(x), fc=nn.Linear(3, 4), bn=nn.BatchNorm1d(4))
    judge(model, X.abs(), kept={"bn": "python-value"}, others=[(-X.abs(),)])


def test_mask_of_constants_decides_nothing(judge: Judge, net: Any) -> None:
    judge(net(lambda m, x: m.bn(m.fc(x.repeat(1, 2)[:, torch.arange(6) > 2]))), X, folds={"bn": ["fc"]})
    judge(net(lambda m, x: m.bn(m.fc(x[x[:, 0] < 9]))), X, kept={"bn": "python-value"})


@pytest.mark.parametrize(
    ("write", "decides"),
    [
        (lambda x, mask: x.index_put_((mask,), torch.tensor(0.0).to(x)), False),
        (lambda x, mask: x.__setitem__(mask, x.flip(0)[mask]), False),
        (lambda x, mask: x.__setitem__(mask, (picked := x.flip(0)[mask]) * len(picked)), True),
        (lambda x, mask: x.__setitem__(mask, x[mask].sum() * x[mask].shape[0]), True),
        (lambda x, mask: x.__setitem__(mask, x[mask][:1].sum()), True),
    ],
)
def test_write_by_a_mask_decides_nothing_as_long_as_nobody_counts(
    write: Callable[[Tensor, Tensor], object], decides: bool, judge: Judge, net: Any
) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = x.clone()
        write(x, x > 0)
        return m.bn(m.fc(x))  # type: ignore[no-any-return]

    judge(net(forward), X, folds={} if decides else {"bn": ["fc"]}, kept={"bn": "python-value"} if decides else {})


def counted_by_another_shape(m: Any, picked: Tensor) -> int:
    return len(torch.ones(1, 3).to(picked).expand_as(picked))


def counted_by_keyword(m: Any, picked: Tensor) -> int:
    return len(torch.empty_like(input=picked))


def counted_as_a_parameter(m: Any, picked: Tensor) -> int:
    return len(nn.Parameter(picked))


def counted_past_the_witness(m: Any, picked: Tensor) -> int:
    with torch._C.DisableTorchFunction():  # type: ignore[attr-defined]
        return len(picked)


def counted_by_a_module(m: Any, picked: Tensor) -> int:
    return m.count(picked)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "count",
    [
        counted_by_another_shape,
        counted_by_keyword,
        counted_as_a_parameter,
        counted_past_the_witness,
        counted_by_a_module,
    ],
)
def test_whoever_counts_what_a_mask_has_picked_may_decide_by_that(count: Any, judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        picked = x[x[:, 0] > 0]
        return m.bn(m.fc(x)) if count(m, picked) > 1 else m.fc(x)  # type: ignore[no-any-return]

    model = net(forward, fc=nn.Linear(3, 4), bn=nn.BatchNorm1d(4), count=net(lambda m, x: len(x), a=nn.ReLU()))
    judge(model, X, kept={"bn": "python-value"}, others=[(-X.abs(),)])


def test_what_is_written_back_and_counted_besides_may_decide(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y, mask = x.clone(), x[:, 0] > 0
        picked = x.flip(0)[mask]
        y[mask] = picked
        return m.bn(m.fc(y)) if picked.shape[0] > 1 else m.fc(y)  # type: ignore[no-any-return]

    judge(net(forward), X, kept={"bn": "python-value"}, others=[(-X.abs(),)])


def test_module_that_is_told_how_many_were_picked_may_decide_by_that(judge: Judge, net: Any) -> None:
    inner = net(lambda m, x, several: m.bn(m.fc(x)) if several else m.fc(x))

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.inner(x, counted_past_the_witness(m, x[x[:, 0] > 0]) > 1)  # type: ignore[no-any-return]

    judge(net(forward, inner=inner), X, kept={"inner.bn": "python-value"}, others=[(-X.abs(),)])


@pytest.mark.parametrize("value", [lambda x: x.new_ones(3, 3), lambda x: x[x[:, 0].argsort() < 3]])
def test_write_of_so_many_that_may_fail_next_time_keeps_the_batchnorm(value: Any, judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = x.clone()
        try:
            y[x[:, 0] > 0] = value(x)
        except (RuntimeError, IndexError):
            return m.fc(x)  # type: ignore[no-any-return]
        return m.bn(m.fc(x))  # type: ignore[no-any-return]

    x = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0]).double()[:, None] * X.abs()
    judge(net(forward), x, kept={"bn": "python-value"}, others=[(X.abs(),)])


def test_split_at_places_in_a_tensor_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    model = net(lambda m, x, at: m.bn(m.fc(x).tensor_split(at, 1)[1]), fc=nn.Linear(3, 10), bn=nn.BatchNorm1d(3))
    judge(model, X, torch.tensor([2, 5]), kept={"bn": "python-value"}, others=[(X, torch.tensor([4, 7]))])


@pytest.mark.parametrize(
    "make",
    [
        lambda h: torch.tensor([h]),
        lambda h: torch.as_tensor([[h]]),
        lambda h: torch.asarray([h]),
        lambda h: h.new_tensor([h]),
        lambda h: h.new([h]),
        lambda h: torch.DoubleTensor([h]),
    ],
)
def test_tensor_of_a_list_of_tensors_reads_them(make: Callable[[Tensor], Tensor], judge: Judge, net: Any) -> None:
    # It has no part in the output of the example.
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.fc(x)
        return torch.where(x.sum() > 0, m.bn(h), make(h))

    model, x = net(forward, fc=nn.Linear(3, 1), bn=nn.BatchNorm1d(1)), X[:1].abs()
    judge(model, x, kept={"bn": "other-reader"}, others=[(-x,)])


class Deciding(nn.Module):
    """Takes its path as others have told it."""

    def __init__(self, told: dict[str, bool]) -> None:
        super().__init__()
        self.fc, self.bn, self.told = nn.Linear(3, 4), nn.BatchNorm1d(4), told

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.fc(x)) if self.told["normalise"] else self.fc(x)


def test_decision_that_comes_through_an_attribute_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.block.told["normalise"] = bool(x.sum() > 0)
        return m.block(x)

    judge(net(forward, block=Deciding({})), X.abs(), kept={"block.bn": "python-value"}, others=[(-X.abs(),)])


def test_decision_by_an_attribute_of_what_is_called_past_its_hooks_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.outer.block.told["normalise"] = bool(x.sum() > 0)
        return m.outer(x)

    outer = net(lambda m, x: m.block.forward(x), block=Deciding({}))
    judge(net(forward, outer=outer), X.abs(), kept={"outer.block.bn": "python-value"}, others=[(-X.abs(),)])


class Skipped(nn.BatchNorm1d):
    """Normalises if it is told to."""

    normalises = True

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if self.normalises else input.clone()


class Repeating(nn.Linear):
    """Computes if it is told to."""

    computes = True

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if self.computes else input[:, :1].expand(-1, 4)


def test_decision_inside_the_batchnorm_or_the_layer_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.block[1].normalises = m.block[0].computes = bool(x.sum() > 0)
        return m.block(x)

    for block in (nn.Sequential(nn.Linear(3, 4), Skipped(4)), nn.Sequential(Repeating(3, 4), nn.BatchNorm1d(4))):
        judge(net(forward, block=block), X.abs(), kept={"block.1": "python-value"}, others=[(-X.abs(),)])


def test_decision_between_two_calls_of_one_module_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    part = net(lambda m, x: m.fc(x) if x.shape[1] == 3 else m.bn(x))

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.part(x)
        return m.part(h if bool(x.sum() > 0) else h.relu())

    judge(net(forward, part=part), X.abs(), kept={"part.bn": "python-value"}, others=[(-X.abs(),)])


def test_block_that_is_called_twice_with_a_decision_in_between_is_folded(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.block(x)
        return m.block(h) if bool(x.sum() > 0) else h

    block = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    judge(net(forward, block=block), X.abs(), folds={"block.1": ["block.0"]}, others=[(-X.abs(),)])


class Times(nn.Module):
    """A parametrization whose factor others set."""

    factor = 1.0

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.factor


def test_decision_inside_a_parametrization_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    times, block = Times(), nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    nn.utils.parametrize.register_parametrization(block[0], "weight", times)

    def forward(m: Any, x: Tensor) -> Tensor:
        m.times.factor = 2.0 if bool(x.sum() > 0) else 1.0
        return m.block(x)

    judge(net(forward, times=times, block=block), X.abs(), kept={"block.1": "python-value"}, others=[(-X.abs(),)])


class Gate(nn.Module):
    """Lets everything pass, and remembers what it was in one of several ways."""

    def __init__(self, remember: Callable[[Any, bool], None]) -> None:
        super().__init__()
        self.remember = remember
        self.open, self.context, self.config = True, SimpleNamespace(use=True), {"run": {"use": True}}

    def forward(self, x: Tensor) -> Tensor:
        self.remember(self, bool(x.mean() > 0))
        return x


class Gated(nn.Module):
    def __init__(self, gate: Gate, asks: Callable[[Any], bool]) -> None:
        super().__init__()
        self.fc, self.bn, self.gate, self.asks = nn.Linear(3, 4), nn.BatchNorm1d(4), gate, asks
        self.context, self.config = gate.context, gate.config

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        return self.bn(h) if self.asks(self) else h


@pytest.mark.parametrize(
    ("remember", "asks"),
    [
        (lambda gate, value: setattr(gate, "open", value), lambda block: block.gate.open),
        (lambda gate, value: setattr(gate.context, "use", value), lambda block: block.context.use),
        (lambda gate, value: gate.config["run"].update(use=value), lambda block: block.config["run"]["use"]),
        (lambda gate, value: gate.train(value), lambda block: block.gate.training),
    ],
)
def test_decision_that_comes_through_what_two_modules_share_keeps_the_batchnorm(
    remember: Any, asks: Any, judge: Judge, randomised: Any
) -> None:
    gate = Gate(remember)
    # What is so when the run begins it has not found out.
    below = -X.abs() if "train" not in remember.__code__.co_names else X.abs()
    always = nn.Sequential(gate, Gated(gate, lambda block: asks(block) is not None))
    judge(always, below, kept={"1.bn": "python-value"}, others=[(X.abs(),), (-X.abs(),)])


def test_block_that_a_decision_changes_inside_keeps_its_batchnorm(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.block[1].eps = 1e-5 if bool(x.mean() > 9) else 1.0
        return m.block(x)

    judge(net(forward, block=nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))), X, kept={"block.1": "python-value"})


def test_private_attribute_that_changes_is_no_decision(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.block._calls = float(x.sum())
        return m.block(x)

    judge(net(forward, block=nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))), X, folds={"block.1": ["block.0"]})


def test_attribute_that_changes_after_the_path_was_taken_is_no_decision(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.block(x)
        m.block.told["normalise"] = float(y.sum())
        return y

    judge(net(forward, block=Deciding({"normalise": True})), X, folds={"block.bn": ["block.fc"]})


def test_attribute_that_changes_where_nothing_is_decided_keeps_nothing(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.calls = getattr(m, "calls", 0) + 1
        return m.bn(m.fc(x))

    judge(net(forward, fc=nn.Linear(3, 4), bn=nn.BatchNorm1d(4)), X, folds={"bn": ["fc"]})


def test_a_float_of_zero_is_something_that_is_added(judge: Judge, net: Any) -> None:
    model = net(lambda m, x, t=0.0: m.bn(m.fc(x) + t))
    judge(model, X, kept={"bn": "not-transparent"}, others=[(X, 1.0)])
    judge(net(lambda m, x: m.bn(sum([m.fc(x)]))), X, folds={"bn": ["fc"]})


def test_a_multiple_that_is_added_could_be_another_one(judge: Judge, net: Any) -> None:
    bn, fc = nn.BatchNorm1d(3), nn.Linear(3, 2)
    model = net(lambda m, x, a=2.0: m.fc(torch.add(m.bn(x), m.bn(-x), alpha=a)), bn=bn, fc=fc)
    plan = judge(model, X, kept={"bn": "no-layer"}, others=[(X, 3.0)])
    assert "adds a multiple" in plan.kept[0].reason
