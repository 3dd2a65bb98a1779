"""fmcv_jax: vision foundation models pretrained in JAX, one sharded train step from a laptop to a pod."""

from typing import Any

__version__ = '0.1.0'


def load(workdir: str, **options: Any) -> Any:
  """The model of a workdir of `fmcv train` or `fmcv import`, ready for use: see `fmcv_jax.apps.model.Model`."""
  from fmcv_jax.apps.model import Model

  return Model(workdir, **options)
