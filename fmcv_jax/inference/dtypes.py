"""The dtype in which a trained model computes."""

import pathlib
from typing import get_args

from fmcv_jax.config import paths_of
from fmcv_jax.errors import UserError, did_you_mean
from fmcv_jax.models.common.layers import Dtype
from fmcv_jax.run import Run


def dtypes_of(workdir: str | pathlib.Path) -> list[str]:
  """Config paths of all `dtype` fields of the objective."""
  return paths_of(Run.reopen(workdir).config['objective'], 'dtype', 'objective')


def dtype_overrides(dtype: str, workdir: str) -> tuple[str, ...]:
  """The config overrides that set the computation dtype. Raises UserError where a model cannot compute in it."""
  known = get_args(Dtype)
  if dtype not in known:
    raise UserError(f'dtype: {dtype!r} is not one of {", ".join(map(repr, known))}; {did_you_mean(dtype, known)}')
  paths = dtypes_of(workdir)
  if not paths and dtype != 'float32':
    raise UserError(f'dtype: the network of {workdir} computes in float32 only, got {dtype!r}')
  return tuple(f'{path}={dtype}' for path in paths)
