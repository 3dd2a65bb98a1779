"""The input pipeline of a config: a source, and the transforms from its records to examples."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from fmcv_jax.bounds import Fraction, NonNegativeInt, PositiveFloat, PositiveInt
from fmcv_jax.data.sources.base import Source
from fmcv_jax.data.transforms import ImageTransform
from fmcv_jax.fields import FIELDS, Field


@dataclasses.dataclass(frozen=True)
class MultiCrop:
  """`count` random crops of each image by the transform `image` (multi-crop: SwAV, Caron et al. 2020)."""

  image: ImageTransform
  count: PositiveInt

  def __post_init__(self) -> None:
    if self.count < 1:
      raise ValueError(f'count: expected at least 1, got {self.count}')


@dataclasses.dataclass(frozen=True)
class ClassQueries:
  """Texts to look for in an image: the classes of its objects, then classes that are drawn at random.

  count      texts of an image; an image with objects of more classes is a bad record
  templates  sentences with a '{}' for the name of a class; training draws one per text, evaluation uses the first

  Classes that are known to be absent (`negatives` of LVIS) are drawn before others. They give the field `queries`, and
  `classes` then number these texts.
  """

  count: PositiveInt = 50
  templates: tuple[str, ...] = ('{}',)

  def __post_init__(self) -> None:
    _check_templates('templates', self.templates)


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """Input pipeline: a source, and the transforms from its records to examples.

  image              transform to images of one size, which also moves maps, masks, boxes and points; None for a source
                     whose images are arrays of one size
  caption_templates  sentences with a '{}' for the caption or class name; training draws one per example, evaluation
                     uses the first
  views              name -> MultiCrop; each adds a field of that name
  fields             name -> Field: the meaning of fields of the records, where neither the source nor `FIELDS` has it
  queries            the texts of classes that an open-vocabulary detector looks for in each image
  channels           channels of the images; encoded ones always have 3, and an array with others is a bad record
  shuffle            a new order in each epoch of training; evaluation never shuffles
  workers            decoding processes; 0 reads in two threads of this process
  max_bad            fraction of unreadable records above which a run stops
  timeout            seconds without a batch after which a run stops
  """

  source: Source
  image: ImageTransform | None = None
  caption_templates: tuple[str, ...] = ('{}',)
  views: Mapping[str, MultiCrop] = dataclasses.field(default_factory=dict)
  fields: Mapping[str, Field] = dataclasses.field(default_factory=dict)
  queries: ClassQueries | None = None
  channels: PositiveInt = 3
  shuffle: bool = True
  workers: NonNegativeInt = 0
  max_bad: Fraction = 0.01
  timeout: PositiveFloat = 600.0

  def __post_init__(self) -> None:
    _check_templates('caption_templates', self.caption_templates)
    if taken := set(self.views) & set(FIELDS):
      raise ValueError(f'views: {sorted(taken)} are fields already; choose another name')
    if self.workers < 0:
      raise ValueError(f'workers: expected at least 0, got {self.workers}')
    if not 0 <= self.max_bad <= 1:
      raise ValueError(f'max_bad: expected a fraction from 0 to 1, got {self.max_bad}')
    if self.timeout <= 0:
      raise ValueError(f'timeout: expected seconds above 0, got {self.timeout}')

  def field(self, name: str) -> Field | None:
    """The meaning of a field: the config's, the source's or the usual one of that name; None if nobody states it."""
    return self.fields.get(name) or self.source.fields.get(name) or FIELDS.get(name)

  def padded_as(self, example: Mapping[str, Any]) -> 'Pipeline':
    """A copy whose ragged fields are padded to the rows of an example's arrays, unless they state their own `pad_to`.

    example   arrays or their shapes by name, such as `Objective.example_batch`
    """
    rows: dict[str, Field] = {}
    for name, array in example.items():
      field = self.field(name)
      if field is not None and field.group is not None and field.pad_to is None:
        rows[name] = dataclasses.replace(field, pad_to=array.shape[0])
    return dataclasses.replace(self, fields={**self.fields, **rows}) if rows else self


def _check_templates(name: str, templates: tuple[str, ...]) -> None:
  if not templates or any(prompt.count('{}') != 1 for prompt in templates):
    raise ValueError(f"{name}: each needs one '{{}}' for the text, got {templates}")
