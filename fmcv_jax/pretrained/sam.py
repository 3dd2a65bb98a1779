"""Segment Anything as transformers and the original release name it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fmcv_jax.dataset_statistics import IMAGENET
from fmcv_jax.models.dense.sam import MASK_HIDDEN
from fmcv_jax.models.dense.sam_encoder import GROUPS
from fmcv_jax.pretrained.layout import (
  POINT,
  SPATIAL,
  ArrayTransform,
  Layout,
  Row,
  Rows,
  Shape,
  convolution,
  expand,
  fused,
  layer_rows,
  linear,
  norm,
  point,
  with_prefix,
)

DEPTHS = (12, 24, 32)  # of the image encoders: B, L and H
# The mean color, which is nearest to the zeros that the images are padded with after they are normalized.
FILL = tuple(round(255 * mean) for mean in IMAGENET['mean'])


def _on_grid(x: np.ndarray) -> np.ndarray:
  side = math.isqrt(len(x))
  return x.reshape(1, side, side, -1)


def _flat(theirs: Shape) -> Shape:
  _, rows, columns, width = theirs
  return rows * columns, width


# Ours [rows * columns, D], theirs [1, rows, columns, D].
_GRID = ArrayTransform(_on_grid, lambda x, shape: x.reshape(shape), _flat)


def _encoder(depth: int, root: str, blocks: str, norms: str, patch: str, neck: Sequence[str]) -> Rows:
  rows: Rows = (
    Row('patch/kernel', f'{root}.{patch}.weight', convolution(3)),
    Row('patch/bias', f'{root}.{patch}.bias'),
    Row('position', f'{root}.pos_embed', _GRID),
    Row('neck1/kernel', f'{root}.neck.{neck[0]}.weight', POINT),
    *norm('neck_norm1', f'{root}.neck.{neck[1]}'),
    Row('neck2/kernel', f'{root}.neck.{neck[2]}.weight', SPATIAL),
    *norm('neck_norm2', f'{root}.neck.{neck[3]}'),
  )
  size = depth // GROUPS
  for group in range(GROUPS):
    first, last = group * size, (group + 1) * size - 1
    for ours, number in ((f'group{group + 1}/blocks', f'{{{first}..{last - 1}}}'), (f'group{group + 1}/whole', last)):
      rows += _block(ours, f'{root}.{blocks}.{number}', norms)
  return rows


def _block(ours: str, theirs: str, norms: str) -> Rows:
  return (
    *norm(f'{ours}/norm1', f'{theirs}.{norms}1'),
    *fused(f'{ours}/attention', f'{theirs}.attn.qkv.'),
    *linear(f'{ours}/attention/out', f'{theirs}.attn.proj'),
    Row(f'{ours}/attention/relative_rows', f'{theirs}.attn.rel_pos_h'),
    Row(f'{ours}/attention/relative_columns', f'{theirs}.attn.rel_pos_w'),
    *norm(f'{ours}/norm2', f'{theirs}.{norms}2'),
    *layer_rows(f'{ours}/mlp', f'{theirs}.mlp', {'up': 'lin1', 'down': 'lin2'}),
  )


def _prompt(frequencies: str, points: str, masks: Sequence[str]) -> Rows:
  """`masks`: three convolutions and, between them, two norms."""
  return (
    Row('frequencies', frequencies),
    Row('kinds', f'prompt_encoder.{points}.{{i}}.weight'),
    Row('no_point', 'prompt_encoder.not_a_point_embed.weight'),
    Row('no_mask', 'prompt_encoder.no_mask_embed.weight'),
    Row('mask_embedding/conv1/kernel', f'{masks[0]}.weight', convolution(1)),
    Row('mask_embedding/conv1/bias', f'{masks[0]}.bias'),
    *norm('mask_embedding/norm1', masks[1]),
    Row('mask_embedding/conv2/kernel', f'{masks[2]}.weight', convolution(MASK_HIDDEN // 4)),
    Row('mask_embedding/conv2/bias', f'{masks[2]}.bias'),
    *norm('mask_embedding/norm2', masks[3]),
    *point('mask_embedding/conv3', masks[4]),
  )


def _attention(ours: str, theirs: str) -> Rows:
  names = {'query': 'q_proj', 'key': 'k_proj', 'value': 'v_proj', 'out': 'out_proj'}
  return layer_rows(ours, theirs, names)


def _decoder(norms: str, last_norm: str, upscale: Sequence[str], layers: Sequence[str]) -> Rows:
  """`upscale`: a convolution, a norm, a convolution; `layers`: the names of three layers."""
  root = 'mask_decoder'
  rows: Rows = (
    Row('iou_token', f'{root}.iou_token.weight'),
    Row('mask_tokens', f'{root}.mask_tokens.weight'),
    *_attention('last_attention', f'{root}.transformer.final_attn_token_to_image'),
    *norm('last_norm', f'{root}.transformer.{last_norm}'),
    *expand(2)('upscale1', f'{root}.{upscale[0]}'),
    *norm('upscale_norm', f'{root}.{upscale[1]}'),
    *expand(2)('upscale2', f'{root}.{upscale[2]}'),
  )
  for number in (0, 1):
    ours, theirs = f'layer{number + 1}', f'{root}.transformer.layers.{number}'
    rows += _attention(f'{ours}/self_attention', f'{theirs}.self_attn')
    rows += _attention(f'{ours}/token_attention', f'{theirs}.cross_attn_token_to_image')
    rows += _attention(f'{ours}/image_attention', f'{theirs}.cross_attn_image_to_token')
    rows += layer_rows(f'{ours}/mlp', f'{theirs}.mlp', {'up': 'lin1', 'down': 'lin2'})
    for place in (1, 2, 3, 4):
      rows += norm(f'{ours}/norm{place}', f'{theirs}.{norms}{place}')
  for place, name in enumerate(layers, 1):
    rows += linear(f'blocks/layer{place}', f'{root}.output_hypernetworks_mlps.{{i}}.{name}')
    rows += linear(f'iou/layer{place}', f'{root}.iou_prediction_head.{name}')
  return rows


def _layout(encoder: Rows, prompt: Rows, decoder: Rows, ignored: tuple[str, ...]) -> Layout:
  parts = (('encoder', encoder), ('prompt', prompt), ('decoder', decoder))
  return Layout(tuple(row for name, rows in parts for row in with_prefix(name, rows)), ignored)


def transformers(depth: int) -> Layout:
  """transformers' names, for an image encoder of `depth` blocks."""
  masks = [f'prompt_encoder.mask_embed.{name}' for name in ('conv1', 'layer_norm1', 'conv2', 'layer_norm2', 'conv3')]
  return _layout(
    _encoder(
      depth,
      'vision_encoder',
      'layers',
      'layer_norm',
      'patch_embed.projection',
      ('conv1', 'layer_norm1', 'conv2', 'layer_norm2'),
    ),
    _prompt('shared_image_embedding.positional_embedding', 'point_embed', masks),
    _decoder(
      'layer_norm',
      'layer_norm_final_attn',
      ('upscale_conv1', 'upscale_layer_norm', 'upscale_conv2'),
      ('proj_in', 'layers.0', 'proj_out'),
    ),
    (r'prompt_encoder\.shared_embedding\.positional_embedding',),  # the same array again
  )


