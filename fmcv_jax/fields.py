"""Fields of examples by kind: how the loader batches a field, and how a crop, a flip or a warp moves it."""

import dataclasses
from collections.abc import Mapping
from typing import Literal, get_args

import numpy as np

from fmcv_jax.bounds import Finite, NonNegativeInt, PositiveInt
from fmcv_jax.errors import UserError

ImageSize = PositiveInt | tuple[PositiveInt, PositiveInt]
Kind = Literal['image', 'clip', 'map', 'masks', 'boxes', 'points', 'label', 'tokens', 'array']
SPATIAL = ('image', 'clip', 'map', 'masks', 'boxes', 'points')  # kinds that a change of geometry changes


def height_width(size: ImageSize) -> tuple[int, int]:
  """(height, width) of an image size; a single number is a square."""
  return (size, size) if isinstance(size, int) else (size[0], size[1])


@dataclasses.dataclass(frozen=True)
class Field:
  """The meaning of a field of an example, of which geometry and padding follow.

  kind       'image': encoded bytes or uint8 [H, W, C]
             'clip': uint8 [T, H, W, C], or a tuple of encoded frames; all frames are cropped alike
             'map': [H, W] or [H, W, D], a value of each pixel such as a class or a depth; resampled by the nearest
             pixel, never blended
             'masks': bool or uint8 [N, H, W], one per object; resampled as a map
             'boxes': float [N, 4] as (left, top, right, bottom), in pixels from the image's top left corner; positions
             and maps are those of the upright image, after its EXIF orientation is applied
             'points': float [..., 2] as (x, y) in pixels, or [..., 3] with the visibility last, which becomes 0 outside
             of the image
             'label': an integer; 'tokens': the tokenized text, or int [L]; 'array': does not depend on positions
  group      name of a group of fields with one row per object: the row of an object that a crop cuts off entirely is
             removed from all of them
  pad_to     rows after padding, for fields whose rows differ in number; None takes them from the objective
  pad_value  value of the padded rows
  fill       value of a map or of masks outside of the image
  numbered   True if the values are classes, by their number in the source's `names`; others, such as -1 for none or
             255 for 'ignore', stand for no class
  """

  kind: Kind
  group: str | None = None
  pad_to: NonNegativeInt | None = None
  pad_value: Finite = 0.0
  fill: Finite = 0.0
  numbered: bool = False

  def __post_init__(self) -> None:
    if self.kind not in get_args(Kind):
      raise ValueError(f'kind: {self.kind!r} is not one of {", ".join(get_args(Kind))}')
    if self.kind == 'boxes' and self.group is None:
      object.__setattr__(self, 'group', 'objects')

  @property
  def spatial(self) -> bool:
    """True if a change of geometry changes the field."""
    return self.kind in SPATIAL

  @property
  def ragged(self) -> bool:
    """True if the number of rows may differ between examples."""
    return self.group is not None or self.pad_to is not None


# The meaning of these names where neither the source nor the config says otherwise.
FIELDS: Mapping[str, Field] = {
  'image': Field('image'),
  'clip': Field('clip'),
  'label': Field('label', numbered=True),
  'tokens': Field('tokens'),
  'segments': Field('map', fill=255, numbered=True),
  'depth': Field('map'),
  'masks': Field('masks', group='objects'),
  'boxes': Field('boxes', group='objects'),
  'classes': Field('array', group='objects', pad_value=-1, numbered=True),
  'points': Field('points'),
}


def padded(name: str, values: np.ndarray, field: Field) -> np.ndarray:
  """`values` [N, ...] with rows of `pad_value` up to `pad_to`; the values themselves where pad_to is None.

  Raises UserError for more rows than pad_to: cutting them off would hide objects from the loss.
  """
  if field.pad_to is None or len(values) == field.pad_to:
    return values
  if len(values) > field.pad_to:
    raise UserError(
      f'data: {name} has {len(values)} rows in one record, more than the {field.pad_to} that it is padded to; raise '
      f'pad_to of data.fields.{name} (and the number that the network takes), or leave such records out'
    )
  rows = np.full((field.pad_to, *values.shape[1:]), field.pad_value, values.dtype)
  rows[: len(values)] = values
  return rows
