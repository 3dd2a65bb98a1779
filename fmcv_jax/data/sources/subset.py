"""Some records of a source."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from typing_extensions import override

from fmcv_jax.data.sources.account import Account
from fmcv_jax.data.sources.base import Example, Source
from fmcv_jax.fields import Field


@dataclasses.dataclass(frozen=True, eq=False)
class Subset(Source):
  """The records `rows` (int [N]) of a source, in that order."""

  source: Source
  rows: np.ndarray

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, index: int) -> Example:
    return self.source[int(self.rows[index])]

  @property
  @override
  def names(self) -> tuple[str, ...]:
    return self.source.names

  @property
  @override
  def fields(self) -> Mapping[str, Field]:
    return self.source.fields

  @override
  def key_of(self, index: int) -> str:
    return self.source.key_of(int(self.rows[index]))

  @override
  def texts_of(self, index: int) -> tuple[str, ...]:
    return self.source.texts_of(int(self.rows[index]))

  @override
  def annotations_of(self, index: int) -> Example:
    return self.source.annotations_of(int(self.rows[index]))

  def account(self) -> Account:
    """That of the whole source, but for what is counted by record."""
    whole = self.source.account()
    return dataclasses.replace(whole, records=len(self), class_counts=None, label_range=None, missing={})


def evenly_spaced(source: Source, count: int) -> Subset:
  """`count` records of a source, or all if it has no more: evenly spaced, so that a sorted one gives of each class."""
  count = min(count, len(source))
  return Subset(source, np.arange(count) * len(source) // max(count, 1))
