"""Train with BatchNorm, ship without it.

The names below are imported when they are first used, so that ``import lit_bnfold.folding`` needs torch alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_bnfold.callbacks import BatchNormFolding as BatchNormFolding
    from lit_bnfold.callbacks import HistogramMonitor as HistogramMonitor
    from lit_bnfold.callbacks import UpdateRatioMonitor as UpdateRatioMonitor
    from lit_bnfold.checkpoint import FoldedLoading as FoldedLoading
    from lit_bnfold.checkpoint import load_folded as load_folded
    from lit_bnfold.folding import BatchNormKind as BatchNormKind
    from lit_bnfold.folding import FoldingError as FoldingError
    from lit_bnfold.folding import FoldingPlan as FoldingPlan
    from lit_bnfold.folding import Kinds as Kinds
    from lit_bnfold.folding import LayerKind as LayerKind
    from lit_bnfold.folding import fold_batchnorm as fold_batchnorm
    from lit_bnfold.folding import plan_folding as plan_folding
    from lit_bnfold.names.data import NamesDataModule as NamesDataModule
    from lit_bnfold.names.model import BatchNormMLP as BatchNormMLP

__version__ = "0.1.0"

_HOME = {
    "BatchNormFolding": "lit_bnfold.callbacks",
    "BatchNormKind": "lit_bnfold.folding",
    "BatchNormMLP": "lit_bnfold.names.model",
    "FoldedLoading": "lit_bnfold.checkpoint",
    "FoldingError": "lit_bnfold.folding",
    "FoldingPlan": "lit_bnfold.folding",
    "HistogramMonitor": "lit_bnfold.callbacks",
    "Kinds": "lit_bnfold.folding",
    "LayerKind": "lit_bnfold.folding",
    "NamesDataModule": "lit_bnfold.names.data",
    "UpdateRatioMonitor": "lit_bnfold.callbacks",
    "fold_batchnorm": "lit_bnfold.folding",
    "load_folded": "lit_bnfold.checkpoint",
    "plan_folding": "lit_bnfold.folding",
}

__all__ = [*_HOME, "__version__"]


if not TYPE_CHECKING:  # or else any misspelt name would be one

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
