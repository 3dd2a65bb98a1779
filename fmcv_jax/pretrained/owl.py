"""OWL-ViT and OWLv2 as transformers names them."""

import math
from collections.abc import Mapping
from typing import Any

from fmcv_jax.dataset_statistics import CLIP
from fmcv_jax.pretrained.clip import clip_image, dual_encoder, transformers_text
from fmcv_jax.pretrained.layout import Layout, Row, Rows, Shape, linear, matrix, norm, with_prefix
from fmcv_jax.pretrained.shape_inference import has, part

BLACK = (0, 0, 0)  # of the padding of OWLv2's images, as in Scenic; transformers before version 5 had gray


def _head(name: str) -> Rows:
  return tuple(row for number in range(3) for row in linear(f'{name}/layer{number + 1}', f'{name}.dense{number}'))


def layout(kind: str) -> Layout:
  """The layout of 'owlvit', or of 'owlv2', which has a head for objectness."""
  return Layout(
    (
      *with_prefix('towers/image', clip_image('pre_layernorm'), f'{kind}.vision_model.'),
      *matrix('towers/image/head', f'{kind}.visual_projection'),
      *with_prefix('towers/text', transformers_text(), f'{kind}.text_model.'),
      *matrix('towers/text/head', f'{kind}.text_projection'),
      Row('towers/temperature', f'{kind}.logit_scale'),
      *norm('merge/norm', 'layer_norm'),
      *linear('class_head/embedding', 'class_head.dense0'),
      *linear('class_head/shift', 'class_head.logit_shift'),
      *linear('class_head/scale', 'class_head.logit_scale'),
      *_head('box_head'),
      *(_head('objectness_head') if kind == 'owlv2' else ()),
    ),
    ignored=(r'.*\.position_ids', 'box_bias'),
  )


def config(shapes: Mapping[str, Shape]) -> dict[str, Any]:
  """Config of a run with the network of these parameter shapes."""
  towers = dual_encoder(part(shapes, 'towers/'), sigmoid=False, activation='quick_gelu')
  objectness, side = has(shapes, 'objectness_head/'), towers['image']['image_size']
  patches = math.prod(shapes['towers/image/position']) // shapes['towers/image/position'][-1] - 1
  image = {'name': 'pillow_resize', 'size': side, 'mode': 'squash'}
  if objectness:
    image = {'name': 'resize_pad', 'size': side, 'fill': BLACK, 'interpolation': 'bilinear'}
  return {
    'objective': {
      'name': 'detection',
      'network': {'name': 'owl_detector', 'towers': towers, 'objectness': objectness},
      'max_boxes': min(100, patches),
      'normalize': dict(CLIP),
    },
    'data': {'source': {'name': 'none'}, 'image': image, 'queries': {'count': 50, 'templates': ('a photo of a {}',)}},
  }
