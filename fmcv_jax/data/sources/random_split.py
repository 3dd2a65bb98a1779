"""Splits a source at random into training and held-out records, without the same image on both sides."""

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from typing_extensions import override

from fmcv_jax.bounds import Fraction, Seed
from fmcv_jax.data import storage
from fmcv_jax.data.images.decode import decode
from fmcv_jax.data.order import RunOrder, WindowedOrder
from fmcv_jax.data.sources.account import Account, class_counts, left_out
from fmcv_jax.data.sources.base import UNREADABLE, Example, Source, reason_of
from fmcv_jax.data.sources.values import Classes
from fmcv_jax.errors import UserError
from fmcv_jax.fields import Field

_BLOCK = 256  # records read at a time by all threads


@dataclasses.dataclass(frozen=True)
class RandomSplit(Source):
  """The readable records of a source, or one part of a random split of them.

  Every image is decoded once, when the source is opened: unreadable records are left out (and counted by `account`),
  and records with the same pixels are never on both sides. In a source with labels the split is stratified: every class
  has the same fraction held out, rounded by largest remainder, and at least one image left for training.

  part      'train' and 'held_out' are complementary; 'all' is every readable record
  fraction  fraction of the records that are held out
  seed      seed of the split
  """

  source: Source
  part: Literal['train', 'held_out', 'all'] = 'all'
  fraction: Fraction = 0.2
  seed: Seed = 0

  @property
  @override
  def names(self) -> tuple[str, ...]:
    return self.source.names

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> Example:
    return self.source[int(self._rows[index])]

  @property
  @override
  def fields(self) -> Mapping[str, Field]:
    return self.source.fields

  @override
  def key_of(self, index: int) -> str:
    return self.source.key_of(int(self._rows[index]))

  @override
  def texts_of(self, index: int) -> tuple[str, ...]:
    return self.source.texts_of(int(self._rows[index]))

  @override
  def annotations_of(self, index: int) -> Example:
    return self.source.annotations_of(int(self._rows[index]))

  @override
  def account(self) -> Account:
    whole, scan = self.source.account(), self.scan
    labels = None if scan.labels is None else scan.labels[self._rows]
    return dataclasses.replace(
      whole,
      records=len(self),
      class_counts=None if labels is None else class_counts(labels, self.names),
      label_range=None if labels is None or not len(labels) else (int(labels.min()), int(labels.max())),
      split=whole.split if self.part == 'all' else self.part,
      missing={},
      left_out=(*whole.left_out, *left_out((reason, key) for key, reason in scan.unreadable.items())),
    )

  @override
  def order(self, seed: int, shuffle: bool) -> RunOrder:
    inner = self.source.order(seed, shuffle)
    if not isinstance(inner, WindowedOrder):
      return super().order(seed, shuffle)
    ends = np.unique(np.searchsorted(self._rows, inner.ends))
    return WindowedOrder(ends[ends > 0], inner.window, seed, shuffle)

  @property
  @override
  def order_name(self) -> str:
    rows = hashlib.sha256(self._rows.astype('<i8').tobytes()).hexdigest()[:12]
    return f'{self.source.order_name} {self.part}={len(self)} rows={rows}'

  @functools.cached_property
  def scan(self) -> 'Scan':
    """Results of reading every record of the source once."""
    try:
      return _scanned(self.source, tuple(self.source.key_of(index) for index in range(len(self.source))))
    except TypeError:  # a source that cannot be hashed, such as a mixture
      return _scan(self.source)

  @functools.cached_property
  def _rows(self) -> np.ndarray:
    rows = np.flatnonzero(self.scan.readable)
    if self.part == 'all':
      return rows
    held_out = held_out_rows(self.scan, self.fraction, self.seed)
    return rows[held_out[rows] == (self.part == 'held_out')]


class Scan(NamedTuple):
  """A source whose every record was read once.

  contents    bytes or None [N], a hash of the decoded pixels
  labels      int [N], -1 where the record cannot be read; None for a source without labels
  unreadable  key of a record -> why it cannot be used
  """

  contents: Sequence[bytes | None]
  labels: np.ndarray | None
  unreadable: dict[str, str]

  @property
  def readable(self) -> np.ndarray:
    """bool [N]"""
    return np.array([content is not None for content in self.contents], bool)

  @property
  def groups(self) -> dict[bytes, list[int]]:
    """Content -> the readable records with it, in order."""
    found: dict[bytes, list[int]] = collections.defaultdict(list)
    for row, content in enumerate(self.contents):
      if content is not None:
        found[content].append(row)
    return found


def held_out_rows(scan: Scan, fraction: float, seed: int) -> np.ndarray:
  """bool [N], True for the records that are held out.

  Records with the same pixels are one unit, which is not held out if they are of different classes.
  """
  units: dict[int, list[list[int]]] = collections.defaultdict(list)
  for rows in scan.groups.values():
    classes = {0 if scan.labels is None else int(scan.labels[row]) for row in rows}
    if len(classes) == 1:
      units[classes.pop()].append(rows)
  rng = np.random.default_rng(seed)
  labels, sizes = sorted(units), np.array([len(units[label]) for label in sorted(units)], int)
  counts = np.floor(sizes * fraction).astype(int)
  remainders = sizes * fraction - counts
  for at in np.lexsort((rng.random(len(sizes)), -remainders))[: round(sizes.sum() * fraction) - counts.sum()]:
    counts[at] += 1
  chosen = np.zeros(len(scan.contents), bool)
  for label, count, size in zip(labels, counts, sizes):
    for unit in rng.permutation(size)[: min(count, size - 1)]:
      chosen[units[label][unit]] = True
  return chosen


@functools.lru_cache(maxsize=4)
def _scanned(source: Hashable, keys: tuple[str, ...]) -> Scan:
  """The scan of a source with these records, read once for all parts of it."""
  del keys
  assert isinstance(source, Source)
  return _scan(source)


def _scan(source: Source) -> Scan:
  classes = Classes(source.names)

  def read(row: int) -> tuple[bytes, int, bool] | str:
    try:
      example = source[row]
      image = example.get('image')
      if image is None:
        raise UserError(f'{type(source).__name__}: the records have no image; they have {", ".join(sorted(example))}')
      pixels = decode(image) if isinstance(image, bytes) else image
      content = hashlib.sha256(f'{pixels.shape} {pixels.dtype}'.encode())
      content.update(np.ascontiguousarray(pixels).tobytes())
      label = classes.number(example['label'], 'label') if 'label' in example else -1
      return content.digest(), label, 'label' in example or not {'text', 'texts'} & set(example) or _has_text(example)
    except UNREADABLE as error:
      return reason_of(error)

  contents: list[bytes | None] = []
  labels, unreadable = [], {}
  for start in range(0, len(source), _BLOCK):
    for row, found in enumerate(storage.in_threads(read, range(start, min(start + _BLOCK, len(source)))), start):
      reason = found if isinstance(found, str) else '' if found[2] else 'has no text'
      if reason:
        unreadable[source.key_of(row)] = reason
      contents.append(None if reason else found[0])  # type: ignore[arg-type]
      labels.append(-1 if reason else found[1])
  numbers = np.array(labels, int)
  return Scan(contents, numbers if (numbers >= 0).any() else None, unreadable)


def _has_text(example: Example) -> bool:
  texts = example.get('texts', (example.get('text'),))
  return any(isinstance(text, str) and text.strip() for text in texts)
