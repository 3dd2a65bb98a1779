"""Vision transformers as timm, the original releases of DeiT, DINO, DINOv2 and MAE, and transformers name them."""

import math
from collections.abc import Mapping
from typing import Any

from fmcv_jax.errors import UserError
from fmcv_jax.models.vit import SIZES
from fmcv_jax.pretrained.layout import BATCHED, LINEAR, Layout, Row, Shape, convolution, fused, linear, norm

HEAD_WIDTH = 64  # of nearly all that is published; a size with others is named in models/vit.py


def _mlp(theirs: str, gated: bool) -> tuple[Row, ...]:
  if not gated:
    return (*linear('blocks/mlp/up', f'{theirs}.fc1'), *linear('blocks/mlp/down', f'{theirs}.fc2'))
  parts = ('gate', 'up')
  return (
    *(Row(f'blocks/mlp/{part}/kernel', f'{theirs}.w12.weight', LINEAR) for part in parts),
    *(Row(f'blocks/mlp/{part}/bias', f'{theirs}.w12.bias') for part in parts),
    *linear('blocks/mlp/down', f'{theirs}.w3'),
  )


def timm(*, registers: str = 'reg_token', final_norm: str = 'norm', gated: bool = False) -> Layout:
  """timm's names; the original releases have them too, but for `registers` ('register_tokens' in DINOv2's)."""
  block = 'blocks.{i}'
  return Layout(
    (
      Row('class_token', 'cls_token', BATCHED),
      Row('distillation_token', 'dist_token', BATCHED),
      Row('registers', registers, BATCHED),
      Row('mask_token', 'mask_token'),
      Row('position', 'pos_embed', BATCHED),
      Row('patch/kernel', 'patch_embed.proj.weight', convolution(3)),
      Row('patch/bias', 'patch_embed.proj.bias'),
      *norm('pre_norm', 'norm_pre'),
      *norm('blocks/norm1', f'{block}.norm1'),
      *fused('blocks/attention', f'{block}.attn.qkv.'),
      *linear('blocks/attention/out', f'{block}.attn.proj'),
      Row('blocks/scale1', f'{block}.ls1.gamma'),
      *norm('blocks/norm2', f'{block}.norm2'),
      *_mlp(f'{block}.mlp', gated),
      Row('blocks/scale2', f'{block}.ls2.gamma'),
      *norm('norm', final_norm),
      *linear('head', 'head'),
      *linear('distillation_head', 'head_dist'),
    )
  )


def transformers(prefix: str, *, hub: bool = True) -> Layout:
  """transformers' names: those of published files, or (hub=False) those that its version 5 has in memory."""
  block = f'{prefix}encoder.layer.{{i}}' if hub else f'{prefix}layers.{{i}}'
  attention = f'{block}.attention.attention' if hub else f'{block}.attention'
  names = {part: part if hub else f'{part[0]}_proj' for part in ('query', 'key', 'value')}
  up, down = ('intermediate.dense', 'output.dense') if hub else ('mlp.fc1', 'mlp.fc2')
  return Layout(
    (
      Row('class_token', f'{prefix}embeddings.cls_token', BATCHED),
      Row('distillation_token', f'{prefix}embeddings.distillation_token', BATCHED),
      Row('position', f'{prefix}embeddings.position_embeddings', BATCHED),
      Row('patch/kernel', f'{prefix}embeddings.patch_embeddings.projection.weight', convolution(3)),
      Row('patch/bias', f'{prefix}embeddings.patch_embeddings.projection.bias'),
      *norm('blocks/norm1', f'{block}.layernorm_before'),
      *(row for ours, theirs in names.items() for row in linear(f'blocks/attention/{ours}', f'{attention}.{theirs}')),
      *linear('blocks/attention/out', f'{block}.attention.output.dense' if hub else f'{attention}.o_proj'),
      *norm('blocks/norm2', f'{block}.layernorm_after'),
      *linear('blocks/mlp/up', f'{block}.{up}'),
      *linear('blocks/mlp/down', f'{block}.{down}'),
      *norm('norm', f'{prefix}layernorm'),
      *linear('head', 'cls_classifier' if prefix == 'deit.' else 'classifier'),
      *linear('distillation_head', 'distillation_classifier'),
    ),
    ignored=(r'.*pooler\..*', r'.*position_ids'),
  )


def _size(width: int, depth: int, hidden: int) -> str | None:
  return next((name for name, size in SIZES.items() if (size[0], size[1], size[3]) == (width, depth, hidden)), None)


def heads_of(width: int, depth: int, hidden: int) -> int:
  """Shapes do not tell: that of the size with these numbers, or as many as are 64 wide."""
  name = _size(width, depth, hidden)
  return SIZES[name][2] if name else max(1, width // HEAD_WIDTH)


def tower(shapes: Mapping[str, Shape]) -> dict[str, Any]:
  """The network that has these parameters, as a config: what shapes tell, which is all but activations and eps."""
  try:
    rows, width = shapes['patch/kernel']
    depth = shapes['blocks/norm1/scale'][0]
    hidden = shapes['blocks/mlp/up/kernel'][-1]
    places = shapes['position'][0]
  except KeyError as error:
    raise UserError(f'no {error.args[0]} among its parameters: is it a vision transformer?') from error
  patch = math.isqrt(rows // 3)
  size = _size(width, depth, hidden)
  network: dict[str, Any] = {'name': 'vit', 'variant': f'{size or "B"}/{patch}'}
  if size is None:
    network |= {'width': width, 'depth': depth, 'mlp_dim': hidden, 'heads': heads_of(width, depth, hidden)}
  if 'class_token' not in shapes:
    network['pool'] = 'map' if 'map_pool/probe' in shapes else 'gap'
  distilled = 'distillation_token' in shapes
  special = int('class_token' in shapes) + int(distilled)
  placed = special if math.isqrt(places - special) ** 2 == places - special else 0
  side = math.isqrt(places - placed)
  if side**2 != places - placed:
    raise UserError(f'{places} positions are no square of patches')
  if special and not placed:
    network['place_class_token'] = False
  network['image_size'] = side * patch
  network |= {
    field: value
    for field, value, there in (
      ('distilled', True, distilled),
      ('registers', shapes.get('registers', (0,))[0], 'registers' in shapes),
      ('mask_token', True, 'mask_token' in shapes),
      ('pre_norm', True, 'pre_norm/scale' in shapes),
      ('patch_bias', False, 'patch/bias' not in shapes),
      ('layer_scale', 1.0, 'blocks/scale1' in shapes),
      ('gated', True, 'blocks/mlp/gate/kernel' in shapes),
      ('activation', 'silu', 'blocks/mlp/gate/kernel' in shapes),
      ('outputs', shapes.get('head/kernel', (0, 0))[-1], 'head/kernel' in shapes),
      ('outputs_bias', False, 'head/kernel' in shapes and 'head/bias' not in shapes),
    )
    if there
  }
  return network
