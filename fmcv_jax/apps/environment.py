"""Process-wide settings of the command line: the compilation cache, and messages that are silenced at shutdown."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


def keep_compiled() -> None:
  """Enables JAX's persistent compilation cache, for programs that take a second or more to compile."""
  import jax

  from fmcv_jax.data.storage import cache_folder

  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:  # which may be a gs:// folder
    jax.config.update('jax_compilation_cache_dir', str(cache_folder() / 'compiled'))


@contextlib.contextmanager
def suppress_tensorstore_shutdown_errors() -> Iterator[None]:
  """Silences 'Event loop is closed', which every tensorstore thread reports after a failed write."""
  usual = sys.unraisablehook

  def hook(unraisable: Any) -> None:
    if unraisable.exc_type is not RuntimeError or str(unraisable.exc_value) != 'Event loop is closed':
      usual(unraisable)

  sys.unraisablehook = hook
  try:
    yield
  finally:
    sys.unraisablehook = usual
