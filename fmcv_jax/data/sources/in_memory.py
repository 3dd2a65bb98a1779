"""Images in memory, or in files of which there is no more than a list."""

import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image
from typing_extensions import override

from fmcv_jax.data.images.decode import rgb
from fmcv_jax.data.sources.base import BadRecord, Example, Source
from fmcv_jax.errors import UserError

_NOT_AN_IMAGE = 'is not an image; give an array, a Pillow image, a path or encoded bytes'

ImageLike = np.ndarray | Image.Image | bytes | str | os.PathLike[str]


def image_list(images: Any) -> tuple[Sequence[ImageLike] | np.ndarray, bool]:
  """Images as a list or an array [N, ...], and whether they were a single image instead of several.

  Arrays of other libraries are converted to NumPy. UserError for what is neither an image nor an iterable of images.
  """
  images = _numpy(images)
  if isinstance(images, np.ndarray):
    return ([images], True) if images.ndim in (2, 3) else (images, False)
  if isinstance(images, (str, os.PathLike, bytes, Image.Image)):
    return [images], True
  if not isinstance(images, Iterable) or hasattr(images, 'read'):
    raise UserError(f'images: {type(images).__name__} {_NOT_AN_IMAGE}, or a list of these')
  return [_numpy(image) for image in images], False


def _numpy(image: Any) -> Any:
  """An array of another library, such as JAX or PyTorch, as NumPy; anything else as it is."""
  if not (hasattr(image, '__array__') and hasattr(image, 'dtype')):
    return image
  try:
    return np.asarray(image)
  except (TypeError, RuntimeError) as error:  # on a GPU, or with gradients, PyTorch says what to call first
    raise UserError(f'images: {" ".join(str(error).split())}') from error


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
      raise BadRecord(f'{type(image).__name__} {_NOT_AN_IMAGE}')
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
  hint = ''
  if image.ndim == 3 and image.shape[0] in (1, 3, 4) and image.shape[2] not in (1, 2, 3, 4):
    hint = '; move the channels last: x.transpose(1, 2, 0)'
  elif np.issubdtype(image.dtype, np.floating):
    hint = '; for pixels from 0 to 1 give (255 * x).round().astype(np.uint8)'
  raise BadRecord(f'{image.dtype} {list(image.shape)} is not an image; expected uint8 [H, W, 3]{hint}')
