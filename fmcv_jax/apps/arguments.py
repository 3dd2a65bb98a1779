"""Errors of the library in the words of the command line."""

import contextlib
import dataclasses
from collections.abc import Iterator

from fmcv_jax.decoding.options import DecodingOptions
from fmcv_jax.diffusion.options import SamplingOptions
from fmcv_jax.errors import UserError

# Arguments of sampling, decoding and their files -> options of `fmcv generate`, `fmcv caption` and `fmcv ask`.
_OPTIONS = {
  **{
    field.name: f'--{field.name.replace("_", "-")}'
    for options in (SamplingOptions, DecodingOptions)
    for field in dataclasses.fields(options)
  },
  **{name: f'--{name}' for name in ('answers', 'batch', 'control', 'interpolate', 'mask', 'prompt')},
  'margin': '--expand',
}


@contextlib.contextmanager
def command_line_errors() -> Iterator[None]:
  """A UserError about an argument, such as 'steps: ...', names it as the command line does: '--steps: ...'."""
  try:
    yield
  except UserError as error:
    name, colon, rest = str(error).partition(':')
    if not colon or name not in _OPTIONS:
      raise
    raise UserError(f'{_OPTIONS[name]}:{rest}') from error
