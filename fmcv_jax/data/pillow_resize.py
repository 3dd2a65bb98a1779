"""The geometry of published image processors, by Pillow itself: what the publisher's network was shown, to the byte."""

import dataclasses
import math
from typing import Literal

import numpy as np
from PIL import Image
from typing_extensions import override

from fmcv_jax.bounds import Byte, PositiveFloat, PositiveInt
from fmcv_jax.data.geometry import Geometry
from fmcv_jax.data.images.decode import LazyImage, decode_pil, lazy_image
from fmcv_jax.data.transforms import ImageTransform, Resize, ResizeCrop
from fmcv_jax.errors import UserError
from fmcv_jax.fields import ImageSize, height_width

PillowFilter = Literal['nearest', 'bilinear', 'bicubic', 'lanczos', 'box', 'hamming']
FILTERS = {
  'nearest': Image.Resampling.NEAREST,
  'lanczos': Image.Resampling.LANCZOS,
  'bilinear': Image.Resampling.BILINEAR,
  'bicubic': Image.Resampling.BICUBIC,
  'box': Image.Resampling.BOX,
  'hamming': Image.Resampling.HAMMING,
}


@dataclasses.dataclass(frozen=True)
class PillowResize(ImageTransform):
  """Decodes the image whole, resizes the whole of it, then cuts out the center.

  Slower than `resize` and `resize_crop`, which decode and resize no more than they need and may differ in some pixels.

  size           side of the square that comes out
  mode           'shortest': the short side becomes floor(size / crop) pixels; 'squash': both sides do, and the aspect
                 ratio is lost; 'longest': the long side does, and `fill` surrounds what is shorter than `size`
  crop           share of the resized side that the center is, 0 < crop <= 1
  interpolation  a filter of Pillow's
  center         how half a pixel at the top or left is rounded: 'round' to even (torchvision, timm, OpenCLIP), or
                 'floor' (transformers)
  fill           RGB, 0 to 255
  """

  size: PositiveInt
  mode: Literal['shortest', 'squash', 'longest'] = 'shortest'
  crop: PositiveFloat = 1.0
  interpolation: PillowFilter = 'bicubic'
  center: Literal['round', 'floor'] = 'round'
  fill: tuple[Byte, Byte, Byte] = (0, 0, 0)

  def __post_init__(self) -> None:
    if self.size < 1:
      raise ValueError(f'size: expected at least 1, got {self.size}')
    if not 0 < self.crop <= 1:
      raise ValueError(f'crop: expected 0 < crop <= 1, got {self.crop}')

  @property
  def side(self) -> int:
    """Pixels of the side that `mode` names, before the center is cut out."""
    return math.floor(self.size / self.crop + 1e-6)

  @property
  @override
  def fill_color(self) -> tuple[int, int, int]:
    return self.fill

  @override
  def draw(self, height: int, width: int, rng: np.random.Generator) -> Geometry:
    columns, rows = self._sides(width, height)
    left, top = (self._margin(side) for side in (columns, rows))
    x, y = width / columns, height / rows
    box = (left * x, top * y, (left + self.size) * x, (top + self.size) * y)
    return Geometry(height, width, box, (self.size, self.size))

  @override
  def open(self, image: bytes | np.ndarray, channels: int = 3) -> LazyImage:
    return _decoded(image, channels)

  @override
  def apply(self, image: LazyImage, geometry: Geometry) -> np.ndarray:
    whole = Image.fromarray(image.pixels())
    resized = whole.resize(self._sides(whole.width, whole.height), FILTERS[self.interpolation])
    return self._center(np.asarray(resized))

  def _sides(self, width: int, height: int) -> tuple[int, int]:
    """(width, height) after the resize, in whole pixels as torchvision, timm and OpenCLIP count them."""
    side = self.side
    if self.mode == 'squash':
      return side, side
    if self.mode == 'longest':
      ratio = max(width, height) / side
      return max(1, round(width / ratio)), max(1, round(height / ratio))
    short = min(width, height)
    return int(side * width / short), int(side * height / short)

  def _margin(self, side: int) -> int:
    """Pixels of a resized side before the output begins; negative where it is padded."""
    free = side - self.size
    if free < 0:
      return -(-free // 2)
    return round(free / 2) if self.center == 'round' else free // 2

  def _center(self, pixels: np.ndarray) -> np.ndarray:
    out = np.empty((self.size, self.size, 3), np.uint8)
    out[:] = self.fill
    (top, rows), (left, columns) = ((self._margin(side), side) for side in pixels.shape[:2])
    shown = pixels[max(top, 0) : top + self.size, max(left, 0) : left + self.size]
    top, left = max(-top, 0), max(-left, 0)
    out[top : top + min(rows, self.size), left : left + min(columns, self.size)] = shown
    return out


@dataclasses.dataclass(frozen=True)
class ResizeToMultiple(ImageTransform):
  """Resizes the whole image so that both sides are multiples of `multiple` (MiDaS, DPT, Depth Anything).

  size               side, or (height, width), that the image is scaled to
  multiple           each side is rounded to the nearest multiple of it
  keep_aspect_ratio  both sides are scaled by that factor of the two which is nearer to 1, and the other side has any
                     length: images then come out in several sizes; False squashes the image to `size`
  interpolation      a filter of Pillow's
  """

  size: ImageSize
  multiple: PositiveInt = 14
  keep_aspect_ratio: bool = True
  interpolation: PillowFilter = 'bicubic'

  def __post_init__(self) -> None:
    if min(height_width(self.size)) < 1:
      raise ValueError(f'size: expected at least 1, got {self.size}')

  @override
  def draw(self, height: int, width: int, rng: np.random.Generator) -> Geometry:
    rows, columns = height_width(self.size)
    down, right = rows / height, columns / width
    if self.keep_aspect_ratio:
      down = right = right if abs(1 - right) < abs(1 - down) else down
    sides = (max(1, round(side / self.multiple)) * self.multiple for side in (down * height, right * width))
    new_height, new_width = sides
    return Geometry(height, width, (0, 0, width, height), (new_height, new_width))

  @override
  def open(self, image: bytes | np.ndarray, channels: int = 3) -> LazyImage:
    return _decoded(image, channels)

  @override
  def apply(self, image: LazyImage, geometry: Geometry) -> np.ndarray:
    whole = Image.fromarray(image.pixels())
    return np.asarray(whole.resize(geometry.size[::-1], FILTERS[self.interpolation]))


def _decoded(image: bytes | np.ndarray, channels: int) -> LazyImage:
  return lazy_image(np.asarray(decode_pil(image)) if isinstance(image, bytes) else image, channels=channels)


def as_pillow_resize(image: ImageTransform) -> PillowResize:
  """The same geometry as a transform's; of a random one, the center of the short side's square."""
  if isinstance(image, PillowResize):
    return image
  crop = image.crop if isinstance(image, ResizeCrop) else 1.0
  mode: Literal['squash', 'shortest'] = 'squash' if isinstance(image, Resize) else 'shortest'
  return PillowResize(_square(image), mode, crop, getattr(image, 'interpolation', 'bicubic'))


def _square(image: ImageTransform) -> int:
  height, width = height_width(image.size)
  if height != width:
    raise UserError(f'image: {height} x {width} pixels; published processors of this layout give squares')
  return height
