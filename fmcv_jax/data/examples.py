"""An example of a run from a record of the source: text, label, and everything spatial by one drawn geometry."""

import dataclasses
import functools
from typing import Any

import numpy as np

from fmcv_jax.data.geometry import Geometry
from fmcv_jax.data.images.decode import LazyImage, decode
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.data.sources import values
from fmcv_jax.data.sources.base import BadRecord, Example
from fmcv_jax.data.transforms import ImageTransform
from fmcv_jax.errors import UserError
from fmcv_jax.fields import Field, padded


@dataclasses.dataclass(frozen=True)
class Examples:
  """Reads examples with `fields`; `train` draws caption templates and texts, evaluation takes the first ones."""

  pipeline: Pipeline
  fields: tuple[str, ...]
  train: bool

  def read(self, index: int, rng: np.random.Generator) -> Example:
    """The example of a record: arrays by field, a string for 'tokens'. Random values are drawn from `rng` alone.

    Raises BadRecord for a record that cannot be used, and UserError for a field that the source does not provide.
    """
    record = self.pipeline.source[index]
    row: Example = {}
    if 'tokens' in self.fields:
      row['tokens'] = self._text(record, rng)
    for name in self._of_kind('label'):
      classes = self._classes if name == 'label' else values.Classes(())
      row[name] = classes.number(self._given(record, name), name)
    row |= self._spatial(record, rng)
    row |= self._views(record, rng)
    if 'queries' in self.fields:
      row |= self._queries(record, row, rng)
    for name in self.fields:
      if name not in row:
        row[name] = self._array(record, name)
    return row

  @functools.cached_property
  def _kinds(self) -> dict[str, Field]:
    """The meaning of each requested field; one that nobody states is an array."""
    return {
      name: self.pipeline.field(name) or Field('array')
      for name in self.fields
      if name not in (*self.pipeline.views, 'queries', 'geometry')
    }

  def _of_kind(self, *kinds: str) -> list[str]:
    return [name for name, field in self._kinds.items() if field.kind in kinds]

  # --- what belongs to positions in the image

  def _spatial(self, record: Example, rng: np.random.Generator) -> Example:
    """The requested images, clips, maps, masks, boxes and points, changed by one geometry, and rows of their groups."""
    names = [name for name, field in self._kinds.items() if field.spatial or field.group]
    if not names:
      return {}
    given = {name: self._given(record, name) for name in names}
    self._check_undeclared(record)
    drawn = _Drawn(self.pipeline.image, self.pipeline.channels, *self._anchor(record), rng)
    row = {name: drawn.apply(name, value, self._kinds[name]) for name, value in given.items()}
    for group in {field.group for field in self._kinds.values() if field.group}:
      members = [name for name in names if self._kinds[name].group == group]
      rows = {name: len(row[name]) for name in members}
      kept = self._kept(record, group, drawn)
      if kept is not None:
        rows['the boxes or masks'] = len(kept)
      if len(set(rows.values())) > 1:
        raise BadRecord(f'rows of the objects differ: {", ".join(f"{name} {count}" for name, count in rows.items())}')
      if kept is not None:
        row |= {name: row[name][kept] for name in members}
    row = {name: self._padded(name, value) for name, value in row.items()}
    return row | ({'geometry': drawn.geometry.array} if 'geometry' in self.fields else {})

  def _padded(self, name: str, value: Any) -> Any:
    return padded(name, value, self._kinds[name]) if self._kinds[name].ragged else value

  def _anchor(self, record: Example) -> tuple[str, Any]:
    """Name and value of the field whose size the geometry is drawn for: an image or clip, requested or not."""
    ordered = dict.fromkeys((*self._of_kind('image', 'clip'), *record))
    for kinds in (('image', 'clip'), ('map',)):
      for name in ordered:
        field = self.pipeline.field(name)
        if field is not None and field.kind in kinds and name in record:
          return name, record[name]
    wanted = ', '.join(name for name, field in self._kinds.items() if field.spatial)
    raise UserError(f'data: {wanted} belong to an image, which {type(self.pipeline.source).__name__} does not provide')

  def _kept(self, record: Example, group: str | None, drawn: '_Drawn') -> np.ndarray | None:
    """bool [N]: the objects of a group of which something is left, by their boxes or else their masks; None if all are.

    Without a change of geometry, nothing goes.
    """
    if drawn.geometry.identity:
      return None
    for kind in ('boxes', 'masks'):
      for name in record:
        field = self.pipeline.field(name)
        if field is not None and field.kind == kind and field.group == group:
          if kind == 'boxes':
            return drawn.geometry.kept(name, np.asarray(record[name]))
          return np.asarray(drawn.apply(name, record[name], field).any(axis=(1, 2)))
    return None

  def _check_undeclared(self, record: Example) -> None:
    """Refuses arrays that look like positions or pixels, of which nobody states the kind: they would stay unchanged."""
    if self.pipeline.image is None:
      return
    for name in self._kinds:
      if self.pipeline.field(name) is not None or not isinstance(record.get(name), np.ndarray):
        continue
      shape = record[name].shape
      pixels = len(shape) > 2 and shape[-1] in (1, 3, 4)
      positions = len(shape) == 2 and shape[-1] in (2, 4)
      if pixels or positions or any(word in name for word in ('box', 'mask', 'point', 'frame')):
        raise UserError(
          f'data: data.image changes the geometry of images, and it is not known whether {name} '
          f'{record[name].dtype} {list(shape)} has to change with them: set data.fields.{name} to its kind, such as '
          f"dict(kind='boxes'), or to dict(kind='array') if it does not depend on positions"
        )

  def _views(self, record: Example, rng: np.random.Generator) -> Example:
    names = [name for name in self.pipeline.views if name in self.fields]
    if not names:
      return {}
    if others := [name for name, field in self._kinds.items() if field.spatial and field.kind != 'image']:
      raise UserError(f'data: each of data.views is a crop of its own, which {", ".join(others)} cannot follow')
    image = self._given(record, 'image')
    image = image if isinstance(image, np.ndarray) else decode(image)  # once for all views
    row = {}
    for name in names:
      views = self.pipeline.views[name]
      row[name] = np.stack([views.image(image, rng) for _ in range(views.count)])
    return row

  # --- the rest

  def _queries(self, record: Example, row: Example, rng: np.random.Generator) -> Example:
    """`queries`, a text for each class to look for, '' for none, and `classes` as their numbers."""
    queries, names = self.pipeline.queries, self.pipeline.source.names
    if queries is None or not names or 'classes' not in row:
      source = type(self.pipeline.source).__name__
      raise UserError(
        f'data: the objective looks for classes by their names: set data.queries, such as dict(count=50), and a source '
        f'of objects that has names ({source} has {len(names)})'
      )
    classes = row['classes']
    if (classes >= len(names)).any():
      raise BadRecord(f'has an object of class {classes.max()}, but the source names {len(names)} classes')
    present = np.unique(classes[classes >= 0])
    if len(present) > queries.count:
      raise BadRecord(f'has objects of {len(present)} classes, more than the {queries.count} of data.queries.count')
    absent = np.setdiff1d(record.get('negatives', ()), present)
    others = np.setdiff1d(np.arange(len(names)), np.concatenate([present, absent]))
    drawn = [rng.permutation(part) if self.train else part for part in (absent, others)]
    chosen = np.concatenate([present, *drawn]).astype(np.int64)[: queries.count]
    texts = []
    for number in chosen:
      if not names[number].strip():
        raise UserError(f'data: class {number} has no name to look for; give it one in the data')
      template = queries.templates[rng.integers(len(queries.templates)) if self.train else 0]
      texts.append(template.replace('{}', names[number]))
    number_of = np.full(len(names) + 1, -1, np.int32)  # the last is that of padding, -1
    number_of[chosen] = np.arange(len(chosen))
    return {'queries': (*texts, *[''] * (queries.count - len(texts))), 'classes': number_of[classes]}

  def _array(self, record: Example, name: str) -> np.ndarray:
    value = np.asarray(self._given(record, name))
    if value.dtype.kind not in 'biuf':
      raise UserError(f'data: {name} of {type(self.pipeline.source).__name__} is not numbers, but {record[name]!r:.60}')
    return self._padded(name, value)

  @functools.cached_property
  def _classes(self) -> values.Classes:
    return values.Classes(self.pipeline.source.names)

  def _text(self, record: Example, rng: np.random.Generator) -> str:
    if 'texts' in record or 'text' in record:
      texts = values.texts(record.get('texts', record.get('text')), 'its text')
    elif self._classes.names and 'label' in record:
      texts = (self._classes.names[self._classes.number(record['label'], 'label')],)
    else:
      texts = values.texts(self._given(record, 'text'), 'its text')
    if not texts:
      raise BadRecord('has no text')
    templates = self.pipeline.caption_templates
    chosen = (rng.integers(len(templates)), rng.integers(len(texts))) if self.train else (0, 0)
    return templates[chosen[0]].replace('{}', texts[chosen[1]])

  def _given(self, record: Example, field: str) -> Any:
    if field not in record:
      name, given = type(self.pipeline.source).__name__, ', '.join(sorted(set(record) - {'key'}))
      views = f', and data.views gives {", ".join(self.pipeline.views)}' if self.pipeline.views else ''
      raise UserError(
        f'data: the objective needs the fields {", ".join(self.fields)}, but {name} has no {field}; it provides '
        f'{given}{views}'
      )
    return record[field]


