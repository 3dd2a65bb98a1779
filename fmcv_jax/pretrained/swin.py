"""Swin transformers as their authors, timm and transformers name them."""

import math
from collections.abc import Mapping
from typing import Any

from fmcv_jax.models.backbones.swin import SIZES
from fmcv_jax.pretrained.layout import Layout, Row, Rows, Shape, linear, matrix, norm, patch
from fmcv_jax.pretrained.shape_inference import count, has, part
from fmcv_jax.pretrained.vit import hub_block, timm_block

STAGES = 4
_PAIR = {'plain': '{2i}', 'shifted': '{2i+1}'}
_DROPPED = (r'.*relative_position_index', r'.*attn_mask', r'.*relative_coords_table')


def _merge(stage: int, theirs: str) -> Rows:
  ours = f'stage{stage + 1}/merge'
  return (*norm(f'{ours}/norm', f'{theirs}.norm'), *matrix(f'{ours}/reduce', f'{theirs}.reduction'))


def published(*, timm: bool) -> Layout:
  """The authors' names; timm has a merge at the start of a stage, not at the end of the one before, and 'head.fc'."""
  rows: list[Row] = []
  for stage in range(STAGES):
    for kind, place in _PAIR.items():
      ours, theirs = f'stage{stage + 1}/blocks/{kind}', f'layers.{stage}.blocks.{place}'
      rows += timm_block(ours, theirs)
      rows.append(Row(f'{ours}/attention/relative', f'{theirs}.attn.relative_position_bias_table'))
    if stage:
      rows += _merge(stage, f'layers.{stage if timm else stage - 1}.downsample')
  return Layout(
    (
      *patch('patch_embed.proj'),
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
      table = 'attention.self' if hub else 'attention.relative_position_bias'
      rows += hub_block(ours, theirs, hub, 'self')
      rows.append(Row(f'{ours}/attention/relative', f'{theirs}.{table}.relative_position_bias_table'))
    if stage:
      rows += _merge(stage, f'swin.encoder.layers.{stage - 1}.downsample')
  return Layout(
    (
      *patch('swin.embeddings.patch_embeddings.projection'),
      *norm('patch_norm', 'swin.embeddings.norm'),
      *rows,
      *norm('norm', 'swin.layernorm'),
      *linear('head', 'classifier'),
    ),
    ignored=_DROPPED,
  )


def network(shapes: Mapping[str, Shape]) -> dict[str, Any]:
  """Config of the Swin with these parameter shapes; windows are 1/32 of the image's side, as in all published ones."""
  stages = range(1, max(2, count(shapes, r'stage(\d+)/')))
  tables = [shapes[f'stage{stage}/blocks/plain/attention/relative'] for stage in stages]
  depths = tuple(2 * max(shape[0] for shape in part(shapes, f'stage{stage}/blocks/').values()) for stage in stages)
  heads = tuple(table[-1] for table in tables)
  rows, width = shapes['patch/kernel']
  side, window = math.isqrt(rows // 3), (math.isqrt(tables[0][1]) + 1) // 2
  size = next((name for name, numbers in SIZES.items() if numbers == (width, depths, heads)), None)
  config: dict[str, Any] = {'name': 'swin', 'variant': size or 'T', 'window': window, 'patch_size': side}
  if size is None:
    config |= {'width': width, 'depths': depths, 'num_heads': heads}
  config['image_size'] = window * side * 2 ** (len(depths) - 1)
  return config | ({'num_classes': shapes['head/kernel'][-1]} if has(shapes, 'head/') else {})
