"""Access to files on the local machine and at URLs of fsspec (gs://, s3://, az://, hf://, https://)."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import functools
import glob
import hashlib
import io
import os
import pathlib
import re
import threading
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO, TypeVar

import fsspec

from fmcv_jax.errors import UserError

_OPEN_FILES = 128  # per reader
_THREADS = 16
_SYSTEM = ('__MACOSX', '@eaDir')
_T = TypeVar('_T')


@dataclasses.dataclass(frozen=True)
class File:
  """A file and its `stamp`, which changes with it: modification time in ns, or the version tag of a remote store."""

  path: str
  size: int
  stamp: str = ''


def is_remote(path: str) -> bool:
  """True for a URL such as gs://bucket/folder; False for a local path."""
  return '://' in path


def find(path: str, suffix: str, what: str, below: bool = False) -> list[File]:
  """The files at `path`, sorted: one file, the matches of a pattern (*, ?, [a-z], {00..99}), or the files of a folder
  that end in `suffix` (case-insensitive).

  `below` includes subfolders, such as year=2024/part.parquet. Files and folders whose name starts with '.' or '_' are
  ignored, as by Arrow and Spark. Raises UserError, with the prefix `what`, if nothing is found or if a file of {..} is
  missing.
  """
  path = path if is_remote(path) else os.path.expanduser(path)
  try:
    if re.search(r'\{\d+\.\.\d+\}', path):
      found = in_threads(_file, _expanded(path))
    else:
      inside = _in_folder(path, suffix, below)
      found = inside if inside is not None else _found_remote(path) if is_remote(path) else _found_local(path)
  except FileNotFoundError as error:
    raise UserError(f'{what}: no file {error.args[-1] if error.filename is None else error.filename!r}') from error
  if not found:
    raise UserError(
      f'{what}: no {suffix} at {path!r} (relative to {os.getcwd()}{_instead(path)}); give a folder, a file or a pattern'
    )
  return found


def others(path: str, read: Iterable[str]) -> list[str]:
  """Relative paths of the files below the folder `path` that are not in `read`; empty for a pattern or a file."""
  path = path if is_remote(path) else os.path.expanduser(path)
  taken = {file.removeprefix(path.rstrip('/') + '/') for file in read}
  return [name for name in files_below(path) or () if name not in taken]


def _instead(path: str) -> str:
  """Counts of the files in a folder by extension, for the message about a missing file."""
  counts = collections.Counter(os.path.splitext(name)[1].lower() for name in files_below(path) or ())
  held = ', '.join(f'{count} {extension or "without extension"}' for extension, count in counts.most_common(3))
  return f'; it contains {held}' if held else ''


def in_threads(function: Callable[[Any], _T], items: Iterable[Any]) -> list[_T]:
  """[function(item) for item in items], in threads: for requests that wait for a network or a disk."""
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    return list(pool.map(function, items))


def _expanded(path: str) -> list[str]:
  range_ = re.search(r'\{(\d+)\.\.(\d+)\}', path)
  if not range_:
    return [path]
  first, last = range_[1], range_[2]
  numbers = [f'{number:0{len(first)}d}' for number in range(int(first), int(last) + 1)]
  return [whole for number in numbers for whole in _expanded(path[: range_.start()] + number + path[range_.end() :])]


def _file(path: str) -> File:
  if is_remote(path):
    fs, inner = filesystem(path)
    return _remote_file(fs, fs.info(inner))
  stat = os.stat(path)
  return File(path, stat.st_size, str(stat.st_mtime_ns))


def _in_folder(path: str, suffix: str, below: bool) -> list[File] | None:
  """None where `path` is not a folder."""
  names = files_below(path, deep=below)
  if names is None:
    return None
  names = [name for name in names if name.lower().endswith(suffix) and not any(p[:1] == '_' for p in name.split('/'))]
  if not is_remote(path):
    return in_threads(_file, [join(path, name) for name in names])
  fs, inner = filesystem(path)
  infos = fs.find(inner, detail=True, **({} if below else {'maxdepth': 1}))  # all at once
  return [_remote_file(fs, infos[f'{inner.rstrip("/")}/{name}']) for name in names]


def _found_local(path: str) -> list[File]:
  return [_file(name) for name in sorted(glob.glob(path)) if os.path.isfile(name)]


def _found_remote(path: str) -> list[File]:
  fs, inner = filesystem(path)
  if glob.has_magic(inner):
    infos = list(fs.glob(inner, detail=True).values())
  else:
    infos = [fs.info(inner)] if fs.exists(inner) else []
  found = [_remote_file(fs, info) for info in infos if info['type'] == 'file']
  return sorted(found, key=lambda file: file.path)


def _remote_file(fs: Any, info: dict[str, Any]) -> File:
  stamp = next((str(info[key]) for key in ('etag', 'ETag', 'md5Hash', 'mtime', 'LastModified') if info.get(key)), '')
  return File(fs.unstrip_protocol(info['name']), int(info['size']), stamp)


