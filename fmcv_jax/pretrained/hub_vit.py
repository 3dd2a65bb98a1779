"""Config keys of vision transformers that several libraries share."""

from typing import Any

from fmcv_jax.errors import UserError
from fmcv_jax.models.backbones.vit import ViT
from fmcv_jax.pretrained.hub_file import HubFile


def exported_side(network: Any, library: str) -> int:
  """The side of a network's images for a library's config. Raises UserError where they are not square or not RGB."""
  height, width, channels = network.input_shape
  if height != width or channels != 3:
    raise UserError(
      f'{library}: this format is for square RGB images; the network takes {height} x {width} pixels (height x width) '
      f'of {channels} channels'
    )
  return height


def side(file: HubFile, key: str, path: str, own: Any, default: int | None = None) -> None:
  """The side of its images, where the file says it; pixels beyond the last whole patch are left out."""
  value = file.get(key, default)
  if isinstance(value, (list, tuple)) and len(set(value)) == 1:
    value = value[0]
  if value is None or value == own.image_size:
    return
  if not isinstance(value, int):
    raise file.refusal(key, value, 'squares')
  file.set(f'{path}.image_size', value)
  if isinstance(own, ViT):
    if (value // own.patch_size,) * 2 != own.grid:
      raise file.refusal(key, value, f'{own.grid[0]} x {own.grid[1]} patches, from the array of positions')
    if value % own.patch_size:
      file.set(f'{path}.drop_remainder', True)
