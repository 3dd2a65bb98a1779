"""Crops and resizes on the host: an image of any size in, uint8 [height, width, C] of a fixed size out.

A transform draws one `Geometry` for an example; its maps, masks, boxes and points are moved by the same one. Color,
flips, noise and mixing run on the device, in `augment/`; the host only does what reduces the data.
"""

import abc
import dataclasses
import math
from typing import ClassVar, cast

import numpy as np
from typing_extensions import override

from fmcv_jax.bounds import Byte, PositiveFloat, PositiveFraction
from fmcv_jax.data.geometry import Geometry
from fmcv_jax.data.images.decode import LazyImage, lazy_image
from fmcv_jax.data.images.resize import FILTERS, Interpolation
from fmcv_jax.fields import ImageSize, height_width


class ImageTransform(abc.ABC):
  """Maps images to a fixed `size`: the side of a square, or (height, width).

  Frozen and picklable; draws only from the given generator.
  """

  exact: ClassVar[bool] = True  # False: large JPEGs may be decoded at a fraction of their size
  size: ImageSize
  interpolation: str

  @abc.abstractmethod
  def draw(self, height: int, width: int, rng: np.random.Generator) -> Geometry:
    """The geometry for an image of height x width pixels."""

  def open(self, image: bytes | np.ndarray, channels: int = 3) -> LazyImage:
    """The image for `apply`; raises BadRecord for one that cannot be decoded or has other channels."""
    return lazy_image(image, self.exact, channels)

  def apply(self, image: LazyImage, geometry: Geometry) -> np.ndarray:
    """The pixels of the output, uint8 [height, width, C]; raises BadRecord if they cannot be decoded."""
    if geometry.identity:
      return image.pixels()
    left, top, right, bottom = geometry.inside
    filter_name = cast(Interpolation, self.interpolation)
    pixels = image.crop(geometry.visible_box, (bottom - top, right - left), filter_name)
    if pixels.shape[:2] == geometry.size:
      return pixels
    out = np.empty((*geometry.size, pixels.shape[2]), np.uint8)
    out[:] = np.asarray(self.fill_color, np.uint8)
    out[top:bottom, left:right] = pixels
    return out

  @property
  def fill_color(self) -> int | tuple[int, ...]:
    """Value, or one per channel, of what lies outside of the image."""
    return 0

  def __call__(self, image: bytes | np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Encoded bytes or uint8 [H, W, 3] -> uint8 [height, width, 3]; an array that needs no change is itself returned.

    Raises BadRecord for an image that cannot be decoded.
    """
    whole = self.open(image)
    return self.apply(whole, self.draw(whole.height, whole.width, rng))


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop(ImageTransform):
  """The Inception crop (Szegedy et al. 2015, section 6): a box of random area and aspect ratio, resized.

  scale: bounds of the fraction of the area, drawn uniformly
  ratio: bounds of width / height, drawn uniformly in the logarithm
  """

  exact: ClassVar[bool] = False
  size: ImageSize
  scale: tuple[PositiveFraction, PositiveFraction] = (0.08, 1.0)
  ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
  interpolation: Interpolation = 'bicubic'

  def __post_init__(self) -> None:
    _check(self.size, self.interpolation)
    if not 0 < self.scale[0] <= self.scale[1] <= 1:
      raise ValueError(f'scale: expected 0 < low <= high <= 1, got {self.scale}')
    if not 0 < self.ratio[0] <= self.ratio[1]:
      raise ValueError(f'ratio: expected 0 < low <= high, got {self.ratio}')

  @override
  def draw(self, height: int, width: int, rng: np.random.Generator) -> Geometry:
    left, top, w, h = sample_box(height, width, self.scale, self.ratio, rng)
    return Geometry(height, width, (left, top, left + w, top + h), height_width(self.size))


@dataclasses.dataclass(frozen=True)
class ResizeCrop(ImageTransform):
  """The standard evaluation transform: resize the short side to floor(size / crop), then a center crop of `size`.

  Rounds as timm and torchvision: 224 / 0.9 is 248, the long side is truncated, the corner of the crop rounded. For a
  `size` that is not square the image is resized to cover floor(size / crop).
  """

  size: ImageSize
  crop: PositiveFraction = 0.875
  interpolation: Interpolation = 'bicubic'

  def __post_init__(self) -> None:
    _check(self.size, self.interpolation)
    if not 0 < self.crop <= 1:
      raise ValueError(f'crop: expected 0 < crop <= 1, got {self.crop}')

  @override
  def draw(self, height: int, width: int, rng: np.random.Generator) -> Geometry:
    rows, columns = height_width(self.size)
    # Rounded to pixels as in torchvision, with which published networks were evaluated.
    fits, side = max((math.floor(columns / self.crop), width), (math.floor(rows / self.crop), height), key=_ratio)
    resized_width, resized_height = int(fits * width / side), int(fits * height / side)
    left, top = round((resized_width - columns) / 2), round((resized_height - rows) / 2)
    # Resizing a box of the original gives the same pixels as resizing everything and cropping.
    x, y = width / resized_width, height / resized_height
    box = (left * x, top * y, min((left + columns) * x, width), min((top + rows) * y, height))
    return Geometry(height, width, box, (rows, columns))


@dataclasses.dataclass(frozen=True)
class Resize(ImageTransform):
  """Resizes the whole image to `size`, ignoring its aspect ratio."""

  size: ImageSize
  interpolation: Interpolation = 'bicubic'

  def __post_init__(self) -> None:
    _check(self.size, self.interpolation)

  @override
  def draw(self, height: int, width: int, rng: np.random.Generator) -> Geometry:
    return Geometry(height, width, (0, 0, width, height), height_width(self.size))


@dataclasses.dataclass(frozen=True)
class ResizePad(ImageTransform):
  """Resizes the whole image to fit into `size`, keeping its aspect ratio, and pads it at the right or the bottom.

  fill  RGB of the padding, 0 to 255
  """

  size: ImageSize
  fill: tuple[Byte, Byte, Byte] = (0, 0, 0)
  interpolation: Interpolation = 'bicubic'

  def __post_init__(self) -> None:
    _check(self.size, self.interpolation)
    _check_color(self.fill)

  @property
  @override
  def fill_color(self) -> tuple[int, int, int]:
    return self.fill

  @override
  def draw(self, height: int, width: int, rng: np.random.Generator) -> Geometry:
    return scaled(height, width, height_width(self.size), 1.0, (0.0, 0.0))


@dataclasses.dataclass(frozen=True)
class ScaleJitter(ImageTransform):
  """Large-scale jittering (Ghiasi et al. 2021): fit into `size` times a random scale, then crop or pad to `size`.

  scale  bounds of the scale, drawn uniformly; 1 shows the whole image
  fill   RGB of the padding, 0 to 255

  A larger image is cropped at a random place; a smaller one is padded at the right and the bottom.
  """

  exact: ClassVar[bool] = False
  size: ImageSize
  scale: tuple[PositiveFloat, PositiveFloat] = (0.1, 2.0)
  fill: tuple[Byte, Byte, Byte] = (128, 128, 128)
  interpolation: Interpolation = 'bilinear'

  def __post_init__(self) -> None:
    _check(self.size, self.interpolation)
    _check_color(self.fill)
    if not 0 < self.scale[0] <= self.scale[1]:
      raise ValueError(f'scale: expected 0 < low <= high, got {self.scale}')

  @property
  @override
  def fill_color(self) -> tuple[int, int, int]:
    return self.fill

  @override
  def draw(self, height: int, width: int, rng: np.random.Generator) -> Geometry:
    scale = rng.uniform(*self.scale)
    return scaled(height, width, height_width(self.size), scale, (rng.uniform(), rng.uniform()))


def scaled(height: int, width: int, size: tuple[int, int], scale: float, place: tuple[float, float]) -> Geometry:
  """An image that fits into `scale` times `size`, its sides rounded to pixels, cropped or padded to `size`.

  place  fractions (x, y) of what is cropped off that lies at the left and at the top
  """
  rows, columns = size
  zoom = scale * min(rows / height, columns / width)
  resized_height, resized_width = max(1, round(height * zoom)), max(1, round(width * zoom))
  left = math.floor(place[0] * (max(0, resized_width - columns) + 1))
  top = math.floor(place[1] * (max(0, resized_height - rows) + 1))
  x, y = width / resized_width, height / resized_height
  return Geometry(height, width, (left * x, top * y, (left + columns) * x, (top + rows) * y), size)


def sample_box(
  height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
  """(left, top, width, height) of a random box inside the image, with area and aspect ratio within the bounds.

  A box that exceeds the image is redrawn. After ten failures, as for very elongated images, it is the largest centered
  box with an aspect ratio within the bounds.
  """
  for _ in range(10):
    area = height * width * rng.uniform(*scale)
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    w, h = max(1, round(math.sqrt(area * aspect))), max(1, round(math.sqrt(area / aspect)))
    if w <= width and h <= height:
      return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
  w = max(1, min(width, round(height * ratio[1])))
  h = max(1, min(height, round(width / ratio[0])))
  return (width - w) // 2, (height - h) // 2, w, h


def _ratio(pair: tuple[int, int]) -> float:
  return pair[0] / pair[1]


def _check(size: ImageSize, interpolation: str) -> None:
  if min(height_width(size)) < 1:
    raise ValueError(f'size: expected at least 1, got {size}')
  if interpolation not in FILTERS:
    raise ValueError(f'interpolation: {interpolation!r} is not one of {", ".join(FILTERS)}')


def _check_color(color: tuple[int, int, int]) -> None:
  if any(not 0 <= value <= 255 for value in color):
    raise ValueError(f'fill: expected numbers from 0 to 255, got {color}')


IMAGE_TRANSFORMS: dict[str, type[ImageTransform]] = {
  'random_resized_crop': RandomResizedCrop,
  'resize': Resize,
  'resize_crop': ResizeCrop,
  'resize_pad': ResizePad,
  'scale_jitter': ScaleJitter,
}
