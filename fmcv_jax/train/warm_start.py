"""How a run begins with what others have learnt: pretrained parameters, frozen teachers, encoders and text towers."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax

from fmcv_jax.errors import UserError, nearest
from fmcv_jax.parallel.rules import path_of
from fmcv_jax.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Part:
  """Where values come from: `part` of what the run in `workdir` has learnt, such as 'params' or 'params/image'.

  skip: regular expressions over paths below it; what matches one stays as it was born.
  """

  workdir: str
  part: str = 'params'
  skip: tuple[str, ...] = ()


def begin_with(state: TrainState, sources: Mapping[str, Part], learnt: Callable[[str], Any]) -> TrainState:
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
      if path not in given or given[path].shape != own.shape:
        found = given[path].shape if path in given else 'missing'
        raise UserError(
          f'{field}: {path} is {found} in {source.workdir} and {own.shape} here; '
          f'add a pattern for it to {field}.skip to train it anew'
        )
      values[f'{target}/{path}' if path else target] = jax.device_put(given[path], own.sharding)
  tree = jax.tree_util.tree_unflatten(treedef, values.values())
  average = None if state.ema is None else jax.tree.map(lambda x: x.copy(), tree['params'])
  return state.replace(params=tree['params'], extra=tree['extra'], ema=average)


def _leaves(tree: Any) -> dict[str, jax.Array]:
  return {path_of(key_path): leaf for key_path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _below(prefix: str, leaves: Mapping[str, jax.Array], whose: str) -> dict[str, jax.Array]:
  """The leaves under a path, by the rest of their paths ('' for the path itself)."""
  found = {
    path[len(prefix) :].lstrip('/'): leaf for path, leaf in leaves.items() if (path + '/').startswith(prefix + '/')
  }
  if not found:
    steps = sorted({'/'.join(path.split('/')[:depth]) for path in leaves for depth in (1, 2, 3)})
    raise UserError(f'{whose} has nothing at {prefix!r}; {nearest(prefix, steps)}')
  return found
