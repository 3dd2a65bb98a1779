"""Depth Anything's config.json and image processor in transformers."""

from typing import Any

from fmcv_jax.models.dense.dpt import FACTORS
from fmcv_jax.pretrained.hub_file import Has, HubFile, Table

_HEAD: Table = {
  'patch_size': Has(lambda network: network.encoder.patch_size, 14),
  'reassemble_hidden_size': Has(lambda network: network.encoder.width, 384),
  'reassemble_factors': Has(FACTORS, FACTORS),
  'neck_hidden_sizes': Has(lambda network: network.channels, (48, 96, 192, 384)),
  'fusion_hidden_size': Has(lambda network: network.width, 64),
  'head_in_index': Has(-1, -1),
  'head_hidden_size': Has(lambda network: network.hidden, 32),
  # Where versions before 5 said which other encoder there is.
  'backbone': Has(None),
  'use_timm_backbone': Has(False),
  'backbone_kwargs': Has({}),
}


def taps(backbone: HubFile, path: str, network: Any) -> None:
  """The blocks that are read: 'out_indices' from 1, or 'out_features', such as 'stage12'; after the last norm."""
  indices = backbone.get('out_indices')
  features = backbone.get('out_features')
  if indices is None and features is not None:
    indices = [int(name.removeprefix('stage')) if name.startswith('stage') else name for name in features]
  depth = network.encoder.stack.depth
  if indices is None:
    raise backbone.refusal('out_indices', None, 'four blocks, which have to be named')
  given = [index + depth + 1 if isinstance(index, int) and index < 0 else index for index in indices]
  whole = all(isinstance(index, int) and 1 <= index <= depth for index in given)
  if not whole or len(given) != 4 or given != sorted(set(given)):
    raise backbone.refusal('out_indices', indices, f'four increasing numbers of blocks from 1 to {depth}')
  backbone.set(f'{path}.taps', tuple(given))
  for key in ('apply_layernorm', 'reshape_hidden_states'):
    value = backbone.get(key, True)
    if key == 'apply_layernorm':
      backbone.agree(key, value, True)


def head(file: HubFile, path: str, network: Any) -> None:
  """Sizes of the head, and the kind of depth."""
  file.apply(_HEAD, path, network)
  file.get('use_pretrained_backbone')
  kind, most = file.get('depth_estimation_type', 'relative'), file.get('max_depth', 1)
  if kind not in ('relative', 'metric'):
    raise file.refusal('depth_estimation_type', kind, 'relative or metric depth')
  if kind == 'relative' and most != 1:
    raise file.refusal('max_depth', most, 'relative inverse depth as the network gives it, times 1')
  file.set(f'{path}.max_depth', float(most) if kind == 'metric' else None)


def images(file: HubFile, multiple: int) -> dict[str, Any]:
  """data.image of DPT's processor; UserError for sides that are not multiples of `multiple`, the network's patches."""
  size = file.get('size', {'height': 384, 'width': 384})
  if isinstance(size, int):
    size = {'height': size, 'width': size}
  if set(size) != {'height', 'width'}:
    raise file.refusal('size', size, 'a height and a width')
  given = file.get('ensure_multiple_of', 1)
  sides = (size['height'], size['width'])
  keep = bool(file.get('keep_aspect_ratio', False))
  if given % multiple and (keep or any(side % multiple for side in sides)):
    raise file.refusal('ensure_multiple_of', given, f'patches of {multiple} pixels')
  side = sides[0] if sides[0] == sides[1] else sides
  return {'name': 'resize_to_multiple', 'size': side, 'multiple': given, 'keep_aspect_ratio': keep}