@functools.cache
def _filesystem(protocol: str) -> Any:
  try:
    return fsspec.filesystem(protocol)
  except (ImportError, ValueError) as error:  # no package for it, or no such protocol
    raise UserError(f'{protocol}:// cannot be read: {" ".join(str(error).split())}') from error


def filesystem(path: str) -> tuple[Any, str]:
  """The fsspec file system of a URL, and the path inside it."""
  fs = _filesystem(path.split('://')[0])
  return fs, fs._strip_protocol(path)


def open_file(path: str) -> BinaryIO:
  """Opens a file for sequential or random reads."""
  if not is_remote(path):
    return open(path, 'rb')
  fs, inner = filesystem(path)
  return fs.open(inner, 'rb')


def join(folder: str, path: str) -> str:
  """Joins `path` to `folder`, unless it is absolute or a URL."""
  if is_remote(path) or not is_remote(folder):
    return path if is_remote(path) else os.path.join(folder, path)
  return f'{folder.rstrip("/")}/{path}'


def files_below(folder: str, deep: bool = True) -> list[str] | None:
  """Relative paths of the files in a folder and, if `deep`, in its subfolders, '/'-separated and sorted.

  Skips hidden files and folders, and those that systems create (`._x.jpg` and __MACOSX of macOS archives, @eaDir of
  network drives). Returns None if the folder does not exist.
  """
  if is_remote(folder):
    fs, inner = filesystem(folder)
    if not fs.isdir(inner):
      return None
    start = len(inner.rstrip('/')) + 1
    found = [path[start:] for path in fs.find(inner, **({} if deep else {'maxdepth': 1}))]
  elif not os.path.isdir(folder):
    return None
  else:
    found = []
    for where, folders, files in os.walk(folder, followlinks=True):
      folders[:] = [name for name in folders if deep and _is_shown(name)]
      below = os.path.relpath(where, folder).replace(os.sep, '/')
      found += files if below == '.' else [f'{below}/{name}' for name in files]
  return sorted(path for path in found if all(_is_shown(part) for part in path.split('/')))


def folders_in(folder: str) -> list[str]:
  """The names of a folder's subfolders, sorted, without those that `files_below` skips."""
  if is_remote(folder):
    fs, inner = filesystem(folder)
    names = [
      info['name'].rstrip('/').rsplit('/', 1)[1] for info in fs.ls(inner, detail=True) if info['type'] == 'directory'
    ]
  else:
    names = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
  return sorted(name for name in names if _is_shown(name))


def _is_shown(name: str) -> bool:
  return not name.startswith('.') and name not in _SYSTEM


def local(file: File) -> str:
  """Local path of the file, or of its copy in the cache; only one process downloads it."""
  if not is_remote(file.path):
    return file.path
  name = hashlib.sha256(f'{file.path} {file.size} {file.stamp}'.encode()).hexdigest()[:24]
  copy = cache_folder() / 'files' / name / file.path.rsplit('/', 1)[1]
  copy.parent.mkdir(parents=True, exist_ok=True)
  with open(copy.parent / 'lock', 'w') as lock:
    with contextlib.suppress(OSError):  # a file system without locks
      fcntl.flock(lock, fcntl.LOCK_EX)
    if not copy.exists():
      fs, inner = filesystem(file.path)
      partial = copy.with_name(f'.{copy.name}.{os.getpid()}.partial')
      fs.get_file(inner, str(partial))
      partial.rename(copy)
  return str(copy)


class Ranges:
  """Thread-safe reads of byte ranges; keeps local files open. Picklable."""

  def __init__(self) -> None:
    self._open: collections.OrderedDict[str, io.FileIO] = collections.OrderedDict()
    self._lock = threading.Lock()

  def read(self, path: str, start: int, size: int) -> bytes:
    """Bytes start to start + size; fewer at the end of the file."""
    if is_remote(path):
      fs, inner = filesystem(path)
      return fs.cat_file(inner, start=start, end=start + size)
    return os.pread(self._file(path).fileno(), size, start)

  def _file(self, path: str) -> io.FileIO:
    with self._lock:
      file = self._open.get(path) or io.FileIO(path)
      self._open[path] = file
      self._open.move_to_end(path)
      if len(self._open) > _OPEN_FILES:
        self._open.popitem(last=False)  # closed once no thread reads from it
    return file

  def __getstate__(self) -> dict[str, Any]:
    return {}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__init__()  # type: ignore[misc]


def cache_folder() -> pathlib.Path:
  """The cache folder: $FMCV_CACHE, or fmcv_jax in the user's cache folder."""
  if given := os.environ.get('FMCV_CACHE'):
    return pathlib.Path(given).expanduser()
  return pathlib.Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'fmcv_jax'
