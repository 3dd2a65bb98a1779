"""Emoji in colors that nobody drew them in: 'blue grinning face', 'green teacup'.

The main hue of a drawing is turned to a named one; what is white, gray or black, and what has another hue, stays. This
teaches what a color word means in front of any name, for models that are asked for combinations.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
from typing_extensions import override

from fmcv_jax.bounds import PositiveInt
from fmcv_jax.data.sources.base import Source
from fmcv_jax.data.sources.emoji import Concept, Emoji, captions, draw, on_white, split_concepts, words
from fmcv_jax.errors import UserError, did_you_mean

# Hue in degrees of the HSV color wheel.
HUES: dict[str, float] = {'red': 0, 'orange': 28, 'yellow': 52, 'green': 125, 'blue': 217, 'purple': 278, 'pink': 330}
# A name with one of these already says its color, or that it is not one color.
_COLOR_WORDS = frozenset(HUES) | {'brown', 'black', 'white', 'gray', 'gold', 'rainbow', 'flag', 'blond', 'leafy'}
_BAND = 40.0  # degrees to either side of the main hue that turn with it
_MIN_AREA = 0.12  # fraction of the image, weighted by saturation, that has to turn; a drawing with less has no color


@dataclasses.dataclass(frozen=True)
class RecoloredEmoji(Source):
  """Each training drawing of `emoji` whose name says no color, in each of `colors`; captions are 'blue NAME'.

  Only the training concepts are used, and no caption is the name of any concept, so that the held-out names of `Emoji`
  stay held out. Drawings with too little color to turn are left out. There are no labels.

  Examples: image uint8 [image_size, image_size, 3] on white, text, texts (with `aliases` also 'blue ALIAS'), key.
  """

  artists: tuple[str, ...] = ('openmoji', 'noto')
  image_size: PositiveInt = 64
  colors: tuple[str, ...] = tuple(HUES)
  aliases: bool = True

  def __post_init__(self) -> None:
    if unknown := [color for color in self.colors if color not in HUES]:
      raise UserError(f'colors: {unknown[0]!r} is not a known color; {did_you_mean(unknown[0], HUES)}')
    if not self.colors:
      raise UserError(f'colors: give at least one of {list(HUES)}')
    object.__setattr__(self, 'artists', tuple(self.artists))
    object.__setattr__(self, 'colors', tuple(self.colors))

  @functools.cached_property
  def _records(self) -> tuple[tuple[str, Concept, float, str], ...]:
    """(artist, concept, main hue, color) of all examples."""
    artists = Emoji(self.artists).artists  # checks the names
    found = []
    for concept in split_concepts()[0]:
      colors = [color for color in self.colors if f'{color} {concept.name}'.lower() not in _taken()]
      if _COLOR_WORDS & set(words(concept.name)):
        continue
      for artist in artists:
        hue = main_hue(draw(artist, concept.key, 32))
        if hue is not None:
          found += [(artist, concept, hue, color) for color in colors]
    return tuple(found)

  def __len__(self) -> int:
    return len(self._records)

  def _at(self, index: int) -> tuple[str, Concept, float, str]:
    if not 0 <= index < len(self):
      raise IndexError(f'{index} of {len(self)}')
    return self._records[index]

  @override
  def key_of(self, index: int) -> str:
    artist, concept, _, color = self._at(index)
    return f'{artist}/{concept.key}/{color}'

  @override
  def texts_of(self, index: int) -> tuple[str, ...]:
    _, concept, _, color = self._at(index)
    texts = captions(concept) if self.aliases else concept.texts[:1]
    return tuple(f'{color} {text}' for text in texts if f'{color} {text}'.lower() not in _taken())

  def __getitem__(self, index: int) -> dict[str, Any]:
    artist, concept, hue, color = self._at(index)
    texts = self.texts_of(index)
    image = on_white(recolored(draw(artist, concept.key, self.image_size), hue, HUES[color]))
    return {'image': image, 'text': texts[0], 'texts': texts, 'key': self.key_of(index)}


@functools.cache
def _taken() -> frozenset[str]:
  """All names and aliases of concepts, lower case."""
  return frozenset(text.lower() for side in split_concepts() for concept in side for text in concept.texts)


def main_hue(rgba: np.ndarray) -> float | None:
  """The hue in degrees of most of a drawing uint8 [H, W, 4], weighted by chroma; None where little has any."""
  hue, saturation, value = hsv(rgba[..., :3])
  chroma = saturation * value * (rgba[..., 3] / 255)
  histogram = np.bincount((hue / 5).astype(int).ravel() % 72, chroma.ravel(), minlength=72)
  # A window of the band that turns, over the circle of hues.
  reach = int(_BAND // 5)
  windows = np.sum([np.roll(histogram, shift) for shift in range(-reach, reach + 1)], axis=0)
  peak = int(np.argmax(windows))
  if windows[peak] < _MIN_AREA * hue.size:
    return None
  near = [(peak + step) % 72 for step in range(-reach, reach + 1)]
  angles = np.deg2rad(np.array(near) * 5 + 2.5)
  weights = histogram[near]
  mean = np.angle((weights * np.exp(1j * angles)).sum())
  return float(np.rad2deg(mean) % 360)


def recolored(rgba: np.ndarray, hue: float, to: float) -> np.ndarray:
  """uint8 [H, W, 4] with what lies within 40 degrees of `hue` turned by to - hue; saturation and value stay."""
  own, saturation, value = hsv(rgba[..., :3])
  off = (own - hue + 180) % 360 - 180
  turned = np.where(np.abs(off) <= _BAND, (to + off * 0.5) % 360, own)  # half the spread: one clear color
  out = rgba.copy()
  out[..., :3] = _rgb(turned, saturation, value)
  return out


def hsv(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """uint8 [..., 3] -> hue in [0, 360), saturation and value in [0, 1], float32 [...] each (Smith 1978)."""
  x = rgb.astype(np.float32) / 255
  value, low = x.max(-1), x.min(-1)
  chroma = value - low
  safe = np.maximum(chroma, 1e-6)
  r, g, b = x[..., 0], x[..., 1], x[..., 2]
  hue = np.where(value == r, (g - b) / safe % 6, np.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4))
  return (60 * hue) % 360, chroma / np.maximum(value, 1e-6), value


def _rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
  """The inverse of `hsv`, uint8 [..., 3]."""
  k = (np.array([5.0, 3.0, 1.0]) + hue[..., None] / 60) % 6
  x = value[..., None] * (1 - saturation[..., None] * np.clip(np.minimum(k, 4 - k), 0, 1))
  return np.round(255 * x).astype(np.uint8)
