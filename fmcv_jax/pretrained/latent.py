"""Latent diffusion as CompVis and as diffusers name it: Stable Diffusion's UNet, autoencoder and text tower; DiT.

Both count the levels of a network's way up from the lowest resolution, or hide them in one number, and we from the
highest; so a layout is of one number of levels.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from fmcv_jax.errors import UserError
from fmcv_jax.models import autoencoder, dit, unet
from fmcv_jax.models.positions import sincos_2d
from fmcv_jax.pretrained import pairs
from fmcv_jax.pretrained.layout import (
  LINEAR,
  SAME,
  Layout,
  Row,
  Shape,
  below,
  convolution,
  fused,
  linear,
  norm,
  point,
  spatial,
)

LEVELS = range(2, 7)  # how many the layouts are made for,
UNET_LEVELS = range(2, 5)
LAYERS = range(4)  # and how many blocks of a level at most
Rows = tuple[Row, ...]

_DIFFUSERS = ('norm1', 'conv1', 'time_emb_proj', 'norm2', 'conv2', 'conv_shortcut')
_COMPVIS = ('in_layers.0', 'in_layers.2', 'emb_layers.1', 'out_layers.0', 'out_layers.3', 'skip_connection')
_COMPVIS_CODER = ('norm1', 'conv1', 'temb_proj', 'norm2', 'conv2', 'nin_shortcut')


def _block(ours: str, theirs: str, names: tuple[str, ...]) -> Rows:
  norm1, conv1, time, norm2, conv2, shortcut = (f'{theirs}.{name}' for name in names)
  return (
    *norm(f'{ours}/norm1', norm1),
    *spatial(f'{ours}/conv1', conv1),
    *linear(f'{ours}/modulation', time),
    *norm(f'{ours}/norm2', norm2),
    *spatial(f'{ours}/conv2', conv2),
    *point(f'{ours}/shortcut', shortcut),
  )


def _attention(ours: str, theirs: str, names: tuple[str, ...], project: Callable[[str, str], Rows]) -> Rows:
  """Of pixels among themselves; names of the norm, then of query, key, value and output."""
  parts = zip(('query', 'key', 'value', 'out'), names[1:], strict=True)
  rows = (row for part, name in parts for row in project(f'{ours}/attention/{part}', f'{theirs}.{name}'))
  return (*norm(f'{ours}/norm', f'{theirs}.{names[0]}'), *rows)


def _transformer(ours: str, theirs: str, project: Callable[[str, str], Rows]) -> Rows:
  own, block = f'{ours}/blocks', f'{theirs}.transformer_blocks.{{i}}'

  def attention(name: str, said: str) -> Rows:
    parts = {'query': 'to_q', 'key': 'to_k', 'value': 'to_v'}
    kernels = (Row(f'{own}/{name}/{part}/kernel', f'{block}.{said}.{to}.weight', LINEAR) for part, to in parts.items())
    return (*kernels, *linear(f'{own}/{name}/out', f'{block}.{said}.to_out.0'))

  return (
    *norm(f'{ours}/norm', f'{theirs}.norm'),
    *project(f'{ours}/enter', f'{theirs}.proj_in'),
    *norm(f'{own}/norm1', f'{block}.norm1'),
    *attention('attention', 'attn1'),
    *norm(f'{own}/cross_norm', f'{block}.norm2'),
    *attention('cross_attention', 'attn2'),
    *norm(f'{own}/norm2', f'{block}.norm3'),
    # The value's half comes before the gate's.
    *(Row(f'{own}/mlp/{part}/kernel', f'{block}.ff.net.0.proj.weight', LINEAR) for part in ('up', 'gate')),
    *(Row(f'{own}/mlp/{part}/bias', f'{block}.ff.net.0.proj.bias') for part in ('up', 'gate')),
    *linear(f'{own}/mlp/down', f'{block}.ff.net.2'),
    *project(f'{ours}/leave', f'{theirs}.proj_out'),
  )


def unet_encoder(levels: int, project: Callable[[str, str], Rows] = point) -> Rows:
  """diffusers' names of the way down; `project` is next to the transformers: Stable Diffusion 1 has `point`."""
  rows = [
    *spatial('conv_in', 'conv_in'),
    *linear('time_embedding/hidden1', 'time_embedding.linear_1'),
    *linear('time_embedding/hidden2', 'time_embedding.linear_2'),
    *_block('middle_block0', 'mid_block.resnets.0', _DIFFUSERS),
    *_transformer('middle_attention0', 'mid_block.attentions.0', project),
    *_block('middle_block1', 'mid_block.resnets.1', _DIFFUSERS),
  ]
  for level in range(levels):
    rows += spatial(f'down{level}_down/conv', f'down_blocks.{level}.downsamplers.0.conv')
    for layer in LAYERS:
      rows += _block(f'down{level}_block{layer}', f'down_blocks.{level}.resnets.{layer}', _DIFFUSERS)
      rows += _transformer(f'down{level}_attention{layer}', f'down_blocks.{level}.attentions.{layer}', project)
  return tuple(rows)


