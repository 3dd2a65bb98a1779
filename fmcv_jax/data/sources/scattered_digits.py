"""Digits at random places and sizes among scraps of others (as Cluttered MNIST, Mnih et al. 2014, section 4.1).

What a pixel means changes from scene to scene, so that nearest neighbors and linear classifiers of the pixels fail,
and each scene knows which of its pixels are the digit's.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Literal

import numpy as np
from PIL import Image
from typing_extensions import override

from fmcv_jax.bounds import NonNegativeInt, PositiveInt
from fmcv_jax.data.sources.base import Example, Source
from fmcv_jax.data.sources.digits import NAMES, Digits
from fmcv_jax.fields import Field

INK = 64  # of 255, from which on a pixel belongs to the digit


@dataclasses.dataclass(frozen=True)
class Scattered(Source):
  """Scenes uint8 [size, size, 3] with one digit each, `copies` of every digit of the split; the same on every machine.

  A digit is between 3/8 and 5/8 of the scene high and lies anywhere in it, over `clutter` scraps of other digits of
  the split, each 3/16 of the scene high. `segments` is uint8 [size, size]: 0 for the ground and the scraps, 1 + label
  for the digit's ink.
  """

  split: Literal['train', 'test'] = 'train'
  copies: PositiveInt = 16
  size: PositiveInt = 32
  clutter: NonNegativeInt = 4

  def __post_init__(self) -> None:
    if self.split not in ('train', 'test'):
      raise ValueError(f"split: {self.split!r} is not 'train' or 'test'")
    if self.copies < 1 or self.clutter < 0:
      raise ValueError(f'copies, clutter: expected at least 1 and 0, got {self.copies} and {self.clutter}')
    if self.size < 8:
      raise ValueError(f'size: expected at least 8, got {self.size}')

  @functools.cached_property
  def _digits(self) -> Digits:
    return Digits(self.split)

  @property
  @override
  def names(self) -> tuple[str, ...]:
    return NAMES

  @property
  @override
  def fields(self) -> Mapping[str, Field]:
    return {'segments': Field('map', fill=255)}  # whose numbers are those of `segment_names`

  @property
  def segment_names(self) -> tuple[str, ...]:
    """segments -> name."""
    return ('ground', *NAMES)

  def __len__(self) -> int:
    return len(self._digits) * self.copies

  def __getitem__(self, index: int) -> Example:
    if not 0 <= index < len(self):
      raise IndexError(f'{index} of {len(self)}')
    rng = np.random.default_rng((('train', 'test').index(self.split), index))
    digit = index % len(self._digits)
    label = self._digits[digit]['label']
    gray, segments = np.zeros((2, self.size, self.size), np.uint8)
    for _ in range(self.clutter):
      other = self._drawn(int(rng.integers(len(self._digits))), rng)
      paste(gray, other[_anywhere(len(other), self.size * 3 // 16, rng)], rng)
    drawn = self._drawn(digit, rng)
    where = paste(gray, drawn, rng)
    segments[where] = np.where(drawn >= INK, 1 + label, 0)
    return {
      'image': np.repeat(gray[..., None], 3, axis=-1),
      'segments': segments,
      'label': label,
      'text': NAMES[label],
      'key': self.key_of(index),
    }

  def _drawn(self, digit: int, rng: np.random.Generator) -> np.ndarray:
    """A digit at a random height, uint8 [H, H]."""
    side = int(rng.integers(self.size * 3 // 8, self.size * 5 // 8 + 1))
    return _at_size(self.split, digit, side)


def _anywhere(space: int, size: int, rng: np.random.Generator) -> tuple[slice, slice]:
  """A square of `size` pixels somewhere in one of `space` pixels."""
  top, left = (int(x) for x in rng.integers(0, space - size + 1, 2))
  return slice(top, top + size), slice(left, left + size)


def paste(gray: np.ndarray, piece: np.ndarray, rng: np.random.Generator) -> tuple[slice, slice]:
  """Puts a piece somewhere into `gray`, where it is brighter, and says where."""
  where = _anywhere(len(gray), len(piece), rng)
  gray[where] = np.maximum(gray[where], piece)
  return where


@functools.cache
def _at_size(split: Literal['train', 'test'], digit: int, side: int) -> np.ndarray:
  """uint8 [side, side], read-only."""
  whole = Image.fromarray(Digits(split)[digit]['image'][..., 0])
  drawn = np.array(whole.resize((side, side), Image.Resampling.BICUBIC))
  drawn.setflags(write=False)
  return drawn
