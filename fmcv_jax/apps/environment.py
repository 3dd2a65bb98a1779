"""Process-wide settings of the command line: the compilation cache."""

import os


def keep_compiled() -> None:
  """Enables JAX's persistent compilation cache, for programs that take a second or more to compile."""
  import jax

  from fmcv_jax.data.storage import cache_folder

  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:  # which may be a gs:// folder
    jax.config.update('jax_compilation_cache_dir', str(cache_folder() / 'compiled'))
