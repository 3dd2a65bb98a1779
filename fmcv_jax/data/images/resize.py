"""Resizing a box of an image, with Pillow's filters and antialiasing."""

import threading
from typing import Literal

import cykooz_resizer as resizer
import numpy as np

from fmcv_jax.data.images import native_crop

Box = tuple[float, float, float, float]  # left, top, right, bottom
Interpolation = Literal['bicubic', 'bilinear', 'lanczos', 'nearest']  # Pillow's, antialiased except 'nearest'

FILTERS = {
  'bicubic': resizer.ResizeAlg.convolution(resizer.FilterType.catmull_rom),
  'bilinear': resizer.ResizeAlg.convolution(resizer.FilterType.bilinear),
  'lanczos': resizer.ResizeAlg.convolution(resizer.FilterType.lanczos3),
  'nearest': resizer.ResizeAlg.nearest(),
}
RADII = {'bicubic': 2, 'bilinear': 1, 'lanczos': 3, 'nearest': 1}  # filter radius in pixels


class _Reused(threading.local):
  """Per-thread resizer and output buffers, reused for every image to avoid allocations."""

  def __init__(self) -> None:
    self.resizer = resizer.Resizer()
    self.targets: dict[tuple[int, int, resizer.PixelType], resizer.ImageData] = {}


_THREAD = _Reused()


def resize(pixels: np.ndarray, box: Box, size: tuple[int, int], interpolation: Interpolation) -> np.ndarray:
  """The box of uint8 [H, W, C] as uint8 [*size, C]; the C code and cykooz.resizer give the same bytes."""
  done = native_crop.resize(pixels, box, size, interpolation)
  return by_package(pixels, box, size, interpolation) if done is None else done


def by_package(pixels: np.ndarray, box: Box, size: tuple[int, int], interpolation: Interpolation) -> np.ndarray:
  """As `resize`, by cykooz.resizer, with buffers that each thread keeps."""
  if pixels.shape[2] == 3:
    return _by_package(pixels, box, size, interpolation, resizer.PixelType.U8x3)
  # One at a time: of two or four channels the package takes the last for transparency.
  planes = np.moveaxis(pixels, -1, 0)[..., None]
  return np.concatenate([_by_package(x, box, size, interpolation, resizer.PixelType.U8) for x in planes], axis=-1)


def _by_package(
  pixels: np.ndarray, box: Box, size: tuple[int, int], interpolation: Interpolation, kind: resizer.PixelType
) -> np.ndarray:
  height, width, channels = pixels.shape
  left, top, right, bottom = box
  source = resizer.ImageData(width, height, kind, pixels.tobytes())
  target = _THREAD.targets.get((*size, kind))
  if target is None:
    target = _THREAD.targets[(*size, kind)] = resizer.ImageData(size[1], size[0], kind)
  crop = resizer.CropBox(left, top, right - left, bottom - top)
  _THREAD.resizer.resize(source, target, resizer.ResizeOptions(FILTERS[interpolation], crop_box=crop))
  return np.frombuffer(target.get_buffer(), np.uint8).reshape(*size, channels)
