"""Maps configuration files of diffusers to our configs, for one network or for a pipeline folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fmcv_jax.diffusion.process import STEPS
from fmcv_jax.errors import UserError, did_you_mean
from fmcv_jax.models.common.conv_blocks import groups_of
from fmcv_jax.models.generative.unet import UNet
from fmcv_jax.pretrained import hub_transformers
from fmcv_jax.pretrained.export_diffusers import PREDICTIONS
from fmcv_jax.pretrained.hub_file import UNSET, Findings, Has, HubFile, Sets, Table, opened

# (beta_schedule, rescale_betas_zero_snr) -> our schedule, and the first and last beta that it has.
_SCHEDULES: dict[tuple[str, bool], tuple[str, tuple[float, float] | None]] = {
  ('linear', False): ('linear', (1e-4, 0.02)),
  ('scaled_linear', False): ('scaled_linear', (0.00085, 0.012)),
  ('scaled_linear', True): ('zero_snr', (0.00085, 0.012)),
  ('squaredcos_cap_v2', False): ('cosine', None),
}
_CODER_PATH = 'objective.latent_space.autoencoder'
IGNORED = (
  r'_.*|sample_size|upcast_attention|force_upcast|dropout|decay|inv_gamma|min_decay|optimization_step|power|update_.*',
  r'addition_time_embed_dim|addition_embed_type_num_heads|latents_(mean|std)_',
)
# Sampler settings, which are arguments of `generate` and do not affect the network.
_SAMPLING = (
  r'clip_sample.*|set_alpha_to_one|steps_offset|thresholding|dynamic_thresholding_ratio|sample_max_value|skip_prk_steps',
  r'variance_type|solver_.*|algorithm_type|lower_order_final|euler_at_final|use_(karras|exponential|beta|lu)_.*|sigma_.*',
  r'final_sigmas_type|interpolation_type|timestep_type|lambda_min_clipped|predict_x0|disable_corrector|use_flow_sigmas',
  r'flow_shift|use_dynamic_shifting|time_shift_type|original_inference_steps|timestep_scaling|shift_terminal|noise_.*',
)


def _constants(**values: Any) -> Table:
  """Keys that our networks support only at the library's defaults."""
  return {key: Has(value, value) for key, value in values.items()}


_DOWN: Table = {
  **_constants(
    flip_sin_to_cos=True,
    freq_shift=0,
    only_cross_attention=False,
    downsample_padding=1,
    mid_block_scale_factor=1,
    mid_block_type='UNetMidBlock2DCrossAttn',
    act_fn='silu',
    resnet_time_scale_shift='default',
  ),
  'norm_num_groups': Has(lambda network: _groups(network.config.block_out_channels), 32),
  'norm_eps': Has(lambda network: network.config.eps, 1e-5),
  'block_out_channels': Has(lambda network: network.config.block_out_channels),
  'cross_attention_dim': Has(lambda network: network.config.cross_attention_dim, 1280),
  'layers_per_block': Has(lambda network: network.config.layers, 2),
  'in_channels': Has(lambda network: network.channels + network.extra_in_channels, 4),
}
_UNET: Table = {
  **_DOWN,
  **_constants(
    center_input_sample=False,
    dual_cross_attention=False,
    resnet_skip_time_act=False,
    resnet_out_scale_factor=1.0,
    time_embedding_type='positional',
    conv_in_kernel=3,
    conv_out_kernel=3,
    attention_type='default',
    class_embeddings_concat=False,
  ),
  'out_channels': Has(lambda network: network.out_channels, 4),
}
_CONTROL: Table = {
  **_DOWN,
  **_constants(
    conditioning_channels=3,
    controlnet_conditioning_channel_order='rgb',
    global_pool_conditions=False,
  ),
}
# Keys that are None if a UNet does not have the part.
_ABSENT = (
  'reverse_transformer_layers_per_block',
  'encoder_hid_dim',
  'encoder_hid_dim_type',
  'class_embed_type',
  'addition_embed_type',
  'num_class_embeds',
  'time_embedding_dim',
  'time_embedding_act_fn',
  'timestep_post_act',
  'time_cond_proj_dim',
  'projection_class_embeddings_input_dim',
  'mid_block_only_cross_attention',
  'cross_attention_norm',
)
_CODER: Table = {
  **_constants(in_channels=3, out_channels=3, act_fn='silu'),
  'norm_num_groups': Has(lambda network: _groups(network.channels), 32),
  'block_out_channels': Has(lambda network: network.channels),
  'layers_per_block': Has(lambda network: network.layers),
  'latent_channels': Has(lambda network: network.latent_channels, 4),
  'mid_block_add_attention': Sets('middle_attention', True),
  'use_quant_conv': Has(lambda network: network.quantize, True),
  'use_post_quant_conv': Has(lambda network: network.quantize, True),
}
_DIT: Table = {
  **_constants(norm_elementwise_affine=False, norm_type='ada_norm_zero', attention_bias=True),
  'num_attention_heads': Sets('num_heads', 16),
  'num_layers': Has(lambda network: network.depth),
  'patch_size': Has(lambda network: network.patch_size, 2),
  'in_channels': Has(lambda network: network.channels, 4),
  'out_channels': Has(lambda network: network.out_channels),
  'num_embeds_ada_norm': Has(lambda network: network.num_classes, 1000),
  'activation_fn': Has('gelu-approximate', 'gelu-approximate'),
}


