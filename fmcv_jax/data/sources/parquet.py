"""Parquet tables with the encoded images inside, as the Hugging Face hub keeps them."""

import bisect
import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from typing_extensions import override

from fmcv_jax.bounds import PositiveInt
from fmcv_jax.data import storage
from fmcv_jax.data.order import RunOrder, WindowedOrder
from fmcv_jax.data.sources import arrow_columns, splits, values
from fmcv_jax.data.sources.account import Account, left_out, other_files
from fmcv_jax.data.sources.base import BadRecord, Example, Source
from fmcv_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Parquet(Source):
  """Tables: `path` is their folder, a pattern such as 'data/train-*.parquet' or 'gs://...', or a file.

  image        the column of encoded bytes, or of {bytes, path} as `datasets` writes it
  text         the column of captions, each a text, UTF-8 bytes or a list of them; None for none
  label        the column of classes, as whole numbers or names; None for none
  class_names  names of the classes by label; by default those that `datasets` wrote into the table, or of a column of
               names all that occur, in order
  window       row groups that each reading process has in memory
  split        'train', 'validation' or 'test' of a folder that holds several, by the names of files and folders; 'all'
               reads them as one

  A field inside objects, of each element of a list or map, is named behind the column: 'sentences/raw'. Of a folder
  also the tables in subfolders are read; in year=2024/part.parquet 'year' is a column. A column whose type cannot hold
  what it is set to is an error before the first record; a null caption is a record without a text, a null class a bad
  record.

  A row group is the least that can be read. So training shuffles in a window (see WindowedOrder): it permutes the row
  groups, takes `window` of them at a time and permutes what they hold. Every reading process reads all of them: `fmcv
  pack` makes ArrayRecord of it, which has single records.
  """

  path: str
  image: str = 'image'
  text: str | None = None
  label: str | None = None
  class_names: tuple[str, ...] = ()
  window: PositiveInt = 8
  split: str | None = None

  def __post_init__(self) -> None:
    if self.window < 1:
      raise ValueError(f'window: expected at least 1 row group, got {self.window}')

  @property
  @override
  def names(self) -> tuple[str, ...]:
    return self._classes.names

  def __len__(self) -> int:
    return int(self._tables.ends[-1])

  def __getitem__(self, index: int) -> Example:
    value = self._row(index)
    example: Example = {'image': self._image(value('image')), 'key': self.key_of(index)}
    if self.text:
      example['texts'] = values.texts(value('text'), self.text)
      if example['texts']:
        example['text'] = example['texts'][0]
    if self.label:
      example['label'] = self._classes.number(value('label'), self.label)
    return example

  def _row(self, index: int) -> Callable[[str], Any]:
    """A function from a field, such as 'image', to its value in a row."""
    if not 0 <= index < len(self):
      raise IndexError(f'{index} of {len(self)}')
    group, row = self._tables.locate(index)
    table, partition = self._groups.get(group, self._read), self._tables.partitions[group[0]]

    def value(field: str) -> Any:
      column = self._tables.columns[field]
      return partition[column.name] if column.name in partition else column.value(table.column(column.name)[row])

    return value

  @property
  def _specs(self) -> dict[str, str | None]:
    """The column of each field that is read."""
    return {'image': self.image, 'text': self.text, 'label': self.label}

  def _image(self, image: Any) -> bytes:
    path = None
    if isinstance(image, dict):
      image, path = image.get('bytes'), image.get('path')
    if not isinstance(image, bytes):
      raise BadRecord(f'has no bytes in {self.image!r}' + (f', only the path {path!r}' if path else ''))
    return image

  @override
  def key_of(self, index: int) -> str:
    (file, group), row = self._tables.locate(index)
    return f'{self._tables.files[file]}[{group}][{row}]'

  @override
  def account(self) -> Account:
    tables = self._tables
    numbers: collections.Counter[int] = collections.Counter()
    missing = {'label': 0} if self.label else {}
    counted = self.label is not None and not storage.is_remote(self.path)  # reading that column costs little here
    for value, count in self._labels.items() if counted else ():
      try:
        numbers[self._classes.number(value, 'label')] += count
      except BadRecord:
        missing['label'] += count
    if tables.null_texts:
      missing['text'] = tables.null_texts
    read = {column.name for column in tables.columns.values()}
    return Account(
      records=len(self),
      fields={field: f'column {column}: {column.kind}' for field, column in tables.columns.items()},
      classes=self.names,
      class_counts=tuple(numbers[number] for number in range(len(self.names))) if counted and self.names else None,
      label_range=(min(numbers), max(numbers)) if numbers else None,
      split=tables.split,
      missing=missing,
      left_out=(
        *left_out(('columns that are not read', name) for name in tables.all_columns if name not in read),
        *other_files(storage.others(self.path, tables.files)),
      ),
    )

  @override
  def order(self, seed: int, shuffle: bool) -> RunOrder:
    return WindowedOrder(self._tables.ends, self.window, seed, shuffle)

  @property
  @override
  def order_name(self) -> str:
    return f'{super().order_name} window={self.window}'

  def _read(self, group: tuple[int, int]) -> Any:
    file, number = group
    columns = list(dict.fromkeys(column.name for column in self._tables.columns.values()))
    try:
      with _open(self._tables.files[file]) as table:
        return table.read_row_group(number, columns=columns, use_threads=False)
    except (ValueError, OSError) as error:  # Arrow's errors
      raise BadRecord(f'row group {number} cannot be read: {" ".join(str(error).split())[:200]}') from error

  @functools.cached_property
  def _groups(self) -> '_Groups':
    return _Groups(self.window + 2)  # a batch may straddle two windows

  @functools.cached_property
  def _classes(self) -> values.Classes:
    """By `class_names`, or by the names in the tables, or of a column of names by all that occur in it, in order."""
    tables, label = self._tables, self._tables.columns.get('label')
    names = self.class_names or tables.class_names
    if not names and label and label.of_texts:
      names = values.names_among(self._labels)
    return values.Classes(names)

  @functools.cached_property
  def _labels(self) -> collections.Counter[Any]:
    """Every stored label -> the number of its rows; of all columns only that of the labels is read."""
    tables, label = self._tables, self._tables.columns['label']
    counts: collections.Counter[Any] = collections.Counter()
    for part in storage.in_threads(functools.partial(_label_counts, tables, label), range(len(tables.files))):
      counts.update(part)
    return counts

  @functools.cached_property
  def _tables(self) -> 'Tables':
    _pyarrow()
    found = storage.find(self.path, '.parquet', 'parquet', below=True)
    chosen, split = splits.chosen(found, self.split, 'parquet')
    files = [file.path for file in chosen]
    partitions = [arrow_columns.partition_of(path) for path in files]
    specs = {field: spec for field, spec in self._specs.items() if spec}
    columns: dict[str, arrow_columns.Column] = {}
    names: tuple[str, ...] = ()
    counts: list[int] = []
    groups: list[tuple[int, int]] = []
    footers = storage.in_threads(functools.partial(_footer, text=self.text), files)
    for number, (path, footer) in enumerate(zip(files, footers)):
      for field, spec in specs.items() if sum(footer.rows) else ():
        column = arrow_columns.find(footer.schema, partitions[number], field, spec, f'parquet: {path}')
        if field not in columns or columns[field].kind == arrow_columns.NULL:
          columns[field] = column
      counts += footer.rows
      groups += [(number, group) for group in range(len(footer.rows))]
      own = class_names(footer.schema, specs.get('classes') or self.label)
      if own and names and own != names:
        raise UserError(
          f'parquet: {path} has other class names ({", ".join(own[:3])}, ...) than {files[0]} ({", ".join(names[:3])}, '
          f'...), so that their labels differ in meaning; read them as a mixture'
        )
      names = names or own
    if not sum(counts):
      raise UserError(f'parquet: no rows in {len(files)} tables at {self.path!r}')
    if nothing := [field for field, column in columns.items() if column.kind == arrow_columns.NULL]:
      raise UserError(f'parquet: column {columns[nothing[0]]} at {self.path!r} holds only nulls, set {nothing[0]}')
    filled = [place for place, count in enumerate(counts) if count]
    ends = np.array(list(itertools.accumulate(counts[place] for place in filled)))
    return Tables(
      files,
      [groups[place] for place in filled],
      ends,
      names,
      columns,
      partitions,
      split,
      [name for name in footers[0].schema.names],
      sum(footer.null_texts for footer in footers),
    )