def unet_diffusers(levels: int, project: Callable[[str, str], Rows] = point) -> Rows:
  rows = [*norm('norm', 'conv_norm_out'), *spatial('conv_out', 'conv_out')]
  for level in range(levels):
    up = f'up_blocks.{levels - 1 - level}'
    rows += spatial(f'up{level}_up/conv', f'{up}.upsamplers.0.conv')
    for layer in LAYERS:
      rows += _block(f'up{level}_block{layer}', f'{up}.resnets.{layer}', _DIFFUSERS)
      rows += _transformer(f'up{level}_attention{layer}', f'{up}.attentions.{layer}', project)
  return (*below('encoder', unet_encoder(levels, project)), *below('decoder', rows))


def unet_compvis(levels: int, project: Callable[[str, str], Rows] = point) -> Rows:
  """Two blocks a level, and no attention at the lowest but in the middle: Stable Diffusion 1 and 2."""
  down = [
    *spatial('conv_in', 'input_blocks.0.0'),
    *linear('time_embedding/hidden1', 'time_embed.0'),
    *linear('time_embedding/hidden2', 'time_embed.2'),
    *_block('middle_block0', 'middle_block.0', _COMPVIS),
    *_transformer('middle_attention0', 'middle_block.1', project),
    *_block('middle_block1', 'middle_block.2', _COMPVIS),
  ]
  up = [*norm('norm', 'out.0'), *spatial('conv_out', 'out.2')]
  for level in range(levels):
    attends = level < levels - 1
    for layer in range(2):
      theirs = f'input_blocks.{1 + 3 * level + layer}'
      down += _block(f'down{level}_block{layer}', f'{theirs}.0', _COMPVIS)
      down += _transformer(f'down{level}_attention{layer}', f'{theirs}.1', project) if attends else ()
    down += spatial(f'down{level}_down/conv', f'input_blocks.{3 + 3 * level}.0.op')
    first = 3 * (levels - 1 - level)
    for layer in range(3):
      up += _block(f'up{level}_block{layer}', f'output_blocks.{first + layer}.0', _COMPVIS)
      up += _transformer(f'up{level}_attention{layer}', f'output_blocks.{first + layer}.1', project) if attends else ()
    up += spatial(f'up{level}_up/conv', f'output_blocks.{first + 2}.{2 if attends else 1}.conv')
  return (*below('encoder', down), *below('decoder', up))


def coder_diffusers(levels: int, *, old: bool = False) -> Rows:
  """`old`: the names of attention in files of before diffusers 0.15, such as those of Stable Diffusion 1."""
  names = ('group_norm', 'query', 'key', 'value', 'proj_attn')
  names = names if old else ('group_norm', 'to_q', 'to_k', 'to_v', 'to_out.0')

  def half(ways: str, numbers: list[int], change: str, said: str) -> Iterator[Row]:
    yield from _half('mid_block.resnets.0', 'mid_block.attentions.0', 'mid_block.resnets.1', _DIFFUSERS, names, linear)
    yield from norm('norm', 'conv_norm_out')
    for level, number in enumerate(numbers):
      yield from spatial(f'level{level}_{change}/conv', f'{ways}.{number}.{said}.0.conv')
      for layer in LAYERS:
        yield from _block(f'level{level}_block{layer}', f'{ways}.{number}.resnets.{layer}', _DIFFUSERS)
        attends = f'level{level}_attention{layer}', f'{ways}.{number}.attentions.{layer}'
        yield from _attention(*attends, names, linear)

  count = list(range(levels))
  return _coder(half('down_blocks', count, 'down', 'downsamplers'), half('up_blocks', count[::-1], 'up', 'upsamplers'))


def coder_compvis(levels: int) -> Rows:
  names = ('norm', 'q', 'k', 'v', 'proj_out')

  def half(ways: str, said: str) -> Iterator[Row]:
    yield from _half('mid.block_1', 'mid.attn_1', 'mid.block_2', _COMPVIS_CODER, names, point)
    yield from norm('norm', 'norm_out')
    for level in range(levels):
      yield from spatial(f'level{level}_{ways}/conv', f'{ways}.{level}.{said}.conv')
      for layer in LAYERS:
        yield from _block(f'level{level}_block{layer}', f'{ways}.{level}.block.{layer}', _COMPVIS_CODER)
        yield from _attention(f'level{level}_attention{layer}', f'{ways}.{level}.attn.{layer}', names, point)

  return _coder(half('down', 'downsample'), half('up', 'upsample'))