def read(folder: Path, config: dict[str, Any], objective: Any, findings: Findings) -> None:
  """Reads the files of a folder of one network, or of a pipeline, whose parts have folders of their own."""
  network = config['objective']['network']['name']
  path = 'objective.network'
  if network == 'autoencoder':
    if file := opened(folder / 'config.json', 'config.json', findings):
      _coder(file, path, objective.network)
      _image_size(file, f'{path}.image_size', 1)
    return
  if network == 'dit':
    if file := opened(folder / 'config.json', 'config.json', findings):
      file.apply(_DIT, path, objective.network)
      if isinstance(side := file.get('sample_size', 32), int):
        findings.overrides[f'{path}.image_size'] = side
        findings.overrides[f'{_CODER_PATH}.image_size'] = side * objective.latent_space.autoencoder.factor
      width = file.get('num_attention_heads', 16) * file.get('attention_head_dim', 72)
      file.agree('attention_head_dim', width, objective.network.width)
      if file.get('norm_eps', 1e-5) > 1e-5:
        raise file.refusal('norm_eps', file.get('norm_eps'), '1e-06')
      file.done((*IGNORED, 'norm_num_groups'))
  else:
    _unet(folder, objective, findings)
  root = folder if (folder / 'scheduler').is_dir() else folder.parent
  if file := opened(root / 'scheduler' / 'scheduler_config.json', 'scheduler_config.json', findings):
    _scheduler(file)
  if file := opened(folder / 'vae' / 'config.json', 'vae/config.json', findings):
    _coder(file, _CODER_PATH, objective.latent_space.autoencoder, scale='objective.latent_space.scale')
  if objective.text_condition.encoder is not None and (
    file := opened(folder / 'text_encoder' / 'config.json', 'text_encoder/config.json', findings)
  ):
    hub_transformers.text_tower(file, 'objective.text_condition.encoder', objective.text_condition.encoder)


def _unet(folder: Path, objective: Any, findings: Findings) -> None:
  inner = folder / 'unet' / 'config.json'
  file = opened(inner, 'unet/config.json', findings) or opened(folder / 'config.json', 'config.json', findings)
  if file is None:
    return
  network: UNet = objective.network
  control = file.get('_class_name') == 'ControlNetModel' or objective.image_condition.control is not None
  path = 'objective.network'
  file.apply(_CONTROL if control else _UNET, path, network)
  for key in _ABSENT:
    if (value := file.get(key)) is not None:
      raise file.refusal(key, value, 'none')
  levels = len(network.config.block_out_channels)
  _heads(file, path, levels)
  depths, kinds = network.config.depths, file.get('down_block_types', UNSET)
  if kinds is not None:
    file.agree('down_block_types', kinds, ['CrossAttnDownBlock2D' if depth else 'DownBlock2D' for depth in depths])
  kinds = file.get('up_block_types')
  if kinds is not None and not control:
    ours = ['CrossAttnUpBlock2D' if depth else 'UpBlock2D' for depth in reversed(depths)]
    file.agree('up_block_types', kinds, ours)
  layers = file.get('transformer_layers_per_block', 1)
  for said, depth in zip(layers if isinstance(layers, (list, tuple)) else (layers,) * levels, depths, strict=False):
    if depth and said != depth:
      raise file.refusal('transformer_layers_per_block', layers, str(list(depths)))
  file.get('use_linear_projection', False)  # shows in the shapes of its arrays
  file.get('conditioning_embedding_out_channels')
  coder = objective.latent_space.autoencoder
  side = file.values.get('sample_size')
  if isinstance(side, int):
    file.get('sample_size')
    findings.overrides[f'{path}.image_size'] = side
    if coder is not None:
      findings.overrides[f'{_CODER_PATH}.image_size'] = side * coder.factor
  file.done(IGNORED)


