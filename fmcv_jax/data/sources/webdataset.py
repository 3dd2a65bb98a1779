"""WebDataset shards, the tar files of LAION and img2dataset, with random access and without streaming.

A sample is a run of members that share their name up to the first dot: `000000012.jpg`, `000000012.txt`,
`000000012.json`. Where each begins is found once, from the tar headers alone, and kept in an index file; from then on a
sample is one read at its place, and order, epochs and resuming are as exact as for any other source.
"""

import bisect
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import os
import pathlib
from typing import Any, Literal

import numpy as np

from fmcv_jax.data import storage
from fmcv_jax.data.sources import tar
from fmcv_jax.data.sources.base import BadRecord, Example, Source
from fmcv_jax.data.sources.image_folder import EXTENSIONS
from fmcv_jax.errors import UserError, did_you_mean

logger = logging.getLogger(__name__)

_IMAGES = tuple(extension[1:] for extension in EXTENSIONS)
_FORMAT = 1  # of the index
_ALIGN = 64
_MOST_MEMBERS = 32
_LOCAL_BLOCK, _REMOTE_BLOCK = 4096, 16 << 20  # what is read at a time while headers are sought


@dataclasses.dataclass(frozen=True)
class WebDataset(Source):
  """Tar shards: `path` is their folder, a pattern such as 'laion/{00000..00999}.tar' or 'gs://bucket/*.tar', or a file.

  text         the member that holds the caption, 'txt', or a field of a JSON member, 'json/caption'; None for none
  label        the member or field that holds the class as a number
  class_names  names of the classes by label
  index        the folder of the index; by default that of the shards, or where it cannot be written $FMCV_CACHE
  on_truncated  'error' stops at a shard that is truncated or empty; 'skip_tail' takes its whole samples, and says so

  The image is the sample's member that ends in .jpg, .png, .webp, ...; samples without one are left out and counted.
  The index is made again when a shard's size or time of change differs. Hosts may be more than shards: rows of the
  global order are divided among them, never shards.
  """

  path: str
  text: str | None = 'txt'
  label: str | None = 'cls'
  class_names: tuple[str, ...] = ()
  index: str | None = None
  on_truncated: Literal['error', 'skip_tail'] = 'error'

  def __post_init__(self) -> None:
    if self.on_truncated not in ('error', 'skip_tail'):
      raise ValueError(f"on_truncated: {self.on_truncated!r} is not 'error' or 'skip_tail'")

  @property
  def names(self) -> tuple[str, ...]:
    return self.class_names

  def __len__(self) -> int:
    return self._index.ends[-1]

  def __getitem__(self, index: int) -> Example:
    if not 0 <= index < len(self):
      raise IndexError(f'{index} of {len(self)}')
    sample = self._index.read(index)
    images = [name for name in sample.members if name in _IMAGES]
    example: Example = {'image': sample.members[images[0]], 'key': sample.key}
    if self.text and self._index.has(self.text):
      value = _at(sample, self.text)
      example['texts'] = () if value is None else tuple(value) if isinstance(value, list) else (str(value),)
      if example['texts']:
        example['text'] = example['texts'][0]
    if self.label and self._index.has(self.label):
      value = _at(sample, self.label)
      if value is None:
        raise BadRecord(f'has no {self.label}')
      example['label'] = int(value)
    return example

  def key_of(self, index: int) -> str:
    shard, row = self._index.locate(index)
    return f'{self._index.shards[shard]}[{row}]'

  @functools.cached_property
  def _index(self) -> '_Index':
    shards = storage.find(self.path, '.tar', 'webdataset')
    file = _index_file(shards, self.index)
    found = _open_index(file, shards)
    if found is None:
      logger.warning('webdataset: making the index of %d shards: %s', len(shards), file)
      _write_index(file, shards, storage.in_threads(_scan, shards))
      found = _open_index(file, shards)
      assert found is not None
    _judge(*found, self.on_truncated)
    return found[0]


@dataclasses.dataclass
class _Sample:
  key: str
  members: dict[str, bytes]  # by extension