def _half(first: str, between: str, last: str, names: tuple[str, ...], attends: tuple[str, ...], project) -> Rows:
  return (
    *spatial('conv_in', 'conv_in'),
    *_block('middle/block0', first, names),
    *_attention('middle/attention0', between, attends, project),
    *_block('middle/block1', last, names),
  )


def _coder(encoder: Iterator[Row], decoder: Iterator[Row]) -> Rows:
  return (
    *below('encoder', encoder, 'encoder.'),
    *below('encoder', spatial('conv_out', 'conv_out'), 'encoder.'),
    *below('decoder', decoder, 'decoder.'),
    *spatial('conv_out', 'decoder.conv_out'),
    *point('quantize', 'quant_conv'),
    *point('unquantize', 'post_quant_conv'),
  )


# What a file of CompVis holds beside the networks: the noise schedule, averages, what the autoencoder was trained with.
_BESIDE = (
  r'betas|alphas_cumprod.*|sqrt_.*|log_one_minus.*|posterior_.*|lvlb_weights|logvar|scale_factor|model_ema\..*',
  r'(first_stage_model\.)?loss\..*|(first_stage_model\.)?model_ema\..*',
  r'cond_stage_model\..*position_ids',
)
FILES = (
  ('unet.', 'unet/diffusion_pytorch_model.safetensors'),
  ('vae.', 'vae/diffusion_pytorch_model.safetensors'),
  ('text_encoder.', 'text_encoder/model.safetensors'),
)


def coders() -> tuple[tuple[str, Layout], ...]:
  return tuple(
    (format, Layout(below('autoencoder', rows(levels)), ignored=_BESIDE))
    for format, rows in (
      ('diffusers', coder_diffusers),
      ('diffusers', lambda levels: coder_diffusers(levels, old=True)),
      ('compvis', coder_compvis),
    )
    for levels in LEVELS
  )


def stable_diffusion(project: Callable[[str, str], Rows]) -> tuple[tuple[str, Layout], ...]:
  """Folders of diffusers, files of CompVis, and the UNet alone, whose other parts then come by init_from."""
  text = pairs.transformers_text()
  found = []
  for levels in UNET_LEVELS:
    network = below('network', unet_diffusers(levels, project))
    for old in (False, True):
      coder = below('extra/autoencoder', coder_diffusers(levels, old=old))
      for prefix in ('text_model.', ''):
        rows = (*below('', network, 'unet.'), *below('', coder, 'vae.'))
        rows = (*rows, *below('extra/text', text, f'text_encoder.{prefix}'))
        found.append(('diffusers', Layout(rows, ignored=(r'.*position_ids',), files=FILES)))
    found.append(('diffusers', Layout(network)))
    rows = (
      *below('network', unet_compvis(levels, project), 'model.diffusion_model.'),
      *below('extra/autoencoder', coder_compvis(levels), 'first_stage_model.'),
      *below('extra/text', text, 'cond_stage_model.transformer.text_model.'),
    )
    found.append(('compvis', Layout(rows, ignored=_BESIDE)))
  return tuple(found)


def controlnets(project: Callable[[str, str], Rows]) -> tuple[tuple[str, Layout], ...]:
  """diffusers' files, of the ControlNet alone; CompVis-like files hold all that it steers, or not."""
  text, found = pairs.transformers_text(), []
  for levels in UNET_LEVELS:
    own = (
      *below('encoder', unet_encoder(levels, project)),
      *_control('controlnet_cond_embedding.conv_in', 'controlnet_cond_embedding.blocks.{}', range(6)),
      *spatial('hint/conv_out', 'controlnet_cond_embedding.conv_out'),
      *(row for n in range(3 * levels) for row in point(f'zero_{n}', f'controlnet_down_blocks.{n}')),
      *point('zero_middle', 'controlnet_mid_block'),
    )
    found.append(('diffusers', Layout(below('control', own))))
    network = unet_compvis(levels, project)
    own = (
      *(row for row in network if row.ours.startswith('encoder/')),
      *_control('input_hint_block.0', 'input_hint_block.{}', range(2, 14, 2)),
      *spatial('hint/conv_out', 'input_hint_block.14'),
      *(row for n in range(3 * levels) for row in point(f'zero_{n}', f'zero_convs.{n}.0')),
      *point('zero_middle', 'middle_block_out.0'),
    )
    rows = (
      *below('control', own, 'control_model.'),
      *below('extra/network', network, 'model.diffusion_model.'),
      *below('extra/autoencoder', coder_compvis(levels), 'first_stage_model.'),
      *below('extra/text', text, 'cond_stage_model.transformer.text_model.'),
    )
    found.append(('compvis', Layout(rows, ignored=_BESIDE)))
  return tuple(found)


