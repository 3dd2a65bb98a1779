"""The geometry of published image processors, by Pillow itself: what the publisher's network was shown, to the byte."""

import dataclasses
import math
from typing import Literal

import numpy as np
from PIL import Image

from fmcv_jax.bounds import Byte, PositiveFloat, PositiveInt
from fmcv_jax.data.images.decode import decode_pil
from fmcv_jax.data.transforms import ImageTransform, Resize, ResizeCrop
from fmcv_jax.errors import BadRecord

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

  def __call__(self, image: bytes | np.ndarray, rng: np.random.Generator) -> np.ndarray:
    whole = decode_pil(image) if isinstance(image, bytes) else _of_array(image)
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

  def _center(self, pixels: np.ndarray) -> np.ndarray:
    short = [max(0, self.size - side) for side in pixels.shape[:2]]
    if any(short):
      before, after = [n // 2 for n in short], [-(-n // 2) for n in short]
      background = np.empty((pixels.shape[0] + short[0], pixels.shape[1] + short[1], 3), np.uint8)
      background[:] = self.fill
      background[before[0] : background.shape[0] - after[0], before[1] : background.shape[1] - after[1]] = pixels
      pixels = background
    free = [(side - self.size) / 2 for side in pixels.shape[:2]]
    top, left = (round(x) if self.center == 'round' else math.floor(x) for x in free)
    return pixels[top : top + self.size, left : left + self.size]


def as_pillow_resize(image: ImageTransform) -> PillowResize:
  """The same geometry as a transform's; of a random one, the center of the short side's square."""
  if isinstance(image, PillowResize):
    return image
  crop = image.crop if isinstance(image, ResizeCrop) else 1.0
  mode: Literal['squash', 'shortest'] = 'squash' if isinstance(image, Resize) else 'shortest'
  return PillowResize(image.size, mode, crop, getattr(image, 'interpolation', 'bicubic'))


def _of_array(pixels: np.ndarray) -> Image.Image:
  if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
    raise BadRecord(f'expected an image uint8 [H, W, 3], got {pixels.dtype} {list(pixels.shape)}')
  return Image.fromarray(pixels)
