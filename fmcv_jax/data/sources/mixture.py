"""Weighted mixture of sources."""

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Mapping

import numpy as np
from typing_extensions import override

from fmcv_jax.bounds import PositiveFloat
from fmcv_jax.data.order import MixedOrder, RunOrder
from fmcv_jax.data.sources import values
from fmcv_jax.data.sources.account import Account, merged
from fmcv_jax.data.sources.base import BadRecord, Example, Source
from fmcv_jax.errors import UserError, did_you_mean
from fmcv_jax.fields import FIELDS, Field


@dataclasses.dataclass(frozen=True)
class Mixture(Source):
  """Interleaves named `sources` in proportion to `weights`.

  Each source has epochs of its own, with each record once per epoch: with weights 3 and 1 and equal sizes, the first
  completes three epochs while the second completes one. Without weights, sources are weighted by their number of
  records and share one epoch. Evaluation reads every record of every source once.

  Classes are merged by name: labels, the classes of objects and those of pixels get one numbering (`Field.numbered`).
  """

  sources: Mapping[str, Source]
  weights: Mapping[str, PositiveFloat] = dataclasses.field(default_factory=dict)

  def __post_init__(self) -> None:
    if not self.sources:
      raise ValueError('sources: expected at least one')
    if unknown := [name for name in self.weights if name not in self.sources]:
      raise ValueError(f'weights: {unknown[0]!r} is not a source; {did_you_mean(unknown[0], self.sources)}')
    if self.weights and (missing := [name for name in self.sources if name not in self.weights]):
      raise ValueError(f'weights: {missing[0]!r} has no weight; set one for every source, or none')
    if bad := [name for name, weight in self.weights.items() if not 0 < weight < float('inf')]:
      raise ValueError(f'weights: expected numbers above 0, got {self.weights[bad[0]]} for {bad[0]!r}')

  @functools.cached_property
  @override
  def names(self) -> tuple[str, ...]:  # type: ignore[override]
    return tuple(dict.fromkeys(itertools.chain.from_iterable(source.names for source in self.sources.values())))

  @functools.cached_property
  @override
  def fields(self) -> Mapping[str, Field]:  # type: ignore[override]
    """The fields of all sources, which have to agree."""
    merged: dict[str, Field] = {}
    for part, source in self.sources.items():
      for name, field in source.fields.items():
        if merged.setdefault(name, field) != field:
          raise UserError(f'mixture: {name} of {part!r} is {field}, but {merged[name]} of another source')
    return merged

  def __len__(self) -> int:
    return self._ends[-1]

  def __getitem__(self, index: int) -> Example:
    if not 0 <= index < len(self):
      raise IndexError(f'{index} of {len(self)}')
    name, row = self._locate(index)
    return self._renumbered(name, self.sources[name][row])

  def _renumbered(self, part: str, example: Example) -> Example:
    """An example of a source with its classes (labels, those of objects, of pixels) in the joint numbering."""
    source = self.sources[part]
    if source.names == self.names:
      return example
    changed: Example = {}
    for name, value in example.items():
      field = source.fields.get(name) or FIELDS.get(name)
      if field is None or not field.numbered:
        continue
      if not source.names:
        raise UserError(
          f'mixture: {part!r} has no class names for its {name}, but others have them; provide class names'
        )
      if field.kind == 'label':
        changed[name] = self._labels[part][values.Classes(source.names).number(value, name)]
      else:
        changed[name] = self._renumbered_array(part, name, np.asarray(value), field)
    return {**example, **changed}

  def _renumbered_array(self, part: str, name: str, numbers: np.ndarray, field: Field) -> np.ndarray:
    """Class numbers of a source in the joint numbering; those that stand for no class stay."""
    known = numbers >= 0
    if field.kind == 'map':
      known &= numbers != field.fill
      if len(self.names) > field.fill:
        raise UserError(f'mixture: {len(self.names)} classes, but in {name} {field.fill:g} stands for no class')
    if known.any() and (largest := numbers[known].max()) >= len(self._labels[part]):
      raise BadRecord(f'{name} has class {largest}, but {part!r} names {len(self._labels[part])} classes')
    joint = numbers.copy()
    joint[known] = np.asarray(self._labels[part])[numbers[known]]
    return joint

  @override
  def key_of(self, index: int) -> str:
    name, row = self._locate(index)
    return f'{name}: {self.sources[name].key_of(row)}'

  @override
  def texts_of(self, index: int) -> tuple[str, ...]:
    name, row = self._locate(index)
    return self.sources[name].texts_of(row)

  @override
  def annotations_of(self, index: int) -> Example:
    name, row = self._locate(index)
    return self._renumbered(name, self.sources[name].annotations_of(row))

  @override
  def account(self) -> Account:
    return merged({name: source.account() for name, source in self.sources.items()}, self.names, self._labels)

  @override
  def order(self, seed: int, shuffle: bool) -> RunOrder:
    parts = tuple(source.order(seed + part, shuffle) for part, source in enumerate(self.sources.values()))
    if not self.weights:
      return super().order(seed, shuffle)
    return MixedOrder(parts, tuple(self.weights[name] for name in self.sources), seed)

  @property
  @override
  def order_name(self) -> str:
    if not self.weights:
      return super().order_name
    parts = ', '.join(f'{self.weights[name]:g} {source.order_name}' for name, source in self.sources.items())
    return f'Mixture({parts})'

  @functools.cached_property
  def _ends(self) -> list[int]:
    lengths = {name: len(source) for name, source in self.sources.items()}
    if empty := [name for name, length in lengths.items() if not length]:
      raise UserError(f'mixture: the source {empty[0]!r} has no records')
    return list(itertools.accumulate(lengths.values()))

  @functools.cached_property
  def _labels(self) -> dict[str, list[int]]:
    number = {name: label for label, name in enumerate(self.names)}
    return {part: [number[name] for name in source.names] for part, source in self.sources.items()}

  def _locate(self, index: int) -> tuple[str, int]:
    part = bisect.bisect_right(self._ends, index)
    return list(self.sources)[part], index - (self._ends[part - 1] if part else 0)