def _control(first: str, pattern: str, numbers: range) -> Rows:
  rows = (row for n, number in enumerate(numbers) for row in spatial(f'hint/conv{n}', pattern.format(number)))
  return (*spatial('hint/conv_in', first), *rows)


def dit_original() -> Layout:
  block = 'blocks.{i}'
  rows = (
    Row('patch/kernel', 'x_embedder.proj.weight', convolution(4)),
    Row('patch/bias', 'x_embedder.proj.bias'),
    *linear('time_embedding/hidden1', 't_embedder.mlp.0'),
    *linear('time_embedding/hidden2', 't_embedder.mlp.2'),
    Row('classes/embedding', 'y_embedder.embedding_table.weight'),
    *fused('blocks/attention', f'{block}.attn.qkv.'),
    *linear('blocks/attention/out', f'{block}.attn.proj'),
    *linear('blocks/mlp/up', f'{block}.mlp.fc1'),
    *linear('blocks/mlp/down', f'{block}.mlp.fc2'),
    *linear('blocks/modulation', f'{block}.adaLN_modulation.1'),
    *linear('modulation', 'final_layer.adaLN_modulation.1'),
    *linear('head', 'final_layer.linear'),
  )
  return Layout(below('network', rows), fixed=(('pos_embed', _positions),))


def dit_diffusers() -> Layout:
  """Here every block has a copy of what embeds time and class."""
  block, told = 'transformer_blocks.{i}', 'transformer_blocks.{*}.norm1.emb'
  parts = {'query': 'to_q', 'key': 'to_k', 'value': 'to_v', 'out': 'to_out.0'}
  rows = (
    Row('patch/kernel', 'pos_embed.proj.weight', convolution(4)),
    Row('patch/bias', 'pos_embed.proj.bias'),
    *linear('time_embedding/hidden1', f'{told}.timestep_embedder.linear_1'),
    *linear('time_embedding/hidden2', f'{told}.timestep_embedder.linear_2'),
    Row('classes/embedding', f'{told}.class_embedder.embedding_table.weight', SAME),
    *(row for ours, name in parts.items() for row in linear(f'blocks/attention/{ours}', f'{block}.attn1.{name}')),
    *linear('blocks/mlp/up', f'{block}.ff.net.0.proj'),
    *linear('blocks/mlp/down', f'{block}.ff.net.2'),
    *linear('blocks/modulation', f'{block}.norm1.linear'),
    *linear('modulation', 'proj_out_1'),
    *linear('head', 'proj_out_2'),
  )
  return Layout(below('network', rows))


def _positions(network: Any) -> np.ndarray:
  side = network.image_size // network.patch
  return np.asarray(sincos_2d(side, side, network.width), np.float32)[None]


def coder_network(shapes: Mapping[str, Shape]) -> dict[str, Any]:
  """The autoencoder that has these parameters, as a config."""
  levels = _count(shapes, 'encoder/level{}_block0/norm1/scale')
  channels = tuple(shapes[f'encoder/level{level}_block0/conv1/kernel'][-1] for level in range(levels))
  layers = _count(shapes, 'encoder/level0_block{}/norm1/scale')
  latent, quantize = shapes['decoder/conv_in/kernel'][-2], 'quantize/kernel' in shapes
  attention = tuple(level for level in range(levels) if f'encoder/level{level}_attention0/norm/scale' in shapes)
  numbers = (channels, layers, latent, attention, quantize)
  for name, size in autoencoder.SIZES.items():
    if size == numbers:
      return {'name': 'autoencoder', 'variant': name}
  if attention:
    raise UserError(f'an autoencoder of {channels} channels with attention at levels {attention} is none of the known')
  variant = 'kl-f8' if quantize else 'f8-16ch'
  return {'name': 'autoencoder', 'variant': variant, 'channels': channels, 'layers': layers, 'latent': latent}


