"""Models of every form that keep a BatchNorm, or come close: a careless fold would change what they give."""

from __future__ import annotations

import copy
import functools
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_bnfold.folding import FoldingError, FoldingPlan, census, fold_batchnorm, plan_folding

Judge = Callable[..., FoldingPlan]
X = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
SEQUENCE = torch.randn(5, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def linear_bn(m: Any, x: Tensor) -> Tensor:
    return m.bn(m.fc(x))


class Closure(nn.Linear):
    """Computes in a closure over itself, which a copy shares."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.compute = lambda x: F.linear(x, self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x)


def test_closure_over_the_original_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    judge(nn.Sequential(Closure(3, 4), nn.BatchNorm1d(4)), X, kept={"1": "computed-weight"})
    model = net(linear_bn)
    forward = model.fc.forward
    model.fc.forward = lambda x: forward(x)
    judge(model, X, kept={"bn": "computed-weight"})


def test_closure_or_list_that_holds_the_batchnorm_beside_its_registration(judge: Judge, net: Any) -> None:
    model = net(lambda m, x: m.alias[0](m.fc(x)))
    vars(model)["alias"] = [model.bn]
    judge(model, X, folds={"bn": ["fc"]})
    # A plain function is not copied with the model: what it closes over is the original's.
    model = net(lambda m, x: m.call(m.fc(x)))
    bn = model.bn
    model.call = lambda h: bn(h)
    judge(model, X, kept={"bn": "aliased"})


def test_partial_that_holds_bound_methods_is_folded(judge: Judge, net: Any) -> None:
    model = net(lambda m, x: m.call(m.fc(x)))
    model.call = functools.partial(model.bn.__call__)
    judge(model, X, folds={"bn": ["fc"]})


def test_vmap_inside_the_model_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    model = net(lambda m, x: torch.vmap(lambda step: m.bn(m.fc(step)))(x))
    judge(model, SEQUENCE, kept={"bn": "kept-alive"})


def test_lazy_model_is_refused_before_its_first_batch_and_folded_after_it(judge: Judge) -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d()).double()
    with pytest.raises(FoldingError, match=r"`0.weight` is not initialised: run the model on one batch"):
        plan_folding(model, (X,))
    model(X)
    judge(model, X, folds={"1": ["0"]})


def test_recording_works_inside_inference_mode(net: Any, randomised: Any, agree: Any) -> None:
    model = randomised(net(lambda m, x: m.bn(m.fc(x).transpose(1, 2).reshape(-1, 4)))).double().eval()
    with torch.inference_mode():
        plan = plan_folding(model, (SEQUENCE,))
        folded = plan.apply(model)
    assert [fold.batchnorm for fold in plan.folds] == [] or agree(model, folded, [(SEQUENCE,)]) is None
    model = randomised(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))).double().eval()
    with torch.inference_mode():
        folded = fold_batchnorm(model, (X,))
        agree(model, folded, [(2 * X,)])
    assert isinstance(folded[1], nn.Identity)
    assert not any(parameter.is_inference() for parameter in folded.parameters())
    folded(X).sum().backward()


def test_recording_works_under_autocast(net: Any, randomised: Any) -> None:
    model = randomised(net(lambda m, x: m.bn(m.fc(x)).relu())).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        plan = plan_folding(model, (X.float(),))
        folded = plan.apply(model)
        expected, found = model(X.float()), folded(X.float())
    assert [fold.layers for fold in plan.folds] == [("fc",)]
    assert folded.fc.weight.dtype == torch.float32
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found.float(), expected.float(), rtol=0.1, atol=0.1)


def test_model_in_training_mode_with_mixed_flags_is_folded_as_in_eval_mode(
    net: Any, randomised: Any, agree: Any
) -> None:
    model = randomised(
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 4), nn.BatchNorm1d(4))
    )
    model.double().train()
    model[1].eval()
    flags = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    folded = fold_batchnorm(model, (X,))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in model.modules()] == flags == [module.training for module in folded.modules()]
    assert isinstance(folded[1], nn.Identity)
    assert isinstance(folded[4], nn.Identity)
    agree(model.eval(), folded.eval(), [(2 * X,)])


def test_checkpointed_part_of_a_model_is_folded(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(lambda z: m.bn(m.fc(z)), x, use_reentrant=False)  # type: ignore[no-any-return]

    judge(net(forward), X, folds={"bn": ["fc"]})


def test_data_parallel_wrapper_is_folded(judge: Judge) -> None:
    model = nn.DataParallel(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    judge(model, X, folds={"module.1": ["module.0"]})


def test_generator_forward_is_folded(judge: Judge, net: Any) -> None:
    def parts(m: Any, x: Tensor) -> Iterator[Tensor]:
        for part in x.chunk(2):
            yield m.bn(m.fc(part))

    judge(net(lambda m, x: torch.cat(list(parts(m, x)))), X, folds={"bn": ["fc"]}, others=[(2 * X,), (X[:2],)])


def test_module_with_attributes_of_its_inner_module_is_folded(judge: Judge) -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("inner"), name)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)  # type: ignore[no-any-return]

    model = nn.Sequential(Wrapper(nn.Linear(3, 4)), Wrapper(nn.BatchNorm1d(4)))
    judge(model, X, folds={"1.inner": ["0.inner"]})


def test_tensor_subclass_with_other_operations_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    class Absolute(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = super().__torch_function__(func, types, args, kwargs or {})
            return result.abs() if func is F.linear else result

    judge(net(lambda m, x: m.bn(m.fc(x.as_subclass(Absolute)))), X, kept={"bn": "kept-alive"})


def test_tensor_subclass_that_changes_nothing_does_not_keep_the_batchnorm(judge: Judge, net: Any) -> None:
    class Named(Tensor):
        pass

    judge(net(lambda m, x: m.bn(m.fc(x.as_subclass(Named))).as_subclass(Tensor)), X, folds={"bn": ["fc"]})


def test_sparse_input_is_folded(judge: Judge, net: Any) -> None:
    judge(net(lambda m, x: m.bn(m.fc(x.to_sparse()))), X, folds={"bn": ["fc"]})


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
def test_scripted_or_traced_submodule_keeps_its_batchnorm(judge: Judge) -> None:
    block = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double().eval()
    for script in (torch.jit.script, lambda m: torch.jit.trace(m, X)):
        model = nn.Sequential(script(copy.deepcopy(block)), nn.Linear(4, 4), nn.BatchNorm1d(4))
        plan = plan_folding(model.double().eval(), (X,))
        assert {kept.batchnorm: kept.code for kept in plan.kept} == {"0.1": "opaque"}
        assert [fold.batchnorm for fold in plan.folds] == ["2"]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
def test_scripted_layer_or_batchnorm_keeps_it() -> None:
    fc, bn = nn.Linear(3, 4).double(), nn.BatchNorm1d(4).double().eval()
    for model in (nn.Sequential(torch.jit.script(fc), bn), nn.Sequential(fc, torch.jit.script(bn))):
        plan = plan_folding(model, (X,))
        assert [kept.batchnorm for kept in plan.kept] == ["1"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(3, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.fc(x)).relu()  # type: ignore[no-any-return]


def test_compiled_submodule_keeps_its_batchnorm_and_recording_compiles_nothing() -> None:
    compiled: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    model = nn.Sequential(torch.compile(Block().double().eval(), backend=backend), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model.double().eval()
    plan = plan_folding(model, (X,))
    assert {kept.batchnorm: kept.code for kept in plan.kept} == {"0._orig_mod.bn": "opaque"}
    assert [fold.batchnorm for fold in plan.folds] == ["2"]
    assert not compiled
    with torch.no_grad():
        model(X)
    assert compiled, "recording must not stop the compiler from compiling later"
    torch._dynamo.reset()


def test_module_that_compiles_itself_is_folded(randomised: Any, agree: Any) -> None:
    compiled: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    for warm in (False, True):
        model = randomised(Block()).double().eval()
        original = copy.deepcopy(model)
        model.compile(backend=backend)
        if warm:
            agree(original, model, [(X,)])
        compiled.clear()
        plan = plan_folding(model, (X,))
        assert not compiled
        assert [fold.layers for fold in plan.folds] == [("fc",)]
        agree(original, plan.apply(model), [(2 * X,)])
        plan.apply(model, inplace=True)
        with torch.no_grad():
            torch.testing.assert_close(model(2 * X), original(2 * X), rtol=0, atol=1e-12)
        torch._dynamo.reset()


def test_model_whose_copy_is_itself_is_refused(net: Any) -> None:
    class Single(nn.Sequential):
        def __deepcopy__(self, memo: Any) -> Single:
            return self

    model = Single(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with pytest.raises(FoldingError, match="cannot be copied: its copy holds parts of the model itself"):
        plan_folding(model, (X.float(),))
    assert model.training


def test_model_that_cannot_be_copied_is_refused(net: Any) -> None:
    model = net(linear_bn)
    model.lock = threading.Lock()
    with pytest.raises(FoldingError, match="cannot be copied"):
        plan_folding(model, (X.float(),))


def test_model_that_holds_a_module_of_python_is_folded(judge: Judge, net: Any) -> None:
    model = net(lambda m, x: m.bn(m.fc(x)) * m.config.pi)
    model.config = math
    judge(model, X, folds={"bn": ["fc"]})

    class CopiedInAWayOfItsOwn(nn.Linear):
        def __getstate__(self) -> dict[str, Any]:
            return vars(self).copy()

    layer = CopiedInAWayOfItsOwn(3, 4)
    layer.config = math
    judge(nn.Sequential(layer, nn.BatchNorm1d(4)), X, folds={"1": ["0"]})


def test_model_that_holds_tensors_of_its_last_run_is_folded(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.bn(m.fc(x))
        m.features = [y.relu()]
        return y

    model = net(forward).double()
    model(X)
    assert model.features[0].grad_fn is not None
    judge(model, X, folds={"bn": ["fc"]})


def test_inputs_that_the_model_takes_apart_are_still_there(net: Any) -> None:
    batch = {"x": X, "rest": [X]}
    model = net(lambda m, b: m.bn(m.fc(b.pop("x"))))
    plan = plan_folding(model.double(), (batch,))
    assert [fold.batchnorm for fold in plan.folds] == ["bn"]
    assert batch["x"] is X


def test_parameters_look_the_same_while_the_model_is_planned(net: Any) -> None:
    seen: list[Any] = []

    def forward(m: Any, x: Tensor) -> Tensor:
        seen.append([(p.requires_grad, p.is_leaf, type(p), getattr(p, "tag", None)) for p in m.fc.parameters()])
        return m.bn(m.fc(x))

    model = net(forward)
    model.fc.weight.tag = "mine"
    model.fc.bias.requires_grad_(False)
    plan_folding(model, (X.float(),))
    assert seen == 2 * [[(True, True, nn.Parameter, "mine"), (False, True, nn.Parameter, None)]]


class Merging(nn.Linear):
    """Takes a low-rank update into its weight when it is put into eval mode, as adapters do."""

    def __init__(self, *sizes: int, in_place: bool) -> None:
        super().__init__(*sizes)
        self.in_place, self.is_merged = in_place, False

    def train(self, mode: bool = True) -> Merging:
        if self.is_merged is mode:
            update = -1.0 if mode else 1.0
            if self.in_place:
                self.weight.data += update
            else:
                self.weight.data = self.weight.data + update
            self.is_merged = not mode
        return super().train(mode)


@pytest.mark.parametrize("in_place", [True, False])
def test_model_that_merges_its_weights_in_eval_mode_is_not_touched(in_place: bool, randomised: Any) -> None:
    model = randomised(nn.Sequential(Merging(3, 4, in_place=in_place), nn.BatchNorm1d(4)).double()).train()
    weight = model[0].weight.clone()
    plan = plan_folding(model, (X,))
    assert torch.equal(model[0].weight, weight)
    assert [kept.code for kept in plan.kept] == ["parameter-read"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensor_beside_a_fold_is_nobodys_concern(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        torch.nested.nested_tensor([x, x[:1]], layout=torch.strided)
        return m.bn(m.fc(x))

    judge(net(forward), X, folds={"bn": ["fc"]})


@pytest.mark.parametrize("place", ["batchnorm", "layer"])
def test_what_is_on_a_device_without_float64_stays(
    place: str, judge: Judge, net: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(census, "_WITHOUT_FLOAT64", ("cpu",))
    if place == "layer":
        monkeypatch.setattr(census.Census, "_batchnorm_obstacle", lambda *_: None)
    plan = judge(net(linear_bn), X, kept={"bn": "unusual-weight"})
    who = {"batchnorm": "it", "layer": "`fc.weight`"}[place]
    assert f"{who} is on an Apple GPU, which has no float64: fold the model on the CPU" in plan.kept[0].reason


@pytest.mark.parametrize(
    ("error", "said"),
    [(AssertionError(), "AssertionError"), (KeyError("h"), "KeyError: 'h'"), (ValueError("a\nb."), "ValueError: a b")],
)
def test_error_of_the_model_is_named_with_its_class(error: Exception, said: str, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        raise error

    with pytest.raises(FoldingError, match=rf"it was given: {said}\. Pass what its `forward` takes"):
        plan_folding(net(forward), (X,))
