"""Maps config.json of timm, and the names of its architectures, to our configs.

Heads, eps, activation and pooling of an architecture are defined in timm's code, not in its files; here they are rules
on known architecture names. `model_args` take precedence, as in timm.
"""

import re
from typing import Any

from fmcv_jax.errors import UserError
from fmcv_jax.models.backbones.efficientnet import SIZES as EFFICIENTNETS
from fmcv_jax.models.backbones.efficientnet import STEM, EfficientNet, channels
from fmcv_jax.models.backbones.swin import Swin
from fmcv_jax.models.backbones.vit import ViT
from fmcv_jax.pretrained.hub_file import HubFile, one_of
from fmcv_jax.pretrained.hub_vit import side

_NUMBERS = r'patch\d+(_(plus|clip|quickgelu|siglip|gap|map|reg\d|dinov2|tipsv2))*(_\d+)?(_miil)?'
_KNOWN = re.compile(
  r'(vit_(tiny|xsmall|wee|little|small|medium|mediumd|betwixt|base|large|huge|giant|giantopt|gigantic|so150m2?|so400m)_'
  rf'{_NUMBERS}|vit_small_patch16_36x1_224|deit3?_(tiny|small|medium|base|large|huge)(_distilled)?_patch\d+_\d+'
  r'|eva_large_patch14_\d+|flexivit_(small|base|large)|test_vit2?)'
)
# SigLIP 2 in sizes that the first release did not have.
_TANH = re.compile(r'_(base_patch32|giantopt_patch16|so400m_patch16)_siglip|_large_patch16_siglip(_gap)?_512')
_SWIN = re.compile(r'swin_(tiny|small|base|large)_patch4_window\d+_\d+')
_EFFICIENTNET = re.compile(r'tf_efficientnet_(b\d|l2)')
_ACTIVATION = one_of(
  {
    'gelu': 'gelu',
    'gelu_tanh': 'gelu_tanh',
    'quick_gelu': 'quick_gelu',
    'silu': 'silu',
    'swish': 'silu',
    'relu': 'relu',
  }
)
_POOLS = {'token': 'cls', 'avg': 'gap', 'map': 'map'}

IGNORED = (
  r'num_features|num_classes|label_names|label_descriptions|labels|global_pool|pretrained_cfg|model_args|version',
  r'origin_url|license|description|paper_.*|notes|.*_stats|param_count',
)
# Constructor arguments that do not affect inference, or whose effect follows from the arrays.
_ARGUMENTS = (
  r'num_classes|(drop|drop_path|pos_drop|patch_drop|proj_drop|attn_drop)_rate|weight_init|fix_init|init_values|depth',
  r'dynamic_img_size|strict_img_size|mlp_ratio|pretrained.*|qk_norm|scale_.*_norm|reg_tokens|no_embed_class|pre_norm',
)


def read(file: HubFile, config: dict[str, Any], objective: Any) -> None:
  """Reads config.json into its findings; UserError for an architecture or an argument that is not known here."""
  architecture = file.get('architecture')
  arguments = file.part('model_args')
  if 'global_pool' in file and 'global_pool' not in arguments:
    arguments.values = {**arguments.values, 'global_pool': file.get('global_pool')}
  network(file, arguments, str(architecture), 'objective.network', getattr(objective, 'network', None))
  file.done(IGNORED)


def network(file: HubFile, arguments: HubFile, architecture: str, path: str, own: Any) -> None:
  """Sets and compares the values of `architecture` with these arguments for our network `own` at `path`."""
  if isinstance(own, ViT) and _KNOWN.fullmatch(architecture):
    _vit(arguments, architecture, path, own)
  elif isinstance(own, Swin) and _SWIN.fullmatch(architecture):
    _swin(arguments, path, own)
  elif isinstance(own, EfficientNet) and (found := _EFFICIENTNET.match(architecture)):
    _efficientnet(file, found[1].upper(), own)
  else:
    raise UserError(
      f'{file.shown}: architecture {architecture!r} is not known for these arrays: its heads, eps and activation are '
      "in timm's code, and cannot be read; without config.json, name them by --config.objective.network..."
    )
  arguments.done(_ARGUMENTS)


