"""One run at a time in a workdir."""

import contextlib
import fcntl
import os
from collections.abc import Iterator

from etils import epath

from fmcv_jax.errors import UserError
from fmcv_jax.train.storage import local

FILE = '.lock'


@contextlib.contextmanager
def held(workdir: epath.Path) -> Iterator[None]:
  """Holds a local workdir while it is open; UserError where another process does.

  The kernel's lock goes with the process, however that ends, so there is never a stale one to remove. Object stores
  such as gs:// have no locks: nothing is held there.
  """
  here = local(workdir)
  if here is None:
    yield
    return
  file = os.open(here / FILE, os.O_RDWR | os.O_CREAT, 0o644)
  try:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      owner = os.read(file, 20).decode(errors='replace').strip() or 'unknown'
      raise UserError(
        f'{workdir}: another run (process {owner}) is training here; wait for it, or use a new --workdir'
      ) from error
    except OSError:  # a file system without locks
      pass
    os.ftruncate(file, 0)
    os.write(file, f'{os.getpid()}\n'.encode())
    yield
  finally:
    os.close(file)
