"""Vision transformers as timm, the original releases of DeiT, DINO, DINOv2 and MAE, and transformers name them."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fmcv_jax.errors import UserError
from fmcv_jax.models.backbones.vit import SIZES
from fmcv_jax.models.common.positions import sincos_2d
from fmcv_jax.pretrained.layout import (
  BATCHED,
  QKV,
  Fixed,
  Layout,
  Row,
  Rows,
  Shape,
  fused,
  layer_rows,
  linear,
  norm,
  patch,
  with_prefix,
)
from fmcv_jax.pretrained.shape_inference import has, part

HEAD_WIDTH = 64  # of nearly all that is published; a size with others is named in models/vit.py


_MLP = {'up': 'fc1', 'down': 'fc2'}


def timm_block(ours: str, theirs: str) -> Rows:
  """Rows of a block with the names of timm and the original releases."""
  return (*_timm_attention(ours, theirs), *layer_rows(f'{ours}/mlp', f'{theirs}.mlp', _MLP))


def _timm_attention(ours: str, theirs: str) -> Rows:
  return (
    *norm(f'{ours}/norm1', f'{theirs}.norm1'),
    *fused(f'{ours}/attention', f'{theirs}.attn.qkv.'),
    *linear(f'{ours}/attention/out', f'{theirs}.attn.proj'),
    *norm(f'{ours}/norm2', f'{theirs}.norm2'),
  )


def hub_block(ours: str, theirs: str, hub: bool, attention: str = 'attention') -> Rows:
  """A block as transformers' files name it (`attention`: its queries, keys and values), or as version 5 in memory."""
  mlp = {'up': 'intermediate.dense', 'down': 'output.dense'} if hub else {'up': 'mlp.fc1', 'down': 'mlp.fc2'}
  return (
    *norm(f'{ours}/norm1', f'{theirs}.layernorm_before'),
    *_hub_attention(f'{ours}/attention', f'{theirs}.attention', hub, attention),
    *norm(f'{ours}/norm2', f'{theirs}.layernorm_after'),
    *layer_rows(f'{ours}/mlp', theirs, mlp),
  )


def _hub_attention(ours: str, theirs: str, hub: bool, inner: str = 'attention') -> Rows:
  if not hub:
    return layer_rows(ours, theirs, {name: f'{name[0]}_proj' for name in (*QKV, 'out')})
  parts = layer_rows(ours, f'{theirs}.{inner}', {name: name for name in QKV})
  return (*parts, *linear(f'{ours}/out', f'{theirs}.output.dense'))


def _gated(ours: str, theirs: str, enter: str, leave: str) -> Rows:
  return (*fused(ours, f'{theirs}.{enter}.', ('gate', 'up')), *linear(f'{ours}/down', f'{theirs}.{leave}'))


def _scales(first: str, second: str) -> Rows:
  return Row('blocks/scale1', first), Row('blocks/scale2', second)


def timm(*, gated: bool = False) -> Layout:
  """timm's names."""
  mlp = (
    _gated('blocks/mlp', 'blocks.{i}.mlp', 'fc1', 'fc2') if gated else layer_rows('blocks/mlp', 'blocks.{i}.mlp', _MLP)
  )
  registers = Row('registers', 'reg_token', BATCHED)
  return Layout((registers, *norm('pre_norm', 'norm_pre'), *_timm(mlp)), ignored=_TRAINED_ON_TOP)


def original(*, gated: bool = False) -> Layout:
  """Those of the releases of DeiT, DINO, DINOv2 and MAE, which timm took over but for registers and SwiGLU."""
  mlp = (
    _gated('blocks/mlp', 'blocks.{i}.mlp', 'w12', 'w3') if gated else layer_rows('blocks/mlp', 'blocks.{i}.mlp', _MLP)
  )
  tokens = Row('registers', 'register_tokens', BATCHED), Row('mask_token', 'mask_token')
  return Layout((*tokens, *_timm(mlp)), ignored=_TRAINED_ON_TOP)


_TRAINED_ON_TOP = (r'head\.(mlp|last_layer)\..*',)  # of DINO


