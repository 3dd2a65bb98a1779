"""EoMT as transformers names it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fmcv_jax.dataset_statistics import IMAGENET
from fmcv_jax.pretrained import vit
from fmcv_jax.pretrained.layout import (
  BATCHED,
  SAME,
  SPATIAL,
  Fixed,
  Layout,
  Row,
  Rows,
  Shape,
  expand,
  layer_rows,
  linear,
  norm,
  patch,
  with_prefix,
)
from fmcv_jax.pretrained.shape_inference import count, part

BLACK = (0, 0, 0)  # of the padding of images
_UPSCALES = 4  # more than any has
_MASKED = 'fixed/masked_attention'


def _upscale(number: int) -> Rows:
  theirs = f'upscale_block.block.{number}'
  return with_prefix(
    f'upscale{number}',
    (
      *expand(2)('up', f'{theirs}.conv1'),
      Row('depthwise/kernel', f'{theirs}.conv2.weight', SPATIAL),
      *norm('norm', f'{theirs}.layernorm2d'),
    ),
  )


def layout() -> Layout:
  """The layout of EomtForUniversalSegmentation, with a plain MLP.

  Probabilities of masked attention have to be 0, as after training: inference is that of a plain ViT here.
  """
  block = 'layers.{i}'
  attention = {'query': 'q_proj', 'key': 'k_proj', 'value': 'v_proj', 'out': 'out_proj'}
  encoder = (
    Row('class_token', 'embeddings.cls_token', BATCHED),
    Row('registers', 'embeddings.register_tokens', BATCHED),
    *patch('embeddings.patch_embeddings.projection'),
    Row('position', 'embeddings.position_embeddings.weight', SAME),
    *norm('blocks/norm1', f'{block}.norm1'),
    *layer_rows('blocks/attention', f'{block}.attention', attention),
    Row('blocks/scale1', f'{block}.layer_scale1.lambda1'),
    *norm('blocks/norm2', f'{block}.norm2'),
    *layer_rows('blocks/mlp', f'{block}.mlp', {'up': 'fc1', 'down': 'fc2'}),
    Row('blocks/scale2', f'{block}.layer_scale2.lambda1'),
    *norm('norm', 'layernorm'),
  )
  return Layout(
    (
      *with_prefix('encoder', encoder),
      Row('query', 'query.weight'),
      *linear('class_head', 'class_predictor'),
      *(row for number in (1, 2, 3) for row in linear(f'mask_head/layer{number}', f'mask_head.fc{number}')),
      *(row for number in range(_UPSCALES) for row in _upscale(number)),
    ),
    ignored=('criterion.empty_weight', r'.*position_ids'),
    fixed=(Fixed(_MASKED, 'attn_mask_probs', lambda network: np.zeros(network.blocks, np.float32)),),
  )


def config(shapes: Mapping[str, Shape]) -> dict[str, Any]:
  """Config of a run with the network of these parameter shapes."""
  encoder = vit.tower(part(shapes, 'encoder/'), class_token=True)
  queries = shapes['query'][0]
  network = {
    'name': 'eomt',
    'encoder': encoder,
    'num_classes': shapes['class_head/kernel'][-1] - 1,
    'queries': queries,
    'blocks': shapes[_MASKED][0],
    'upscales': count(shapes, r'upscale(\d+)/'),
  }
  return {
    'objective': {
      'name': 'mask_prediction',
      'network': network,
      'max_segments': min(100, queries),
      'normalize': dict(IMAGENET),
    },
    'data': {'source': {'name': 'none'}, 'image': image_config(encoder['image_size'], 'bilinear')},
  }


def image_config(side: int, interpolation: str) -> dict[str, Any]:
  """The transform of images that fit into a square of `side` pixels."""
  return {'name': 'resize_pad', 'size': side, 'fill': BLACK, 'interpolation': interpolation}