def _groups(widths: Sequence[int]) -> Any:
  groups = {groups_of(width) for width in widths}
  return groups.pop() if len(groups) == 1 else tuple(groups)


def _heads(file: HubFile, path: str, levels: int) -> None:
  """diffusers calls the number of heads `attention_head_dim`, and refuses `num_attention_heads`."""
  if 'num_attention_heads' in file:
    raise file.refusal('num_attention_heads', file.get('num_attention_heads'), 'attention_head_dim, as diffusers does')
  heads = file.get('attention_head_dim', 8)
  heads = tuple(heads) if isinstance(heads, (list, tuple)) else (heads,) * levels
  file.set(f'{path}.num_heads', heads)


def _coder(file: HubFile, path: str, network: Any, scale: str | None = None) -> None:
  file.apply(_CODER, path, network)
  for key, kind in (('down_block_types', 'DownEncoderBlock2D'), ('up_block_types', 'UpDecoderBlock2D')):
    if (kinds := file.get(key)) is not None:
      file.agree(key, kinds, [kind] * len(network.channels))
  factor = file.get('scaling_factor', 0.18215)
  if scale:
    file.set(scale, float(factor))
  for key in ('shift_factor', 'latents_mean', 'latents_std'):
    if file.get(key):
      raise file.refusal(key, file.get(key), 'none: latents are scaled, and not moved')
  if scale:
    file.done(IGNORED)


def _image_size(file: HubFile, path: str, factor: int) -> None:
  if isinstance(side := file.get('sample_size'), int):
    file.set(path, side * factor)
  file.done(IGNORED)


def _scheduler(file: HubFile) -> None:
  """Reads the diffusion process of training: betas, their rescaling, and the prediction type."""
  kind = str(file.get('_class_name', ''))
  if 'FlowMatch' in kind or 'EDM' in kind:
    raise UserError(f'{file.shown}: _class_name is {kind}, but these networks go through a table of betas')
  file.agree('num_train_timesteps', file.get('num_train_timesteps', STEPS), STEPS)
  if file.get('trained_betas') is not None:
    raise file.refusal('trained_betas', file.get('trained_betas'), 'a named schedule')
  name, zero = file.get('beta_schedule', 'linear'), bool(file.get('rescale_betas_zero_snr', False))
  if (name, zero) not in _SCHEDULES:
    known = ', '.join(f'{one}{" with rescale_betas_zero_snr" if other else ""}' for one, other in _SCHEDULES)
    key = 'rescale_betas_zero_snr' if zero else 'beta_schedule'
    raise file.refusal(key, zero or name, f'one of {known}')
  ours, betas = _SCHEDULES[name, zero]
  for key, usual, beta in zip(('beta_start', 'beta_end'), (1e-4, 0.02), betas or (None, None), strict=True):
    if beta is not None:
      file.agree(key, file.get(key, usual), beta)
    else:
      file.get(key)
  file.set('objective.process.schedule', ours)
  prediction = file.get('prediction_type', 'epsilon')
  named = {theirs: own for own, theirs in PREDICTIONS.items()}
  if prediction not in named:
    raise UserError(f'{file.shown}: prediction_type is {prediction!r}; {did_you_mean(prediction, named)}')
  file.set('objective.process.prediction', named[prediction])
  if spacing := file.get('timestep_spacing'):
    file.findings.assumed.append(f'`generate` spaces its steps by --spacing, and not as {file.shown} says: {spacing}')
  file.done((*IGNORED, *_SAMPLING))
