"""Initialization from other runs: pretrained parameters, frozen teachers, image and text encoders."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fmcv_jax.errors import UserError, did_you_mean
from fmcv_jax.models.common.positions import resize_grid
from fmcv_jax.parallel.rules import path_of
from fmcv_jax.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class InitFrom:
  """Source of initial values: `part` of the trained state in `workdir`, such as 'params' or 'params/image'.

  'whole' is the full parameter tree of a run that trained only a part of it (objective 'finetune').

  skip     regular expressions over the paths below `part`; matching parameters keep their initialization
  resize   likewise, for positional tables to resize by bicubic interpolation, as for another image_size:
           '(.*/)?position' of a ViT, '(.*/)?relative' of a Swin with another window; and for '(.*/)?patch/kernel' with
           another patch size
  widen    likewise, for kernels with more input channels in this run, such as 'encoder/conv_in/kernel' of an inpainting
           UNet: weights of the additional channels are zero, so the output does not change
  """

  workdir: str
  part: str = 'params'
  skip: tuple[str, ...] = ()
  resize: tuple[str, ...] = ()
  widen: tuple[str, ...] = ()


def load_partial_state(state: TrainState, sources: Mapping[str, InitFrom], trained: Callable[[str], Any]) -> TrainState:
  """The state with the subtree at each key of `sources` replaced by trained values, placed as it was.

  trained(workdir) -> {'params': ..., 'extra': ...}. The EMA restarts from the new parameters. Raises UserError for a
  path that does not exist and for a parameter that is missing or of another shape.
  """
  trained = functools.cache(trained)
  flat, treedef = jax.tree_util.tree_flatten_with_path({'params': state.params, 'extra': state.extra})
  values = {path_of(key_path): leaf for key_path, leaf in flat}
  for target, source in sources.items():
    field = f'config.init_from.{target}'
    given = _below(source.part, _leaves(trained(source.workdir)), f'{field}.part: {source.workdir}')
    for path, own in _below(target, values, f'{field}: the state of this run').items():
      if any(re.fullmatch(pattern, path) for pattern in source.skip):
        continue
      value = given.get(path)
      if value is not None and any(re.fullmatch(pattern, path) for pattern in source.resize):
        resize = resized_patches if f'/{path}'.endswith('/patch/kernel') else resized
        value = resize(value, own.shape[-2])
      if value is not None and any(re.fullmatch(pattern, path) for pattern in source.widen):
        value = pad_input_channels(value, own.shape)
      if value is None or value.shape != own.shape:
        found = given[path].shape if path in given else 'missing'
        raise UserError(
          f'{field}: {path} is {found} in {source.workdir} and {own.shape} here; '
          f'add a pattern for it to {field}.skip to keep its initialization, to {field}.widen for a kernel with more '
          f'input channels, or to {field}.resize for a positional table'
        )
      values[f'{target}/{path}' if path else target] = jax.device_put(value, own.sharding)
  tree = jax.tree_util.tree_unflatten(treedef, values.values())
  average = None if state.ema is None else jax.tree.map(lambda x: x.copy(), tree['params'])
  return state.replace(params=tree['params'], extra=tree['extra'], ema=average)


def resized(table: jax.Array, rows: int) -> jax.Array:
  """Resizes a positional table [..., old rows, D] to another number of rows; rows of special tokens are unchanged.

  Both numbers must be a square plus up to two leading special tokens; otherwise the table is returned unchanged.
  """
  old = table.shape[-2]
  for special in range(3):
    sides = math.isqrt(max(old - special, 0)), math.isqrt(max(rows - special, 0))
    if [side**2 + special for side in sides] == [old, rows]:
      break
  else:
    return table
  flat = table.reshape(-1, old, table.shape[-1])
  grids = jax.vmap(lambda grid: resize_grid(grid, (sides[0],) * 2, (sides[1],) * 2))(flat[:, special:])
  return jnp.concatenate([flat[:, :special], grids], axis=1).reshape(*table.shape[:-2], rows, -1)


def resized_patches(kernel: jax.Array, rows: int, channels: int = 3) -> jax.Array:
  """Resizes a kernel of patches [old * old * channels, D] to [rows, D] (FlexiViT, Beyer et al. 2023, section 3.4).

  For a larger patch, its products with patches that are resized bicubically are those of the old kernel. A kernel that
  is not of square patches on either side is returned unchanged.
  """
  old, new = (math.isqrt(count // channels) for count in (kernel.shape[-2], rows))
  if kernel.ndim != 2 or (old**2 * channels, new**2 * channels) != (kernel.shape[0], rows):
    return kernel
  resize = jax.image.resize(jnp.eye(old), (new, old), 'cubic')
  inverse = jnp.linalg.pinv(resize.T)
  grid = kernel.reshape(old, old, channels, -1)
  return jnp.einsum('ia,jb,abcd->ijcd', inverse, inverse, grid, precision='highest').reshape(rows, -1)


def pad_input_channels(kernel: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """A kernel [..., inputs, outputs] padded with zeros along inputs; unchanged if that does not give this shape."""
  more = shape[-2] - kernel.shape[-2] if kernel.ndim == len(shape) > 1 else 0
  if more <= 0:
    return kernel
  return jnp.pad(kernel, [(0, 0)] * (kernel.ndim - 2) + [(0, more), (0, 0)])


def _leaves(tree: Any) -> dict[str, jax.Array]:
  return {path_of(key_path): leaf for key_path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _below(prefix: str, leaves: Mapping[str, jax.Array], whose: str) -> dict[str, jax.Array]:
  """Leaves under a path, by their relative paths ('' for the path itself)."""
  found = {
    path[len(prefix) :].lstrip('/'): leaf for path, leaf in leaves.items() if (path + '/').startswith(prefix + '/')
  }
  if not found:
    steps = sorted({'/'.join(path.split('/')[:depth]) for path in leaves for depth in (1, 2, 3)})
    raise UserError(f'{whose} has nothing at {prefix!r}; {did_you_mean(prefix, steps)}')
  return found
