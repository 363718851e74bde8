"""A process that lives long: folding leaves nothing behind in it, however often, and whatever the model does.

The long forms are the promise, 2,000 rounds of folding and 200 fits; the short ones see the same in fewer rounds.
"""

from __future__ import annotations

import gc
import logging
import os
import random
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn.modules import module as modules_of_torch
from torch.optim import optimizer as optimizers_of_torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, is_in_torch_dispatch_mode
from torch.utils.data import DataLoader, TensorDataset

from lit_bnfold import BatchNormFolding, load_folded
from lit_bnfold.folding import FoldingError, fold_batchnorm, plan_folding
from lit_bnfold.folding.rewrite import folded_in_place

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))

Randomised = Callable[[nn.Module], nn.Module]


@pytest.fixture(scope="module", autouse=True)
def _old_objects_are_left_alone() -> Iterator[None]:
    """Neither collected nor counted again and again: there are a million, most of them torch's."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


# What a process holds -------------------------------------------------------------------------------------------------


@dataclass
class Held:
    """What grows in a process that something leaks in."""

    objects: Counter[str]  # by type
    memory: int  # bytes in RAM
    files: int
    threads: int

    @classmethod
    def now(cls) -> Held:
        for _ in range(3):  # What the first collection sets free may set free more.
            gc.collect()
        objects = Counter(f"{type(each).__module__}.{type(each).__qualname__}" for each in gc.get_objects())
        memory = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        files, threads = (len(list(Path(f"/proc/self/{kind}").iterdir())) for kind in ("fd", "task"))
        return cls(objects, memory, files, threads)


def assert_nothing_piles_up(task: Callable[[], object], rounds: int, warm_up: int, megabytes: int) -> None:
    """Run a task many times over; of nothing may there be one more for each round."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("what a process holds is read from /proc")
    seen = []
    for times in (warm_up, rounds // 2, rounds // 2):
        for _ in range(times):
            task()
        seen.append(Held.now())
    first, middle, last = seen
    # A cache that fills up grows in one half and not in the other.
    grown = (middle.objects - first.objects) & (last.objects - middle.objects)
    more = (last.memory - first.memory) / 2**20
    print(f"{rounds} rounds: {more:+.1f} MiB, {last.objects.total() - first.objects.total():+} objects")
    assert {kind: count for kind, count in grown.items() if count >= rounds // 2} == {}
    assert (last.files, last.threads) == (first.files, first.threads)
    assert more < megabytes


class Leaky(nn.Module):
    """All that folding meets and has to let go of: hooks, a class of its own, a bias that is lent, another in place."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4)
        # This makes a class for this one object.
        self.norm = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.behind, self.kept = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.kept.register_forward_hook(lambda *_: None)

    def forward(self, x: Tensor) -> Tensor:
        return self.kept(self.behind(self.norm(self.bn(self.fc(x)).relu())).tanh())  # type: ignore[no-any-return]


@pytest.mark.parametrize("rounds", [30, pytest.param(2000, marks=pytest.mark.long)])
def test_folding_and_unfolding_leave_nothing_behind(rounds: int, randomised: Randomised) -> None:
    lasting = randomised(Leaky()).eval()
    plan, expected, before = plan_folding(lasting, (X,)), lasting(X), process_state(lasting)

    def fold() -> None:
        with folded_in_place(plan, lasting):
            lasting(X)
        fold_batchnorm(lasting, (X,))
        # Of a new model everything is new, its classes too.
        assert [fold.batchnorm for fold in plan_folding(Leaky(), (X,)).folds] == ["bn", "behind"]

    assert_nothing_piles_up(fold, rounds, warm_up=5, megabytes=16)
    assert torch.equal(lasting(X), expected)
    assert changes(before, process_state(lasting), but="torch") == {}


class Tiny(LightningModule):
    """A network with a BatchNorm that can be folded; raises where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
        self.trouble: Callable[[], object] = int

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()  # type: ignore[no-any-return]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self(batch[0]).square().mean())
        self.trouble()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(directory: Path, folding: BatchNormFolding, **options: Any) -> LightningModule:
    module, data = Tiny(), DataLoader(TensorDataset(torch.randn(8, 3)), batch_size=4)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=1, log_every_n_steps=1, callbacks=[folding], **quiet, **options)
    trainer.fit(module, data, data)
    return module


@pytest.mark.filterwarnings("ignore:.*The process will be killed:UserWarning")
@pytest.mark.parametrize("fits", [4, pytest.param(200, marks=pytest.mark.long)])
def test_fits_leave_nothing_behind(
    fits: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    # What pytest keeps of all that is printed and logged would pile up as well.
    request.addfinalizer(lambda: logging.disable(logging.NOTSET))
    logging.disable(logging.CRITICAL)

    def fit_and_load() -> None:
        logger = TensorBoardLogger(tmp_path, version="same")
        for old in tmp_path.rglob("*.*"):
            old.unlink()
        fit(tmp_path, BatchNormFolding(), logger=logger, default_root_dir=tmp_path)
        load_folded(Tiny, tmp_path / "lightning_logs" / "same" / "folded.ckpt")
        capsys.readouterr()

    assert_nothing_piles_up(fit_and_load, fits, warm_up=2, megabytes=32)


# What belongs to the process ------------------------------------------------------------------------------------------

HOOKS = [name for name in vars(nn.Module()) if name.endswith(("_hooks", "_hooks_with_kwargs"))]
GLOBAL_HOOKS = [
    (owner, name)
    for owner in (modules_of_torch, optimizers_of_torch)
    for name in vars(owner)
    if name.startswith("_global_") and name.endswith(("hooks", "hooks_with_kwargs", "hooks_always_called"))
]


def process_state(model: nn.Module) -> dict[str, object]:
    """Whatever a run of a model is watched with, or could change, outside the numbers of the model."""
    state: dict[str, object] = {
        "function modes": list(_get_current_function_mode_stack()),
        "dispatch modes": list(_get_current_dispatch_mode_stack()),
        "in a dispatch mode": is_in_torch_dispatch_mode(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled()),
        "dtype": torch.get_default_dtype(),
        "stance": torch._dynamo.eval_frame._stance.stance,
        "warnings": list(warnings.filters),
        "collector": (gc.isenabled(), gc.get_threshold()),
        "threads": threading.active_count(),
        "torch": torch.random.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": repr(numpy.random.get_state()),
    }
    state |= {f"global {name}": dict(vars(owner)[name]) for owner, name in GLOBAL_HOOKS}
    for name, module in model.named_modules():
        state[f"class of {name}"] = type(module)
        state[f"mode of {name}"] = module.training
        state |= {f"{hooks} of {name}": dict(vars(module).get(hooks, {})) for hooks in HOOKS}
    return state


def changes(before: dict[str, object], after: dict[str, object], but: str = "") -> dict[str, object]:
    names = before.keys() | after.keys()
    return {name: after.get(name) for name in names if before.get(name) != after.get(name) and name != but}


class Trouble:
    """Is called at one place of every run, and raises in one of them."""

    def __init__(self, error: type[BaseException], run: int) -> None:
        self.error, self.run, self.calls = error, run, 0

    def __call__(self, *_: object) -> None:
        random.random(), numpy.random.rand(), torch.rand(1)
        self.calls += 1
        if self.calls == self.run:
            raise self.error("trouble")

    def __deepcopy__(self, memo: object) -> Trouble:
        return self


class Layer(nn.Linear):
    """Is in trouble at the end of its forward."""

    trouble: Trouble

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        self.trouble()
        return output


class Parametrization(nn.Module):
    """Is in trouble before it gives the weight that it was given."""

    trouble: Trouble | None = None

    def forward(self, weight: Tensor) -> Tensor:
        if self.trouble is not None:
            self.trouble()
        return weight


def troubled(place: str, trouble: Trouble) -> nn.Module:
    model = nn.Sequential(Layer(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.BatchNorm1d(4))
    model[0].trouble = trouble if place == "forward" else int
    if place == "pre-hook":
        model[2].register_forward_pre_hook(trouble)
    elif place == "hook":
        model[2].register_forward_hook(trouble)
    elif place == "parametrization":
        nn.utils.parametrize.register_parametrization(model[2][0], "weight", Parametrization())
        model[2][0].parametrizations["weight"][0].trouble = trouble
    return model


@pytest.mark.parametrize("run", [1, 2], ids=["first run", "second run"])
@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["forward", "pre-hook", "hook", "parametrization"])
def test_a_model_that_raises_while_it_is_recorded_leaves_no_trace(
    place: str, error: type[BaseException], run: int, randomised: Randomised
) -> None:
    trouble = Trouble(error, run)
    model = randomised(troubled(place, trouble))
    # One of the places is enough to see that inference mode goes on.
    with torch.inference_mode(place == "hook"):
        before = process_state(model)
        if error is KeyboardInterrupt:
            with pytest.raises(error):
                fold_batchnorm(model, (X,))
        elif run == 1:
            with pytest.raises(FoldingError, match="does not run on the example"):
                fold_batchnorm(model, (X,))
        else:
            # An error that the second run alone meets is tried once more, as a cache that was filled would make one.
            assert [fold.batchnorm for fold in plan_folding(model, (X,)).folds] == ["1"]
        assert changes(before, process_state(model)) == {}
    assert trouble.calls >= run
    # Another thread's turn comes.
    folded: list[nn.Module] = []
    thread = threading.Thread(target=lambda: folded.append(fold_batchnorm(model, (X,))), daemon=True)
    thread.start()
    thread.join(60)
    assert len(folded) == 1


class Watching(BatchNormFolding):
    """The callback in a fit whose validation is in trouble, and what that left."""

    def __init__(self, trouble: Trouble, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.trouble = trouble

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.trouble = self.trouble
        before = process_state(pl_module)
        try:
            with pytest.raises(self.trouble.error, match="trouble"):
                super().on_train_end(trainer, pl_module)
        finally:
            self.left = changes(before, process_state(pl_module))
            # Nothing was folded, which is nothing to warn of here.
            self.plan = object()  # type: ignore[assignment]


@pytest.mark.parametrize("run", [1, 3], ids=["original", "folded"])
@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
def test_a_validation_that_raises_leaves_no_trace(error: type[BaseException], run: int, tmp_path: Path) -> None:
    # Each validation has two batches.
    folding = Watching(Trouble(error, run), dirpath=str(tmp_path / "folded"))
    fit(tmp_path, folding, logger=False, enable_checkpointing=False, num_sanity_val_steps=0)
    assert folding.trouble.calls == run
    assert folding.left == {}
