"""SAM's config.json and image processor in transformers."""

from collections.abc import Collection
from typing import Any

from fmcv_jax.models.dense.sam import MASK_HIDDEN, MASKS
from fmcv_jax.models.dense.sam_encoder import GROUPS
from fmcv_jax.pretrained import sam
from fmcv_jax.pretrained.hub_file import ACTIVATION, Has, HubFile, Sets, Table


def _global_blocks(network: Any) -> list[int]:
  size = network.encoder.depth // GROUPS
  return [size * (group + 1) - 1 for group in range(GROUPS)]


_VISION: Table = {
  'hidden_size': Has(lambda network: network.encoder.width, 768),
  'output_channels': Has(lambda network: network.encoder.channels, 256),
  'num_hidden_layers': Has(lambda network: network.encoder.depth, 12),
  'num_attention_heads': Sets('num_heads', 12),
  'num_channels': Has(3, 3),
  'image_size': Has(lambda network: network.encoder.image_size, 1024),
  'patch_size': Has(lambda network: network.encoder.patch_size, 16),
  'hidden_act': Sets('activation', 'gelu', ACTIVATION),
  'layer_norm_eps': Sets('eps', 1e-6, float),
  'qkv_bias': Sets('qkv_bias', True),
  'use_abs_pos': Has(True, True),
  'use_rel_pos': Has(True, True),
  'window_size': Has(lambda network: network.encoder.window, 14),
  'global_attn_indexes': Has(_global_blocks, [2, 5, 8, 11]),
  'num_pos_feats': Has(lambda network: network.encoder.channels // 2, 128),
  'mlp_dim': Has(lambda network: network.encoder.block.mlp_dim),
}
_PROMPT: Table = {
  'hidden_size': Has(lambda network: network.encoder.channels, 256),
  'image_size': Has(lambda network: network.encoder.image_size, 1024),
  'patch_size': Has(lambda network: network.encoder.patch_size, 16),
  'image_embedding_size': Has(lambda network: network.encoder.side),
  'mask_input_channels': Has(MASK_HIDDEN, MASK_HIDDEN),
  'num_point_embeddings': Has(4, 4),
  'hidden_act': Has('gelu', 'gelu'),
  'layer_norm_eps': Has(1e-6, 1e-6),
}
_DECODER: Table = {
  'hidden_size': Has(lambda network: network.encoder.channels, 256),
  'hidden_act': Has('relu', 'relu'),
  'mlp_dim': Has(lambda network: network.decoder_block.mlp_dim, 2048),
  'num_hidden_layers': Has(2, 2),
  'num_attention_heads': Sets('decoder_heads', 8),
  'attention_downsample_rate': Has(2, 2),
  'num_multimask_outputs': Has(MASKS - 1, MASKS - 1),
  'iou_head_depth': Has(3, 3),
  'iou_head_hidden_dim': Has(lambda network: network.iou_hidden, 256),
  'layer_norm_eps': Sets('decoder_eps', 1e-6, float),  # where the original has PyTorch's 1e-5
}


def read(file: HubFile, path: str, network: Any, ignored: Collection[str]) -> None:
  """Sets and compares all of config.json."""
  vision = file.part('vision_config')
  if 'mlp_dim' not in vision:
    vision.agree('mlp_ratio', vision.get('mlp_ratio', 4.0), network.encoder.block.mlp_dim / network.encoder.width)
  vision.get('mlp_ratio')
  for part, table in (
    (vision, _VISION),
    (file.part('prompt_encoder_config'), _PROMPT),
    (file.part('mask_decoder_config'), _DECODER),
  ):
    part.apply(table, path, network)
    part.done((*ignored, 'scale'))


def images(file: HubFile, side: int) -> dict[str, Any]:
  """data.image of its processor."""
  for key in ('do_pad', 'do_resize'):
    if not file.get(key, True):
      raise file.refusal(key, False, 'True')
  pad = {'height': side, 'width': side}
  for key, ours in (('size', {'longest_edge': side}), ('pad_size', pad)):
    value = {name: number for name, number in file.get(key, ours).items() if number is not None}
    if value != ours:
      raise file.refusal(key, value, f'images that are padded to {side} x {side} pixels')
  for key in ('mask_size', 'mask_pad_size', 'do_convert_rgb'):  # of labels
    file.get(key)
  if file.get('resample', 2) != 2:
    raise file.refusal('resample', file.get('resample'), 'bilinear interpolation, 2')
  return sam.image(side)
