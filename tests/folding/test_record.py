"""What one run leaves behind: a graph without tensors, and a model as it was."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from lit_bnfold.folding import FoldingError, plan_folding
from lit_bnfold.folding.record import Recorder
from lit_bnfold.folding.search import make_plan
from lit_bnfold.folding.tensors import tensors_in

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))


def record(model: nn.Module, *args: Any) -> Recorder:
    with torch.no_grad(), Recorder(model.eval()) as recorder:
        model(*args)
    return recorder


def calls(recorder: Recorder) -> list[tuple[str, str, str | None]]:
    return [(call.kind, call.name, call.owner) for call in recorder.graph.calls]


def test_layers_and_batchnorms_are_one_call_each_and_operations_are_below() -> None:
    recorder = record(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()), X)
    assert calls(recorder) == [
        ("layer", "linear", "0"),
        ("batchnorm", "batch_norm", "1"),
        ("operation", "aten.relu.default", None),
    ]


def test_thread_that_opens_a_recorder_is_the_one_that_is_recorded() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    recorder = Recorder(model)

    def run() -> None:
        with torch.no_grad(), recorder:
            model(X)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert calls(recorder) == [("layer", "linear", "0"), ("batchnorm", "batch_norm", "1")]


def test_frames_tell_where_a_call_happened() -> None:
    graph = record(nn.Sequential(nn.Sequential(nn.ReLU())), X).graph
    assert graph.modules_around(graph.calls[0].frame) == [None, "", "0", "0.0"]
    assert graph.where(graph.calls[0]) == "`relu` in `0.0`"


def test_compound_operations_are_taken_apart_in_inference_mode_as_they_are_outside(net: Any) -> None:
    model = net(lambda m, x: m.fc(x).reshape(-1, 2).transpose(0, 1).flatten().square().sum(0))
    outside = calls(record(model, X))
    with torch.inference_mode():
        assert calls(record(model, X)) == outside


def test_views_share_memory_and_new_tensors_do_not(net: Any) -> None:
    graph = record(net(lambda m, x: (m.fc(x).view(-1), x.abs())), X).graph
    linear, view, absolute = (graph.values[call.outputs[0]] for call in graph.calls)
    assert linear.storage == view.storage
    assert len({linear.storage, absolute.storage, graph.values[graph.calls[0].inputs[0]].storage}) == 3


def test_memory_that_is_used_again_is_other_memory(net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        for _ in range(20):
            x = x.abs()
        return x

    graph = record(net(forward), torch.randn(1000, 3)).graph
    assert len({graph.values[call.outputs[0]].storage for call in graph.calls}) == 20


def test_write_makes_a_new_value_and_names_the_memory(net: Any) -> None:
    graph = record(net(lambda m, x: m.fc(x).relu_()), X).graph
    linear, relu = graph.calls
    assert relu.inputs == linear.outputs
    assert relu.outputs != linear.outputs
    assert graph.writers == {graph.values[linear.outputs[0]].storage: [relu]}


def test_tensors_are_found_in_everything_that_holds_some() -> None:
    class Plain:
        def __init__(self) -> None:
            self.tensor = a

    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    cycle: list[Any] = [a]
    cycle.append(cycle)
    assert list(tensors_in(cycle)) == [a]
    assert [len(t) for t in tensors_in({"x": [a, (b, {"y": c})], "z": Plain(), "n": 1, "s": "text", "none": None})] == [
        1, 2, 3, 1,
    ]  # fmt: skip
    assert not list(tensors_in([nn.Linear(1, 1), nn.Linear, "text", 3]))


def test_graph_holds_no_tensor_and_nothing_keeps_the_run_alive(net: Any) -> None:
    seen: list[weakref.ref[Any]] = []

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.fc(x)
        y = m.bn(h)
        seen.extend(weakref.ref(thing) for thing in (m, m.fc, m.bn, h, y))
        return y

    model = net(forward).eval()
    gc.collect()
    gc.disable()
    try:
        plan_folding(model, (X,))
        assert [ref() for ref in seen] == [None] * 10
    finally:
        gc.enable()
    # The parameters are the only tensors that a recorder holds on to, and its graph holds none.
    recorder = record(model, X)
    graph = recorder.graph
    del recorder
    assert not list(tensors_in(graph))


def snapshot(model: nn.Module) -> Any:
    """Everything of a model that a run could change."""
    modules = {name: (type(module), module.training) for name, module in model.named_modules()}
    hooks = [(dict(m._forward_hooks), dict(m._forward_pre_hooks), dict(m._forward_hooks_always_called))
             for m in model.modules()]  # fmt: skip
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return modules, hooks, {name: (id(tensor), tensor.detach().clone()) for name, tensor in tensors.items()}


def assert_unchanged(model: nn.Module, before: Any) -> None:
    after = snapshot(model)
    assert after[:2] == before[:2]
    assert {k: i for k, (i, _) in after[2].items()} == {k: i for k, (i, _) in before[2].items()}
    assert all(torch.equal(tensor, before[2][name][1]) for name, (_, tensor) in after[2].items())


def assert_nothing_watches() -> None:
    assert not _get_current_function_mode_stack()
    assert not _get_current_dispatch_mode_stack()


def test_model_is_as_it_was_after_recording(net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.counter += 1
        m.bn.running_mean.mul_(0.5)
        m.bn.num_batches_tracked.add_(1)
        m.bn.weight.view(-1)[0] = 7
        m.bn.train()
        m.new = x
        return m.bn(m.fc(x)) + torch.rand(1)

    model = net(forward).train()
    model.register_buffer("counter", torch.zeros(()))
    model.fc.register_forward_hook(lambda *_: None)
    before, state = snapshot(model), torch.random.get_rng_state()
    plan_folding(model, (X,))
    assert_unchanged(model, before)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not hasattr(model, "new")
    assert_nothing_watches()


def test_statistics_that_a_function_moves_are_put_back(net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.nn.functional.batch_norm(m.fc(x), m.bn.running_mean, m.bn.running_var, training=True)
        m.bn.train()
        return m.bn.forward(h)

    model = net(forward)
    before = snapshot(model)
    plan_folding(model, (X,))
    assert_unchanged(model, before)


def test_recorder_alone_puts_everything_back_too(net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.counter += 1
        m.fc.weight.detach().view(-1)[1:3].zero_()
        m.bn.train()
        return m.bn(m.fc(x))

    model = net(forward).eval()
    model.register_buffer("counter", torch.zeros(()))
    before = snapshot(model)
    record(model, X)
    model.bn.eval()
    assert_unchanged(model, before)


def test_model_that_raises_in_the_middle_is_as_it_was(net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.counter += 1
        m.bn.train()
        raise ArithmeticError(str(m.bn(m.fc(x)).shape) + str(torch.rand(1)))

    model = net(lambda m, x: m.inner(x), inner=net(forward))
    model.inner.register_buffer("counter", torch.zeros(()))
    before, state = snapshot(model), torch.random.get_rng_state()
    with pytest.raises(
        FoldingError, match=r"does not run on the example it was given: ArithmeticError: torch.Size\(\[5, 4\]\)"
    ) as error:
        plan_folding(model, (X,))
    assert isinstance(error.value.__cause__, ArithmeticError)
    assert_unchanged(model, before)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert_nothing_watches()


def test_interrupt_in_the_middle_leaves_the_model_as_it_was(net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.bn.running_mean.add_(m.fc(x).mean())
        raise KeyboardInterrupt

    model = net(forward)
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        plan_folding(model, (X,))
    assert_unchanged(model, before)
    assert_nothing_watches()


def test_model_that_catches_what_its_module_raises_is_recorded_rightly(net: Any) -> None:
    def stumble(m: Any, x: Tensor) -> Tensor:
        raise ValueError

    def forward(m: Any, x: Tensor) -> Tensor:
        try:
            x = m.bad(x)
        except ValueError:
            x = -x
        return m.bn(m.fc(x))

    model = net(forward, bad=net(stumble), fc=nn.Linear(3, 4), bn=nn.BatchNorm1d(4))
    graph = record(model, X).graph
    assert {graph.frames[call.frame].module for call in graph.calls} == {"", "fc", "bn"}
    assert [fold.batchnorm for fold in plan_folding(model, (X,)).folds] == ["bn"]


def test_model_that_is_used_by_another_thread_meanwhile_is_planned_rightly(net: Any) -> None:
    model = net(lambda m, x: m.bn(m.fc(x)).relu())
    running, stop = threading.Event(), threading.Event()
    failures: list[BaseException] = []

    def use() -> None:
        try:
            while not stop.is_set():
                model(X)
                running.set()
        except BaseException as failure:
            failures.append(failure)
            running.set()

    thread = threading.Thread(target=use)
    model.eval()
    thread.start()
    try:
        running.wait(10)
        plans = [plan_folding(model, (X,)) for _ in range(20)]
    finally:
        stop.set()
        thread.join()
    assert not failures
    assert all([fold.layers for fold in plan.folds] == [("fc",)] for plan in plans)


def test_modules_that_run_in_another_thread_are_not_around_those_of_this_one(net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        thread = threading.Thread(target=lambda: m.other(x))
        thread.start()
        thread.join()
        return m.bn(m.fc(x))

    model = net(forward, other=nn.Linear(3, 4), fc=nn.Linear(3, 4), bn=nn.BatchNorm1d(4))
    graph = record(model, X).graph
    assert [graph.modules_around(call.frame) for call in graph.calls] == [[None, "", "fc"], [None, "", "bn"]]
    assert [fold.layers for fold in plan_folding(model, (X,)).folds] == [("fc",)]


def test_gradients_are_neither_made_nor_lost(net: Any) -> None:
    model = net(lambda m, x: m.bn(m.fc(x)))
    model(X).sum().backward()
    before = copy.deepcopy([parameter.grad for parameter in model.parameters()])
    plan_folding(model, (X,))
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)


def test_inputs_are_left_alone(net: Any) -> None:
    x = X.clone().requires_grad_()
    plan_folding(net(lambda m, x: m.bn(m.fc(x))), (x,))
    assert torch.equal(x, X)
    assert x.grad is None


def test_copy_of_a_module_made_during_the_run_is_no_part_of_the_model(net: Any) -> None:
    model = net(lambda m, x: m.bn(copy.deepcopy(m.fc)(x)))
    assert [kept.code for kept in plan_folding(model, (X,)).kept] == ["no-layer"]
    model = net(lambda m, x: m.bn(copy.copy(m.fc)(x)))
    assert [kept.code for kept in plan_folding(model, (X,)).kept] == ["no-layer"]


def test_call_of_a_module_whose_hash_changes_in_it_ends_all_the_same(net: Any) -> None:
    class Counting(nn.Module):
        count = 0

        def __hash__(self) -> int:
            return self.count

        def __eq__(self, other: object) -> bool:
            return self is other

        def forward(self, x: Tensor) -> Tensor:
            self.count += 10**6 + 3
            return x

    graph = record(net(lambda m, x: m.fc(m.metric(x)), metric=Counting(), fc=nn.Linear(3, 4)), X).graph
    parents = {frame.module: frame.parent and graph.frames[frame.parent].module for frame in graph.frames}
    assert parents["metric"] == parents["fc"] == ""
    assert [value.fate for value in graph.values][-1] == "is returned by the model"


def test_parameter_that_a_part_of_the_model_gives_to_whoever_calls_it_keeps_the_batchnorm(net: Any) -> None:
    block = net(lambda m, x: (m.bn(m.fc(x)), m.fc.weight))
    model = net(lambda m, x: m.block(x)[0], block=block).eval()
    assert [fold.batchnorm for fold in plan_folding(model, (X,)).folds] == ["block.bn"]
    with torch.no_grad(), Recorder(model) as recorder:
        model.block(X)
    assert [kept.code for kept in make_plan(recorder.graph).kept] == ["kept-alive"]
