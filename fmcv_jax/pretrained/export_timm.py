"""What timm and OpenCLIP find in a folder beside the arrays: `timm.create_model('local-dir:DIR')` and the like."""

from typing import Any

from fmcv_jax.data.transforms import ImageTransform, Resize, ResizeCrop
from fmcv_jax.errors import UserError
from fmcv_jax.models.backbones.efficientnet import EfficientNet
from fmcv_jax.models.backbones.swin import Swin
from fmcv_jax.models.backbones.vit import SIZES, ViT
from fmcv_jax.pretrained import efficientnet
from fmcv_jax.pretrained.export_transformers import Files, plain

# A name that timm knows, of whose numbers the arguments leave none.
_VIT, _GATED = 'vit_base_patch16_224', 'vit_giant_patch14_dinov2'
_DISTILLED, _SWIN = 'deit_base_distilled_patch16_224', 'swin_base_patch4_window7_224'
_CLASSIFIERS = {_DISTILLED: ['head', 'head_dist'], _SWIN: 'head.fc'}
_SIGLIP = {'B': 'base', 'L': 'large', 'So400m': 'so400m', 'g': 'giantopt'}
_ACTIVATIONS = {'gelu': 'gelu', 'gelu_tanh': 'gelu_tanh', 'quick_gelu': 'quick_gelu', 'silu': 'silu'}


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
  seen = {
    'input_size': [3, network.image_size, network.image_size],
    'fixed_input_size': not isinstance(network, EfficientNet),
    'mean': list(objective.normalize.mean),
    'std': list(objective.normalize.std),
    **_crop(image),
    'first_conv': 'conv_stem' if isinstance(network, EfficientNet) else 'patch_embed.proj',
    'classifier': _CLASSIFIERS.get(name, 'classifier' if isinstance(network, EfficientNet) else 'head'),
  }
  config = {
    'architecture': name,
    'num_classes': network.num_classes,
    'num_features': network.width * (8 if name == _SWIN else 1),
    'pretrained_cfg': {**seen, 'num_classes': network.num_classes},
    'model_args': arguments,
  }
  return {'config.json': config}


def _efficientnet(network: EfficientNet) -> tuple[str, dict[str, Any]]:
  variant = efficientnet.variant_of(network.stem, [row.repeats for row in network.stages])
  if not network.top or variant == 'mu':
    raise UserError('timm has no EfficientNet without its last convolution, or of the size mu')
  return f'tf_efficientnet_{variant.lower()}', {}


def _crop(image: ImageTransform | None) -> dict[str, Any]:
  squash = isinstance(image, Resize)
  return {
    'interpolation': getattr(image, 'interpolation', 'bicubic'),
    'crop_pct': image.crop if isinstance(image, ResizeCrop) else 1.0,
    'crop_mode': 'squash' if squash else 'center',
  }


def _vit(network: ViT) -> tuple[str, dict[str, Any]]:
  block = plain(network.stack.block, 'timm')
  if network.pos_embed != 'learned':
    raise UserError(f'timm has no vision transformer with positions of the kind {network.pos_embed}')
  if block.eps > 1e-6:
    raise UserError(f'timm has vision transformers with an eps of 1e-6, not {block.eps}')
  if network.registers and network.class_token_has_position and not network.mask_token:
    raise UserError('timm has no vision transformer with registers and a place for the class token')
  # timm counts the width of a SwiGLU as that of gate and value together.
  arguments: dict[str, Any] = {
    'img_size': network.image_size,
    'patch_size': network.patch_size,
    'embed_dim': network.width,
    'depth': network.stack.depth,
    'num_heads': block.num_heads,
    'mlp_ratio': block.mlp_dim * (2 if block.gated_mlp else 1) / network.width,
    'act_layer': _ACTIVATIONS[block.activation],
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
  return _GATED if block.gated_mlp else _VIT, arguments


def _swin(network: Swin) -> tuple[str, dict[str, Any]]:
  return _SWIN, {
    'img_size': network.image_size,
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
    'norm_kwargs': {'eps': block.eps},
    'context_length': text.length,
    'vocab_size': text.vocab_size,
    'width': text.width,
    'num_heads': block.num_heads,
    'layers': text.stack.depth,
    'mlp_ratio': block.mlp_dim / text.width,
  }
  model: dict[str, Any] = {'embed_dim': text.num_classes, 'text_cfg': words}
  if family == 'siglip':
    model |= {
      'init_logit_bias': -10,
      'custom_text': True,
      'vision_cfg': {
        'image_size': tower.image_size,
        'timm_model_name': _siglip_name(tower),
        'timm_model_pretrained': False,
        'timm_pool': 'map',
        'timm_proj': 'none',
      },
    }
    words |= {
      'no_causal_mask': True,
      'proj_bias': True,
      'pool_type': 'last',
      'act_kwargs': {'approximate': 'tanh'},
    }
  else:
    own = plain(tower.stack.block, 'OpenCLIP')
    model |= {
      'quick_gelu': own.activation == 'quick_gelu',
      'vision_cfg': {
        'image_size': tower.image_size,
        'patch_size': tower.patch_size,
        'width': tower.width,
        'layers': tower.stack.depth,
        'head_width': tower.width // own.num_heads,
        'mlp_ratio': own.mlp_dim / tower.width,
        'norm_kwargs': {'eps': own.eps},
      },
    }
  seen = {
    'mean': list(objective.normalize.mean),
    'std': list(objective.normalize.std),
    'interpolation': getattr(image, 'interpolation', 'bicubic'),
    'resize_mode': 'squash' if isinstance(image, Resize) else 'shortest',
  }
  return {'open_clip_config.json': {'model_cfg': model, 'preprocess_cfg': seen}}


def _siglip_name(network: ViT) -> str:
  """What timm calls it; OpenCLIP gives timm no other numbers than those of a name."""
  size = (network.width, network.stack.depth, network.stack.block.num_heads, network.stack.block.mlp_dim)
  for name, numbers in SIZES.items():
    if numbers == size and name in _SIGLIP:
      return f'vit_{_SIGLIP[name]}_patch{network.patch_size}_siglip_{network.image_size}'
  raise UserError(f'OpenCLIP has SigLIP in the sizes {", ".join(_SIGLIP)} only')