def _vit(arguments: HubFile, name: str, path: str, own: ViT) -> None:
  """Rules on the names of timm's vision_transformer.py, deit.py and eva's ViTs."""
  for key, ours in (('embed_dim', own.width), ('depth', own.stack.depth), ('patch_size', own.patch_size)):
    if key in arguments:
      arguments.agree(key, arguments.get(key), ours)
  width = own.width
  arguments.set(f'{path}.num_heads', int(arguments.get('num_heads', heads(name, width))))
  usual = activation_of(name, gated=own.stack.block.gated_mlp)
  try:
    arguments.set(f'{path}.activation', _ACTIVATION(arguments.get('act_layer', usual)))
  except ValueError as error:
    raise UserError(f'{arguments.shown}: act_layer is {arguments.get("act_layer")!r}: {error}') from error
  norm = str(arguments.get('norm_layer', 'layernorm'))
  if norm.lower() != 'layernorm':
    raise arguments.refusal('norm_layer', norm, 'LayerNorm')
  arguments.set(f'{path}.eps', 1e-5 if 'clip' in name and 'norm_layer' not in arguments else 1e-6)
  biased = not re.search(r'miil|vit_(medium|betwixt)_patch16_gap|so150m2', name)
  arguments.set(f'{path}.qkv_bias', bool(arguments.get('qkv_bias', biased)))
  _pool(arguments, name, path, own)
  if arguments.get('pos_embed', 'learn') != 'learn':
    raise arguments.refusal('pos_embed', arguments.get('pos_embed'), 'learned positions')
  for key in ('final_norm', 'proj_bias'):
    arguments.agree(key, arguments.get(key, True), True)
  for key in ('pool_include_prefix', 'dynamic_img_pad'):
    arguments.agree(key, arguments.get(key, False), False)
  arguments.agree('in_chans', arguments.get('in_chans', 3), 3)
  side(arguments, 'img_size', path, own)


def activation_of(name: str, *, gated: bool) -> str:
  """The activation of an architecture."""
  if 'quickgelu' in name:
    return 'quick_gelu'
  return 'gelu_tanh' if _TANH.search(name) else 'silu' if gated else 'gelu'


def heads(name: str, width: int) -> int:
  """Number of heads of an architecture: 64 channels per head, with listed exceptions."""
  if name in ('vit_base_patch16_gap_224', 'test_vit', 'test_vit2'):
    return 16 if 'base' in name else 2
  if re.search(r'_(so400m|huge|gigantic|giantopt)_', name):
    return 16
  if '_giant_' in name:
    return 24 if re.search('dinov2|tipsv2', name) else 16
  return max(1, width // 64)


def _pool(arguments: HubFile, name: str, path: str, own: ViT) -> None:
  """Sets the pooling; the arrays show whether the norm follows the mean (fc_norm) and whether there is a probe."""
  averaged = '_gap' in name or name.startswith(('eva_large', 'test_vit2'))
  mapped = re.search('siglip|_map_', name) and not averaged
  usual = 'avg' if averaged else 'map' if mapped else 'token'
  pool = arguments.get('global_pool', usual)
  if pool not in _POOLS or (pool == 'map') != (own.pool == 'map'):
    raise arguments.refusal('global_pool', pool, f'a pool of the kind {own.pool!r}')
  pool = _POOLS[pool]
  for key, ours in (('class_token', own.has_class_token), ('fc_norm', own.fc_norm)):
    if key in arguments:
      arguments.agree(key, arguments.get(key), ours)
  if pool == 'cls' and (not own.has_class_token or own.fc_norm):
    raise arguments.refusal('global_pool', 'token', 'a mean of the patches')
  arguments.set(f'{path}.pool', pool)
  if pool == 'gap':
    arguments.set(f'{path}.class_token', own.has_class_token)


def _swin(arguments: HubFile, path: str, own: Swin) -> None:
  for key, ours in (
    ('embed_dim', own.width),
    ('depths', own.depths),
    ('num_heads', [block.num_heads for block in own.blocks]),
    ('patch_size', own.smallest_patch),
    ('window_size', own.window),
  ):
    if key in arguments:
      arguments.agree(key, arguments.get(key), ours)
  side(arguments, 'img_size', path, own)
  for key, usual in (('act_layer', 'gelu'), ('global_pool', 'avg')):
    arguments.agree(key, arguments.get(key, usual), usual)


def _efficientnet(file: HubFile, size: str, own: EfficientNet) -> None:
  if channels(STEM, EFFICIENTNETS[size][0]) != own.stem:
    raise file.refusal('architecture', file.get('architecture'), f'a stem of {own.stem} channels')
