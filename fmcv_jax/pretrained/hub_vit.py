"""Config keys of vision transformers that several libraries share."""

from typing import Any

from fmcv_jax.models.backbones.vit import ViT
from fmcv_jax.pretrained.hub_file import HubFile


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
    if value // own.patch_size != own.image_size // own.patch_size:
      raise file.refusal(key, value, f'{own.image_size} x {own.image_size}, from the array of positions')
    if value % own.patch_size:
      file.set(f'{path}.drop_remainder', True)
