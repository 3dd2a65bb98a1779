"""Scenes of two or three emoji with known things, colors, numbers and positions, in words."""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image
from typing_extensions import override

from fmcv_jax.bounds import Fraction, PositiveInt
from fmcv_jax.data.sources import scene_texts
from fmcv_jax.data.sources.base import Example, Source
from fmcv_jax.data.sources.emoji import Emoji, draw, drawn_concepts, on_white
from fmcv_jax.data.sources.recolored_emoji import HUES, main_hue, recolored
from fmcv_jax.data.sources.scene_texts import QUESTION_TYPES, Group, Question, Scene
from fmcv_jax.errors import UserError, did_you_mean

# Names of training concepts of `emoji` that look different in one color.
THINGS = (
  'backpack', 'balloon', 'basketball', 'bell', 'camel', 'cookie', 'crown', 'doughnut', 'droplet', 'frog',
  'hamburger', 'lion', 'ogre', 'package', 'pretzel', 'ribbon', 'star', 'taco', 'telephone', 'toolbox',
)  # fmt: skip
COLORS = ('red', 'yellow', 'green', 'blue', 'purple')
SPLITS = ('train', 'seen', 'held_out')
_KINDS = ('pair', 'double', 'triple')
_RENDERED = 40  # pixels of a drawing before it is scaled into a scene
_MARGIN = 0.06  # around a drawing, for its corners when it is rotated
_SIDES = (0.34, 0.44)  # sides of things, fractions of the scene's


class _Record(NamedTuple):
  scene: Scene
  question: Question
  captioned: bool
  rng: np.random.Generator  # for the image


def is_held_out(i: int, j: int) -> bool:
  """True for two things, by their numbers, that are never in one training scene: (7 i + 13 j) % 5 == 0.

  These are the pairs with i % 5 == j % 5, one fifth of all pairs.
  """
  return (7 * i + 13 * j) % 5 == 0


