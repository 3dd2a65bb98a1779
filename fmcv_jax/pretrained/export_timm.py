"""Writes the config files of timm and OpenCLIP, so that e.g. `timm.create_model('local-dir:DIR')` loads an export."""

from typing import Any

from fmcv_jax.data.pillow_resize import as_pillow_resize
from fmcv_jax.data.transforms import ImageTransform
from fmcv_jax.errors import UserError
from fmcv_jax.models.backbones.efficientnet import EfficientNet
from fmcv_jax.models.backbones.swin import Swin
from fmcv_jax.models.backbones.text import TextTransformer
from fmcv_jax.models.backbones.vit import SIZES, ViT
from fmcv_jax.models.common.layers import BlockConfig
from fmcv_jax.pretrained import efficientnet
from fmcv_jax.pretrained.export_transformers import Files, plain
from fmcv_jax.pretrained.hub_timm import activation_of
from fmcv_jax.pretrained.hub_vit import exported_side

# Architecture of which all values but the eps (CLIP's, 1e-5) are overridden by arguments.
_VIT, _CLIP, _GATED = 'vit_base_patch16_224', 'vit_base_patch16_clip_224', 'vit_giant_patch14_dinov2'
_DISTILLED, _SWIN = 'deit_base_distilled_patch16_224', 'swin_base_patch4_window7_224'
_CLASSIFIERS = {_DISTILLED: ['head', 'head_dist'], _SWIN: 'head.fc'}
_SIGLIP = {'B': 'base', 'L': 'large', 'So400m': 'so400m', 'gopt': 'giantopt'}


def files(objective: Any, image: ImageTransform | None) -> Files:
  """timm's config.json."""
  network = objective.network
  match network:
    case Swin():
      name, arguments = _swin(network)
    case EfficientNet():
      name, arguments = _efficientnet(network)
    case _:
      name, arguments = _vit(network)
  preprocessing = {
    'input_size': [3, *(exported_side(network, 'timm'),) * 2],
    'fixed_input_size': not isinstance(network, EfficientNet),
    'mean': list(objective.normalize.mean),
    'std': list(objective.normalize.std),
    **_crop(image, objective.normalize),
    'first_conv': 'conv_stem' if isinstance(network, EfficientNet) else 'patch_embed.proj',
    'classifier': _CLASSIFIERS.get(name, 'classifier' if isinstance(network, EfficientNet) else 'head'),
  }
  config = {
    'architecture': name,
    'num_classes': network.num_classes,
    'num_features': network.width * (8 if name == _SWIN else 1),
    'pretrained_cfg': {**preprocessing, 'num_classes': network.num_classes},
    'model_args': arguments,
  }
  return {'config.json': config}


def _efficientnet(network: EfficientNet) -> tuple[str, dict[str, Any]]:
  variant = efficientnet.variant_of(network.stem, [row.repeats for row in network.stages])
  if not network.top or variant == 'mu':
    raise UserError('timm has no EfficientNet without its last convolution, or of the size mu')
  return f'tf_efficientnet_{variant.lower()}', {}


def _crop(image: ImageTransform | None, normalize: Any) -> dict[str, Any]:
  if image is None:
    return {}
  own = as_pillow_resize(image)
  if own.mode == 'longest' and own.fill != tuple(round(255 * m) for m in normalize.mean):
    raise UserError(f'timm surrounds images by the mean of the pixels, not by data.image.fill={own.fill}')
  modes = {'shortest': 'center', 'squash': 'squash', 'longest': 'border'}
  return {'interpolation': own.interpolation, 'crop_pct': own.crop, 'crop_mode': modes[own.mode]}


def _vit(network: ViT) -> tuple[str, dict[str, Any]]:
  block = plain(network.stack.block, 'timm', qkv_bias=False)
  if network.pos_embed != 'learned':
    raise UserError(f'timm has no vision transformer with positions of the kind {network.pos_embed}')
  if block.eps > 1e-6 and (block.eps != 1e-5 or network.distilled or block.gated_mlp):
    raise UserError(f'timm has no such vision transformer with an eps of {block.eps}')
  if network.registers and network.class_token_has_position and not network.mask_token:
    raise UserError('timm has no vision transformer with registers and a place for the class token')
  # timm's hidden width of a SwiGLU counts gate and value together.
  arguments: dict[str, Any] = {
    'img_size': exported_side(network, 'timm'),
    'patch_size': network.patch_size,
    'embed_dim': network.width,
    'depth': network.stack.depth,
    'num_heads': block.num_heads,
    'mlp_ratio': block.mlp_dim * (2 if block.gated_mlp else 1) / network.width,
    'act_layer': block.activation,
    'qkv_bias': block.qkv_bias,
  }
  if network.distilled:
    return _DISTILLED, arguments
  arguments |= {
    'class_token': network.has_class_token,
    'global_pool': {'cls': 'token', 'gap': 'avg', 'map': 'map'}[network.pool],
    'fc_norm': network.fc_norm,
    'reg_tokens': network.registers,
    'no_embed_class': bool(network.registers) or not network.class_token_has_position,
    'pre_norm': network.pre_norm,
    'init_values': block.layer_scale,
  }
  return _GATED if block.gated_mlp else _CLIP if block.eps == 1e-5 else _VIT, arguments


def _swin(network: Swin) -> tuple[str, dict[str, Any]]:
  return _SWIN, {
    'img_size': exported_side(network, 'timm'),
    'patch_size': network.smallest_patch,
    'window_size': network.window,
    'embed_dim': network.width,
    'depths': list(network.depths),
    'num_heads': [block.num_heads for block in network.blocks],
  }


def open_clip(family: str, objective: Any, image: ImageTransform | None) -> Files:
  """OpenCLIP's open_clip_config.json."""
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
    **_text_pool(text),
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
    own = plain(tower.stack.block, 'OpenCLIP')
    if len({own.activation == 'quick_gelu', block.activation == 'quick_gelu'}) > 1:
      raise UserError('OpenCLIP has quick_gelu in both towers or in none')
    if tower.pool != 'cls' or not tower.class_token_has_position or tower.registers:
      raise UserError('OpenCLIP has image towers of its own with a class token that has a place and is read')
    model |= {
      'quick_gelu': own.activation == 'quick_gelu',
      'vision_cfg': {
        **_layers(own),
        'image_size': exported_side(tower, 'open_clip'),
        'patch_size': tower.patch_size,
        'width': tower.width,
        'layers': tower.stack.depth,
        'head_width': tower.width // own.num_heads,
        'mlp_ratio': own.mlp_dim / tower.width,
        'no_ln_pre': not tower.pre_norm,
      },
    }
  preprocessing = {'mean': list(objective.normalize.mean), 'std': list(objective.normalize.std)}
  return {'open_clip_config.json': {'model_cfg': model, 'preprocess_cfg': preprocessing | _resize(image)}}


def _layers(block: BlockConfig) -> dict[str, Any]:
  if block.activation not in ('gelu', 'gelu_tanh', 'quick_gelu'):
    raise UserError(f'OpenCLIP has no towers with the activation {block.activation}')
  tanh = {'act_kwargs': {'approximate': 'tanh'}} if block.activation == 'gelu_tanh' else {}
  return {'norm_kwargs': {'eps': block.eps}, **tanh}


def _text_pool(text: TextTransformer) -> dict[str, Any]:
  if text.pool == 'mean' or not text.attend_padding:
    raise UserError('OpenCLIP has no text tower that averages its tokens, or does not attend to padding')
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
