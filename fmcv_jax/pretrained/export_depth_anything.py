"""Depth Anything's config.json and image processor, as transformers reads them."""

from typing import Any

from fmcv_jax.data.pillow_resize import FILTERS, ResizeToMultiple
from fmcv_jax.data.transforms import ImageTransform
from fmcv_jax.errors import UserError
from fmcv_jax.fields import height_width
from fmcv_jax.models.dense.dpt import FACTORS, Dpt


def config(network: Dpt, backbone: dict[str, Any]) -> dict[str, Any]:
  """config.json; `backbone` is that of the encoder."""
  encoder = network.encoder
  if encoder.registers or not encoder.has_class_token:
    raise UserError('transformers has Depth Anything with a class token and without registers')
  own = {'out_indices': list(network.taps), 'apply_layernorm': True, 'reshape_hidden_states': False}
  metric = network.max_depth is not None
  if metric and network.max_depth != int(network.max_depth or 0):
    raise UserError(f'transformers has whole meters for max_depth, not {network.max_depth:g}')
  return {
    'model_type': 'depth_anything',
    'architectures': ['DepthAnythingForDepthEstimation'],
    'backbone_config': {**backbone, **own},
    'patch_size': encoder.patch_size,
    'reassemble_hidden_size': encoder.width,
    'reassemble_factors': list(FACTORS),
    'neck_hidden_sizes': list(network.channels),
    'fusion_hidden_size': network.width,
    'head_in_index': -1,
    'head_hidden_size': network.hidden,
    'depth_estimation_type': 'metric' if metric else 'relative',
    'max_depth': int(network.max_depth or 1),
  }


def images(network: Dpt, image: ImageTransform | None, normalize: Any) -> dict[str, Any]:
  """preprocessor_config.json; of a model that was trained with other crops, images scaled to the network's size."""
  if not isinstance(image, ResizeToMultiple):
    image = ResizeToMultiple(network.image_size, network.encoder.patch_size)
  height, width = height_width(image.size)
  return {
    'image_processor_type': 'DPTImageProcessor',
    'do_resize': True,
    'size': {'height': height, 'width': width},
    'ensure_multiple_of': image.multiple,
    'keep_aspect_ratio': image.keep_aspect_ratio,
    'resample': int(FILTERS[image.interpolation]),
    'do_rescale': True,
    'rescale_factor': 1 / 255,
    'do_normalize': True,
    'image_mean': list(normalize.mean),
    'image_std': list(normalize.std),
    'do_pad': False,
  }
