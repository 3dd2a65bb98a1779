"""Handwritten digits: 1,797 small real images with ten classes, inside scikit-learn's wheel."""

import dataclasses
import functools
from typing import Literal

import numpy as np
from PIL import Image
from typing_extensions import override

from fmcv_jax.data.sources.base import Example, Source
from fmcv_jax.errors import UserError

NAMES = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')
SIZE = 32


@dataclasses.dataclass(frozen=True)
class Digits(Source):
  """The UCI digits (Alpaydin and Kaynak 1998, CC BY 4.0), 8 x 8 enlarged to uint8 [32, 32, 3].

  Every fifth image is for testing (360), the others are for training (1,437); the same on every machine.
  """

  split: Literal['train', 'test'] = 'train'

  def __post_init__(self) -> None:
    if self.split not in ('train', 'test'):
      raise ValueError(f"split: {self.split!r} is not 'train' or 'test'")

  @property
  @override
  def names(self) -> tuple[str, ...]:
    return NAMES

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> Example:
    if not 0 <= index < len(self):
      raise IndexError(f'{index} of {len(self)}')
    images, labels = _digits()
    row = self._rows[index]
    label = int(labels[row])
    return {'image': images[row], 'label': label, 'text': NAMES[label], 'key': self.key_of(index)}

  @functools.cached_property
  def _rows(self) -> np.ndarray:
    every = np.arange(len(_digits()[1]))
    return every[every % 5 == 0] if self.split == 'test' else every[every % 5 != 0]


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
  """uint8 [1797, 32, 32, 3], read-only, and int [1797]."""
  try:
    from sklearn.datasets import load_digits
  except ImportError as error:
    raise UserError('the digits need scikit-learn: pip install fmcv-jax[demo]') from error
  raw = load_digits()
  gray = np.round(raw.images * (255 / 16)).astype(np.uint8)
  large = [np.asarray(Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for image in gray]
  images = np.repeat(np.stack(large)[..., None], 3, axis=-1)
  images.setflags(write=False)
  return images, raw.target
