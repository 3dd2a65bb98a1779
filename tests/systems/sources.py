"""Small data sets in memory, made from a formula, one for each system of this folder."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from fmcv_jax.data.sources.base import Source
from fmcv_jax.data.tokenizers import Tokenizer

COLORS = {'red': (230, 20, 20), 'green': (20, 230, 20), 'blue': (20, 20, 230), 'white': (240, 240, 240)}
CAPTIONS = ('red', 'a green one', 'something very blue here', 'all white')


@dataclasses.dataclass(frozen=True)
class Words(Tokenizer):
  """One id for each word of `words`, after padding 0 and start 1; the end is the last id."""

  words: tuple[str, ...]
  length: int

  @property
  def vocab_size(self) -> int:  # type: ignore[override]
    return len(self.words) + 3

  @property
  def pad_id(self) -> int:
    return 0

  @property
  def start_id(self) -> int:
    return 1

  @property
  def end_id(self) -> int:
    return self.vocab_size - 1

  def __call__(self, texts: Sequence[str]) -> np.ndarray:
    rows = np.full((len(texts), self.length), self.pad_id, np.int32)
    for row, text in zip(rows, texts, strict=True):
      ids = [self.words.index(word) + 2 for word in text.split()]
      ids = [self.start_id, *ids[: self.length - 2], self.end_id]
      row[: len(ids)] = ids
    return rows

  def decode(self, tokens: np.ndarray) -> list[str]:
    return [' '.join(self.words[i - 2] for i in row if 1 < i < self.end_id) for row in tokens]


@dataclasses.dataclass(frozen=True)
class CaptionedColors(Source):
  """Noisy images of one color, uint8 [16, 16, 3], with captions of 1 to 4 words."""

  count: int = 32

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, index: int):
    kind = index % len(CAPTIONS)
    noise = np.random.default_rng(index).integers(0, 16, (16, 16, 3))
    color = np.array(list(COLORS.values())[kind])
    return {'image': np.clip(color + noise, 0, 255).astype(np.uint8), 'text': CAPTIONS[kind]}


@dataclasses.dataclass(frozen=True)
class MovingBars(Source):
  """Clips uint8 [3, 8, 8, 3] of a bright bar that moves to the left (label 0) or to the right (label 1)."""

  count: int = 32

  def __len__(self) -> int:
    return self.count

  @property
  def names(self) -> tuple[str, ...]:
    return ('left', 'right')

  def __getitem__(self, index: int):
    label, start = index % 2, index // 2 % 8
    clip = np.zeros((3, 8, 8, 3), np.uint8)
    for frame in range(3):
      clip[frame, :, (start + frame * (1 if label else -1)) % 8] = 255
    return {'image': clip, 'label': label}


@dataclasses.dataclass(frozen=True)
class Rectangles(Source):
  """Images uint8 [16, 16, 3] with N = 0 to 3 rectangles: `boxes` float32 [N, 4] and `classes` int32 [N]: 0 red,
  1 green."""

  count: int = 32

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, index: int):
    draw = np.random.default_rng(index)
    image = draw.integers(0, 16, (16, 16, 3)).astype(np.uint8)
    boxes, classes = np.zeros((index % 4, 4), np.float32), np.zeros(index % 4, np.int32)
    for row in range(index % 4):
      width, height = draw.integers(3, 9, 2)
      left, top = draw.integers(0, 16 - width + 1), draw.integers(0, 16 - height + 1)
      classes[row] = draw.integers(2)
      image[top : top + height, left : left + width, classes[row]] = 255
      boxes[row] = left, top, left + width, top + height
    return {'image': image, 'boxes': boxes, 'classes': classes}


@dataclasses.dataclass(frozen=True)
class PushedDot(Source):
  """A dot that an action moves: `image` uint8 [8, 8, 3] is the next frame, `past_frames` uint8 [2, 8, 8, 3] the last
  two (equal: the dot rests), `action` float32 [2] the move (rows, columns), each -1, 0 or 1."""

  count: int = 32

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, index: int):
    draw = np.random.default_rng(index)
    place, action = draw.integers(2, 6, 2), draw.integers(-1, 2, 2)
    return {
      'image': _dot(place + action),
      'past_frames': np.stack([_dot(place)] * 2),
      'action': action.astype(np.float32),
    }


def _dot(place: np.ndarray) -> np.ndarray:
  frame = np.zeros((8, 8, 3), np.uint8)
  row, column = place
  frame[row - 1 : row + 2, column - 1 : column + 2] = 255
  return frame