class _Drawn:
  """The geometry drawn for the image, clip or map `value` of a record, and the fields that it changes.

  Without a transform it is that of the image itself, and images have to be arrays already.
  """

  def __init__(self, transform: ImageTransform | None, channels: int, name: str, value: Any, rng: np.random.Generator):
    self._transform, self._channels, self._name = transform, channels, name
    self._frames: list[LazyImage] = []
    if transform is None or (isinstance(value, np.ndarray) and value.ndim == 2):  # a map, without an image
      shape = _array(value).shape
      height, width = shape if len(shape) == 2 else shape[-3:-1]
    else:
      self._frames = self._opened(value)
      height, width = self._frames[0].height, self._frames[0].width
    whole = Geometry(height, width, (0, 0, width, height), (height, width))
    self.geometry = whole if transform is None else transform.draw(height, width, rng)

  def apply(self, name: str, value: Any, field: Field) -> np.ndarray:
    """The field in the output; raises BadRecord if it does not fit the image."""
    if field.kind not in ('image', 'clip'):
      return self.geometry.apply(name, value, field) if field.spatial else np.asarray(value)
    if self._transform is None:
      return _array(value)
    frames = self._frames if name == self._name else self._opened(value)
    if field.kind == 'image' and len(frames) > 1:
      raise BadRecord(f'{name} has {len(frames)} frames; an image has one')
    for frame in frames:
      if (frame.height, frame.width) != (self.geometry.height, self.geometry.width):
        raise BadRecord(
          f'{name} has {frame.height} x {frame.width} pixels, but {self._name} {self.geometry.height} x '
          f'{self.geometry.width} (height x width)'
        )
    pixels = [self._transform.apply(frame, self.geometry) for frame in frames]
    return pixels[0] if field.kind == 'image' else np.stack(pixels)

  def _opened(self, value: Any) -> list[LazyImage]:
    assert self._transform is not None
    clip = isinstance(value, (tuple, list)) or (isinstance(value, np.ndarray) and value.ndim == 4)
    frames = [self._transform.open(frame, self._channels) for frame in (value if clip else (value,))]
    if not frames:
      raise BadRecord('a clip without frames')
    return frames


def _array(value: Any) -> np.ndarray:
  if not isinstance(value, np.ndarray):
    raise UserError(
      "data: the source provides encoded images; set the pipeline's image, such as "
      "data.image={'name': 'resize_crop', 'size': 224}"
    )
  return value
