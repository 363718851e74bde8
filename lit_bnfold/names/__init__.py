"""The example application: the notebook's character model of names, its data, and the names that it makes up."""

from .callbacks import CharacterEmbedding, SampledNames
from .data import NamesDataModule
from .model import BatchNormMLP
from .sampling import Sampling, sample_names

__all__ = ["BatchNormMLP", "CharacterEmbedding", "NamesDataModule", "SampledNames", "Sampling", "sample_names"]