@dataclasses.dataclass
class _Index:
  """Where all samples lie; in memory are only the shards' paths and counts, whatever the number of samples.

  A row of the file: where the sample begins in its shard, and for each of `members` its place from there and its size,
  both 0 where the sample has none.
  """

  shards: list[str]
  ends: list[int]
  members: list[str]
  file: str
  offset: int
  ranges: storage.Ranges = dataclasses.field(default_factory=storage.Ranges)

  @functools.cached_property
  def rows(self) -> np.ndarray:
    return np.memmap(self.file, _row(self.members), 'r', self.offset, (self.ends[-1],))

  def has(self, name: str) -> bool:
    return name.split('/')[0] in self.members

  def locate(self, index: int) -> tuple[int, int]:
    shard = bisect.bisect_right(self.ends, index)
    return shard, index - (self.ends[shard - 1] if shard else 0)

  def read(self, index: int) -> _Sample:
    path, row = self.shards[self.locate(index)[0]], self.rows[index]
    begin, places = int(row['begin']), dict(zip(self.members, row['places'].tolist()))
    places = {name: place for name, place in places.items() if place[0]}
    data = self.ranges.read(path, begin, max(start + size for start, size in places.values()))
    members = {name: data[start : start + size] for name, (start, size) in places.items()}
    headers = {name: data[start - tar.BLOCK : start] for name, (start, _) in places.items()}
    if any(tar.size_in(header) != places[name][1] for name, header in headers.items()):
      raise BadRecord(f'the shard has changed since its index was made; remove {self.file}')
    first = next(iter(headers.values()))
    return _Sample(f'{path}/{_split(tar.name_in(first))[0]}', members)

  def __getstate__(self) -> dict[str, Any]:
    return {key: value for key, value in self.__dict__.items() if key != 'rows'}


def _row(members: list[str]) -> np.dtype:
  return np.dtype([('begin', '<u8'), ('places', '<u4', (len(members), 2))])


def _at(sample: _Sample, name: str) -> Any:
  """The member as text, or the field of a JSON member; None where the sample has none."""
  member, *path = name.split('/')
  if member not in sample.members:
    return None
  text = sample.members[member].decode('utf-8')
  if not path:
    return text
  value = json.loads(text)
  for part in path:
    if not isinstance(value, dict) or part not in value:
      known = list(value) if isinstance(value, dict) else []
      raise BadRecord(f'has no {name} in its .{member}; {did_you_mean(part, known)}')
    value = value[part]
  return value


def _split(name: str) -> tuple[str, str]:
  """A member's name as the sample's key and the extension, from the first dot of the last part of its path."""
  folder, slash, base = name.rpartition('/')
  key, _, extension = base.partition('.')
  return folder + slash + key, extension.lower()


@dataclasses.dataclass
class _Scan:
  """What one shard holds: `rows` as in the index, with columns of its own, and what is wrong with it."""

  members: list[str]
  rows: np.ndarray
  without_image: int
  damage: str


def _scan(shard: storage.File) -> _Scan:
  begins: list[int] = []
  samples: list[dict[str, tuple[int, int]]] = []
  without_image, damage = 0, ''
  key, begin, places = '', 0, dict[str, tuple[int, int]]()

  def take() -> None:
    nonlocal without_image
    if any(extension in _IMAGES for extension in places):
      begins.append(begin)
      samples.append(places)
    else:
      without_image += bool(places)

  try:
    for member in tar.members(_reading_ahead(shard), shard.size):
      name, extension = _split(member.name)
      if name != key or extension in places:
        take()
        key, begin, places = name, member.header, {}
      if extension and not name.rpartition('/')[2].startswith('.'):
        places[extension] = (member.start - begin, member.size)
    take()
  except tar.TarDamaged as error:  # the sample in hand may lack members, and is not taken
    damage = error.reason
  members = sorted({extension for places in samples for extension in places})
  rows = np.zeros(len(samples), _row(members))
  rows['begin'] = begins
  for column, extension in enumerate(members):
    rows['places'][:, column] = [places.get(extension, (0, 0)) for places in samples]
  return _Scan(members, rows, without_image, damage)


def _reading_ahead(shard: storage.File):
  ranges, block = storage.Ranges(), _REMOTE_BLOCK if storage.is_remote(shard.path) else _LOCAL_BLOCK
  held, at = b'', 0

  def read(start: int, count: int) -> bytes:
    nonlocal held, at
    if start >= shard.size:
      return b''
    if not at <= start <= start + count <= at + len(held):
      held, at = ranges.read(shard.path, start, min(max(block, count), shard.size - start)), start
    return held[start - at : start - at + count]

  return read


