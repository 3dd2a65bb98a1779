"""Errors of the library in the words of the command line."""

import contextlib
import dataclasses
from collections.abc import Iterator

from fmcv_jax.diffusion.options import SamplingOptions
from fmcv_jax.errors import UserError

# Arguments of sampling and of its image files -> options of `fmcv generate`.
_OPTIONS = {
  **{field.name: f'--{field.name.replace("_", "-")}' for field in dataclasses.fields(SamplingOptions)},
  **{name: f'--{name}' for name in ('batch', 'control', 'interpolate', 'mask')},
  'margin': '--expand',
}


@contextlib.contextmanager
def command_line_errors() -> Iterator[None]:
  """A UserError about a sampling argument, such as 'steps: ...', names it as the command line does: '--steps: ...'."""
  try:
    yield
  except UserError as error:
    name, colon, rest = str(error).partition(':')
    if not colon or name not in _OPTIONS:
      raise
    raise UserError(f'{_OPTIONS[name]}:{rest}') from error
