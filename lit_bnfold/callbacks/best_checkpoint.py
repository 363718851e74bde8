"""The checkpoint of the best step, also of a training that was stopped and goes on in another directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint


class BestCheckpoint(ModelCheckpoint):
    """Keeps the best checkpoint of a whole training, however often that was stopped.

    A training that goes on writes into a directory of its own. Lightning's ModelCheckpoint forgets at that moment how
    good the best one was, and takes the first one after the stop for the best.
    """

    @property
    def state_key(self) -> str:
        """That of Lightning's own class, whose state it is."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the best ones, where they are, if they are still there.

        Args:
            state_dict: The state of the training that goes on.
        """
        kept = [path for path in state_dict.get("best_k_models", {}) if Path(path).is_file()]
        if len(kept) == len(state_dict.get("best_k_models", {})):
            state_dict = {**state_dict, "dirpath": self.dirpath}
        super().load_state_dict(state_dict)
