"""Learning rates that decay by layer (Clark et al. 2020; Bao et al. 2022)."""

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from fmcv_jax.errors import UserError
from fmcv_jax.parallel.rules import path_of

# What a tower does before its first block.
STEM = re.compile(r'(patch|patch_norm|pre_norm|tokens|position|registers|\w+_token)(/.*)?')


def layerwise_lr_scales(params: Any, decay: float) -> Any:
  """decay^(L + 1 - l) for each parameter of layer l of L, shaped to multiply it (BEiT, Bao et al. 2022, appendix).

  A layer is one entry of what is stacked below `blocks`, counted from 1 (a pair of blocks of a Swin, whose stages
  follow one another); what stands before the blocks (patches, tokens, positions) is layer 0, what stands behind them
  (last norm, pooling, heads) and what belongs to no tower L + 1, at the full rate.
  """
  flat = {path_of(key_path): x for key_path, x in jax.tree_util.tree_flatten_with_path(params)[0]}
  stacks: dict[str, dict[int, int]] = {}  # tower -> stage -> its layers
  for path, x in flat.items():
    place = _BLOCKS.fullmatch(path)
    if place:
      stacks.setdefault(place['tower'], {})[int(place['stage'] or 0)] = x.shape[0]
  if decay != 1 and not stacks:
    raise UserError('config.optimizer.layer_decay: this network has no stack of blocks whose layers could be counted')

  def rate(path: str, x: Any) -> np.ndarray:
    towers = [tower for tower in stacks if path.startswith(tower)]
    if not towers:
      return np.ones(())
    tower = max(towers, key=len)
    stages, rest = stacks[tower], path[len(tower) :]
    total = sum(stages.values())
    stage = int(match[1]) if (match := re.match(r'stage(\d+)/', rest)) else 0
    before = sum(layers for index, layers in stages.items() if index < stage)
    if _BLOCKS.fullmatch(path):
      layer = np.arange(before + 1, before + 1 + x.shape[0]).reshape(-1, *(1,) * (x.ndim - 1))
    elif stage:  # the merge before a stage's blocks
      layer = np.array(before + 1)
    else:
      layer = np.array(0 if STEM.fullmatch(rest) else total + 1)
    return np.asarray(decay ** (total + 1.0 - layer), np.float32)

  return map_by_path(rate, params)


_BLOCKS = re.compile(r'(?P<tower>(.*?/)??)(stage(?P<stage>\d+)/)?blocks/.*')


def map_by_path(fn: Callable[[str, Any], Any], tree: Any) -> Any:
  """Maps fn('a/b/c', leaf) over a tree."""
  return jax.tree_util.tree_map_with_path(lambda key_path, x: fn(path_of(key_path), x), tree)
