"""Swin transformers as their authors, timm and transformers name them."""

import math
from collections.abc import Mapping
from typing import Any

from fmcv_jax.models.swin import SIZES
from fmcv_jax.pretrained.layout import LINEAR, Layout, Row, Shape, convolution, fused, linear, norm

STAGES = 4
_PAIR = {'plain': '{2i}', 'shifted': '{2i+1}'}
_DROPPED = (r'.*relative_position_index', r'.*attn_mask', r'.*relative_coords_table')


def _merge(stage: int, theirs: str) -> tuple[Row, ...]:
  ours = f'stage{stage + 1}/merge'
  return (*norm(f'{ours}/norm', f'{theirs}.norm'), Row(f'{ours}/reduce/kernel', f'{theirs}.reduction.weight', LINEAR))


def published(*, timm: bool) -> Layout:
  """The authors' names; timm has a merge at the start of a stage, not at the end of the one before, and 'head.fc'."""
  rows: list[Row] = []
  for stage in range(STAGES):
    for kind, place in _PAIR.items():
      ours, theirs = f'stage{stage + 1}/blocks/{kind}', f'layers.{stage}.blocks.{place}'
      rows += [
        *norm(f'{ours}/norm1', f'{theirs}.norm1'),
        *fused(f'{ours}/attention', f'{theirs}.attn.qkv.'),
        *linear(f'{ours}/attention/out', f'{theirs}.attn.proj'),
        Row(f'{ours}/attention/relative', f'{theirs}.attn.relative_position_bias_table'),
        *norm(f'{ours}/norm2', f'{theirs}.norm2'),
        *linear(f'{ours}/mlp/up', f'{theirs}.mlp.fc1'),
        *linear(f'{ours}/mlp/down', f'{theirs}.mlp.fc2'),
      ]
    if stage:
      rows += _merge(stage, f'layers.{stage if timm else stage - 1}.downsample')
  return Layout(
    (
      Row('patch/kernel', 'patch_embed.proj.weight', convolution(3)),
      Row('patch/bias', 'patch_embed.proj.bias'),
      *norm('patch_norm', 'patch_embed.norm'),
      *rows,
      *norm('norm', 'norm'),
      *linear('head', 'head.fc' if timm else 'head'),
    ),
    ignored=_DROPPED,
  )


def transformers(*, hub: bool) -> Layout:
  """transformers' names: those of published files, or (hub=False) those that its version 5 has in memory."""
  rows: list[Row] = []
  for stage in range(STAGES):
    for kind, place in _PAIR.items():
      ours, theirs = f'stage{stage + 1}/blocks/{kind}', f'swin.encoder.layers.{stage}.blocks.{place}'
      attention = f'{theirs}.attention.self' if hub else f'{theirs}.attention'
      names = {part: part if hub else f'{part[0]}_proj' for part in ('query', 'key', 'value')}
      up, down = ('intermediate.dense', 'output.dense') if hub else ('mlp.fc1', 'mlp.fc2')
      rows += [
        *norm(f'{ours}/norm1', f'{theirs}.layernorm_before'),
        *(row for part, name in names.items() for row in linear(f'{ours}/attention/{part}', f'{attention}.{name}')),
        *linear(f'{ours}/attention/out', f'{theirs}.attention.output.dense' if hub else f'{attention}.o_proj'),
        Row(f'{ours}/attention/relative', f'{attention}.relative_position_bias_table'),
        *norm(f'{ours}/norm2', f'{theirs}.layernorm_after'),
        *linear(f'{ours}/mlp/up', f'{theirs}.{up}'),
        *linear(f'{ours}/mlp/down', f'{theirs}.{down}'),
      ]
    if stage:
      rows += _merge(stage, f'swin.encoder.layers.{stage - 1}.downsample')
  return Layout(
    (
      Row('patch/kernel', 'swin.embeddings.patch_embeddings.projection.weight', convolution(3)),
      Row('patch/bias', 'swin.embeddings.patch_embeddings.projection.bias'),
      *norm('patch_norm', 'swin.embeddings.norm'),
      *rows,
      *norm('norm', 'swin.layernorm'),
      *linear('head', 'classifier'),
    ),
    ignored=_DROPPED,
  )


def network(shapes: Mapping[str, Shape]) -> dict[str, Any]:
  """The Swin that has these parameters, as a config; windows are 1/32 of the image's side, as in all published ones."""
  tables = [shapes[f'stage{stage + 1}/blocks/plain/attention/relative'] for stage in range(_stages(shapes))]
  depths = tuple(2 * table[0] for table in tables)
  heads = tuple(table[-1] for table in tables)
  rows, width = shapes['patch/kernel']
  patch, window = math.isqrt(rows // 3), (math.isqrt(tables[0][1]) + 1) // 2
  size = next((name for name, numbers in SIZES.items() if numbers == (width, depths, heads)), None)
  config: dict[str, Any] = {'name': 'swin', 'variant': size or 'T', 'window': window, 'patch': patch}
  if size is None:
    config |= {'width': width, 'depths': depths, 'heads': heads}
  config['image_size'] = window * patch * 2 ** (len(depths) - 1)
  return config | ({'outputs': shapes['head/kernel'][-1]} if 'head/kernel' in shapes else {})


def _stages(shapes: Mapping[str, Shape]) -> int:
  return sum(f'stage{stage + 1}/blocks/plain/attention/relative' in shapes for stage in range(STAGES))
