"""Low-rank matrices of ours as adapters of PEFT and of kohya's scripts."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fmcv_jax.errors import UserError
from fmcv_jax.pretrained.layout import Layout, Row, Shape, arrays
from fmcv_jax.pretrained.lora.adapter_file import PEFT


class LowRank(NamedTuple):
  """The difference of a weight of theirs, scale * up @ down: down [r, in, ...], up [out, r, ...]."""

  down: np.ndarray
  up: np.ndarray

  @property
  def rank(self) -> int:
    """The inner dimension."""
    return self.down.shape[0]


def low_rank(
  layout: Layout, shapes: Mapping[str, Shape], added: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> dict[str, LowRank]:
  """Adapters by the name of their layer in a layout.

  shapes  of all our parameters by path
  added   path of a kernel [..., in, out] -> its matrices [..., in, r] and [..., r, out]

  Kernels that a layout keeps in one matrix, as queries, keys and values may be, give one adapter of the sum of their
  ranks. UserError for a kernel that is not a linear layer or convolution there.
  """
  found: dict[str, LowRank] = {}
  for name, array in arrays(layout, shapes).items():
    parts = [(row, added.get(row.ours)) for row in array.rows]
    if not any(pair is not None for _, pair in parts):
      continue
    downs, ups, begin = [], [], 0
    for row, pair in parts:
      end = begin + shapes[row.ours][-1]
      if pair is not None:
        down, up = (x if array.layer is None else x[array.layer] for x in pair)
        downs.append(_down(row, down, name))
        above = np.zeros((array.shape[0], up.shape[0]), np.float32)
        above[begin:end] = up.T
        ups.append(above)
      begin = end
    down, up = np.concatenate(downs), np.concatenate(ups, axis=1)
    found[name.removesuffix('.weight')] = LowRank(down, up.reshape(*up.shape, *(1,) * (down.ndim - 2)))
  return found


def _down(row: Row, down: np.ndarray, name: str) -> np.ndarray:
  """[in, r] of ours as the layer of theirs that has r outputs."""
  theirs = row.transform.write(down)
  if not name.endswith('.weight') or theirs.ndim not in (2, 4) or theirs.shape[0] != down.shape[-1]:
    raise UserError(f'{row.ours}: {name} is not a linear layer or convolution, which these formats adapt')
  return np.ascontiguousarray(theirs, np.float32)


def peft(
  adapters: Mapping[str, LowRank], scale: float, trained: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """The arrays and the adapter_config.json of a folder of PEFT.

  trained  weights of layers that are trained as a whole, by their names: PEFT's modules_to_save
  """
  tensors = {f'{PEFT}{name}': x for name, x in trained.items()}
  for name, adapter in adapters.items():
    tensors |= {f'{PEFT}{name}.lora_A.weight': adapter.down, f'{PEFT}{name}.lora_B.weight': adapter.up}
  ranks = {name: adapter.rank for name, adapter in adapters.items()}
  usual = max(ranks.values(), key=list(ranks.values()).count)
  others = {name: rank for name, rank in ranks.items() if rank != usual}
  return tensors, {
    'peft_type': 'LORA',
    'task_type': None,
    'base_model_name_or_path': None,
    'inference_mode': True,
    'r': usual,
    'lora_alpha': scale * usual,
    'rank_pattern': others,
    'alpha_pattern': {name: scale * rank for name, rank in others.items()},
    'lora_dropout': 0.0,
    'bias': 'none',
    'fan_in_fan_out': False,
    'init_lora_weights': True,
    'target_modules': sorted(adapters),
    'modules_to_save': sorted({name.rpartition('.')[0] for name in trained}) or None,
    'use_rslora': False,
    'use_dora': False,
  }


def kohya(adapters: Mapping[str, LowRank], scale: float) -> dict[str, np.ndarray]:
  """The arrays of a file of kohya's scripts, of a UNet ('unet.') and a text tower ('text_encoder.')."""
  tensors: dict[str, np.ndarray] = {}
  for name, adapter in adapters.items():
    network, _, layer = name.partition('.')
    start = {'unet': 'lora_unet_', 'text_encoder': 'lora_te_'}[network] + layer.replace('.', '_')
    tensors |= {
      f'{start}.lora_down.weight': adapter.down,
      f'{start}.lora_up.weight': adapter.up,
      f'{start}.alpha': np.array(scale * adapter.rank, np.float32),
    }
  return tensors
