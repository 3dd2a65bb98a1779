"""EfficientNet as timm and as transformers name it, with its running statistics.

transformers numbers blocks across stages, so each size has its own layout. timm's are those called `tf_`, with
TensorFlow's padding and norms, with which the published weights were trained.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fmcv_jax.errors import UserError
from fmcv_jax.models.backbones.efficientnet import SIZES, STEM, TABLE, channels
from fmcv_jax.pretrained.layout import POINT, SPATIAL, Layout, Row, Rows, Shape, linear, point
from fmcv_jax.pretrained.shape_inference import has, part

_UNUSED = (r'.*\.num_batches_tracked',)
# Names of a block's layers and of the norm after each, with and without an expansion layer.
_TIMM = {'expand': 'conv_pw', 'depthwise': 'conv_dw', 'project': 'conv_pwl', 'squeeze': 'se.conv_reduce'}
_TIMM |= {'excite': 'se.conv_expand', 'expand_norm': 'bn1', 'depthwise_norm': 'bn2', 'project_norm': 'bn3'}
_TIMM_FIRST = _TIMM | {'project': 'conv_pw', 'depthwise_norm': 'bn1', 'project_norm': 'bn2'}
_HUB = {
  'expand': 'expansion.expand_conv',
  'expand_norm': 'expansion.expand_bn',
  'depthwise': 'depthwise_conv.depthwise_conv',
  'depthwise_norm': 'depthwise_conv.depthwise_norm',
  'squeeze': 'squeeze_excite.reduce',
  'excite': 'squeeze_excite.expand',
  'project': 'projection.project_conv',
  'project_norm': 'projection.project_bn',
}


def timm() -> Layout:
  """Layout of timm's tf_efficientnet models."""
  rows = _ends('conv_stem', 'bn1', 'conv_head', 'bn2')
  for stage, row in enumerate(TABLE):
    names = _TIMM_FIRST if row.ratio == 1 else _TIMM
    rows += _block(f'stage{stage + 1}/first', f'blocks.{stage}.0', names)
    rows += _block(f'stage{stage + 1}/blocks', f'blocks.{stage}.{{i+1}}', names)
  return Layout(rows, ignored=_UNUSED)


def transformers(variant: str) -> Layout:
  """Layout of transformers' EfficientNetModel of a variant, whose blocks are numbered through all stages."""
  prefix = 'efficientnet.'
  encoder = f'{prefix}encoder'
  embed = f'{prefix}embeddings'
  rows = _ends(f'{embed}.convolution', f'{embed}.batchnorm', f'{encoder}.top_conv', f'{encoder}.top_bn')
  before = 0
  for stage, repeats in enumerate(_repeats(variant), 1):
    rows += _block(f'stage{stage}/first', f'{encoder}.blocks.{before}', _HUB)
    rows += _block(f'stage{stage}/blocks', f'{encoder}.blocks.{{{before + 1}..{before + repeats - 1}}}', _HUB)
    before += repeats
  return Layout(rows, ignored=_UNUSED)


def _ends(stem: str, stem_norm: str, top: str, top_norm: str) -> Rows:
  return (
    Row('conv/kernel', f'{stem}.weight', SPATIAL),
    *_norm('norm', stem_norm),
    Row('top/kernel', f'{top}.weight', POINT),
    *_norm('top_norm', top_norm),
    *linear('head', 'classifier'),
  )


def _block(ours: str, theirs: str, names: Mapping[str, str]) -> Rows:
  def layer_rows(parts: tuple[str, ...], make: Callable[[str, str], Rows]) -> Rows:
    return tuple(row for part in parts for row in make(f'{ours}/{part}', f'{theirs}.{names[part]}'))

  return (
    *(Row(f'{ours}/{part}/kernel', f'{theirs}.{names[part]}.weight', POINT) for part in ('expand', 'project')),
    Row(f'{ours}/depthwise/kernel', f'{theirs}.{names["depthwise"]}.weight', SPATIAL),
    *layer_rows(('squeeze', 'excite'), point),
    *layer_rows(('expand_norm', 'depthwise_norm', 'project_norm'), _norm),
  )


def _norm(ours: str, theirs: str) -> Rows:
  statistics = f'extra/batch_stats/{ours}'
  return (
    Row(f'{ours}/scale', f'{theirs}.weight'),
    Row(f'{ours}/bias', f'{theirs}.bias'),
    Row(f'{statistics}/mean', f'{theirs}.running_mean'),
    Row(f'{statistics}/var', f'{theirs}.running_var'),
  )


def _repeats(variant: str) -> list[int]:
  return [math.ceil(SIZES[variant][1] * row.repeats) for row in TABLE]


def variant_of(stem: int, repeats: Sequence[int]) -> str:
  """Variant with this stem width and these block counts per stage; UserError if there is none."""
  for variant, (width, *_) in SIZES.items():
    if channels(STEM, width) == stem and _repeats(variant) == list(repeats):
      return variant
  raise UserError(f'an EfficientNet with a stem of {stem} channels and stages of {repeats} blocks is none of the known')


def network(shapes: Mapping[str, Shape]) -> dict[str, Any]:
  """Config of the EfficientNet with these parameter shapes: the smallest size that contains all of them."""
  stem, stages = shapes['conv/kernel'][-1], range(1, len(TABLE) + 1)
  blocks = [part(shapes, f'stage{stage}/blocks/').values() for stage in stages]
  repeats = [1 + max((shape[0] for shape in own), default=0) for own in blocks]
  sizes = sorted((sum(_repeats(size)), size) for size, (width, *_) in SIZES.items() if channels(STEM, width) == stem)
  fits = (size for _, size in sizes if all(a >= b for a, b in zip(_repeats(size), repeats)))
  variant = next(fits, None) or variant_of(stem, repeats)
  top = has(shapes, 'top/') or has(shapes, 'top_norm/')
  found = {'name': 'efficientnet', 'variant': variant, 'image_size': SIZES[variant][2], 'top': top}
  return found | ({'num_classes': shapes['head/kernel'][-1]} if has(shapes, 'head/') else {})