@dataclasses.dataclass(frozen=True)
class Tables:
  """`groups` are (file, number in it), `ends` where in the order of all rows each of them ends."""

  files: list[str]
  groups: list[tuple[int, int]]
  ends: np.ndarray
  class_names: tuple[str, ...]
  columns: dict[str, arrow_columns.Column]  # of 'image', 'text' and 'label'
  partitions: list[dict[str, str | None]]  # the columns that the folders of each file stand for
  split: str | None
  all_columns: list[str]
  null_texts: int

  def locate(self, index: int) -> tuple[tuple[int, int], int]:
    """((file, row group in it), row in that group) of a row."""
    place = bisect.bisect_right(self.ends, index)
    return self.groups[place], index - int(self.ends[place - 1] if place else 0)


class _Groups:
  """The row groups read last; it travels to other processes empty."""

  def __init__(self, most: int):
    self._most = most
    self._held: collections.OrderedDict[tuple[int, int], Any] = collections.OrderedDict()
    self._lock = threading.Lock()

  def get(self, group: tuple[int, int], read: Callable[..., Any]) -> Any:
    with self._lock:  # of two threads that want the same, one reads it
      if group not in self._held:
        self._held[group] = read(group)
        if len(self._held) > self._most:
          self._held.popitem(last=False)
      self._held.move_to_end(group)
      return self._held[group]

  def __reduce__(self) -> Any:
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


