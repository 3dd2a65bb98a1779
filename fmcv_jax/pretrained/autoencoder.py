"""Gaussian autoencoders of latent diffusion as CompVis and as diffusers name them.

Their decoders count levels from the lowest resolution, ours from the highest, so a layout has a fixed number of levels.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fmcv_jax.errors import UserError
from fmcv_jax.models.generative.autoencoder import SIZES
from fmcv_jax.pretrained.layout import (
  QKV,
  Layout,
  Project,
  Row,
  Rows,
  Shape,
  layer_rows,
  linear,
  norm,
  point,
  spatial,
  with_prefix,
)
from fmcv_jax.pretrained.shape_inference import count, has, part

LEVELS = range(2, 7)  # how many the layouts are made for,
LAYERS = range(4)  # and how many blocks of a level at most

DIFFUSERS = ('norm1', 'conv1', 'time_emb_proj', 'norm2', 'conv2', 'conv_shortcut')
_COMPVIS = ('norm1', 'conv1', 'temb_proj', 'norm2', 'conv2', 'nin_shortcut')
# Tensors in CompVis files that belong to no network: noise schedule, EMA copies, loss modules of the autoencoder.
NON_NETWORK = (
  r'betas|alphas_cumprod.*|sqrt_.*|log_one_minus.*|posterior_.*|lvlb_weights|logvar|scale_factor|model_ema\..*',
  r'(first_stage_model\.)?loss\..*|(first_stage_model\.)?model_ema\..*',
  r'cond_stage_model\..*position_ids',
)


def block(ours: str, theirs: str, names: Sequence[str]) -> Rows:
  """Rows of a residual block, with or without a time embedding; `names`: its norms, convolutions and projections."""
  norm1, conv1, time, norm2, conv2, shortcut = (f'{theirs}.{name}' for name in names)
  return (
    *norm(f'{ours}/norm1', norm1),
    *spatial(f'{ours}/conv1', conv1),
    *linear(f'{ours}/modulation', time),
    *norm(f'{ours}/norm2', norm2),
    *spatial(f'{ours}/conv2', conv2),
    *point(f'{ours}/shortcut', shortcut),
  )


def _attention(ours: str, theirs: str, names: Sequence[str], project: Project) -> Rows:
  """Rows of self-attention over pixels; `names`: norm, query, key, value and output."""
  parts = dict(zip((*QKV, 'out'), names[1:], strict=True))
  return (*norm(f'{ours}/norm', f'{theirs}.{names[0]}'), *layer_rows(f'{ours}/attention', theirs, parts, project))


def diffusers(levels: int, *, old: bool = False) -> Rows:
  """Layout of diffusers; `old`: attention names of files older than diffusers 0.15, such as Stable Diffusion 1."""
  names = ('group_norm', 'query', 'key', 'value', 'proj_attn')
  names = names if old else ('group_norm', 'to_q', 'to_k', 'to_v', 'to_out.0')

  def half(ways: str, numbers: list[int], change: str, said: str) -> Iterator[Row]:
    yield from _half('mid_block.resnets.0', 'mid_block.attentions.0', 'mid_block.resnets.1', DIFFUSERS, names, linear)
    yield from norm('norm', 'conv_norm_out')
    for level, number in enumerate(numbers):
      yield from spatial(f'level{level}_{change}/conv', f'{ways}.{number}.{said}.0.conv')
      for layer in LAYERS:
        yield from block(f'level{level}_block{layer}', f'{ways}.{number}.resnets.{layer}', DIFFUSERS)
        attends = f'level{level}_attention{layer}', f'{ways}.{number}.attentions.{layer}'
        yield from _attention(*attends, names, linear)

  count = list(range(levels))
  return _coder(half('down_blocks', count, 'down', 'downsamplers'), half('up_blocks', count[::-1], 'up', 'upsamplers'))


def compvis(levels: int) -> Rows:
  """Rows of the original layout of latent diffusion (CompVis), of an autoencoder of that many levels."""
  names = ('norm', 'q', 'k', 'v', 'proj_out')

  def half(ways: str, said: str) -> Iterator[Row]:
    yield from _half('mid.block_1', 'mid.attn_1', 'mid.block_2', _COMPVIS, names, point)
    yield from norm('norm', 'norm_out')
    for level in range(levels):
      yield from spatial(f'level{level}_{ways}/conv', f'{ways}.{level}.{said}.conv')
      for layer in LAYERS:
        yield from block(f'level{level}_block{layer}', f'{ways}.{level}.block.{layer}', _COMPVIS)
        yield from _attention(f'level{level}_attention{layer}', f'{ways}.{level}.attn.{layer}', names, point)

  return _coder(half('down', 'downsample'), half('up', 'upsample'))


def _half(first: str, between: str, last: str, names: Sequence[str], attends: Sequence[str], project: Project) -> Rows:
  return (
    *spatial('conv_in', 'conv_in'),
    *block('middle/block0', first, names),
    *_attention('middle/attention0', between, attends, project),
    *block('middle/block1', last, names),
  )


def _coder(encoder: Iterator[Row], decoder: Iterator[Row]) -> Rows:
  return (
    *with_prefix('encoder', encoder, 'encoder.'),
    *with_prefix('encoder', spatial('conv_out', 'conv_out'), 'encoder.'),
    *with_prefix('decoder', decoder, 'decoder.'),
    *spatial('conv_out', 'decoder.conv_out'),
    *point('quantize', 'quant_conv'),
    *point('unquantize', 'post_quant_conv'),
  )


def layouts() -> tuple[tuple[str, Layout], ...]:
  """All layouts of autoencoders by format: diffusers, diffusers before 0.15 with other attention names, and CompVis."""
  return tuple(
    (format, Layout(with_prefix('autoencoder', rows(levels)), ignored=NON_NETWORK))
    for format, rows in (
      ('diffusers', diffusers),
      ('diffusers', lambda levels: diffusers(levels, old=True)),
      ('compvis', compvis),
    )
    for levels in LEVELS
  )


def network(shapes: Mapping[str, Shape]) -> dict[str, Any]:
  """Config of the autoencoder with these parameter shapes."""
  levels = count(shapes, r'(?:en|de)coder/level(\d+)_')
  channels = tuple(shapes[f'encoder/level{level}_block0/conv1/kernel'][-1] for level in range(levels))
  layers = count(shapes, r'encoder/level\d+_block(\d+)/')
  latent, quantize = shapes['decoder/conv_in/kernel'][-2], has(shapes, 'quantize/') or has(shapes, 'unquantize/')
  attention = tuple(level for level in range(levels) if has(shapes, f'encoder/level{level}_attention'))
  numbers = (channels, layers, latent, attention, quantize)
  for name, size in SIZES.items():
    if size == numbers:
      return {'name': 'autoencoder', 'variant': name}
  if attention:
    raise UserError(f'an autoencoder of {channels} channels with attention at levels {attention} is none of the known')
  variant = 'kl-f8' if quantize else 'f8-16ch'
  return {'name': 'autoencoder', 'variant': variant, 'channels': channels, 'layers': layers, 'latent_channels': latent}


def config(shapes: Mapping[str, Shape]) -> dict[str, Any]:
  """The config of an objective whose network has these shapes; its adversarial loss is off."""
  own = network(part(shapes, 'autoencoder/'))
  return {'objective': {'name': 'autoencoding', 'network': own, 'adversarial': 0.0}}
