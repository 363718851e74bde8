"""How many tests begin and end: with a Trainer that says and writes nothing, and with a look at the files it left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer


def quiet_trainer(tmp_path: Path, make: Callable[..., Any] = Trainer, **kwargs: Any) -> Any:
    defaults: dict[str, Any] = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "default_root_dir": tmp_path,
    }
    return make(**{**defaults, **kwargs})


def files_in(path: Path) -> set[str]:
    return {each.name for each in path.rglob("*") if each.is_file()}