@dataclasses.dataclass(frozen=True)
class EmojiScenes(Source):
  """Scenes of two things, of three with two alike, or of three different things; the same on every machine.

  Every scene has a caption and a question with one answer. The types of the questions take turns: 'exists' (yes or no),
  'count' (0, 1 or 2), 'color', and 'relation' ('what is left of the frog?'). Relations are asked in scenes of three
  different things, about the one that has another to its left or right and a third above or below it: two answers are
  possible for a model that knows the things but not their positions. 'exists' and 'count' have each of their answers
  equally often.

  Colors are those of `recolored_emoji`. Things are scaled, rotated by up to 12 degrees and mirrored one by one, which
  changes no answer, and do not overlap.

  scenes     number of records
  artists    drawings of `emoji`; those of one scene may be of several artists
  split      'train'     no scene has two things of a held-out pair (`is_held_out`)
             'seen'      likewise, other scenes
             'held_out'  all pairs of things in a scene are held out
  things     names of training concepts of `emoji`, at least 15
  colors     colors of `recolored_emoji`, at least 2
  image_size pixels of a side
  caption_fraction   fraction of the records whose text is the caption; that of the others is 'question\\nanswer'
  caption_template, question_template   sentences with a '{}' for these texts, such as 'caption en\\n{}' and
             'answer en {}' for the tokenizer `prompted`
  blank      True: images are white, for a model that is trained without images

  Examples: image uint8 [image_size, image_size, 3], texts, caption, question, answers, question_type, and of each thing
  boxes [N, 4], masks bool [N, image_size, image_size] and classes, an index into `names`.
  """

  scenes: PositiveInt = 1_000_000
  artists: tuple[str, ...] = ('openmoji', 'noto')
  split: Literal['train', 'seen', 'held_out'] = 'train'
  things: tuple[str, ...] = THINGS
  colors: tuple[str, ...] = COLORS
  image_size: PositiveInt = 64
  caption_fraction: Fraction = 1.0
  caption_template: str = '{}'
  question_template: str = '{}'
  blank: bool = False

  def __post_init__(self) -> None:
    Emoji(self.artists)  # checks the names
    if self.split not in SPLITS:
      raise UserError(f'split: {self.split!r} is not one of {list(SPLITS)}')
    if unknown := [color for color in self.colors if color not in HUES]:
      raise UserError(f'colors: {unknown[0]!r} is not a known color; {did_you_mean(unknown[0], HUES)}')
    for field, least in (('artists', 1), ('things', 15), ('colors', 2)):
      values = tuple(getattr(self, field))
      if len(set(values)) != len(values) or len(values) < least:
        raise UserError(f'{field}: expected at least {least} different ones, got {list(values)}')
      object.__setattr__(self, field, values)
    for field in ('caption_template', 'question_template'):
      if getattr(self, field).count('{}') != 1:
        raise UserError(f"{field}: needs one '{{}}' for the text, got {getattr(self, field)!r}")

  @property
  @override
  def names(self) -> tuple[str, ...]:
    return self.things

  def __len__(self) -> int:
    return self.scenes

  def __getitem__(self, index: int) -> Example:
    record = self._record(index)
    image = np.full((self.image_size, self.image_size, 3), 255, np.uint8)
    annotations = self._annotations(record, index)
    return {'image': image, **annotations} if self.blank else {**self._drawn(record), **annotations}

  @override
  def annotations_of(self, index: int) -> Example:
    return self._annotations(self._record(index), index)

  @override
  def texts_of(self, index: int) -> tuple[str, ...]:
    return self._texts(self._record(index))

  @override
  def key_of(self, index: int) -> str:
    return f'{self.split}/{index}'

  @property
  @override
  def order_name(self) -> str:
    return f'{super().order_name} split={self.split} things={",".join(self.things)} captions={self.caption_fraction}'

  def scene_of(self, index: int) -> Scene:
    """The truth of record `index`."""
    return self._record(index).scene

  def question_of(self, index: int) -> Question:
    """The question of record `index`."""
    return self._record(index).question

  def _annotations(self, record: _Record, index: int) -> Example:
    return {
      'texts': self._texts(record),
      'caption': scene_texts.caption(record.scene),
      'question': scene_texts.question_text(record.question, record.scene),
      'answers': (scene_texts.answer(record.question, record.scene),),
      'question_type': record.question.type,
      'key': self.key_of(index),
    }

  def _texts(self, record: _Record) -> tuple[str, ...]:
    if record.captioned:
      return (self.caption_template.replace('{}', scene_texts.caption(record.scene)),)
    asked = scene_texts.question_text(record.question, record.scene)
    answered = scene_texts.answer(record.question, record.scene)
    return (self.question_template.replace('{}', f'{asked}\n{answered}'),)

  def _record(self, index: int) -> _Record:
    if not 0 <= index < len(self):
      raise IndexError(f'{index} of {len(self)}')
    rng = np.random.default_rng((SPLITS.index(self.split), index))
    asked = QUESTION_TYPES[index % len(QUESTION_TYPES)]
    wanted = {'exists': ('no', 'yes'), 'count': ('0', '1', '2')}.get(asked, ('',))
    answer = wanted[int(rng.integers(len(wanted)))]
    kind = {'relation': 'triple'}.get(asked, 'double' if answer == '2' else _KINDS[int(rng.integers(len(_KINDS)))])
    things = self._draw_things(3 if kind == 'triple' else 2, rng)
    colors = rng.integers(len(self.colors), size=len(things))
    doubled = int(rng.integers(2)) if kind == 'double' else None
    groups = [
      Group(self.things[thing], self.colors[color], 2 if place == doubled else 1)
      for place, (thing, color) in enumerate(zip(things, colors, strict=True))
    ]
    sideways, upright = ('left of', 'right of')[int(rng.integers(2))], ('above', 'below')[int(rng.integers(2))]
    pair = ('left of', 'above')[int(rng.integers(2))]
    scene = Scene(tuple(groups), (sideways, upright) if kind == 'triple' else (pair,))
    absent = [thing for number, thing in enumerate(self.things) if number not in things]
    question = scene_texts.draw_question(asked, scene, absent[int(rng.integers(len(absent)))], answer, rng)
    return _Record(scene, question, rng.random() < self.caption_fraction, rng)

  def _draw_things(self, count: int, rng: np.random.Generator) -> list[int]:
    """Numbers of different things, of which all pairs are held out or none is, according to the split."""
    first = int(rng.integers(len(self.things)))
    chosen = [first]
    while len(chosen) < count:
      other = int(rng.integers(len(self.things)))
      if other not in chosen and all(is_held_out(other, i) == (self.split == 'held_out') for i in chosen):
        chosen.append(other)
    return chosen

  def _drawn(self, record: _Record) -> dict[str, Any]:
    rng, size = record.rng, self.image_size
    image = np.zeros((size, size, 4), np.uint8)
    masks, classes = [], []
    for group, (left, top, side) in _places(record.scene, rng):
      artist = self.artists[int(rng.integers(len(self.artists)))]
      drawing = _varied(_colored(artist, group.thing, group.color), round(side * size), rng)
      pixels = len(drawing)
      x, y = (min(int(at * size), size - pixels) for at in (left, top))
      image[y : y + pixels, x : x + pixels] = drawing
      mask = np.zeros((size, size), bool)
      mask[y : y + pixels, x : x + pixels] = drawing[..., 3] >= 128
      masks.append(mask)
      classes.append(self.things.index(group.thing))
    return {
      'image': on_white(image),
      'boxes': np.array([_box(mask) for mask in masks], np.float32),
      'masks': np.stack(masks),
      'classes': np.array(classes, np.int32),
    }


