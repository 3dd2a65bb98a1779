"""Writes timm's config.json, so that `timm.create_model('local-dir:DIR')` loads an export."""

from typing import Any

from fmcv_jax.data.pillow_resize import as_pillow_resize
from fmcv_jax.data.transforms import ImageTransform
from fmcv_jax.errors import UserError
from fmcv_jax.models.backbones.efficientnet import EfficientNet
from fmcv_jax.models.backbones.swin import Swin
from fmcv_jax.models.backbones.vit import ViT
from fmcv_jax.pretrained import efficientnet
from fmcv_jax.pretrained.export_transformers import Files, plain
from fmcv_jax.pretrained.hub_vit import exported_side

# Architecture of which all values but the eps (CLIP's, 1e-5) are overridden by arguments.
_VIT, _CLIP, _GATED = 'vit_base_patch16_224', 'vit_base_patch16_clip_224', 'vit_giant_patch14_dinov2'
_DISTILLED, _SWIN = 'deit_base_distilled_patch16_224', 'swin_base_patch4_window7_224'
_CLASSIFIERS = {_DISTILLED: ['head', 'head_dist'], _SWIN: 'head.fc'}


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
