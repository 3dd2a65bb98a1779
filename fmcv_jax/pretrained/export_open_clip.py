"""Writes OpenCLIP's open_clip_config.json, so that `open_clip.create_model('local-dir:DIR')` loads an export."""

from typing import Any

from fmcv_jax.data.pillow_resize import as_pillow_resize
from fmcv_jax.data.transforms import ImageTransform
from fmcv_jax.errors import UserError
from fmcv_jax.models.backbones.text import TextTransformer
from fmcv_jax.models.backbones.vit import SIZES, ViT
from fmcv_jax.models.common.layers import BlockConfig
from fmcv_jax.models.multimodal.captioner import ContrastiveCaptioner
from fmcv_jax.pretrained.export_transformers import Files, plain
from fmcv_jax.pretrained.hub_timm import activation_of
from fmcv_jax.pretrained.hub_vit import exported_side

_SIGLIP = {'B': 'base', 'L': 'large', 'So400m': 'so400m', 'gopt': 'giantopt'}


def files(family: str, objective: Any, image: ImageTransform | None) -> Files:
  """OpenCLIP's open_clip_config.json; UserError for a network that it cannot compute."""
  network = objective.network
  tower, text, block = network.image, network.text, plain(network.text.stack.block, 'OpenCLIP')
  words: dict[str, Any] = {
    **_layers(block),
    'context_length': text.length,
    'vocab_size': text.vocab_size,
    'width': text.width,
    'heads': block.num_heads,
    'layers': text.stack.depth,
    'mlp_ratio': block.mlp_dim / text.width,
    'no_causal_mask': not block.causal,
    **_text_pool(text, family),
  }
  model: dict[str, Any] = {'embed_dim': text.num_classes, 'text_cfg': words}
  if family == 'siglip':
    model |= {
      'init_logit_bias': -10,
      'custom_text': True,
      'vision_cfg': {
        'image_size': exported_side(tower, 'open_clip'),
        'timm_model_name': _siglip_name(tower),
        'timm_model_pretrained': False,
        'timm_pool': 'map',
        'timm_proj': 'none',
      },
    }
    words |= {'proj_bias': True}
  else:
    model |= _own_tower(tower, block)
  if family == 'coca':
    model['multimodal_cfg'] = _decoder(network)
    model['custom_text'] = True
    words['output_tokens'] = model['vision_cfg']['output_tokens'] = True
  preprocessing = {'mean': list(objective.normalize.mean), 'std': list(objective.normalize.std)}
  return {'open_clip_config.json': {'model_cfg': model, 'preprocess_cfg': preprocessing | _resize(image)}}


def _own_tower(tower: ViT, text: BlockConfig) -> dict[str, Any]:
  """The parts of the config on an image tower of OpenCLIP's own, next to a text tower of these blocks."""
  own = plain(tower.stack.block, 'OpenCLIP')
  if len({own.activation == 'quick_gelu', text.activation == 'quick_gelu'}) > 1:
    raise UserError('OpenCLIP has quick_gelu in both towers or in none')
  is_read = tower.pool == 'cls' or (tower.pool == 'queries' and tower.class_token)
  if not is_read or not tower.class_token_has_position or tower.registers:
    raise UserError('OpenCLIP has image towers of its own with a class token that has a place and is read')
  pool: dict[str, Any] = {}
  if tower.pool == 'queries':
    if own.eps != 1e-5:
      raise UserError(f'OpenCLIP computes norms of an attention pooling with an eps of 1e-05, not {own.eps}')
    pool = {
      'attentional_pool': True,
      'attn_pooler_queries': tower.queries,
      'attn_pooler_heads': tower.query_heads,
    }
  vision = {
    **_layers(own),
    'image_size': exported_side(tower, 'open_clip'),
    'patch_size': tower.patch_size,
    'width': tower.width,
    'layers': tower.stack.depth,
    'head_width': tower.width // own.num_heads,
    'mlp_ratio': own.mlp_dim / tower.width,
    'no_ln_pre': not tower.pre_norm,
    **pool,
  }
  return {'quick_gelu': own.activation == 'quick_gelu', 'vision_cfg': vision}


def _decoder(network: ContrastiveCaptioner) -> dict[str, Any]:
  decoder, text = network.decoder, network.text
  block = plain(decoder.stack.block, 'OpenCLIP')
  expected = 'quick_gelu' if text.stack.block.activation == 'quick_gelu' else 'gelu'
  for what, ours, theirs in (
    ('activation', block.activation, expected),
    ('eps', block.eps, 1e-5),
    ('mlp_dim', block.mlp_dim, 4 * decoder.width),
  ):
    if ours != theirs:
      raise UserError(f'OpenCLIP has decoders of such texts with {what}={theirs}, not {ours}')
  return {
    'context_length': text.length,
    'vocab_size': decoder.vocab_size,
    'width': decoder.width,
    'heads': block.num_heads,
    'layers': decoder.stack.depth,
  }


def _layers(block: BlockConfig) -> dict[str, Any]:
  if block.activation not in ('gelu', 'gelu_tanh', 'quick_gelu'):
    raise UserError(f'OpenCLIP has no towers with the activation {block.activation}')
  tanh = {'act_kwargs': {'approximate': 'tanh'}} if block.activation == 'gelu_tanh' else {}
  return {'norm_kwargs': {'eps': block.eps}, **tanh}


def _text_pool(text: TextTransformer, family: str) -> dict[str, Any]:
  if text.pool == 'cls' and family == 'coca':
    return {'embed_cls': True}
  if text.pool in ('mean', 'cls') or not text.attend_padding:
    raise UserError(
      'OpenCLIP has no text tower that averages its tokens or does not attend to padding, and one with a class token '
      'only in CoCa'
    )
  if text.end_id is not None:
    return {'pool_type': 'eos', 'eos_id': text.end_id}
  return {'pool_type': 'argmax' if text.pool == 'eot' else text.pool}


def _resize(image: ImageTransform | None) -> dict[str, Any]:
  if image is None:
    return {}
  own = as_pillow_resize(image)
  if own.crop != 1 or own.interpolation not in ('bicubic', 'bilinear') or len(set(own.fill)) > 1:
    raise UserError(
      f'OpenCLIP cuts no center out of larger images, and resizes by bicubic or bilinear filters: data.image is {own}'
    )
  fill = {'fill_color': own.fill[0]} if own.mode == 'longest' else {}
  return {'interpolation': own.interpolation, 'resize_mode': own.mode, **fill}


def differences(family: str, objective: Any) -> list[str]:
  """Lines on outputs that will differ in OpenCLIP, since timm's architecture name fixes the activation."""
  if family != 'siglip':
    return []
  name, own = _siglip_name(objective.network.image), objective.network.image.stack.block.activation
  theirs = activation_of(name, gated=False)
  return [f"OpenCLIP's {name} computes {theirs} where this model has {own}"] if theirs != own else []


def _siglip_name(network: ViT) -> str:
  """Name of the timm architecture, since OpenCLIP selects a timm model by name only; UserError for other sizes."""
  size = (network.width, network.stack.depth, network.stack.block.num_heads, network.stack.block.mlp_dim)
  for name, numbers in SIZES.items():
    if numbers == size and name in _SIGLIP:
      return f'vit_{_SIGLIP[name]}_patch{network.patch_size}_siglip_{network.image_size}'
  raise UserError(f'OpenCLIP has SigLIP in the sizes {", ".join(_SIGLIP)} only')