def _places(scene: Scene, rng: np.random.Generator) -> list[tuple[Group, tuple[float, float, float]]]:
  """Each thing with its left, top and side, fractions of the scene; cells of a 2 x 2 grid keep things apart."""
  groups, relations = scene.groups, scene.relations
  cuts = rng.uniform(0.46, 0.54, 2)  # of x and y
  if len(groups) == 3:
    column, row = int(relations[0] == 'right of'), int(relations[1] == 'below')
    cells = [(column, row), (1 - column, row), (column, 1 - row)]
    return [(group, _within(cell, cuts, rng)) for group, cell in zip(groups, cells, strict=True)]
  along = 0 if relations[0] == 'left of' else 1
  middle, placed = rng.uniform(0.3, 0.7), []
  for half, group in enumerate(groups):
    for across in range(group.number):
      cell = (half, across) if along == 0 else (across, half)
      place = list(_within(cell, cuts, rng))
      if group.number == 1:  # about as high, or as far right, as the other
        place[1 - along] = float(np.clip(middle + rng.uniform(-0.08, 0.08) - place[2] / 2, 0, 1 - place[2]))
      placed.append((group, (place[0], place[1], place[2])))
  return placed


def _within(cell: tuple[int, int], cuts: np.ndarray, rng: np.random.Generator) -> tuple[float, float, float]:
  """Left, top and side of a thing somewhere in a cell (column, row) of the grid with these cuts of x and y."""
  side = rng.uniform(*_SIDES)
  edges = [((0.0, cut), (cut, 1.0))[number] for number, cut in zip(cell, cuts, strict=True)]
  left, top = (rng.uniform(low, high - side) for low, high in edges)
  return left, top, side


def _varied(drawing: Image.Image, side: int, rng: np.random.Generator) -> np.ndarray:
  """A drawing uint8 [side, side, 4], scaled, rotated and perhaps mirrored."""
  angle, mirrored = np.deg2rad(rng.uniform(-12, 12)), (1, -1)[int(rng.integers(2))]
  turn = drawing.width / side * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
  turn[:, 0] *= mirrored
  matrix = np.column_stack([turn, drawing.width / 2 - turn @ np.full(2, side / 2)])  # of a pixel's place before it
  scaled = drawing.transform((side, side), Image.Transform.AFFINE, matrix.ravel().tolist(), Image.Resampling.BILINEAR)
  return np.asarray(scaled.convert('RGBA'))


@functools.cache
def _colored(artist: str, thing: str, color: str) -> Image.Image:
  """An artist's drawing of a thing in a color in the middle of a square, with premultiplied alpha."""
  keys = {concept.name: concept.key for concept in drawn_concepts()}
  if thing not in keys:
    raise UserError(f'things: {thing!r} is not the name of an emoji; {did_you_mean(thing, keys)}')
  drawing = draw(artist, keys[thing], _RENDERED)
  hue = main_hue(drawing)
  if hue is None:
    raise UserError(f'things: {thing!r} of {artist} has too little color to be recolored; choose another')
  left, top, right, bottom = _box(drawing[..., 3] > 0)
  drawing = recolored(drawing[top:bottom, left:right], hue, HUES[color])
  side = round(max(drawing.shape[:2]) * (1 + 2 * _MARGIN))
  square = np.zeros((side, side, 4), np.uint8)
  y, x = ((side - length) // 2 for length in drawing.shape[:2])
  square[y : y + drawing.shape[0], x : x + drawing.shape[1]] = drawing
  return Image.fromarray(square).convert('RGBa')


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
  """Left, top, right and bottom of the pixels of a mask."""
  (rows,), (columns,) = np.nonzero(mask.any(1)), np.nonzero(mask.any(0))
  return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
