"""Index of tar shards: the location of the members of every sample, read once from the tar headers.

Members are grouped to samples as in the `webdataset` library: adjacent members whose names agree up to the first dot of
the base name. Names that start with a dot (`._0.jpg` in macOS archives) or contain none, and the library's own `__x__`,
are not members and do not end a sample.
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
import re
from typing import Any

import numpy as np

from fmcv_jax.data import storage
from fmcv_jax.data.sources import tar
from fmcv_jax.data.sources.account import EXAMPLES, LeftOut
from fmcv_jax.data.sources.base import BadRecord
from fmcv_jax.data.sources.folder_index import EXTENSIONS
from fmcv_jax.errors import UserError

logger = logging.getLogger(__name__)

IMAGES = tuple(extension[1:] for extension in EXTENSIONS)
_FORMAT = 2  # of the index
_ALIGN = 64
_MOST_MEMBERS = 32
_LOCAL_BLOCK, _REMOTE_BLOCK = 4096, 16 << 20  # bytes per read while scanning headers
_META = re.compile(r'__[^/]*__($|/)')
_NO_IMAGE, _NO_MEMBER = 'samples without an image', 'files that are no members of a sample'


def is_image(member: str) -> bool:
  """True if a member, such as 'jpg' or 'input.jpg', is an encoded image by its extension."""
  return member.rpartition('.')[2] in IMAGES


def open_index(shards: list[storage.File], folder: str | None, on_truncated: str) -> 'Index':
  """Opens the index of shards, or creates it; `folder` and `on_truncated` as in `WebDataset`."""
  file = _index_file(shards, folder)
  found = _open_index(file, shards)
  if found is None:
    logger.warning('webdataset: creating the index of %d shards: %s', len(shards), file)
    _write_index(file, shards, storage.in_threads(_scan, shards))
    found = _open_index(file, shards)
    assert found is not None
  _report_damage(*found, on_truncated)
  return found[0]


@dataclasses.dataclass
class Sample:
  """One sample: its key, such as 'shard.tar/000123', and its members by extension."""

  key: str
  members: dict[str, bytes]  # by extension


@dataclasses.dataclass
class Index:
  """Locations of all samples, memory-mapped: only paths and counts of shards are in memory.

  A row of the file has the offset of the sample in its shard, and for each of `members` the offset within the sample
  and the size, in bytes; both are 0 if the sample lacks the member.
  """

  shards: list[str]
  ends: list[int]
  members: list[str]
  file: str
  offset: int
  counts: dict[str, int]  # member -> number of samples that have it
  left_out: tuple[LeftOut, ...]
  ranges: storage.Ranges = dataclasses.field(default_factory=storage.Ranges)

  @functools.cached_property
  def rows(self) -> np.ndarray:
    """Rows of the index file, memory-mapped, one per sample (dtype of `_row`)."""
    return np.memmap(self.file, _row(self.members), 'r', self.offset, (self.ends[-1],))

  def locate(self, index: int) -> tuple[int, int]:
    """(number of the shard, number of the sample in it) of a sample."""
    shard = bisect.bisect_right(self.ends, index)
    return shard, index - (self.ends[shard - 1] if shard else 0)

  def read(self, index: int) -> Sample:
    """Reads all members of a sample by one request; BadRecord if the shard has changed since it was indexed."""
    path, row = self.shards[self.locate(index)[0]], self.rows[index]
    begin, places = int(row['begin']), dict(zip(self.members, row['places'].tolist()))
    places = {name: place for name, place in places.items() if place[0]}
    data = self.ranges.read(path, begin, max(start + size for start, size in places.values()))
    members = {name: data[start : start + size] for name, (start, size) in places.items()}
    headers = {name: data[start - tar.BLOCK : start] for name, (start, _) in places.items()}
    if any(tar.size_in(header) != places[name][1] for name, header in headers.items()):
      raise BadRecord(f'the shard has changed since its index was created; remove {self.file}')
    first = next(iter(headers.values()))
    return Sample(f'{path}/{_split(tar.name_in(first))[0]}', members)

  def __getstate__(self) -> dict[str, Any]:
    return {key: value for key, value in self.__dict__.items() if key != 'rows'}


def _row(members: list[str]) -> np.dtype:
  return np.dtype([('begin', '<u8'), ('places', '<u4', (len(members), 2))])


def _split(name: str) -> tuple[str, str]:
  """Splits a member name at the first dot of its base name into sample key and extension."""
  folder, slash, base = name.rpartition('/')
  key, _, extension = base.partition('.')
  return folder + slash + key, extension.lower()


@dataclasses.dataclass
class _Scan:
  """Scan of one shard: `rows` as in the index, with its own `members` as columns; `damage` is the reason or ''."""

  members: list[str]
  rows: np.ndarray
  left_out: dict[str, list[str]]  # reason -> names
  damage: str


def _scan(shard: storage.File) -> _Scan:
  begins: list[int] = []
  samples: list[dict[str, tuple[int, int]]] = []
  left_out: dict[str, list[str]] = {_NO_IMAGE: [], _NO_MEMBER: []}
  with_image: dict[str, bool] = {}
  damage, key, begin, places = '', '', 0, dict[str, tuple[int, int]]()

  def take() -> None:
    if not places:
      return
    found = any(map(is_image, places))
    if found:
      begins.append(begin)
      samples.append(places)
    else:
      left_out[_NO_IMAGE].append(f'{key}: {", ".join(places)}')
    if key in with_image and not (found and with_image[key]):
      raise UserError(
        f'webdataset: {shard.path}: the members of sample {key!r} are not adjacent, so its image would be '
        f'separated from its text; write the shard sorted by name (tar --sort=name)'
      )
    with_image[key] = found

  try:
    for member in tar.members(_reading_ahead(shard), shard.size):
      name, extension = _split(member.name)
      if not extension or name.endswith('/') or not name or _META.match(member.name):
        left_out[_NO_MEMBER].append(member.name)
        continue
      if name != key:
        take()
        key, begin, places = name, member.header, {}
      if extension in places:
        raise UserError(
          f'webdataset: {shard.path}: sample {key!r} has two members {extension!r}; each needs a name of its own'
        )
      places[extension] = (member.start - begin, member.size)
    take()
  except tar.TarDamaged as error:  # the current sample may be incomplete and is dropped
    damage = error.reason
  members = sorted({extension for places in samples for extension in places})
  rows = np.zeros(len(samples), _row(members))
  rows['begin'] = begins
  for column, extension in enumerate(members):
    rows['places'][:, column] = [places.get(extension, (0, 0)) for places in samples]
  return _Scan(members, rows, left_out, damage)


def _reading_ahead(shard: storage.File) -> Any:
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
  """Path of the index. Next to the shards its name depends only on theirs, so that the folder can be moved."""
  first = shards[0].path
  neighbor = None if storage.is_remote(first) else pathlib.Path(first).absolute().parent
  names = [shard.path for shard in shards]
  if folder is None and neighbor is not None and os.access(neighbor, os.W_OK):
    names = [os.path.relpath(name, neighbor) for name in names]
    place = neighbor
  else:
    place = pathlib.Path(folder).expanduser() if folder is not None else storage.cache_folder() / 'webdataset'
  return place / f'.fmcv-{hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]}.index'


def _write_index(file: pathlib.Path, shards: list[storage.File], scans: list[_Scan]) -> None:
  members = sorted({extension for scan in scans for extension in scan.members})
  if len(members) > _MOST_MEMBERS:
    raise UserError(
      f'webdataset: the members have {len(members)} extensions ({", ".join(members[:3])}, ...); a member is named '
      f'SAMPLE.EXTENSION, such as 000012.jpg'
    )
  header = {
    'format': _FORMAT,
    'shards': [[shard.size, shard.stamp, len(scan.rows)] for shard, scan in zip(shards, scans)],
    'members': members,
    'damage': {number: scan.damage for number, scan in enumerate(scans) if scan.damage},
    'counts': [
      sum(
        int((scan.rows['places'][:, scan.members.index(member), 0] > 0).sum())
        for scan in scans
        if member in scan.members
      )
      for member in members
    ],
    'left_out': [_joined(reason, scans) for reason in (_NO_IMAGE, _NO_MEMBER)],
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


def _joined(reason: str, scans: list[_Scan]) -> tuple[str, int, list[str]]:
  names = itertools.chain.from_iterable(scan.left_out[reason] for scan in scans)
  return reason, sum(len(scan.left_out[reason]) for scan in scans), list(itertools.islice(names, EXAMPLES))


def _open_index(file: pathlib.Path, shards: list[storage.File]) -> tuple[Index, dict[str, Any]] | None:
  """The index and its header; None if it does not exist, is damaged, or belongs to other shards."""
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
  left_out = tuple(LeftOut(reason, count, tuple(names)) for reason, count, names in header['left_out'] if count)
  samples_with = dict(zip(header['members'], header['counts']))
  paths = [shard.path for shard in shards]
  return Index(paths, ends, header['members'], str(file), offset, samples_with, left_out), header


def _report_damage(index: Index, header: dict[str, Any], on_truncated: str) -> None:
  """Logs damaged shards and skipped samples, or raises UserError."""
  for number, reason in header['damage'].items():
    path, count = index.shards[int(number)], header['shards'][int(number)][2]
    if on_truncated == 'error':
      more = f' ({len(header["damage"])} shards are damaged)' if len(header['damage']) > 1 else ''
      raise UserError(
        f"webdataset: {path}: {reason}; fetch it again, or set on_truncated='skip_tail' to use the {count} complete "
        f'samples{more}'
      )
    logger.warning('webdataset: %s: %s; using its first %d samples', path, reason, count)
  for left in index.left_out:
    if left.reason == _NO_IMAGE:
      logger.warning('webdataset: %d samples have no image and are skipped', left.count)
  if not index.ends[-1]:
    others = f'; it has {index.left_out[0]}; images are {", ".join(IMAGES[:6])}, ...' if index.left_out else ''
    raise UserError(
      f'webdataset: no sample with an image in {len(index.shards)} shards, the first {index.shards[0]!r}{others}'
    )
