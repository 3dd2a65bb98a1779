"""The families of published checkpoints: how their files look, and which objective and tokenizer go with them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fmcv_jax.errors import UserError, did_you_mean
from fmcv_jax.pretrained import autoencoder, big_vision, clip, dit, efficientnet, inception, stable_diffusion, swin, vit
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


def _seen(size: int, crop: float | None) -> dict[str, Any]:
  """How images are shown: the center, after their short side was made size / crop; None: the whole, made a square."""
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
    return {'objective': objective, 'data': _seen(own['image_size'], crop)}

  return config


def _inception(shapes: Mapping[str, Shape]) -> dict[str, Any]:
  return {'objective': {'name': 'encoder', 'network': {'name': 'inception'}, 'normalize': dict(BYTES)}}


def _masked(shapes: Mapping[str, Shape]) -> dict[str, Any]:
  own = vit.masked_autoencoder(shapes)
  objective = {'name': 'mae', 'network': own, 'normalize': dict(IMAGENET)}
  return {'objective': objective, 'data': _seen(own['encoder']['image_size'], 0.875)}


def _dual(normalize: Mapping[str, Any], *, sigmoid: bool, activation: str):
  def config(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    network = clip.dual_encoder(shapes, sigmoid=sigmoid, activation=activation)
    objective = {'name': 'contrastive', 'network': network, 'normalize': dict(normalize)}
    seen = {'data': _seen(network['image']['image_size'], None if sigmoid else 1.0)}
    if sigmoid:
      return {'objective': objective | {'loss_name': 'sigmoid'}, **seen}
    return {'objective': objective, 'tokenizer': {'name': 'clip_bpe', 'length': network['text']['length']}, **seen}

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

# In the order in which they are tried where none is named. Files do not tell how images were normalized, nor which
# GELU was meant: that is what the names of one layout differ by.
FAMILIES: dict[str, Family] = {
  'deit': Family((*_TIMM, *_transformers('deit.')), _encoder(IMAGENET, 0.875)),
  'vit': Family((*_TIMM, *_transformers('vit.', ''), *_GOOGLE), _encoder(HALF, 0.9)),
  'dino': Family((*_TIMM, *_transformers('', 'vit.'), *_GOOGLE), _encoder(IMAGENET, 0.875)),
  'mae': Family((*_TIMM, *_transformers('vit.', '')), _encoder(IMAGENET, 0.875)),
  'mae_pretrain': Family(
    (('timm', vit.mae()), ('transformers', vit.mae(hub=True)), ('transformers', vit.mae(hub=False))), _masked
  ),
  'dinov2': Family((*_TIMM, *_DINOV2), _encoder(IMAGENET, 0.875)),
  'swin': Family(_SWIN, _encoder(IMAGENET, 0.875, swin.network)),
  'clip': Family(_CLIP, _dual(OPENAI, sigmoid=False, activation='gelu')),
  'clip_openai': Family(_CLIP, _dual(OPENAI, sigmoid=False, activation='quick_gelu')),
  'siglip': Family(_SIGLIP, _dual(HALF, sigmoid=True, activation='gelu_tanh')),
  'efficientnet': Family(_EFFICIENTNET, _encoder(IMAGENET, 0.875, efficientnet.network)),
  'inception': Family((('torch_fidelity', inception.published()),), _inception),
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
  family, size = (None, ()) if name is None else _named(name)
  complaints = []
  for candidate in [family] if family else FAMILIES:
    for _, layout in FAMILIES[candidate].layouts:
      shapes, unknown = outline(layout, tensors)
      if not unknown and shapes and _mlps_agree(shapes):
        found = candidate if family else _by_signs(candidate, shapes)
        _check_size(size, FAMILIES[found].config(shapes), f'--as {name}: {what}')
        return Recognized(found, layout, shapes)
      complaints.append((len(unknown), unknown))
  unknown = min(complaints, default=(0, ['nothing']))[1]
  more = f' and {len(unknown) - 1} more' if len(unknown) > 1 else ''
  whose = f'family {family!r}' if family else 'any family'
  raise UserError(f'{what}: no layout of {whose} knows {unknown[0] if unknown else "an empty file"}{more}')


def _named(name: str) -> tuple[str, tuple[str, ...]]:
  """The family of 'dinov2', or of 'dinov2_l14' with what its shapes then have to be."""
  if name in FAMILIES:
    return name, ()
  spellings = {family: family for family in FAMILIES} | {'sd15': 'sd1', 'controlnet_sd15': 'controlnet_sd1'}
  for spelling in sorted(spellings, key=len, reverse=True):
    if f'{name}_'.startswith(f'{spelling}_'):
      return spellings[spelling], tuple(name[len(spelling) + 1 :].split('_')) if name != spelling else ()
  raise UserError(f'--as {name}: unknown family; {did_you_mean(name, FAMILIES)}')


def _check_size(words: tuple[str, ...], config: Mapping[str, Any], what: str) -> None:
  """UserError unless a network is of the size that was named: its variant's letters, and whether it is distilled."""
  network = config['objective']['network']
  network = network.get('image') or network.get('encoder') or network
  size = network.get('variant', '').lower().replace('/', '').replace('-', '')
  is_named = 'width' not in network and 'block_out_channels' not in network
  for word in words:
    if not (word == size and is_named if word != 'distilled' else network.get('distilled')):
      found = f'of the size {network["variant"]}' if is_named else 'of no named size'
      raise UserError(f'{what} is {found}, not {word}')


def _mlps_agree(shapes: Mapping[str, Shape]) -> bool:
  """Whether MLPs give back as much as they take in: timm calls a gated one as it does one without."""
  ups = (path for path in shapes if path.endswith('mlp/up/kernel'))
  downs = ((shapes[path], shapes.get(path.replace('mlp/up', 'mlp/down'))) for path in ups)
  return all(down is None or up[-1] == down[-2] for up, down in downs)


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
  if 'top_norm/scale' in shapes or 'stage1/first/depthwise/kernel' in shapes:
    return 'efficientnet'
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
