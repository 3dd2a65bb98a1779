"""Checksums of a checkpoint's files: a flipped bit on a disk becomes an error, not a wrong model."""

import concurrent.futures
import hashlib
import json
from collections.abc import Iterator

import jax
from etils import epath

from fmcv_jax.errors import UserError
from fmcv_jax.parallel.distributed import any_process

FILE = 'checksums.json'
THREADS = 4

# orbax writes the time of the commit into these after everything else is in place.
_LATE = ('_CHECKPOINT_METADATA', 'commit_success.txt', FILE)


class Damaged(UserError):
  """Files of a checkpoint are not as they were written."""


def write(folder: epath.Path) -> None:
  """Keeps the size and SHA-256 of each file below `folder`; call it when all is written and nothing is committed."""
  files = {str(path.relative_to(folder)): path for path in _files(folder)}
  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    rows = pool.map(lambda path: [path.stat().length, _digest(path)], files.values())
    table = dict(zip(files, rows, strict=True))
  (folder / FILE).write_text(json.dumps(table, indent=0) + '\n')


def verify(folder: epath.Path, items: tuple[str, ...]) -> None:
  """Raises Damaged, in every process, if a file of one of the `items` is missing or not as it was written.

  The processes share the work; each of them must call this.
  """
  found = _first_damage(folder, items)
  if any_process(found is not None):
    raise Damaged(f'{folder}: damaged: {found or "another process says where"}')


def _first_damage(folder: epath.Path, items: tuple[str, ...]) -> str | None:
  try:
    table = json.loads((folder / FILE).read_text())
  except (OSError, ValueError) as error:
    return f'{FILE} cannot be read ({type(error).__name__})'
  names = sorted(name for name in table if name.split('/')[0] in items)
  mine = names[jax.process_index() :: jax.process_count()]
  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    return next(filter(None, pool.map(lambda name: _damage(folder / name, name, *table[name]), mine)), None)


def _damage(path: epath.Path, name: str, size: int, digest: str) -> str | None:
  if not path.exists():
    return f'{name} is missing'
  if (length := path.stat().length) != size:
    return f'{name} has {length} bytes of {size}'
  return None if _digest(path) == digest else f'{name} has changed since it was written'


def _digest(path: epath.Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _files(folder: epath.Path) -> Iterator[epath.Path]:
  for path in sorted(folder.iterdir()):
    if path.is_dir():
      yield from _files(path)
    elif path.name not in _LATE:
      yield path