class _Footer(NamedTuple):
  schema: Any
  rows: list[int]  # of each row group
  null_texts: int


def _footer(path: str, text: str | None) -> _Footer:
  try:
    with _open(path) as table:
      meta = table.metadata
      groups = [meta.row_group(group) for group in range(meta.num_row_groups)]
      return _Footer(table.schema_arrow, [group.num_rows for group in groups], sum(_nulls(g, text) for g in groups))
  except (ValueError, OSError) as error:
    raise UserError(
      f'parquet: {path} is truncated, damaged or no Parquet file ({" ".join(str(error).split())[:150]}); fetch it '
      f'again, or leave it out of the pattern'
    ) from error


def _nulls(group: Any, column: str | None) -> int:
  """Rows of a row group in which a column of plain values is null, by its statistics; 0 where they do not say."""
  for at in range(group.num_columns):
    chunk = group.column(at)
    if chunk.path_in_schema == column and chunk.statistics is not None and chunk.statistics.has_null_count:
      return chunk.statistics.null_count
  return 0


def _label_counts(tables: Tables, label: arrow_columns.Column, file: int) -> collections.Counter[Any]:
  if label.name in tables.partitions[file]:
    ends = [0, *tables.ends.tolist()]
    rows = sum(end - begin for (of, _), begin, end in zip(tables.groups, ends, ends[1:]) if of == file)
    return collections.Counter({tables.partitions[file][label.name]: rows})
  column = whole_column(tables, label, file)
  if label.path:
    return collections.Counter(label.value(scalar) for scalar in column)
  counts = column.value_counts()
  return collections.Counter(dict(zip(counts.field('values').to_pylist(), counts.field('counts').to_pylist())))


def whole_column(tables: Tables, column: arrow_columns.Column, file: int) -> Any:
  """The Arrow scalars of a column of one table; raises UserError if it cannot be read."""
  try:
    with _open(tables.files[file]) as table:
      return table.read(columns=[column.name], use_threads=False).column(0)
  except (ValueError, OSError) as error:
    raise UserError(f'parquet: {tables.files[file]}: column {column} cannot be read ({error})') from error


def class_names(schema: Any, column: str | None) -> tuple[str, ...]:
  """Those of a column, or of a field inside objects, that `datasets` keeps in the table's metadata."""
  try:
    found = json.loads((schema.metadata or {})[b'huggingface'])['info']['features']
    for part in (column or '').split('/'):
      while part not in found and 'feature' in found:  # of each element of a list
        found = found['feature']
      found = found[part]
    while 'names' not in found:
      found = found['feature']
    return tuple(found['names'])
  except (KeyError, TypeError, ValueError):
    return ()
