"""Parquet tables with the encoded images inside, as the Hugging Face hub keeps them."""

import bisect
import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from fmcv_jax.data import storage
from fmcv_jax.data.order import RunOrder, WindowedOrder
from fmcv_jax.data.sources.base import BadRecord, Example, Source
from fmcv_jax.errors import UserError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Parquet(Source):
  """Tables: `path` is their folder, a pattern such as 'data/train-*.parquet' or 'gs://...', or a file.

  image        the column of encoded bytes, or of {bytes, path} as `datasets` writes it
  text         the column of captions, each a text or a list of texts; None for none
  label        the column of classes as numbers; None for none
  class_names  names of the classes by label; by default those that `datasets` wrote into the table
  window       row groups that each reading process has in memory

  A row group is the least that can be read. So training shuffles in a window (see WindowedOrder): it permutes the row
  groups, takes `window` of them at a time and permutes what they hold. Every reading process reads all of them: `fmcv
  pack` makes ArrayRecord of it, which has single records.
  """

  path: str
  image: str = 'image'
  text: str | None = None
  label: str | None = None
  class_names: tuple[str, ...] = ()
  window: int = 8

  def __post_init__(self) -> None:
    if self.window < 1:
      raise ValueError(f'window: expected at least 1 row group, got {self.window}')

  @property
  def names(self) -> tuple[str, ...]:
    return self.class_names or self._tables.class_names

  def __len__(self) -> int:
    return int(self._tables.ends[-1])

  def __getitem__(self, index: int) -> Example:
    if not 0 <= index < len(self):
      raise IndexError(f'{index} of {len(self)}')
    group, row = self._tables.locate(index)
    table = self._groups.get(group, self._read)
    image = table.column(self.image)[row].as_py()
    if isinstance(image, dict):
      image = image.get('bytes')
    if not isinstance(image, bytes):
      raise BadRecord(f'has no bytes in {self.image!r}')
    example: Example = {'image': image, 'key': self.key_of(index)}
    if self.text:
      value = table.column(self.text)[row].as_py()
      texts = [value] if isinstance(value, str) else value or []
      example['texts'] = tuple(texts)
      if texts:
        example['text'] = texts[0]
    if self.label:
      if (value := table.column(self.label)[row].as_py()) is None:
        raise BadRecord(f'has no {self.label!r}')
      example['label'] = int(value)
    return example

  def key_of(self, index: int) -> str:
    (file, group), row = self._tables.locate(index)
    return f'{self._tables.files[file]}[{group}][{row}]'

  def order(self, seed: int, shuffle: bool) -> RunOrder:
    return WindowedOrder(self._tables.ends, self.window, seed, shuffle)

  @property
  def order_name(self) -> str:
    return f'{super().order_name} window={self.window}'

  @property
  def _columns(self) -> dict[str, str]:
    fields = {'image': self.image, 'text': self.text, 'label': self.label}
    return {field: column for field, column in fields.items() if column}

  def _read(self, group: tuple[int, int]) -> Any:
    file, number = group
    try:
      with _open(self._tables.files[file]) as table:
        return table.read_row_group(number, columns=list(self._columns.values()), use_threads=False)
    except (ValueError, OSError) as error:  # Arrow's errors
      raise BadRecord(f'row group {number} cannot be read: {" ".join(str(error).split())[:200]}') from error

  @functools.cached_property
  def _groups(self) -> '_Groups':
    return _Groups(self.window + 2)  # a batch may straddle two windows

  @functools.cached_property
  def _tables(self) -> '_Tables':
    _pyarrow()
    files = [file.path for file in storage.find(self.path, '.parquet', 'parquet')]
    counts: list[int] = []
    groups: list[tuple[int, int]] = []
    class_names: tuple[str, ...] = ()
    for number, (path, (schema, rows)) in enumerate(zip(files, storage.in_threads(_footer, files))):
      for field, column in self._columns.items():
        if column not in schema.names:
          raise UserError(
            f'parquet: {path} has no column {column!r}, set {field}; {did_you_mean(column, schema.names)}'
          )
      counts += rows
      groups += [(number, group) for group in range(len(rows))]
      class_names = class_names or _class_names(schema, self.label)
    if not sum(counts):
      raise UserError(f'parquet: no rows in {len(files)} tables at {self.path!r}')
    filled = [place for place, count in enumerate(counts) if count]
    ends = np.array(list(itertools.accumulate(counts[place] for place in filled)))
    return _Tables(files, [groups[place] for place in filled], ends, class_names)


@dataclasses.dataclass(frozen=True)
class _Tables:
  """`groups` are (file, number in it), `ends` where in the order of all rows each of them ends."""

  files: list[str]
  groups: list[tuple[int, int]]
  ends: np.ndarray
  class_names: tuple[str, ...]

  def locate(self, index: int) -> tuple[tuple[int, int], int]:
    place = bisect.bisect_right(self.ends, index)
    return self.groups[place], index - int(self.ends[place - 1] if place else 0)


class _Groups:
  """The row groups read last; it travels to other processes empty."""

  def __init__(self, most: int):
    self._most = most
    self._held: collections.OrderedDict[tuple[int, int], Any] = collections.OrderedDict()
    self._lock = threading.Lock()

  def get(self, group: tuple[int, int], read) -> Any:
    with self._lock:  # of two threads that want the same, one reads it
      if group not in self._held:
        self._held[group] = read(group)
        if len(self._held) > self._most:
          self._held.popitem(last=False)
      self._held.move_to_end(group)
      return self._held[group]

  def __reduce__(self):
    return _Groups, (self._most,)


def _pyarrow() -> Any:
  try:
    import pyarrow.parquet
  except ImportError as error:
    raise UserError('parquet: needs pyarrow: pip install fmcv-jax[parquet]') from error
  return pyarrow.parquet


@contextlib.contextmanager
def _open(path: str) -> Iterator[Any]:
  with storage.open_file(path) as file, _pyarrow().ParquetFile(file, page_checksum_verification=True) as table:
    yield table


def _footer(path: str) -> tuple[Any, list[int]]:
  try:
    with _open(path) as table:
      meta = table.metadata
      return table.schema_arrow, [meta.row_group(group).num_rows for group in range(meta.num_row_groups)]
  except (ValueError, OSError) as error:
    raise UserError(
      f'parquet: {path} is truncated, damaged or no Parquet file ({" ".join(str(error).split())[:150]}); fetch it '
      f'again, or leave it out of the pattern'
    ) from error


def _class_names(schema: Any, label: str | None) -> tuple[str, ...]:
  """Those that `datasets` keeps in the table's metadata."""
  try:
    features = json.loads((schema.metadata or {})[b'huggingface'])['info']['features']
    return tuple(features[label]['names'])
  except (KeyError, TypeError, ValueError):
    return ()
