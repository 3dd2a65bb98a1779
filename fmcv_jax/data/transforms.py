"""Crops and resizes on the host: one image of any size in, uint8 [size, size, 3] out.

Color, flips, noise and mixing run on the device, in `augment.py`; the host only does what reduces the data.
"""

import abc
import dataclasses
import math
from typing import TypeGuard

import numpy as np

from fmcv_jax.bounds import PositiveFloat, PositiveFraction, PositiveInt
from fmcv_jax.data.images.decode import lazy_image
from fmcv_jax.data.images.resize import FILTERS, Interpolation


class ImageTransform(abc.ABC):
  """Maps an image to a square of a fixed `size`. Frozen and picklable; draws only from the given generator."""

  size: int

  @abc.abstractmethod
  def __call__(self, image: bytes | np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Encoded bytes or uint8 [H, W, 3] -> uint8 [size, size, 3]; an array that needs no change is returned as it is.

    Raises BadRecord for an image that cannot be decoded.
    """


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop(ImageTransform):
  """The Inception crop (Szegedy et al. 2015, section 6): a box of random area and aspect ratio, resized.

  scale: bounds of the fraction of the area, drawn uniformly
  ratio: bounds of width / height, drawn uniformly in the logarithm
  """

  size: PositiveInt
  scale: tuple[PositiveFraction, PositiveFraction] = (0.08, 1.0)
  ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
  interpolation: Interpolation = 'bicubic'

  def __post_init__(self) -> None:
    _check(self.size, self.interpolation)
    if not 0 < self.scale[0] <= self.scale[1] <= 1:
      raise ValueError(f'scale: expected 0 < low <= high <= 1, got {self.scale}')
    if not 0 < self.ratio[0] <= self.ratio[1]:
      raise ValueError(f'ratio: expected 0 < low <= high, got {self.ratio}')

  def __call__(self, image: bytes | np.ndarray, rng: np.random.Generator) -> np.ndarray:
    whole = lazy_image(image, exact=False)
    left, top, width, height = sample_box(whole.height, whole.width, self.scale, self.ratio, rng)
    return whole.crop((left, top, left + width, top + height), self.size, self.interpolation)


@dataclasses.dataclass(frozen=True)
class ResizeCrop(ImageTransform):
  """The standard evaluation transform: resize the short side to floor(size / crop), then a center crop of `size`.

  Rounds as timm and torchvision: 224 / 0.9 is 248, the long side is truncated, the corner of the crop rounded.
  """

  size: PositiveInt
  crop: PositiveFraction = 0.875
  interpolation: Interpolation = 'bicubic'

  def __post_init__(self) -> None:
    _check(self.size, self.interpolation)
    if not 0 < self.crop <= 1:
      raise ValueError(f'crop: expected 0 < crop <= 1, got {self.crop}')

  def __call__(self, image: bytes | np.ndarray, rng: np.random.Generator) -> np.ndarray:
    short = math.floor(self.size / self.crop)
    if short == self.size and _fits(image, self.size):
      return image
    whole = lazy_image(image)
    # Rounded to pixels as in torchvision, with which published networks were evaluated.
    width, height = (int(short * side / min(whole.width, whole.height)) for side in (whole.width, whole.height))
    left, top = round((width - self.size) / 2), round((height - self.size) / 2)
    # Resizing a box of the original gives the same pixels as resizing everything and cropping.
    x, y = whole.width / width, whole.height / height
    right, bottom = min((left + self.size) * x, whole.width), min((top + self.size) * y, whole.height)
    box = (left * x, top * y, right, bottom)
    return whole.crop(box, self.size, self.interpolation)


@dataclasses.dataclass(frozen=True)
class Resize(ImageTransform):
  """Resizes the whole image to a square, ignoring its aspect ratio."""

  size: PositiveInt
  interpolation: Interpolation = 'bicubic'

  def __post_init__(self) -> None:
    _check(self.size, self.interpolation)

  def __call__(self, image: bytes | np.ndarray, rng: np.random.Generator) -> np.ndarray:
    if _fits(image, self.size):
      return image
    whole = lazy_image(image)
    return whole.crop((0, 0, whole.width, whole.height), self.size, self.interpolation)


def transform_label_map(transform: ImageTransform, segments: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Applies the transform to a label map uint8 [H, W], with nearest-neighbour interpolation."""
  nearest = dataclasses.replace(transform, interpolation='nearest')  # type: ignore[type-var]
  return nearest(np.repeat(segments[..., None], 3, axis=-1), rng)[..., 0]


def sample_box(height, width, scale, ratio, rng: np.random.Generator) -> tuple[int, int, int, int]:
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


def _check(size: int, interpolation: str) -> None:
  if size < 1:
    raise ValueError(f'size: expected at least 1, got {size}')
  if interpolation not in FILTERS:
    raise ValueError(f'interpolation: {interpolation!r} is not one of {", ".join(FILTERS)}')


def _fits(image: bytes | np.ndarray, size: int) -> TypeGuard[np.ndarray]:
  return isinstance(image, np.ndarray) and image.shape == (size, size, 3) and image.dtype == np.uint8


IMAGE_TRANSFORMS: dict[str, type[ImageTransform]] = {
  'random_resized_crop': RandomResizedCrop,
  'resize_crop': ResizeCrop,
  'resize': Resize,
}
