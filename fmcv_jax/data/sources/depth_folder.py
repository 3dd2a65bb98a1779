"""Images and maps of depth in two folders, such as those of NYU Depth V2, KITTI or a rendered data set."""

import dataclasses
import functools
import io
import os
import posixpath
from typing import NamedTuple

import numpy as np
from PIL import Image
from typing_extensions import override

from fmcv_jax.bounds import PositiveFloat
from fmcv_jax.data import storage
from fmcv_jax.data.sources.account import Account, LeftOut, left_out
from fmcv_jax.data.sources.base import BadRecord, Example, Source
from fmcv_jax.data.sources.folder_index import is_image
from fmcv_jax.errors import UserError

_MAPS = ('.png', '.npy')


class _Index(NamedTuple):
  """Relative paths of the images and of their maps, and what is left out."""

  images: tuple[str, ...]
  maps: tuple[str, ...]
  left_out: tuple[LeftOut, ...]


@dataclasses.dataclass(frozen=True)
class DepthFolder(Source):
  """Records with `image` and `depth`, float32 [H, W] in meters, sorted by path; 0 is a pixel of unknown depth.

  images  folder or URL of the images, read with its subfolders
  depths  folder or URL of the maps, with the same relative paths except for the extension: gray PNGs of 16 bits, or
          .npy of numbers [H, W]
  scale   meters of one unit of the maps: 0.001 for millimeters, 1/256 for KITTI, 1 for meters

  Values that are not finite or not above 0 are unknown. Images without a map, and maps without an image, are left out
  and counted.
  """

  images: str
  depths: str
  scale: PositiveFloat

  def __len__(self) -> int:
    return len(self._index.images)

  def __getitem__(self, index: int) -> Example:
    if not 0 <= index < len(self):
      raise IndexError(f'{index} of {len(self)}')
    with storage.open_file(storage.join(os.path.expanduser(self.images), self._index.images[index])) as file:
      image = file.read()
    return {'image': image, **self.annotations_of(index)}

  @override
  def annotations_of(self, index: int) -> Example:
    name = self._index.maps[index]
    with storage.open_file(storage.join(os.path.expanduser(self.depths), name)) as file:
      values = read_map(file.read(), name)
    known = np.isfinite(values) & (values > 0)
    depth = np.where(known, values, 0).astype(np.float32) * np.float32(self.scale)
    return {'depth': depth, 'key': self._index.images[index]}

  @override
  def key_of(self, index: int) -> str:
    return self._index.images[index]

  @override
  def account(self) -> Account:
    fields = {'image': self.images, 'depth': f'{self.depths}, times {self.scale:g} in meters'}
    return Account(records=len(self), fields=fields, left_out=self._index.left_out)

  @functools.cached_property
  def _index(self) -> _Index:
    images = {_stem(name): name for name in self._files('images') if is_image(name)}
    maps: dict[str, str] = {}
    for name in self._files('depths'):
      if not name.lower().endswith(_MAPS):
        continue
      if (stem := _stem(name)) in maps:
        raise UserError(f'depth_folder: depths: {self.depths} has both {maps[stem]} and {name}; remove one')
      maps[stem] = name
    both = sorted(set(images) & set(maps))
    if not both:
      raise UserError(
        f'depth_folder: none of the {len(images)} images in {self.images} has a map ({" or ".join(_MAPS)}) of its path '
        f'in {self.depths}, which has {len(maps)}'
      )
    lost = [('images without a map of depth', name) for stem, name in images.items() if stem not in maps]
    lost += [('maps of depth without an image', name) for stem, name in maps.items() if stem not in images]
    return _Index(tuple(images[stem] for stem in both), tuple(maps[stem] for stem in both), left_out(lost))

  def _files(self, field: str) -> list[str]:
    folder = os.path.expanduser(getattr(self, field))
    found = storage.files_below(folder)
    if found is None:
      raise UserError(f'depth_folder: {field}: no folder {folder!r} (relative to {os.getcwd()})')
    return found


def read_map(data: bytes, name: str) -> np.ndarray:
  """Numbers [H, W] of a .npy file or a gray PNG of 16 bits; BadRecord for anything else."""
  if name.lower().endswith('.npy'):
    values = np.load(io.BytesIO(data), allow_pickle=False)
    if values.ndim != 2 or values.dtype.kind not in 'fiu':
      raise BadRecord(f'{name} {values.dtype} {list(values.shape)} is not numbers [H, W]')
    return values
  image = Image.open(io.BytesIO(data))
  if image.mode not in ('I;16', 'I;16B', 'I'):
    raise BadRecord(f'{name} is a PNG of mode {image.mode}; a map of depth is gray, of 16 bits')
  return np.asarray(image)


def _stem(name: str) -> str:
  return posixpath.splitext(name)[0]