def unet_network(shapes: Mapping[str, Shape], like: str) -> dict[str, Any]:
  """The UNet with words that has these parameters, as a config; heads are those of the size `like`."""
  levels = _count(shapes, 'encoder/down{}_block0/norm1/scale')
  widths = tuple(shapes[f'encoder/down{level}_block0/conv1/kernel'][-1] for level in range(levels))
  norms = (f'encoder/down{level}_attention0/blocks/norm1/scale' for level in range(levels))
  depths = tuple(shapes[path][0] if path in shapes else 0 for path in norms)
  layers = _count(shapes, 'encoder/down0_block{}/norm1/scale')
  context = shapes['encoder/middle_attention0/blocks/cross_attention/key/kernel'][-2]
  inputs = shapes['encoder/conv_in/kernel'][-2]
  outputs = shapes.get('decoder/conv_out/kernel', (inputs,))[-1]
  network: dict[str, Any] = {'name': 'unet', 'variant': like}
  for name, size in unet.SIZES.items():
    if (size.widths, size.depths, size.context) == (widths, depths, context):
      network['variant'] = name
      break
  else:
    network |= {'widths': widths, 'depths': depths, 'context': context, 'channels': outputs}
  network |= {'layers': layers} if layers != 2 else {}
  return network | ({'beside': inputs - outputs} if inputs != outputs else {})


def sd_config(
  like: str, activation: str, padding: str, prediction: str = 'noise'
) -> Callable[[Mapping[str, Shape]], dict[str, Any]]:
  """Stable Diffusion's numbers beside the shapes: pictures of 8 times the latent's side, latents scaled to variance 1.

  What a file does not hold, as one of a UNet alone, is that of Stable Diffusion 1.
  """

  def config(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    control = _part(shapes, 'control/')
    network = unet_network(_part(shapes, 'network/') or control, like)
    coder, text = _part(shapes, 'extra/autoencoder/'), _part(shapes, 'extra/text/')
    numbers: dict[str, Any] = {'vocab_size': 49_408, 'length': 77, 'width': 768, 'depth': 12, 'heads': 12}
    if text:
      numbers = pairs.text_numbers(text)
    decoder = coder_network(coder) if coder else {'name': 'autoencoder', 'variant': 'kl-f8'}
    channels = decoder.get('channels', autoencoder.SIZES[decoder['variant']][0])
    side = unet.SIZES[network['variant']].image_size * 2 ** (len(channels) - 1)
    objective: dict[str, Any] = {
      'name': 'diffusion',
      'network': network,
      'autoencoder': decoder | {'image_size': side},
      'latent_scale': 0.18215,
      'text': {'name': 'text_transformer', 'activation': activation, **numbers},
      'padding': padding,
      'process': {'schedule': 'scaled_linear', 'prediction': prediction},
    }
    if 'beside' in network:
      objective['holes'] = {}
    if control:
      objective['control'] = {'name': 'edges'}
    return {'objective': objective, 'tokenizer': {'name': 'clip_bpe', 'length': numbers['length']}}

  return config


def coder_config(shapes: Mapping[str, Shape]) -> dict[str, Any]:
  network = coder_network(_part(shapes, 'autoencoder/'))
  return {'objective': {'name': 'autoencoding', 'network': network, 'adversarial': 0.0}}


def dit_config(shapes: Mapping[str, Shape]) -> dict[str, Any]:
  """Told classes, in latents of kl-f8, with a learned variance (Peebles & Xie 2023); 256 pixels where no file tells."""
  own = _part(shapes, 'network/')
  (rows, width), depth = own['patch/kernel'], own['blocks/modulation/bias'][0]
  patch = math.isqrt(rows // 4)
  size = next((name for name, numbers in dit.SIZES.items() if numbers[:2] == (width, depth)), None)
  network: dict[str, Any] = {'name': 'dit', 'variant': f'{size or "B"}/{patch}'}
  if size is None:
    network |= {'width': width, 'depth': depth, 'heads': max(1, width // 64)}
  places = shapes.get('fixed/pos_embed', (1, (32 // patch) ** 2, width))[1]
  outputs, side = own['head/bias'][0] // patch**2, math.isqrt(places) * patch
  network |= {'image_size': side, 'classes': own['classes/embedding'][0] - 1, 'outputs': outputs}
  objective = {
    'name': 'diffusion',
    'network': network,
    'autoencoder': {'name': 'autoencoder', 'variant': 'kl-f8', 'image_size': 8 * side},
    'latent_scale': 0.18215,
    'process': {'schedule': 'linear', 'learned_variance': outputs == 8},
  }
  return {'objective': objective}


def _part(shapes: Mapping[str, Shape], prefix: str) -> dict[str, Shape]:
  return {path.removeprefix(prefix): shape for path, shape in shapes.items() if path.startswith(prefix)}


def _count(shapes: Mapping[str, Shape], pattern: str) -> int:
  return next(number for number in range(1 + len(shapes)) if pattern.format(number) not in shapes)
