"""The example application: the notebook's character model of names, its data, and the names that it makes up."""

from __future__ import annotations

from lit_bnfold.names.callbacks import CharacterEmbedding, SampledNames
from lit_bnfold.names.data import NamesDataModule
from lit_bnfold.names.model import BatchNormMLP
from lit_bnfold.names.sampling import Sampling, sample_names

__all__ = ["BatchNormMLP", "CharacterEmbedding", "NamesDataModule", "SampledNames", "Sampling", "sample_names"]
