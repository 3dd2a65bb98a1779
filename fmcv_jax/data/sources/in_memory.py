"""Images in memory, or in files of which there is no more than a list."""

import os
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image
from typing_extensions import override

from fmcv_jax.data.images.decode import rgb
from fmcv_jax.data.sources.base import BadRecord, Example, Source
from fmcv_jax.errors import UserError

ImageLike = np.ndarray | Image.Image | bytes | str | pathlib.Path


class InMemoryImages(Source):
  """Images as a source, each a path, encoded bytes, a Pillow image or an array.

  The same image has the same pixels in each of these ways: 16 bits, transparency and EXIF orientation are treated as
  `decode` treats them in a file. An array is uint8 [H, W], [H, W, 1], [H, W, 2] (gray and alpha), [H, W, 3] or
  [H, W, 4] (alpha last), or uint16 [H, W]; of floating-point pixels the range is not known, and they are bad records.
  """

  def __init__(self, images: Sequence[ImageLike] | np.ndarray):
    if isinstance(images, (str, bytes, os.PathLike, Image.Image)):
      raise UserError(f'images: expected a list of images, got one ({type(images).__name__}); put it into a list')
    self._images = images

  def __len__(self) -> int:
    return len(self._images)

  def __getitem__(self, index: int) -> Example:
    image = self._images[index]
    if isinstance(image, (str, os.PathLike)):
      image = pathlib.Path(image).expanduser().read_bytes()
    elif isinstance(image, Image.Image):
      image = np.asarray(rgb(image))
    elif isinstance(image, np.ndarray):
      image = _pixels(image)
    elif not isinstance(image, bytes):
      raise BadRecord(f'{type(image).__name__} is not an image; give an array, a Pillow image, a path or encoded bytes')
    return {'image': image, 'key': str(index)}

  @override
  def key_of(self, index: int) -> str:
    image = self._images[index]
    return str(image) if isinstance(image, (str, os.PathLike)) else f'image {index}'


def _pixels(image: np.ndarray) -> np.ndarray:
  """uint8 [H, W, 3]; raises BadRecord for an array that is not an image."""
  if image.size and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
    return image
  flat = image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
  eight_bits = flat.dtype == np.uint8 and (flat.ndim == 2 or (flat.ndim == 3 and flat.shape[2] in (2, 4)))
  if flat.size and (eight_bits or (flat.dtype == np.uint16 and flat.ndim == 2)):
    return np.asarray(rgb(Image.fromarray(flat)))
  raise BadRecord(f'{image.dtype} {list(image.shape)} is not an image; expected uint8 [H, W, 3]')
