"""Layouts of Stable Diffusion 1 and 2, of CompVis and of diffusers: UNet, ControlNets, autoencoder and text tower.

CompVis numbers UNet blocks across levels, and diffusers numbers decoder levels from the lowest resolution, we from the
highest, so each layout has a fixed number of levels.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fmcv_jax.models.generative import unet
from fmcv_jax.models.generative.autoencoder import SIZES as CODERS
from fmcv_jax.pretrained import autoencoder, clip
from fmcv_jax.pretrained.autoencoder import DIFFUSERS, LAYERS, NON_NETWORK, block
from fmcv_jax.pretrained.layout import (
  QKV,
  Layout,
  Project,
  Rows,
  Shape,
  fused,
  layer_rows,
  linear,
  matrix,
  norm,
  point,
  spatial,
  with_prefix,
)
from fmcv_jax.pretrained.shape_inference import count, part

LEVELS = range(2, 5)  # how many the layouts are made for
_COMPVIS = ('in_layers.0', 'in_layers.2', 'emb_layers.1', 'out_layers.0', 'out_layers.3', 'skip_connection')


def _transformer(ours: str, theirs: str, project: Project) -> Rows:
  own, block = f'{ours}/blocks', f'{theirs}.transformer_blocks.{{i}}'

  def attention(name: str, said: str) -> Rows:
    kernels = layer_rows(f'{own}/{name}', f'{block}.{said}', {part: f'to_{part[0]}' for part in QKV}, matrix)
    return (*kernels, *linear(f'{own}/{name}/out', f'{block}.{said}.to_out.0'))

  return (
    *norm(f'{ours}/norm', f'{theirs}.norm'),
    *project(f'{ours}/enter', f'{theirs}.proj_in'),
    *norm(f'{own}/norm1', f'{block}.norm1'),
    *attention('attention', 'attn1'),
    *norm(f'{own}/cross_norm', f'{block}.norm2'),
    *attention('cross_attention', 'attn2'),
    *norm(f'{own}/norm2', f'{block}.norm3'),
    *fused(f'{own}/mlp', f'{block}.ff.net.0.proj.', ('up', 'gate')),  # the value's half before the gate's
    *linear(f'{own}/mlp/down', f'{block}.ff.net.2'),
    *project(f'{ours}/leave', f'{theirs}.proj_out'),
  )


def encoder(levels: int, project: Project = point) -> Rows:
  """Encoder layout of diffusers; `project` is next to the transformers: Stable Diffusion 1 has `point`."""
  rows = [
    *spatial('conv_in', 'conv_in'),
    *linear('time_embedding/hidden1', 'time_embedding.linear_1'),
    *linear('time_embedding/hidden2', 'time_embedding.linear_2'),
    *block('middle_block0', 'mid_block.resnets.0', DIFFUSERS),
    *_transformer('middle_attention0', 'mid_block.attentions.0', project),
    *block('middle_block1', 'mid_block.resnets.1', DIFFUSERS),
  ]
  for level in range(levels):
    rows += spatial(f'down{level}_down/conv', f'down_blocks.{level}.downsamplers.0.conv')
    for layer in LAYERS:
      rows += block(f'down{level}_block{layer}', f'down_blocks.{level}.resnets.{layer}', DIFFUSERS)
      rows += _transformer(f'down{level}_attention{layer}', f'down_blocks.{level}.attentions.{layer}', project)
  return tuple(rows)


def diffusers(levels: int, project: Project = point) -> Rows:
  """Rows of UNet2DConditionModel with that many levels; `project`: its attention projections, convolutions by
  default."""
  rows = [*norm('norm', 'conv_norm_out'), *spatial('conv_out', 'conv_out')]
  for level in range(levels):
    up = f'up_blocks.{levels - 1 - level}'
    rows += spatial(f'up{level}_up/conv', f'{up}.upsamplers.0.conv')
    for layer in LAYERS:
      rows += block(f'up{level}_block{layer}', f'{up}.resnets.{layer}', DIFFUSERS)
      rows += _transformer(f'up{level}_attention{layer}', f'{up}.attentions.{layer}', project)
  return (*with_prefix('encoder', encoder(levels, project)), *with_prefix('decoder', rows))


def compvis(levels: int, project: Project = point) -> Rows:
  """Two blocks a level, and no attention at the lowest but in the middle: Stable Diffusion 1 and 2."""
  down = [
    *spatial('conv_in', 'input_blocks.0.0'),
    *linear('time_embedding/hidden1', 'time_embed.0'),
    *linear('time_embedding/hidden2', 'time_embed.2'),
    *block('middle_block0', 'middle_block.0', _COMPVIS),
    *_transformer('middle_attention0', 'middle_block.1', project),
    *block('middle_block1', 'middle_block.2', _COMPVIS),
  ]
  up = [*norm('norm', 'out.0'), *spatial('conv_out', 'out.2')]
  for level in range(levels):
    attends = level < levels - 1
    for layer in range(2):
      theirs = f'input_blocks.{1 + 3 * level + layer}'
      down += block(f'down{level}_block{layer}', f'{theirs}.0', _COMPVIS)
      down += _transformer(f'down{level}_attention{layer}', f'{theirs}.1', project) if attends else ()
    down += spatial(f'down{level}_down/conv', f'input_blocks.{3 + 3 * level}.0.op')
    first = 3 * (levels - 1 - level)
    for layer in range(3):
      up += block(f'up{level}_block{layer}', f'output_blocks.{first + layer}.0', _COMPVIS)
      up += _transformer(f'up{level}_attention{layer}', f'output_blocks.{first + layer}.1', project) if attends else ()
    up += spatial(f'up{level}_up/conv', f'output_blocks.{first + 2}.{2 if attends else 1}.conv')
  return (*with_prefix('encoder', down), *with_prefix('decoder', up))


class Version(NamedTuple):
  """Differences between Stable Diffusion 1 and 2 that cannot be inferred from shapes.

  size        of the UNet
  project     next to its transformers, a convolution of one pixel or a linear layer
  activation  of the text tower
  padding     of texts
  text        text tower config, if a file does not have one
  words       CompVis names of the text tower
  left        unused text tower arrays in their files
  """

  size: str
  project: Project
  activation: str
  padding: str
  text: dict[str, int]
  words: Rows
  left: tuple[str, ...] = ()


_LENGTH = {'vocab_size': 49_408, 'length': 77}
SD1 = Version(
  size='sd1',
  project=point,
  activation='quick_gelu',
  padding='end',
  text={**_LENGTH, 'width': 768, 'depth': 12, 'mlp_dim': 3072, 'num_heads': 12},
  words=with_prefix('', clip.transformers_text(), 'cond_stage_model.transformer.text_model.'),
)
# The text tower is OpenCLIP's H/14 without its last layer.
SD2 = Version(
  size='sd2',
  project=linear,
  activation='gelu',
  padding='zeros',
  text={**_LENGTH, 'width': 1024, 'depth': 23, 'mlp_dim': 4096, 'num_heads': 16},
  words=with_prefix('', clip.open_clip_text(), 'cond_stage_model.model.'),
  left=(r'cond_stage_model\.model\.(transformer\.resblocks\.23\..*|text_projection|logit_scale|attn_mask)',),
)

FILES = (
  ('unet.', 'unet/diffusion_pytorch_model.safetensors'),
  ('vae.', 'vae/diffusion_pytorch_model.safetensors'),
  ('text_encoder.', 'text_encoder/model.safetensors'),
)


def pipelines(version: Version) -> tuple[tuple[str, Layout], ...]:
  """Folders of diffusers, files of CompVis, and the UNet alone, whose other parts then come by init_from."""
  found = []
  for levels in LEVELS:
    unet = with_prefix('network', diffusers(levels, version.project))
    for old in (False, True):
      coder = with_prefix('extra/autoencoder', autoencoder.diffusers(levels, old=old))
      for prefix in ('text_model.', ''):
        text = with_prefix('extra/text', clip.transformers_text(), f'text_encoder.{prefix}')
        rows = (*with_prefix('', unet, 'unet.'), *with_prefix('', coder, 'vae.'), *text)
        found.append(('diffusers', Layout(rows, ignored=(r'.*position_ids',), files=FILES)))
    found.append(('diffusers', Layout(unet)))
    found.append(('compvis', _file('network', version, levels)))
  return tuple(found)


def controlnets(version: Version) -> tuple[tuple[str, Layout], ...]:
  """Layouts: diffusers files hold the ControlNet alone; CompVis files with or without the networks that it controls."""
  found = []
  for levels in LEVELS:
    steps = (*(f'blocks.{n}' for n in range(6)), 'conv_out')
    hint = [f'controlnet_cond_embedding.{name}' for name in ('conv_in', *steps)]
    own = _control(hint, 'controlnet_down_blocks.{}', 'controlnet_mid_block', 3 * levels)
    own = (*with_prefix('encoder', encoder(levels, version.project)), *own)
    found.append(('diffusers', Layout(with_prefix('control', own))))
    hint = [f'input_hint_block.{number}' for number in range(0, 16, 2)]
    own = _control(hint, 'zero_convs.{}.0', 'middle_block_out.0', 3 * levels)
    own = (*(row for row in compvis(levels, version.project) if row.ours.startswith('encoder/')), *own)
    whole = _file('extra/network', version, levels)
    found.append(('compvis', whole._replace(rows=(*with_prefix('control', own, 'control_model.'), *whole.rows))))
  return tuple(found)


def _file(network: str, version: Version, levels: int) -> Layout:
  """Layout of a single CompVis file: UNet, autoencoder and text tower."""
  rows = (
    *with_prefix(network, compvis(levels, version.project), 'model.diffusion_model.'),
    *with_prefix('extra/autoencoder', autoencoder.compvis(levels), 'first_stage_model.'),
    *with_prefix('extra/text', version.words),
  )
  return Layout(rows, ignored=(*NON_NETWORK, *version.left))


def _control(hint: Sequence[str], zero: str, middle: str, count: int) -> Rows:
  """Rows of a ControlNet without its encoder: the hint convolutions, `count` zero convolutions and the middle one."""
  first, *between, last = hint
  return (
    *spatial('hint/conv_in', first),
    *(row for n, name in enumerate(between) for row in spatial(f'hint/conv{n}', name)),
    *spatial('hint/conv_out', last),
    *(row for n in range(count) for row in point(f'zero_{n}', zero.format(n))),
    *point('zero_middle', middle),
  )


def denoiser(shapes: Mapping[str, Shape], like: str) -> dict[str, Any]:
  """The UNet with words that has these parameters, as a config; heads are those of the size `like`."""
  levels = count(shapes, r'(?:encoder/down|decoder/up)(\d+)_')
  widths = tuple(shapes[f'encoder/down{level}_block0/conv1/kernel'][-1] for level in range(levels))
  depths = tuple(_depth(shapes, level) for level in range(levels))
  layers = count(shapes, r'encoder/down\d+_block(\d+)/')
  context = shapes['encoder/middle_attention0/blocks/cross_attention/key/kernel'][-2]
  inputs = shapes['encoder/conv_in/kernel'][-2]
  outputs = shapes.get('decoder/conv_out/kernel', (inputs,))[-1]
  network: dict[str, Any] = {'name': 'unet', 'variant': like}
  for name, size in unet.SIZES.items():
    if (size.block_out_channels, size.depths, size.cross_attention_dim) == (widths, depths, context):
      network['variant'] = name
      break
  else:
    network |= {'block_out_channels': widths, 'depths': depths, 'cross_attention_dim': context, 'channels': outputs}
  network |= {'layers': layers} if layers != 2 else {}
  return network | ({'extra_in_channels': inputs - outputs} if inputs != outputs else {})


def _depth(shapes: Mapping[str, Shape], level: int) -> int:
  """Number of transformer blocks at a level; 0 for a level without attention."""
  blocks = rf'encoder/down{level}_attention\d+/blocks/'
  return max((shape[0] for path, shape in shapes.items() if re.match(blocks, path)), default=0)


def _unsaid_text(version: Version, network: Mapping[str, Any]) -> dict[str, int]:
  """The numbers of the text tower of a UNet that comes alone: its version's, but as wide as the words that it reads."""
  width = network.get('cross_attention_dim', unet.SIZES[network['variant']].cross_attention_dim)
  if width == version.text['width']:
    return version.text
  return version.text | {'width': width, 'mlp_dim': 4 * width, 'num_heads': max(1, width // 64)}


def config_of(version: Version, prediction: str = 'noise') -> Callable[[Mapping[str, Shape]], dict[str, Any]]:
  """Config of Stable Diffusion: images of 8 times the latent's side, latents scaled to unit variance.

  Parts missing in the file, e.g. when it holds the UNet alone, are those of the version.
  """

  def config(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    control = part(shapes, 'control/')
    network = denoiser(part(shapes, 'network/') or control, version.size)
    coder, text = part(shapes, 'extra/autoencoder/'), part(shapes, 'extra/text/')
    numbers = clip.text_numbers(text) if text else _unsaid_text(version, network)
    decoder = autoencoder.network(coder) if coder else {'name': 'autoencoder', 'variant': 'kl-f8'}
    channels = decoder.get('channels', CODERS[decoder['variant']][0])
    side = unet.SIZES[network['variant']].image_size * 2 ** (len(channels) - 1)
    objective: dict[str, Any] = {
      'name': 'diffusion',
      'network': network,
      'latent_space': {'autoencoder': decoder | {'image_size': side}, 'scale': 0.18215},
      'text_condition': {
        'encoder': {'name': 'text_transformer', 'activation': version.activation, **numbers},
        'padding': version.padding,
      },
      'process': {'schedule': 'scaled_linear', 'prediction': prediction},
    }
    if 'extra_in_channels' in network:
      objective['image_condition'] = {'inpainting': {}}
    if control:
      objective['image_condition'] = {'control': {'name': 'edges'}}
    return {'objective': objective, 'tokenizer': {'name': 'clip_bpe', 'length': numbers['length']}}

  return config
