"""Families of published checkpoints: their layouts, and the objective and tokenizer of each."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fmcv_jax.data.tokenizers import ClipBpe
from fmcv_jax.dataset_statistics import CLIP, HALF, IMAGENET
from fmcv_jax.pretrained import (
  autoencoder,
  big_vision,
  clip,
  coca,
  dit,
  dpt,
  efficientnet,
  eomt,
  inception,
  owl,
  paligemma,
  sam,
  stable_diffusion,
  swin,
  vit,
)
from fmcv_jax.pretrained.layout import Layout, Shape
from fmcv_jax.pretrained.shape_inference import has
from fmcv_jax.pretrained.stable_diffusion import SD1, SD2

BYTES = {'mean': (128 / 255,) * 3, 'std': (128 / 255,) * 3}  # (byte - 128) / 128


class Family(NamedTuple):
  """One kind of published checkpoint.

  layouts   (format, layout); the first of each format is used for writing
  config    shapes of our parameters by path -> the config of a run with this network
  parts     path prefixes; a checkpoint of this family has at least one parameter below each
  """

  layouts: tuple[tuple[str, Layout], ...]
  config: Callable[[Mapping[str, Shape]], dict[str, Any]]
  parts: tuple[str, ...] = ()


def _data_config(size: int, crop: float | None) -> dict[str, Any]:
  """Preprocessing: resize the short side to size / crop, then center crop; with crop None, squash the whole image."""
  mode = {'mode': 'squash'} if crop is None else {'mode': 'shortest', 'crop': crop}
  image = {'name': 'pillow_resize', 'size': size, **mode}
  return {'source': {'name': 'none'}, 'image': image}


def _encoder(
  normalize: Mapping[str, Any],
  crop: float | None,
  network: Callable[[Mapping[str, Shape]], dict[str, Any]] = vit.tower,
) -> Callable[[Mapping[str, Shape]], dict[str, Any]]:
  def config(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    own = network(shapes)
    objective = {'name': 'encoder', 'network': own, 'normalize': dict(normalize)}
    return {'objective': objective, 'data': _data_config(own['image_size'], crop)}

  return config


def _inception(shapes: Mapping[str, Shape]) -> dict[str, Any]:
  return {'objective': {'name': 'encoder', 'network': {'name': 'inception'}, 'normalize': dict(BYTES)}}


def _masked(shapes: Mapping[str, Shape]) -> dict[str, Any]:
  own = vit.masked_autoencoder(shapes)
  objective = {'name': 'mae', 'network': own, 'normalize': dict(IMAGENET)}
  return {'objective': objective, 'data': _data_config(own['encoder']['image_size'], 0.875)}


def _dual(normalize: Mapping[str, Any], *, sigmoid: bool, activation: str) -> Callable[..., Any]:
  def config(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    network = clip.dual_encoder(shapes, sigmoid=sigmoid, activation=activation)
    objective = {'name': 'contrastive', 'network': network, 'normalize': dict(normalize)}
    data = {'data': _data_config(network['image']['image_size'], None if sigmoid else 1.0)}
    if sigmoid:
      return {'objective': objective | {'loss_name': 'sigmoid'}, **data}
    return {'objective': objective, **data, **_clip_words(network['text'])}

  return config


def _clip_words(text: Mapping[str, Any]) -> dict[str, Any]:
  """CLIP's tokenizer, for a text tower with its vocabulary."""
  if text['vocab_size'] != ClipBpe().vocab_size:
    return {}
  return {'tokenizer': {'name': 'clip_bpe', 'length': text['length']}}


