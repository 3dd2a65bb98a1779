"""Writes the config files of diffusers for networks, schedulers and pipelines, so that `from_pretrained` loads them."""

from collections.abc import Sequence
from typing import Any

from fmcv_jax.data.tokenizers import Tokenizer
from fmcv_jax.diffusion.process import STEPS, Process
from fmcv_jax.errors import UserError
from fmcv_jax.models.common.conv_blocks import groups_of
from fmcv_jax.models.generative.autoencoder import Autoencoder
from fmcv_jax.models.generative.controlnet import controlnet
from fmcv_jax.models.generative.dit import DiT
from fmcv_jax.models.generative.unet import UNet
from fmcv_jax.pretrained import export_transformers
from fmcv_jax.pretrained.export_transformers import Files

_VERSION = {'_diffusers_version': '0.30.0'}  # the oldest whose files these are
PREDICTIONS = {'noise': 'epsilon', 'image': 'sample', 'velocity': 'v_prediction'}
_BETAS: dict[str, dict[str, Any]] = {
  'linear': {'beta_schedule': 'linear', 'beta_start': 1e-4, 'beta_end': 0.02},
  'scaled_linear': {'beta_schedule': 'scaled_linear', 'beta_start': 0.00085, 'beta_end': 0.012},
  'cosine': {'beta_schedule': 'squaredcos_cap_v2'},
  'zero_snr': {
    'beta_schedule': 'scaled_linear',
    'beta_start': 0.00085,
    'beta_end': 0.012,
    'rescale_betas_zero_snr': True,
  },
}


def files(family: str, objective: Any, tokenizer: Tokenizer | None, *, whole: bool) -> Files:
  """All files except the weights, for one network or for a whole pipeline with one folder per part."""
  network = objective.network
  linear = family.endswith(('sd2', 'sd2_velocity'))
  if family == 'sd_vae':
    return {'config.json': coder(network, 1.0)}
  if family == 'dit':
    return {'config.json': transformer(network)}
  if family.startswith('controlnet'):
    base_unet = controlnet(network, objective.latent_space.autoencoder.factor)
    return {'config.json': control(network, base_unet.widths, linear=linear)}
  if not whole:
    return {'config.json': unet(network, linear=linear)}
  filling = bool(network.extra_in_channels)
  pipeline = {
    '_class_name': 'StableDiffusionInpaintPipeline' if filling else 'StableDiffusionPipeline',
    'unet': ['diffusers', 'UNet2DConditionModel'],
    'vae': ['diffusers', 'AutoencoderKL'],
    'text_encoder': ['transformers', 'CLIPTextModel'],
    'tokenizer': ['transformers', 'CLIPTokenizer'],
    'scheduler': ['diffusers', 'DDIMScheduler'],
    'safety_checker': [None, None],
    'feature_extractor': [None, None],
    'requires_safety_checker': False,
  }
  words = {}
  if tokenizer is not None:
    padding = '!' if objective.text_condition.padding == 'zeros' else '<|endoftext|>'
    words = export_transformers.texts(tokenizer, padding)
  return {
    'model_index.json': {**pipeline, **_VERSION},
    'unet/config.json': unet(network, linear=linear),
    'vae/config.json': coder(objective.latent_space.autoencoder, objective.latent_space.scale),
    'text_encoder/config.json': export_transformers.text_tower(objective.text_condition.encoder),
    'scheduler/scheduler_config.json': scheduler(objective.process),
    **{f'tokenizer/{name}': content for name, content in words.items()},
  }


def unet(network: UNet, *, linear: bool) -> dict[str, Any]:
  """config.json of UNet2DConditionModel; `linear`: attention projections are linear layers, not 1 x 1 convolutions."""
  unet = network.config
  return {
    '_class_name': 'UNet2DConditionModel',
    'sample_size': network.image_size,
    'in_channels': network.channels + network.extra_in_channels,
    'out_channels': network.out_channels,
    'up_block_types': ['CrossAttnUpBlock2D' if depth else 'UpBlock2D' for depth in reversed(unet.depths)],
    **_down(network, linear),
  }