def original(depth: int) -> Layout:
  """The names of the original repository."""
  masks = [f'prompt_encoder.mask_downscaling.{number}' for number in (0, 1, 3, 4, 6)]
  upscale = tuple(f'output_upscaling.{number}' for number in (0, 1, 3))
  return _layout(
    _encoder(depth, 'image_encoder', 'blocks', 'norm', 'patch_embed.proj', ('0', '1', '2', '3')),
    _prompt('prompt_encoder.pe_layer.positional_encoding_gaussian_matrix', 'point_embeddings', masks),
    _decoder('norm', 'norm_final_attn', upscale, ('layers.0', 'layers.1', 'layers.2')),
    (r'pixel_mean|pixel_std',),
  )


def layouts() -> tuple[tuple[str, Layout], ...]:
  """All of them; a smaller depth comes first, since a larger one has its names too."""
  made = (('transformers', transformers), ('official', original))
  return tuple((format, make(depth)) for format, make in made for depth in DEPTHS)


def config(shapes: Mapping[str, Shape]) -> dict[str, Any]:
  """Config of a run with the network of these parameter shapes."""
  rows, width = shapes['encoder/patch/kernel']
  patch_size = math.isqrt(rows // 3)
  windowed = shapes['encoder/group1/blocks/attention/relative_rows']
  side, channels = math.isqrt(shapes['encoder/position'][0]) * patch_size, shapes['decoder/iou_token'][1]
  network = {
    'name': 'sam',
    'image_size': side,
    'patch_size': patch_size,
    'window': (windowed[1] + 1) // 2,
    'width': width,
    'depth': GROUPS * (windowed[0] + 1),
    'num_heads': width // windowed[2],
    'mlp_dim': shapes['encoder/group1/whole/mlp/up/kernel'][1],
    'qkv_bias': 'encoder/group1/whole/attention/query/bias' in shapes,
    'channels': channels,
    'decoder_mlp_dim': shapes['decoder/layer1/mlp/up/kernel'][1],
    'iou_hidden': shapes['decoder/iou/layer1/kernel'][1],
  }
  return {
    'objective': {'name': 'prompted_segmentation', 'network': network, 'normalize': dict(IMAGENET)},
    'data': {'source': {'name': 'none'}, 'image': image(side)},
  }


def image(side: int) -> dict[str, Any]:
  """data.image: the whole image, padded at the right or the bottom."""
  return {'name': 'resize_pad', 'size': side, 'fill': FILL, 'interpolation': 'bilinear'}