def _prefix_lm(*, second: bool) -> Callable[[Mapping[str, Shape]], dict[str, Any]]:
  def config(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    network = paligemma.network(shapes, second=second)
    objective = {'name': 'language', 'network': network, 'normalize': dict(HALF)}
    return {'objective': objective, 'data': _data_config(network['image']['image_size'], None)}

  return config


def _coca(shapes: Mapping[str, Shape]) -> dict[str, Any]:
  network = coca.network(shapes)
  objective = {'name': 'contrastive_captioning', 'network': network, 'normalize': dict(CLIP)}
  return {
    'objective': objective,
    'data': _data_config(network['image']['image_size'], 1.0),
    **_clip_words(network['text']),
  }


def _image_tower(normalize: Mapping[str, Any], *, sigmoid: bool, activation: str) -> Callable[..., Any]:
  network = functools.partial(clip.image_tower, sigmoid=sigmoid, activation=activation)
  return _encoder(normalize, None if sigmoid else 1.0, network)


def _text_tower(*, sigmoid: bool, activation: str) -> Callable[..., Any]:
  def config(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    network = clip.text_tower(shapes, sigmoid=sigmoid, activation=activation)
    words = {} if sigmoid else _clip_words(network)
    return {'objective': {'name': 'text_encoder', 'network': network}, 'data': {'source': {'name': 'none'}}, **words}

  return config


_TIMM = (
  ('timm', vit.timm()),
  ('timm', vit.timm(gated=True)),
  # timm reads the releases too.
  *((format, vit.original(gated=gated)) for format in ('timm', 'official') for gated in (False, True)),
)


def _transformers(*prefixes: str) -> tuple[tuple[str, Layout], ...]:
  return tuple(('transformers', vit.transformers(prefix, hub=hub)) for prefix in prefixes for hub in (True, False))


_SWIN = (
  ('timm', swin.published(timm=True)),
  ('official', swin.published(timm=False)),
  *(('transformers', swin.transformers(hub=hub)) for hub in (True, False)),
)
_EFFICIENTNET = (
  ('timm', efficientnet.timm()),
  *(('transformers', efficientnet.transformers(size)) for size in efficientnet.SIZES if size != 'mu'),
)
_DEPTH_ANYTHING = (
  *(('transformers', dpt.transformers(hub=hub)) for hub in (True, False)),
  ('official', dpt.original()),
)
_DINOV2 = tuple(
  ('transformers', vit.transformers_dinov2(prefix, hub=hub, gated=gated))
  for prefix in ('', 'dinov2.', 'dinov2_with_registers.')
  for hub in (True, False)
  for gated in (False, True)
)
_GOOGLE = (
  ('augreg', big_vision.augreg()),
  *(('big_vision', layout) for layout in big_vision.big_vision()),
)
_SIGLIP = (
  ('transformers', clip.transformers_siglip()),
  ('open_clip', clip.open_clip_siglip()),
  *(('big_vision', layout) for layout in big_vision.siglip()),
)
_CLIP = (
  ('open_clip', clip.open_clip()),
  ('transformers', clip.transformers_clip()),
  ('open_clip', clip.open_clip(text='text.')),
)
_SIGLIP_IMAGE = (
  *clip.siglip_image_towers(),
  *(('big_vision', layout) for prefix in ('params/', 'params/img/') for layout in big_vision.big_vision(prefix)),
)
_SIGLIP_TEXT = (*clip.siglip_text_towers(), *(('big_vision', layout) for layout in big_vision.siglip_text()))
_PAIR = ('image/', 'text/')
_OPENAI: dict[str, Any] = {'sigmoid': False, 'activation': 'quick_gelu'}
_OPEN: dict[str, Any] = {'sigmoid': False, 'activation': 'gelu'}
_SIGMOID: dict[str, Any] = {'sigmoid': True, 'activation': 'gelu_tanh'}

# In the order of detection when no family is named. Files do not record the image normalization or the kind of GELU:
# families with the same layout differ in these.
FAMILIES: dict[str, Family] = {
  'deit': Family((*_TIMM, *_transformers('deit.')), _encoder(IMAGENET, 0.875)),
  'vit': Family((*_TIMM, *_transformers('vit.', ''), *_GOOGLE), _encoder(HALF, 0.9)),
  'dino': Family((*_TIMM, *_transformers('', 'vit.'), *_GOOGLE), _encoder(IMAGENET, 0.875)),
  'mae': Family((*_TIMM, *_transformers('vit.', '')), _encoder(IMAGENET, 0.875)),
  'mae_pretrain': Family(
    (('timm', vit.mae()), ('transformers', vit.mae(hub=True)), ('transformers', vit.mae(hub=False))), _masked
  ),
  'dinov2': Family((*_TIMM, *_DINOV2), _encoder(IMAGENET, 0.875, vit.dinov2)),
  'swin': Family(_SWIN, _encoder(IMAGENET, 0.875, swin.network)),
  'clip': Family(_CLIP, _dual(CLIP, **_OPEN), _PAIR),
  'clip_openai': Family(_CLIP, _dual(CLIP, **_OPENAI), _PAIR),
  'siglip': Family(_SIGLIP, _dual(HALF, **_SIGMOID), _PAIR),
  'coca': Family(coca.layouts(), _coca, (*_PAIR, 'decoder/')),
  # One tower alone.
  'clip_image': Family(clip.image_towers(), _image_tower(CLIP, **_OPEN)),
  'clip_text': Family(clip.text_towers(), _text_tower(**_OPEN)),
  'clip_openai_image': Family(clip.image_towers(), _image_tower(CLIP, **_OPENAI)),
  'clip_openai_text': Family(clip.text_towers(), _text_tower(**_OPENAI)),
  'siglip_image': Family(_SIGLIP_IMAGE, _image_tower(HALF, **_SIGMOID)),
  'siglip_text': Family(_SIGLIP_TEXT, _text_tower(**_SIGMOID)),
  'paligemma': Family(paligemma.layouts(second=False), _prefix_lm(second=False), _PAIR),
  'paligemma2': Family(paligemma.layouts(second=True), _prefix_lm(second=True), _PAIR),
  'owlvit': Family((('transformers', owl.layout('owlvit')),), owl.config),
  'owlv2': Family((('transformers', owl.layout('owlv2')),), owl.config),
  'eomt': Family((('transformers', eomt.layout()),), eomt.config, ('encoder/',)),
  'depth_anything': Family(_DEPTH_ANYTHING, dpt.config),
  'sam': Family(sam.layouts(), sam.config, ('encoder/', 'prompt/', 'decoder/')),
  'efficientnet': Family(_EFFICIENTNET, _encoder(IMAGENET, 0.875, efficientnet.network)),
  'inception': Family((('torch_fidelity', inception.published()),), _inception),
  'dit': Family((('dit', dit.original()), ('diffusers', dit.diffusers())), dit.config),
  'sd_vae': Family(autoencoder.layouts(), autoencoder.config),
  'controlnet_sd1': Family(stable_diffusion.controlnets(SD1), stable_diffusion.config_of(SD1), ('control/',)),
  'controlnet_sd2': Family(stable_diffusion.controlnets(SD2), stable_diffusion.config_of(SD2), ('control/',)),
  'sd1': Family(stable_diffusion.pipelines(SD1), stable_diffusion.config_of(SD1), ('network/',)),
  'sd2': Family(stable_diffusion.pipelines(SD2), stable_diffusion.config_of(SD2), ('network/',)),
  # The larger model of 2 predicts velocities.
  'sd2_velocity': Family(stable_diffusion.pipelines(SD2), stable_diffusion.config_of(SD2, 'velocity'), ('network/',)),
}


def variant_of(objective: Mapping[str, Any]) -> str:
  """Variant of the network in the config of an objective, or of the one that it adapts; '' if it has none."""
  return objective.get('objective', objective).get('network', {}).get('variant', '')


def family_of(shapes: Mapping[str, Shape], variant: str) -> str:
  """Family whose formats can represent these parameters of ours, for a network of this `variant`."""
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
  if 'top_norm/scale' in shapes or 'stage1/first/depthwise/kernel' in shapes:
    return 'efficientnet'
  if 'mask_head/layer1/kernel' in shapes:
    return 'eomt'
  if 'encoder/group1/whole/norm1/scale' in shapes:
    return 'sam'
  if 'fusion1/out/kernel' in shapes:
    return 'depth_anything'
  if 'box_head/layer1/kernel' in shapes:
    return 'owlv2' if has(shapes, 'objectness_head/') else 'owlvit'
  if 'image_projection/kernel' in shapes and 'text/tokens/embedding' in shapes:
    return 'paligemma2' if has(shapes, 'text/blocks/attention_norm/') else 'paligemma'
  if 'decoder/blocks/context_norm/scale' in shapes:
    return 'coca'
  if 'text/tokens/embedding' in shapes:
    return 'siglip' if 'image/map_pool/probe' in shapes else 'clip'
  if 'tokens/embedding' in shapes:
    return 'siglip_text' if 'head/bias' in shapes else 'clip_text'
  if 'map_pool/probe' in shapes:
    return 'siglip_image'
  if 'pre_norm/scale' in shapes and 'patch/bias' not in shapes and not has(shapes, 'head/bias'):
    return 'clip_image'
  return 'swin' if 'patch_norm/scale' in shapes else by_signs('deit', shapes)


def by_signs(candidate: str, shapes: Mapping[str, Shape]) -> str:
  """Most likely family among those that share a layout."""
  if candidate != 'deit' or has(shapes, 'distillation_'):
    return candidate
  scaled = has(shapes, 'blocks/scale')
  if 'mask_token' in shapes or ('registers' in shapes and 'class_token' in shapes and scaled):
    return 'dinov2'
  return 'deit' if scaled else 'vit' if has(shapes, 'head/') else 'dino'
