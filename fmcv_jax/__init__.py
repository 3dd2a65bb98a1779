"""fmcv_jax: vision foundation models pretrained in JAX, one sharded train step from a laptop to a pod."""

from typing import Any

from fmcv_jax.version import __version__ as __version__


def load(workdir: str, **options: Any) -> Any:
  """The model of a workdir of `fmcv train` or `fmcv import`, ready for use: see `fmcv_jax.inference.model.Model`."""
  from fmcv_jax.inference.model import Model

  return Model(workdir, **options)