def _timm(mlp: Rows) -> Rows:
  return (
    Row('class_token', 'cls_token', BATCHED),
    Row('distillation_token', 'dist_token', BATCHED),
    Row('position', 'pos_embed', BATCHED),
    *patch('patch_embed.proj'),
    *_timm_attention('blocks', 'blocks.{i}'),
    *mlp,
    *_scales('blocks.{i}.ls1.gamma', 'blocks.{i}.ls2.gamma'),
    *norm('norm', 'norm'),
    *norm('pooled_norm', 'fc_norm'),
    *linear('head', 'head'),
    *linear('distillation_head', 'head_dist'),
  )


def _hub_inputs(prefix: str) -> Rows:
  return (
    Row('class_token', f'{prefix}embeddings.cls_token', BATCHED),
    Row('distillation_token', f'{prefix}embeddings.distillation_token', BATCHED),
    *patch(f'{prefix}embeddings.patch_embeddings.projection'),
  )


def transformers(prefix: str, *, hub: bool = True) -> Layout:
  """transformers' names: those of published files, or (hub=False) those that its version 5 has in memory."""
  return Layout(
    (
      *_hub_inputs(prefix),
      Row('position', f'{prefix}embeddings.position_embeddings', BATCHED),
      *hub_block('blocks', f'{prefix}encoder.layer.{{i}}' if hub else f'{prefix}layers.{{i}}', hub),
      *norm('norm', f'{prefix}layernorm'),
      *linear('head', 'cls_classifier' if prefix == 'deit.' else 'classifier'),
      *linear('distillation_head', 'distillation_classifier'),
    ),
    ignored=(r'.*pooler\..*', r'.*position_ids'),
  )


def transformers_dinov2(prefix: str, *, hub: bool = True, gated: bool = False) -> Layout:
  """Layout of transformers' Dinov2Model and its kin; `gated`: the MLP is a SwiGLU, stored as one matrix on the hub."""
  block = f'{prefix}encoder.layer.{{i}}'
  own = f'{block}.mlp'
  if not gated:
    mlp = layer_rows('blocks/mlp', own, _MLP)
  elif hub:
    mlp = _gated('blocks/mlp', own, 'weights_in', 'weights_out')
  else:
    mlp = layer_rows('blocks/mlp', own, {name: f'{name}_proj' for name in ('gate', 'up', 'down')})
  return Layout(
    (
      *_hub_inputs(prefix),
      Row('position', f'{prefix}embeddings.position_embeddings', BATCHED),
      Row('mask_token', f'{prefix}embeddings.mask_token'),
      Row('registers', f'{prefix}embeddings.register_tokens', BATCHED),
      *norm('blocks/norm1', f'{block}.norm1'),
      *_hub_attention('blocks/attention', f'{block}.attention', hub),
      *norm('blocks/norm2', f'{block}.norm2'),
      *mlp,
      *_scales(f'{block}.layer_scale1.lambda1', f'{block}.layer_scale2.lambda1'),
      *norm('norm', f'{prefix}layernorm'),
    )
  )


def mae(*, hub: bool | None = None) -> Layout:
  """Encoder and decoder of a masked autoencoder: the original release's names or, by `hub`, transformers'."""
  if hub is None:
    encoder = tuple(row for row in original().rows if row.ours not in ('position', 'mask_token'))
    prefix, block = '', timm_block('blocks', 'decoder_blocks.{i}')
    places, mask = 'pos_embed', 'mask_token'
  else:
    layers = 'vit.encoder.layer.{i}' if hub else 'vit.layers.{i}'
    encoder = (*_hub_inputs('vit.'), *hub_block('blocks', layers, hub), *norm('norm', 'vit.layernorm'))
    prefix, block = 'decoder.', hub_block('blocks', 'decoder.decoder_layers.{i}', hub)
    places, mask = 'vit.embeddings.position_embeddings', 'decoder.mask_token'
  decoder = (
    *linear('embed', f'{prefix}decoder_embed'),
    Row('mask_token', mask, BATCHED),
    *block,
    *norm('norm', f'{prefix}decoder_norm'),
    *linear('head', f'{prefix}decoder_pred'),
  )
  return Layout(
    (*with_prefix('encoder', encoder), *with_prefix('decoder', decoder)),
    fixed=(
      Fixed('fixed/position', places, lambda network: _sines(network.encoder, network.encoder.width)),
      Fixed(
        'fixed/decoder_position',
        f'{prefix}decoder_pos_embed',
        lambda network: _sines(network.encoder, network.decoder.width),
      ),
    ),
  )


