"""Datasets in ArrayRecord files: random access, a checksum per record, few large files.

A dataset is a folder of shards `data-00000-of-00016.array_record` and an `info.json`. A record is a msgpack map of the
fields of an example; nothing in it is ever executed.
"""

import bisect
import dataclasses
import functools
import io
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgpack
import numpy as np
from PIL import Image
from typing_extensions import override

from fmcv_jax.data import storage
from fmcv_jax.data.sources.account import Account, LeftOut
from fmcv_jax.data.sources.base import BadRecord, Example, Source
from fmcv_jax.errors import UserError
from fmcv_jax.fields import Field

FIELDS = ('image', 'label', 'text', 'texts', 'question', 'answers', 'question_type', 'answer_type', 'key')
INFO = 'info.json'
_ARRAYS = 'arrays'
_CLIPS = 'clips'


@dataclasses.dataclass(frozen=True)
class ArrayRecord(Source):
  """A dataset written by `fmcv pack`: `path` is its folder, or a glob pattern of shards (without class names).

  Shards at a URL are copied to $FMCV_CACHE when first read; with a global shuffle all of them are copied soon.
  """

  path: str

  @property
  @override
  def names(self) -> tuple[str, ...]:
    return tuple(self._info.get('names', ()))

  @functools.cached_property
  @override
  def fields(self) -> Mapping[str, Field]:  # type: ignore[override]
    try:
      return {name: Field(**field) for name, field in self._info.get('fields', {}).items()}
    except (TypeError, ValueError) as error:
      raise UserError(f'array record: fields in {INFO} of {self.path!r} are not understood: {error}') from error

  def __len__(self) -> int:
    return self._shards.ends[-1]

  def __getitem__(self, index: int) -> Example:
    if not 0 <= index < len(self):
      raise IndexError(f'{index} of {len(self)}')
    example = decode_record(self._shards.read(index))
    return {'key': self.key_of(index), **example}

  @override
  def key_of(self, index: int) -> str:
    shard, row = self._shards.locate(index)
    return f'{self._shards.files[shard].path}[{row}]'

  def account(self) -> Account:
    """Records that could not be read when the set was packed are left out."""
    skipped = self._info.get('skipped', 0)
    left = LeftOut('records that could not be read when they were packed', skipped)
    return Account(records=len(self), classes=self.names, left_out=(left,) if skipped else ())

  @functools.cached_property
  def _info(self) -> dict[str, Any]:
    file = storage.join(os.path.expanduser(self.path), INFO)
    try:
      with storage.open_file(file) as opened:
        return json.load(opened)
    except (FileNotFoundError, NotADirectoryError):  # a glob pattern
      return {}
    except ValueError as error:
      raise UserError(f'array record: {file!r} is damaged: {error}; write the data set again') from error

  @functools.cached_property
  def _shards(self) -> '_Shards':
    files = storage.find(self.path, '.array_record', 'array record')
    # Local shards are opened, which detects a truncated one.
    counts = list(self._info.get('counts', ())) if storage.is_remote(self.path) else []
    counts = counts if len(counts) == len(files) else storage.in_threads(_count, files)
    if sum(counts) != self._info.get('records', sum(counts)):
      raise UserError(
        f'array record: {len(files)} shards at {self.path!r} have {sum(counts)} records, but {INFO} counts '
        f'{self._info["records"]} in {self._info["shards"]}; copy the folder again'
      )
    return _Shards(files, list(itertools.accumulate(counts)))


@dataclasses.dataclass
class _Shards:
  """Files and the running count of records; every process opens its own readers on first use."""

  files: list[storage.File]
  ends: list[int]
  readers: dict[int, Any] = dataclasses.field(default_factory=dict)

  def locate(self, index: int) -> tuple[int, int]:
    shard = bisect.bisect_right(self.ends, index)
    return shard, index - (self.ends[shard - 1] if shard else 0)

  def read(self, index: int) -> bytes:
    shard, row = self.locate(index)
    if shard not in self.readers:
      self.readers[shard] = _reader(self.files[shard])
    try:
      return self.readers[shard].read([row])[0]
    except RuntimeError as error:  # checksum mismatch
      raise BadRecord(' '.join(str(error).split())) from error

  def __getstate__(self) -> dict[str, Any]:
    return {**self.__dict__, 'readers': {}}


def _reader(file: storage.File) -> Any:
  from array_record.python import array_record_module  # a few hundred milliseconds

  # Without read-ahead: neighbors in a file are not neighbors in a shuffled order.
  return array_record_module.ArrayRecordReader(
    storage.local(file), 'readahead_buffer_size:0', file_reader_buffer_size=32768
  )


def _count(file: storage.File) -> int:
  reader = _reader(file)
  if not reader.ok():  # the reader raises no exception and counts 0 records
    raise UserError(f'array record: {file.path!r} cannot be read: it is truncated, damaged or not an ArrayRecord file')
  return reader.num_records()


