"""The families of published checkpoints: how their files look, and which objective and tokenizer go with them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fmcv_jax.errors import UserError, nearest
from fmcv_jax.pretrained import autoencoder, dit, flax, inception, pairs, stable_diffusion, swin, vit
from fmcv_jax.pretrained.layout import Layout, Shape, outline
from fmcv_jax.pretrained.stable_diffusion import SD1, SD2
from fmcv_jax.pretrained.tensors import Tensors

HALF = {'mean': (0.5, 0.5, 0.5), 'std': (0.5, 0.5, 0.5)}
IMAGENET = {'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225)}
BYTES = {'mean': (128 / 255,) * 3, 'std': (128 / 255,) * 3}  # (byte - 128) / 128
OPENAI = {'mean': (0.48145466, 0.4578275, 0.40821073), 'std': (0.26862954, 0.26130258, 0.27577711)}


class Family(NamedTuple):
  """layouts: by the name of the format, the first of a format being the one that is written."""

  layouts: tuple[tuple[str, Layout], ...]
  config: Callable[[Mapping[str, Shape]], dict[str, Any]]


def _encoder(
  normalize: Mapping[str, Any], network: Callable[[Mapping[str, Shape]], dict[str, Any]] = vit.tower
) -> Callable[[Mapping[str, Shape]], dict[str, Any]]:
  def config(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    return {'objective': {'name': 'encoder', 'network': network(shapes), 'normalize': dict(normalize)}}

  return config


def _masked(shapes: Mapping[str, Shape]) -> dict[str, Any]:
  return {'objective': {'name': 'mae', 'network': vit.masked_autoencoder(shapes), 'normalize': dict(IMAGENET)}}


def _dual(normalize: Mapping[str, Any], *, sigmoid: bool, activation: str):
  def config(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    network = pairs.dual_encoder(shapes, sigmoid=sigmoid, activation=activation)
    objective = {'name': 'contrastive', 'network': network, 'normalize': dict(normalize)}
    length = network['text']['length']
    if sigmoid:
      return {'objective': objective | {'loss_name': 'sigmoid'}}
    return {'objective': objective, 'tokenizer': {'name': 'clip_bpe', 'length': length}}

  return config


_TIMM = (
  ('timm', vit.timm()),
  ('timm', vit.timm(final_norm='fc_norm')),
  ('timm', vit.timm(gated=True)),
  ('timm', vit.timm(registers='register_tokens')),
  ('timm', vit.timm(registers='register_tokens', gated=True)),
)


def _transformers(*prefixes: str) -> tuple[tuple[str, Layout], ...]:
  return tuple(('transformers', vit.transformers(prefix, hub=hub)) for prefix in prefixes for hub in (True, False))


_SWIN = (
  ('timm', swin.published(timm=True)),
  ('official', swin.published(timm=False)),
  *(('transformers', swin.transformers(hub=hub)) for hub in (True, False)),
)
_DINOV2 = tuple(
  ('transformers', vit.transformers_dinov2(prefix, gated=gated))
  for prefix in ('', 'dinov2.', 'dinov2_with_registers.')
  for gated in (False, True)
)
_GOOGLE = (
  *(('augreg', layout) for layout in flax.augreg()),
  *(('big_vision', layout) for layout in flax.big_vision()),
)
_SIGLIP = (
  ('transformers', pairs.transformers_siglip()),
  ('open_clip', pairs.open_clip_siglip()),
  *(('big_vision', layout) for layout in flax.siglip()),
)
_CLIP = (('open_clip', pairs.open_clip()), ('transformers', pairs.transformers_clip()))

# In the order in which they are tried where none is named. Files do not tell how images were normalized, nor which
# GELU was meant: that is what the names of one layout differ by.
FAMILIES: dict[str, Family] = {
  'deit': Family((*_TIMM, *_transformers('deit.')), _encoder(IMAGENET)),
  'vit': Family((*_TIMM, *_transformers('vit.', ''), *_GOOGLE), _encoder(HALF)),
  'dino': Family((*_TIMM, *_transformers('vit.', '')), _encoder(IMAGENET)),
  'mae': Family((*_TIMM, *_transformers('vit.', '')), _encoder(IMAGENET)),
  'mae_pretrain': Family(
    (('timm', vit.mae()), ('transformers', vit.mae(hub=True)), ('transformers', vit.mae(hub=False))), _masked
  ),
  'dinov2': Family((*_TIMM, *_DINOV2), _encoder(IMAGENET)),
  'swin': Family(_SWIN, _encoder(IMAGENET, swin.network)),
  'clip': Family(_CLIP, _dual(OPENAI, sigmoid=False, activation='gelu')),
  'clip_openai': Family(_CLIP, _dual(OPENAI, sigmoid=False, activation='quick_gelu')),
  'siglip': Family(_SIGLIP, _dual(HALF, sigmoid=True, activation='gelu_tanh')),
  'inception': Family((('torch_fidelity', inception.published()),), _encoder(BYTES, inception.network)),
  'dit': Family((('dit', dit.original()), ('diffusers', dit.diffusers())), dit.config),
  'sd_vae': Family(autoencoder.layouts(), autoencoder.config),
  'controlnet_sd1': Family(stable_diffusion.controlnets(SD1), stable_diffusion.config_of(SD1)),
  'controlnet_sd2': Family(stable_diffusion.controlnets(SD2), stable_diffusion.config_of(SD2)),
  'sd1': Family(stable_diffusion.pipelines(SD1), stable_diffusion.config_of(SD1)),
  'sd2': Family(stable_diffusion.pipelines(SD2), stable_diffusion.config_of(SD2)),
  # The larger model of 2 predicts velocities.
  'sd2_velocity': Family(stable_diffusion.pipelines(SD2), stable_diffusion.config_of(SD2, 'velocity')),
}


class Recognized(NamedTuple):
  name: str
  layout: Layout
  shapes: dict[str, Shape]


def recognize(tensors: Tensors, name: str | None, what: str) -> Recognized:
  """The family, layout and shapes of our parameters of a checkpoint; `name` None tries all families.

  UserError for an unknown name and for names of arrays that fit no layout, with the nearest layout's complaint.
  """
  if name is not None and name not in FAMILIES:
    raise UserError(f'--as {name}: unknown family; {nearest(name, FAMILIES)}')
  complaints = []
  for candidate in [name] if name else FAMILIES:
    for _, layout in FAMILIES[candidate].layouts:
      shapes, unknown = outline(layout, tensors)
      if not unknown and shapes:
        return Recognized(candidate if name else _by_signs(candidate, shapes), layout, shapes)
      complaints.append((len(unknown), unknown))
  unknown = min(complaints, default=(0, ['nothing']))[1]
  more = f' and {len(unknown) - 1} more' if len(unknown) > 1 else ''
  family = f'family {name!r}' if name else 'any family'
  raise UserError(f'{what}: no layout of {family} knows {unknown[0] if unknown else "an empty file"}{more}')


def family_of(shapes: Mapping[str, Shape], variant: str) -> str:
  """The family whose formats have a place for these parameters of ours, of a network that is called `variant`."""
  if 'mixed_5b/branch1x1/conv/kernel' in shapes:
    return 'inception'
  if any(path.startswith('autoencoder/') for path in shapes):
    return 'sd_vae'
  if 'decoder/mask_token' in shapes:
    return 'mae_pretrain'
  if 'control/hint/conv_in/kernel' in shapes:
    return 'controlnet_sd2' if variant == 'sd2' else 'controlnet_sd1'
  if 'network/blocks/modulation/kernel' in shapes:
    return 'dit'
  if 'network/encoder/conv_in/kernel' in shapes:
    return 'sd2' if variant == 'sd2' else 'sd1'
  if 'tokens/embedding' in {path.removeprefix('text/') for path in shapes}:
    return 'siglip' if 'image/map_pool/probe' in shapes else 'clip'
  return 'swin' if 'patch_norm/scale' in shapes else _by_signs('deit', shapes)


def _by_signs(candidate: str, shapes: Mapping[str, Shape]) -> str:
  """The likeliest of the families of one layout."""
  if candidate != 'deit' or 'distillation_token' in shapes:
    return candidate
  if 'mask_token' in shapes or 'registers' in shapes:
    return 'dinov2'
  return 'deit' if 'blocks/scale1' in shapes else 'vit' if 'head/kernel' in shapes else 'dino'
