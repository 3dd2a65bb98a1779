"""How a run begins with what others have learnt: pretrained parameters, frozen teachers, encoders and text towers."""

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
  """Where values come from: `part` of what the run in `workdir` has learnt, such as 'params' or 'params/image'.

  'whole' is all of a network of which the run trained but a part (objective 'finetune').

  skip     regular expressions over paths below it; what matches one stays as it was born
  resize   the same; tables of positions that are brought to another number of them by bicubic interpolation, as for
           another image_size: '(.*/)?position' of a ViT, '(.*/)?relative' of a Swin with another window
  widen    the same; kernels that read more channels here, such as 'encoder/conv_in/kernel' of a UNet that is told what
           is beside x: what reads the further ones begins at zero, and changes nothing
  """

  workdir: str
  part: str = 'params'
  skip: tuple[str, ...] = ()
  resize: tuple[str, ...] = ()
  widen: tuple[str, ...] = ()


def load_partial_state(state: TrainState, sources: Mapping[str, InitFrom], learnt: Callable[[str], Any]) -> TrainState:
  """The state with the subtree at each key of `sources` replaced by trained values, placed as it was.

  learnt(workdir) -> {'params': ..., 'extra': ...}. The moving average begins anew from the new parameters. Raises
  UserError for a path that is not there and for a parameter that is missing or of another shape.
  """
  learnt = functools.cache(learnt)
  flat, treedef = jax.tree_util.tree_flatten_with_path({'params': state.params, 'extra': state.extra})
  values = {path_of(key_path): leaf for key_path, leaf in flat}
  for target, source in sources.items():
    field = f'config.init_from.{target}'
    given = _below(source.part, _leaves(learnt(source.workdir)), f'{field}.part: {source.workdir}')
    for path, own in _below(target, values, f'{field}: the state of this run').items():
      if any(re.fullmatch(pattern, path) for pattern in source.skip):
        continue
      value = given.get(path)
      if value is not None and any(re.fullmatch(pattern, path) for pattern in source.resize):
        value = resized(value, own.shape[-2])
      if value is not None and any(re.fullmatch(pattern, path) for pattern in source.widen):
        value = pad_input_channels(value, own.shape)
      if value is None or value.shape != own.shape:
        found = given[path].shape if path in given else 'missing'
        raise UserError(
          f'{field}: {path} is {found} in {source.workdir} and {own.shape} here; '
          f'add a pattern for it to {field}.skip to train it anew, to {field}.widen for a kernel that reads more, '
          f'or to {field}.resize for a table of positions'
        )
      values[f'{target}/{path}' if path else target] = jax.device_put(value, own.sharding)
  tree = jax.tree_util.tree_unflatten(treedef, values.values())
  average = None if state.ema is None else jax.tree.map(lambda x: x.copy(), tree['params'])
  return state.replace(params=tree['params'], extra=tree['extra'], ema=average)


def resized(table: jax.Array, rows: int) -> jax.Array:
  """A table of positions [..., old rows, D] with another number of rows, those of special tokens left as they are.

  Both numbers are a square and up to two rows of special tokens before it; otherwise the table is returned unchanged.
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


def pad_input_channels(kernel: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """A kernel [..., inputs, outputs] with zeros for further inputs; unchanged where that does not give this shape."""
  more = shape[-2] - kernel.shape[-2] if kernel.ndim == len(shape) > 1 else 0
  if more <= 0:
    return kernel
  return jnp.pad(kernel, [(0, 0)] * (kernel.ndim - 2) + [(0, more), (0, 0)])


def _leaves(tree: Any) -> dict[str, jax.Array]:
  return {path_of(key_path): leaf for key_path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _below(prefix: str, leaves: Mapping[str, jax.Array], whose: str) -> dict[str, jax.Array]:
  """The leaves under a path, by the rest of their paths ('' for the path itself)."""
  found = {
    path[len(prefix) :].lstrip('/'): leaf for path, leaf in leaves.items() if (path + '/').startswith(prefix + '/')
  }
  if not found:
    steps = sorted({'/'.join(path.split('/')[:depth]) for path in leaves for depth in (1, 2, 3)})
    raise UserError(f'{whose} has nothing at {prefix!r}; {did_you_mean(prefix, steps)}')
  return found
