"""fmcv_jax: vision foundation models pretrained in JAX, one sharded train step from a laptop to a pod.

    model = fmcv_jax.load('runs/clip')             # a workdir of `fmcv train` or `fmcv import`
    model.classify('photo.jpg', ['cat', 'dog'])    # float32 [2]

    generator = fmcv_jax.ImageGenerator('runs/text_to_image')
    generator.generate(['a red heart'], fmcv_jax.SamplingOptions(steps=50))  # uint8 [1, H, W, 3]

The names of `__all__` are the public API. They are imported when they are first used: `import fmcv_jax` loads neither
JAX nor any data library.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any, Literal

from fmcv_jax.version import __version__

if TYPE_CHECKING:
  from fmcv_jax.diffusion.options import SamplingOptions
  from fmcv_jax.errors import UserError
  from fmcv_jax.inference.adapters import Adapters
  from fmcv_jax.inference.generator import ImageGenerator
  from fmcv_jax.inference.model import Model

__all__ = ['ImageGenerator', 'Model', 'SamplingOptions', 'UserError', '__version__', 'load']

_MODULES = {
  'ImageGenerator': 'fmcv_jax.inference.generator',
  'Model': 'fmcv_jax.inference.model',
  'SamplingOptions': 'fmcv_jax.diffusion.options',
  'UserError': 'fmcv_jax.errors',
}


def load(
  workdir: str | os.PathLike[str],
  *,
  step: int | None = None,
  dtype: str | None = None,
  batch: int = 64,
  unreadable: Literal['error', 'nan'] = 'error',
  lora: 'Adapters' = (),
) -> 'Model':
  """The model of a workdir of `fmcv train` or `fmcv import`, or the one that ships with this package: load('demo').

  See `Model` for the arguments; UserError for a folder without a run or a checkpoint.
  """
  from fmcv_jax.inference.model import Model

  return Model(workdir, step=step, dtype=dtype, batch=batch, unreadable=unreadable, lora=lora)


def __getattr__(name: str) -> Any:
  if name not in _MODULES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
  return sorted({*globals(), *_MODULES})