def _index_file(shards: list[storage.File], folder: str | None) -> pathlib.Path:
  """Beside the shards it is known by their names alone, so that the folder may be moved."""
  first = shards[0].path
  beside = None if storage.is_remote(first) else pathlib.Path(first).absolute().parent
  names = [shard.path for shard in shards]
  if folder is None and beside is not None and os.access(beside, os.W_OK):
    names = [os.path.relpath(name, beside) for name in names]
    place = beside
  else:
    place = pathlib.Path(folder).expanduser() if folder is not None else storage.cache_folder() / 'webdataset'
  return place / f'.fmcv-{hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]}.index'


def _write_index(file: pathlib.Path, shards: list[storage.File], scans: list[_Scan]) -> None:
  members = sorted({extension for scan in scans for extension in scan.members})
  if len(members) > _MOST_MEMBERS:
    raise UserError(
      f'webdataset: the members have {len(members)} extensions ({", ".join(members[:3])}, ...); a member is named by '
      f'its sample, a dot and what it is, such as 000012.jpg'
    )
  header = {
    'format': _FORMAT,
    'shards': [[shard.size, shard.stamp, len(scan.rows)] for shard, scan in zip(shards, scans)],
    'members': members,
    'damage': {number: scan.damage for number, scan in enumerate(scans) if scan.damage},
    'without_image': sum(scan.without_image for scan in scans),
  }
  text = json.dumps(header).encode() + b'\n'
  partial = file.with_name(f'{file.name}.{os.getpid()}.partial')
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    with partial.open('wb') as out:
      out.write(text.ljust(-(-len(text) // _ALIGN) * _ALIGN))
      for scan in scans:
        rows = np.zeros(len(scan.rows), _row(members))
        rows['begin'] = scan.rows['begin']
        rows['places'][:, [members.index(extension) for extension in scan.members]] = scan.rows['places']
        out.write(rows.tobytes())
    partial.rename(file)
  except OSError as error:
    with contextlib.suppress(OSError):
      partial.unlink()
    raise UserError(
      f'webdataset: the index {str(file)!r} cannot be written ({error.strerror}); set index to a folder for it'
    ) from error


def _open_index(file: pathlib.Path, shards: list[storage.File]) -> tuple[_Index, dict[str, Any]] | None:
  """The index and its header; None where there is none, or it is damaged or of other shards."""
  try:
    with file.open('rb') as opened:
      text = opened.readline()
      size = os.fstat(opened.fileno()).st_size
    header = json.loads(text)
    if header['format'] != _FORMAT:
      return None
    counts = [count for _, _, count in header['shards']]
    if [(size, stamp) for size, stamp, _ in header['shards']] != [(shard.size, shard.stamp) for shard in shards]:
      return None
    offset = -(-len(text) // _ALIGN) * _ALIGN
    if size != offset + sum(counts) * _row(header['members']).itemsize:
      return None
  except (OSError, ValueError, KeyError, TypeError):
    return None
  ends = list(itertools.accumulate(counts))
  return _Index([shard.path for shard in shards], ends, header['members'], str(file), offset), header


def _judge(index: _Index, header: dict[str, Any], on_truncated: str) -> None:
  """Says what is wrong with the shards, once, or refuses them."""
  for number, reason in header['damage'].items():
    path, count = index.shards[int(number)], header['shards'][int(number)][2]
    if on_truncated == 'error':
      more = f' ({len(header["damage"])} shards are damaged)' if len(header['damage']) > 1 else ''
      raise UserError(
        f"webdataset: {path}: {reason}; fetch it again, or set on_truncated='skip_tail' to take the {count} samples "
        f'that are whole{more}'
      )
    logger.warning('webdataset: %s: %s; its first %d samples are taken', path, reason, count)
  if header['without_image']:
    logger.warning('webdataset: %d samples have no image and are left out', header['without_image'])
  if not index.ends[-1]:
    raise UserError(f'webdataset: no sample with an image in {len(index.shards)} shards, the first {index.shards[0]!r}')
