"""fmcv_jax: vision foundation models pretrained in JAX, one sharded train step from a laptop to a pod."""

import os
from typing import TYPE_CHECKING

from fmcv_jax.version import __version__ as __version__

if TYPE_CHECKING:
  from fmcv_jax.inference.model import Model


def load(
  workdir: str | os.PathLike[str], *, step: int | None = None, dtype: str | None = None, batch: int = 64
) -> 'Model':
  """The model of a workdir of `fmcv train` or `fmcv import`, or the one that ships with this package: load('demo').

  See `fmcv_jax.inference.model.Model`.
  """
  from fmcv_jax.inference.model import Model

  return Model(workdir, step=step, dtype=dtype, batch=batch)