def encode_record(example: Example) -> bytes:
  """An example as bytes.

  An image as array uint8 [H, W], [H, W, 3] or [H, W, 4] is stored as PNG; other arrays, and tuples of encoded frames,
  as they are.
  """
  arrays = {name: value for name, value in example.items() if isinstance(value, np.ndarray) and _is_array(name, value)}
  clips = {name: list(value) for name, value in example.items() if _is_clip(value)}
  fields = {name: value for name, value in example.items() if name not in arrays and name not in clips}
  if unknown := set(fields) - set(FIELDS):
    raise ValueError(f'fields {sorted(unknown)} of an example are neither one of {FIELDS} nor arrays')
  if clips:
    fields[_CLIPS] = clips
  if arrays:
    fields[_ARRAYS] = {name: (a.dtype.str, a.shape, np.ascontiguousarray(a).tobytes()) for name, a in arrays.items()}
  if isinstance(fields.get('image'), np.ndarray):
    file = io.BytesIO()
    Image.fromarray(fields['image']).save(file, 'PNG')
    fields['image'] = file.getvalue()
  if 'label' in fields:
    fields['label'] = int(fields['label'])
  return msgpack.packb(fields)


def _is_array(name: str, value: np.ndarray) -> bool:
  """True for an array that is stored as it is, and not as a PNG or a number."""
  return name not in FIELDS or (name == 'image' and value.shape[2:] not in ((), (3,), (4,)))


def _is_clip(value: Any) -> bool:
  return isinstance(value, (tuple, list)) and bool(value) and all(isinstance(frame, bytes) for frame in value)


def decode_record(data: bytes) -> Example:
  """The example of `encode_record`, its image as encoded bytes. Raises BadRecord for anything else."""
  try:
    example = msgpack.unpackb(data)
  except Exception as error:  # msgpack has an exception hierarchy of its own
    raise BadRecord(f'not msgpack: {type(error).__name__}: {error}') from error
  if not isinstance(example, dict) or set(example) - {*FIELDS, _ARRAYS, _CLIPS}:
    raise BadRecord(f'not an example: {str(example)[:60]!r}')
  for name, (dtype, shape, values) in example.pop(_ARRAYS, {}).items():
    example[name] = np.frombuffer(values, dtype).reshape(shape)
  for name, frames in example.pop(_CLIPS, {}).items():
    example[name] = tuple(frames)
  for name in ('texts', 'answers'):
    if name in example:
      example[name] = tuple(example[name])
  return example


def write_array_record(source: Source, path: str, shards: int = 1) -> None:
  """Writes every record of `source` in order to the new folder `path`, which appears only when it is complete."""
  target = pathlib.Path(path).expanduser()
  if shards < 1:
    raise UserError(f'array record: shards must be at least 1, got {shards}')
  if target.exists():
    raise UserError(f'array record: {path!r} exists already; choose another path or remove it')
  partial = target.with_name(f'.{target.name}.{os.getpid()}.partial')
  partial.mkdir(parents=True)
  try:
    bounds = [len(source) * shard // shards for shard in range(shards + 1)]
    for shard in range(shards):
      rows = range(bounds[shard], bounds[shard + 1])
      write_shard((source[index] for index in rows), shard_path(partial, shard, shards))
    write_info(partial, len(source), shards, source.names, fields=source.fields)
    partial.rename(target)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise


def shard_path(folder: pathlib.Path, shard: int, shards: int) -> pathlib.Path:
  """Path of a shard, in the naming of sharded files: data-00002-of-00016.array_record."""
  return folder / f'data-{shard:05d}-of-{shards:05d}.array_record'


def write_shard(examples: Iterable[Example], path: pathlib.Path) -> None:
  """Writes examples to one shard, which appears only when it is complete."""
  from array_record.python import array_record_module

  partial = path.with_name(f'.{path.name}.{os.getpid()}.partial')
  # Images are compressed already; groups of one make each record a separate read.
  writer = array_record_module.ArrayRecordWriter(str(partial), 'group_size:1,uncompressed')
  for example in examples:
    writer.write(encode_record(example))
  writer.close()
  partial.rename(path)


def write_info(
  folder: pathlib.Path,
  records: int,
  shards: int,
  names: Sequence[str],
  counts: Sequence[int] = (),
  skipped: int = 0,
  origin: Any = None,
  fields: Mapping[str, Field] = {},
) -> None:
  """Writes info.json, as the last file of a dataset: `counts` of records per shard, the number of unreadable records
  `skipped` when it was written from `origin`, and the meaning of its `fields`."""
  info: dict[str, Any] = {'records': records, 'shards': shards, 'names': list(names)}
  if fields:
    info['fields'] = {name: dataclasses.asdict(field) for name, field in fields.items()}
  made = {'counts': list(counts), 'skipped': skipped, 'origin': origin} if counts else {}
  (folder / INFO).write_text(json.dumps({**info, **made}, indent=1), encoding='utf-8')
