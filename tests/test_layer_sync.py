"""BatchNorm over the examples of all processes: two of them do what one does with all examples."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lit_bnfold import BatchNormFolding, BatchNormMLP, NamesDataModule, load_folded
from lit_bnfold.layer_sync import AnyDeviceSyncBatchNorm, SynchronisedBatchNorm

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked")

PARTS = (5, 2)
"""How many examples each process has."""


def train_on_a_part(rank: int, folder: Path, network: nn.Module, batches: list[Tensor]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", world_size=len(PARTS), rank=rank)
    try:
        synchronised = AnyDeviceSyncBatchNorm().apply(network)
        parts = [batch.split(PARTS)[rank].clone().requires_grad_() for batch in batches]
        torch.save(trained(synchronised, parts), folder / f"{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def trained(network: nn.Module, batches: list[Tensor]) -> dict[str, Any]:
    """What comes out of some batches: outputs, gradients of the inputs and the parameters, and statistics."""
    outputs = [network(batch) for batch in batches]
    sum(output.square().mul(batch.detach()).sum() for output, batch in zip(outputs, batches, strict=True)).backward()
    return {
        "outputs": [output.detach() for output in outputs],
        "inputs": [batch.grad for batch in batches],
        "parameters": {name: parameter.grad for name, parameter in network.named_parameters()},
        "buffers": dict(network.named_buffers()),
    }


def in_processes(folder: Path, network: nn.Module, batches: list[Tensor]) -> list[dict[str, Any]]:
    context = torch.multiprocessing.get_context("fork")
    arguments = [(rank, folder, network, batches) for rank in range(len(PARTS))]
    processes = [context.Process(target=train_on_a_part, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(len(PARTS))]


@pytest.mark.parametrize(
    ("batchnorm", "shape"),
    [
        (nn.BatchNorm1d(3), (7, 3)),
        (nn.BatchNorm1d(3), (7, 3, 4)),
        (nn.BatchNorm2d(3, momentum=None), (7, 3, 4, 2)),
        (nn.BatchNorm3d(3, affine=False, eps=0.1), (7, 3, 2, 2, 2)),
        (nn.BatchNorm1d(3, track_running_stats=False, momentum=0.3), (7, 3)),
    ],
)
def test_two_processes_normalise_as_one_does(
    batchnorm: nn.Module, shape: tuple[int, ...], tmp_path: Path, randomised: Callable[[nn.Module], nn.Module]
) -> None:
    network = randomised(copy.deepcopy(batchnorm)).double()
    batches = [torch.randn(shape, dtype=torch.float64) * 2 + 1 for _ in range(3)]
    found = in_processes(tmp_path, copy.deepcopy(network), batches)
    expected = trained(network, [batch.clone().requires_grad_() for batch in batches])
    for key in ("outputs", "inputs"):
        together = [torch.cat(parts) for parts in zip(*(each[key] for each in found), strict=True)]
        torch.testing.assert_close(together, expected[key], rtol=0, atol=1e-12)
    for name, gradient in expected["parameters"].items():
        torch.testing.assert_close(sum(each["parameters"][name] for each in found), gradient, rtol=0, atol=1e-12)
    for each in found:
        torch.testing.assert_close(each["buffers"], expected["buffers"], rtol=0, atol=1e-12)


def test_halves_of_bfloat16_come_out_in_their_own_dtype(tmp_path: Path) -> None:
    network = nn.BatchNorm1d(3)
    batches = [torch.randn(7, 3).bfloat16() + 200]
    found = in_processes(tmp_path, copy.deepcopy(network), batches)
    (expected,) = trained(network, [batch.clone().requires_grad_() for batch in batches])["outputs"]
    together = torch.cat([each["outputs"][0] for each in found])
    assert together.dtype is torch.bfloat16
    torch.testing.assert_close(together, expected)


def test_a_single_number_of_a_channel_is_refused(tmp_path: Path) -> None:
    store = f"file://{tmp_path}/meeting"
    torch.distributed.init_process_group("gloo", store, world_size=1, rank=0)
    try:
        batchnorm = AnyDeviceSyncBatchNorm().apply(nn.BatchNorm1d(3))
        with pytest.raises(ValueError, match=r"more than one number per channel over all processes, got \(1, 3\)"):
            batchnorm(torch.randn(1, 3))
        with pytest.raises(ValueError, match="expected 2D or 3D input"):
            batchnorm(torch.randn(2, 3, 4, 5))
    finally:
        torch.distributed.destroy_process_group()


def test_only_batchnorms_of_torchs_own_classes_change_and_become_what_they_were() -> None:
    class Own(nn.BatchNorm1d):
        pass

    network = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.BatchNorm3d(2), Own(2), nn.LayerNorm(2))
    kinds, parameters = [type(module) for module in network.modules()], list(network.parameters())
    plugin = AnyDeviceSyncBatchNorm()
    assert plugin.apply(network) is network
    assert [isinstance(module, SynchronisedBatchNorm) for module in network] == [True, True, True, False, False]
    assert plugin.revert(network) is network
    assert [type(module) for module in network.modules()] == kinds
    assert all(one is other for one, other in zip(network.parameters(), parameters, strict=True))


class Noting(BatchNormFolding):
    """Folds in each process, and looks at what is there then."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        kinds = {type(module) for module in pl_module.modules() if isinstance(module, nn.BatchNorm1d)}
        assert len(kinds) == 1
        assert issubclass(kinds.pop(), SynchronisedBatchNorm) == (trainer.world_size > 1)
        assert type(self.folded_module.net.norm1) is nn.Identity


def fit(folder: Path, batch_size: int, **arguments: Any) -> None:
    torch.manual_seed(0)
    trainer = Trainer(
        accelerator="cpu", default_root_dir=folder, logger=False, enable_checkpointing=False, precision="64-true",
        enable_progress_bar=False, enable_model_summary=False, max_steps=25, limit_val_batches=1, **arguments
    )  # fmt: skip
    trainer.fit(BatchNormMLP(), NamesDataModule(batch_size=batch_size))


@pytest.mark.parametrize("reestimate_batches", [0, 3])
def test_two_processes_train_the_network_that_one_trains(reestimate_batches: int, tmp_path: Path) -> None:
    fit(tmp_path / "one", 32, callbacks=[Noting(reestimate_batches=reestimate_batches)])
    fit(
        tmp_path / "two",
        16,
        callbacks=[Noting(reestimate_batches=reestimate_batches)],
        strategy="ddp_fork",
        devices=2,
        plugins=[AnyDeviceSyncBatchNorm()],
    )
    one, two = (load_folded(BatchNormMLP, tmp_path / name / "folded.ckpt").state_dict() for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=1e-6, atol=1e-6)  # trained in float64, loaded in float32
