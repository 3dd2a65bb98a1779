"""SAM's config.json and image processor, as transformers reads them."""

from typing import Any

from fmcv_jax.data.transforms import ImageTransform, ResizePad
from fmcv_jax.errors import UserError
from fmcv_jax.models.dense.sam import Sam
from fmcv_jax.models.dense.sam_encoder import GROUPS

Files = dict[str, Any]


def files(network: Sam, image: ImageTransform | None, normalize: Any, activation: str) -> Files:
  """config.json and preprocessor_config.json; `activation` is the library's name of that of the encoder."""
  encoder, decoder, size = network.encoder, network.decoder_block, network.encoder.depth // GROUPS
  if image is not None and not (isinstance(image, ResizePad) and image.size == encoder.image_size):
    raise UserError('transformers pads the images of SAM to a square at the right or bottom: data.image=resize_pad')
  shared = {'image_size': encoder.image_size, 'patch_size': encoder.patch_size}
  vision = {
    'model_type': 'sam_vision_model',
    'hidden_size': encoder.width,
    'output_channels': encoder.channels,
    'num_hidden_layers': encoder.depth,
    'num_attention_heads': encoder.block.num_heads,
    'num_channels': 3,
    **shared,
    'hidden_act': activation,
    'layer_norm_eps': encoder.block.eps,
    'qkv_bias': encoder.block.qkv_bias,
    'window_size': encoder.window,
    'global_attn_indexes': [size * (group + 1) - 1 for group in range(GROUPS)],
    'num_pos_feats': encoder.channels // 2,
    'mlp_dim': encoder.block.mlp_dim,
  }
  own = {
    'model_type': 'sam_mask_decoder',
    'hidden_size': encoder.channels,
    'mlp_dim': decoder.mlp_dim,
    'num_attention_heads': decoder.num_heads,
    'iou_head_hidden_dim': network.iou_hidden,
    'layer_norm_eps': decoder.eps,
  }
  config = {
    'model_type': 'sam',
    'architectures': ['SamModel'],
    'vision_config': vision,
    'prompt_encoder_config': {'model_type': 'sam_prompt_encoder', 'hidden_size': encoder.channels, **shared},
    'mask_decoder_config': own,
  }
  side = encoder.image_size
  processor = {
    'image_processor_type': 'SamImageProcessor',
    'processor_class': 'SamProcessor',
    'size': {'longest_edge': side},
    'pad_size': {'height': side, 'width': side},
    'mask_size': {'longest_edge': 4 * encoder.side},
    'mask_pad_size': {'height': 4 * encoder.side, 'width': 4 * encoder.side},
    'do_resize': True,
    'do_pad': True,
    'resample': 2,
    'do_rescale': True,
    'rescale_factor': 1 / 255,
    'do_normalize': True,
    'image_mean': list(normalize.mean),
    'image_std': list(normalize.std),
  }
  return {'config.json': config, 'preprocessor_config.json': processor}
