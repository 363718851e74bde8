"""The example application: the notebook's character model of names, and its data."""

from .data import NamesDataModule
from .model import BatchNormMLP

__all__ = ["BatchNormMLP", "NamesDataModule"]
