"""Writes transformers' configs of EoMT and its image processor."""

from typing import Any

from fmcv_jax.data.transforms import ImageTransform, ResizePad
from fmcv_jax.errors import UserError

_FILTERS = {'nearest': 0, 'lanczos': 1, 'bilinear': 2, 'bicubic': 3, 'box': 4, 'hamming': 5}  # Pillow's numbers


def files(objective: Any, encoder: dict[str, Any], image: ImageTransform | None) -> dict[str, Any]:
  """config.json and preprocessor_config.json; `encoder`: the config of the ViT as of a DINOv2.

  UserError for a network or preprocessing that transformers' EoMT does not have.
  """
  network = objective.network
  block = network.encoder.stack.block
  if block.gated_mlp or block.activation != 'gelu' or block.layer_scale is None or not block.qkv_bias:
    raise UserError("transformers has EoMT with biases, layer scales and MLPs with GELU: vit's layer_scale=1.0")
  if network.encoder.class_token_has_position or not network.encoder.registers:
    raise UserError('transformers has EoMT with registers, and a class token without a position')
  config = {key: value for key, value in encoder.items() if key != 'qkv_bias'} | {
    'model_type': 'eomt',
    'architectures': ['EomtForUniversalSegmentation'],
    'id2label': {str(number): f'LABEL_{number}' for number in range(network.num_classes)},
    'num_queries': network.queries,
    'num_blocks': network.blocks,
    'num_upscale_blocks': network.upscales,
    'class_weight': objective.class_weight,
    'mask_weight': objective.mask_weight,
    'dice_weight': objective.dice_weight,
    'no_object_weight': objective.no_object_weight,
    'train_num_points': objective.num_points,
    'oversample_ratio': objective.oversample_ratio,
    'importance_sample_ratio': objective.importance_sample_ratio,
  }
  if image is None:
    return {'config.json': config}
  side = network.image_size
  if not (isinstance(image, ResizePad) and image.size == side and image.fill == (0, 0, 0)):
    raise UserError('transformers pads the images of EoMT with black at the right or bottom: data.image=resize_pad')
  processor = {
    'image_processor_type': 'EomtImageProcessor',
    'size': {'shortest_edge': side, 'longest_edge': side},
    'do_resize': True,
    'do_pad': True,
    'do_split_image': False,
    'do_rescale': True,
    'do_normalize': True,
    'resample': _FILTERS[image.interpolation],
    'image_mean': list(objective.normalize.mean),
    'image_std': list(objective.normalize.std),
  }
  return {'config.json': config, 'preprocessor_config.json': processor}
