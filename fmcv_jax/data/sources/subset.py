"""Some records of a source, evenly spaced, so that a source sorted by class gives of each."""

import dataclasses

from fmcv_jax.data.sources.account import Account
from fmcv_jax.data.sources.base import Example, Source


@dataclasses.dataclass(frozen=True)
class EvenSubset(Source):
  """`count` records of a source, or all where it has no more."""

  source: Source
  count: int

  def __len__(self) -> int:
    return min(self.count, len(self.source))

  def __getitem__(self, index: int) -> Example:
    return self.source[self._at(index)]

  @property
  def names(self) -> tuple[str, ...]:
    return self.source.names

  def key_of(self, index: int) -> str:
    return self.source.key_of(self._at(index))

  def texts_of(self, index: int) -> tuple[str, ...]:
    return self.source.texts_of(self._at(index))

  def account(self) -> Account:
    """That of the whole source, but for what is counted by record."""
    whole = self.source.account()
    return dataclasses.replace(whole, records=len(self), class_counts=None, label_range=None, missing={})

  def _at(self, index: int) -> int:
    return index * len(self.source) // len(self)