def control(network: UNet, hint: Sequence[int], *, linear: bool) -> dict[str, Any]:
  """config.json of ControlNetModel; `hint`: channels of the layers that read the control image."""
  return {
    '_class_name': 'ControlNetModel',
    'in_channels': network.channels,
    'conditioning_embedding_out_channels': list(hint),
    **_down(network, linear),
  }


def _down(network: UNet, linear: bool) -> dict[str, Any]:
  unet = network.config
  return {
    **_VERSION,
    'block_out_channels': list(unet.block_out_channels),
    'down_block_types': ['CrossAttnDownBlock2D' if depth else 'DownBlock2D' for depth in unet.depths],
    'transformer_layers_per_block': [max(1, depth) for depth in unet.depths],
    'layers_per_block': unet.layers,
    'cross_attention_dim': unet.cross_attention_dim,
    'attention_head_dim': list(unet.num_heads),  # in truth the number of heads
    'use_linear_projection': linear,
    'norm_num_groups': groups(unet.block_out_channels),
  }


def groups(widths: Sequence[int]) -> int:
  """Number of groups of all norms; UserError if levels differ, which diffusers does not support."""
  found = {groups_of(width) for width in widths}
  if len(found) > 1:
    raise UserError(
      f'diffusers has one number of groups for all norms, but widths {tuple(widths)} have {sorted(found)}'
    )
  return found.pop()


def coder(network: Autoencoder, scale: float) -> dict[str, Any]:
  """config.json of AutoencoderKL; `scale` is its scaling_factor. UserError for attention that it cannot describe."""
  if any(network.attention):
    raise UserError('diffusers has no autoencoder with attention at some of its levels only')
  levels = len(network.channels)
  return {
    '_class_name': 'AutoencoderKL',
    **_VERSION,
    'in_channels': 3,
    'out_channels': 3,
    'latent_channels': network.latent_channels,
    'norm_num_groups': groups(network.channels),
    'block_out_channels': list(network.channels),
    'down_block_types': ['DownEncoderBlock2D'] * levels,
    'up_block_types': ['UpDecoderBlock2D'] * levels,
    'layers_per_block': network.layers,
    'sample_size': network.image_size,
    'scaling_factor': scale,
    'mid_block_add_attention': network.middle_attention,
    'use_quant_conv': network.quantize,
    'use_post_quant_conv': network.quantize,
  }


def transformer(network: DiT) -> dict[str, Any]:
  """config.json of DiTTransformer2DModel; UserError for images that are not square."""
  if not isinstance(network.image_size, int):
    raise UserError(f'diffusers has DiTs of square images only, not of {network.image_size}')
  return {
    '_class_name': 'DiTTransformer2DModel',
    **_VERSION,
    'num_attention_heads': network.block.num_heads,
    'attention_head_dim': network.width // network.block.num_heads,
    'in_channels': network.channels,
    'out_channels': network.out_channels,
    'num_layers': network.depth,
    'sample_size': network.image_size,
    'patch_size': network.patch_size,
    'num_embeds_ada_norm': network.num_classes,
  }


def scheduler(process: Process) -> dict[str, Any]:
  """scheduler_config.json of DDIMScheduler; UserError for a process that it cannot describe."""
  if process.schedule not in _BETAS or process.prediction not in PREDICTIONS:
    raise UserError(f'no scheduler of Stable Diffusion supports {process.schedule} with {process.prediction}')
  return {
    '_class_name': 'DDIMScheduler',
    **_VERSION,
    **_BETAS[process.schedule],
    'num_train_timesteps': STEPS,
    'prediction_type': PREDICTIONS[process.prediction],
    'clip_sample': False,
    'set_alpha_to_one': False,
    'steps_offset': 1,
  }
