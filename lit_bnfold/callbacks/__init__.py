"""Lightning callbacks."""

from lit_bnfold.callbacks.batchnorm_folding import BatchNormFolding

__all__ = ["BatchNormFolding"]