def _sines(encoder: Any, width: int) -> np.ndarray:
  side = encoder.image_size // encoder.patch_size
  return np.concatenate([np.zeros((1, width), np.float32), sincos_2d(side, side, width)])[None]


def _size(width: int, depth: int, hidden: int) -> str | None:
  return next((name for name, size in SIZES.items() if (size[0], size[1], size[3]) == (width, depth, hidden)), None)


def heads_of(width: int, depth: int, hidden: int) -> int:
  """Number of heads, which shapes do not determine: that of the matching size, else width / 64."""
  name = _size(width, depth, hidden)
  return SIZES[name][2] if name else max(1, width // HEAD_WIDTH)


def tower(shapes: Mapping[str, Shape], *, class_token: bool = False) -> dict[str, Any]:
  """Config of the network with these parameter shapes, which determine everything but activations and eps.

  class_token   True: it has one even if the shapes lack it
  """
  rows, width = shapes['patch/kernel']
  depth = shapes['blocks/norm1/scale'][0]
  hidden = shapes['blocks/mlp/up/kernel'][-1]
  side_of_patch = math.isqrt(rows // 3)
  size = _size(width, depth, hidden)
  network: dict[str, Any] = {'name': 'vit', 'variant': f'{size or "B"}/{side_of_patch}'}
  if size is None:
    network |= {'width': width, 'depth': depth, 'mlp_dim': hidden, 'num_heads': heads_of(width, depth, hidden)}
  distilled = has(shapes, 'distillation_')
  side, placed, expected = _places(shapes['position'][0], class_token or 'class_token' in shapes, distilled)
  if has(shapes, 'pooled_norm/'):
    network |= {'pool': 'gap', 'fc_norm': True, 'class_token': expected}
  elif not expected:
    network['pool'] = 'map' if has(shapes, 'map_pool/') else 'gap'
  if expected and not placed:
    network['class_token_has_position'] = False
  network['image_size'] = side * side_of_patch
  gated = has(shapes, 'blocks/mlp/gate/')
  classifies = has(shapes, 'head/') or has(shapes, 'distillation_head/')
  network |= {
    field: value
    for field, value, there in (
      ('distilled', True, distilled),
      ('registers', shapes.get('registers', (0,))[0], 'registers' in shapes),
      ('mask_token', True, 'mask_token' in shapes),
      ('pre_norm', True, has(shapes, 'pre_norm/')),
      ('patch_bias', False, 'patch/bias' not in shapes and has(shapes, 'pre_norm/')),  # as in CLIP
      ('layer_scale', 1.0, has(shapes, 'blocks/scale')),
      ('gated_mlp', True, gated),
      ('activation', 'silu', gated),
      ('num_classes', shapes['head/kernel'][-1] if classifies else 0, classifies),
    )
    if there
  }
  return network


def dinov2(shapes: Mapping[str, Shape]) -> dict[str, Any]:
  """A ViT of DINOv2, all of which have a class token and layer scales."""
  return tower(shapes, class_token=True) | {'layer_scale': 1.0}


def _places(places: int, class_token: bool, distilled: bool) -> tuple[int, bool, bool]:
  """(patches in a row, whether the class token is placed, whether there is one), for so many positions."""
  for special in (int(class_token) + int(distilled), 0, 1 + int(distilled)):
    side = math.isqrt(max(places - special, 0))
    if side**2 == places - special:
      return side, special > 0, class_token or special > 0
  raise UserError(f'{places} positions are no square of patches')


def masked_autoencoder(shapes: Mapping[str, Shape]) -> dict[str, Any]:
  """Config of the masked autoencoder with these parameter shapes; the decoder has 16 heads, as in all releases."""
  table = shapes.get('fixed/position') or shapes['fixed/decoder_position']
  own = part(shapes, 'encoder/')
  own['position'] = table[1:]
  encoder = tower(own)
  depth, width = shapes['decoder/blocks/norm1/scale']
  network = {'name': 'mae', 'encoder': encoder | {'pos_embed': 'sincos2d'}}
  return network | {'width': width, 'depth': depth, 'num_heads': 16}
