"""Lightning callbacks."""

from lit_bnfold.callbacks.batchnorm_folding import BatchNormFolding
from lit_bnfold.callbacks.histograms import HistogramMonitor
from lit_bnfold.callbacks.update_ratio import UpdateRatioMonitor

__all__ = ["BatchNormFolding", "HistogramMonitor", "UpdateRatioMonitor"]
