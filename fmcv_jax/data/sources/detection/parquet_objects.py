"""Parquet tables of images with objects, as detection data sets on the Hugging Face hub are kept."""

import collections
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from typing_extensions import override

from fmcv_jax.data.sources import values
from fmcv_jax.data.sources.account import Account
from fmcv_jax.data.sources.base import BadRecord, Example
from fmcv_jax.data.sources.detection.objects import OBJECT_FIELDS, SLACK, Objects, clipped, make_example, stored_size
from fmcv_jax.data.sources.parquet import Parquet, whole_column
from fmcv_jax.fields import Field

BoxFormat = Literal['xywh', 'xyxy']


@dataclasses.dataclass(frozen=True)
class ParquetObjects(Parquet):
  """Tables with a list of boxes and one of classes in each row, or a list of objects that have both; else as `Parquet`.

  boxes       the column or field of boxes, four numbers each, in pixels
  classes     the column or field of classes, as whole numbers or names
  box_format  'xywh': left, top, width, height, as COCO has it and most tables do; 'xyxy': left, top, right, bottom. The
              table does not say which: boxes that fit into their image in the other format only are a bad record
  """

  boxes: str = 'objects/bbox'
  classes: str = 'objects/category'
  box_format: BoxFormat = 'xywh'

  @property
  @override
  def fields(self) -> Mapping[str, Field]:
    return OBJECT_FIELDS

  @override
  def __getitem__(self, index: int) -> Example:
    example, value = super().__getitem__(index), self._row(index)
    numbers = [self._classes.number(number, self.classes) for number in value('classes') or ()]
    try:
      given = np.array(value('boxes') or (), np.float64).reshape(-1, 4)
    except (ValueError, TypeError) as error:
      raise BadRecord(f'{self.boxes} is not four numbers for each box') from error
    if len(given) != len(numbers):
      raise BadRecord(f'{len(given)} boxes in {self.boxes}, but {len(numbers)} classes in {self.classes}')
    height, width = stored_size(example['image']).upright
    boxes, reasons = clipped(self._edges(given, height, width), np.full(len(given), height), np.full(len(given), width))
    kept = reasons == ''
    objects = Objects(boxes[kept], np.array(numbers, np.int32)[kept])
    return make_example(example['image'], example['key'], objects, None) | example

  def _edges(self, given: np.ndarray, height: int, width: int) -> np.ndarray:
    """(left, top, right, bottom) of the boxes of a row; raises BadRecord if they are meant in the other format."""
    as_edges = {'xyxy': given, 'xywh': np.concatenate([given[:, :2], given[:, :2] + given[:, 2:]], -1)}

    def fits(name: str) -> bool:
      edges = as_edges[name]
      ordered = (edges[:, 2:] >= edges[:, :2]).all()
      return bool(ordered and (edges[:, 2:] <= np.array([width, height]) + SLACK).all())

    if len(given) and as_edges['xywh'].max() <= 1 and max(height, width) > 1:
      raise BadRecord(f'{self.boxes} are within 0 to 1; they have to be pixels, not fractions of the image')
    other = 'xyxy' if self.box_format == 'xywh' else 'xywh'
    if not fits(self.box_format) and fits(other):
      raise BadRecord(
        f'{self.boxes} has boxes that do not fit into the image of {width} x {height} pixels (width x height) as '
        f'{self.box_format}, but as {other}; set box_format'
      )
    return as_edges[self.box_format]

  @override
  def account(self) -> Account:
    counts: collections.Counter[int] = collections.Counter()
    missing = 0
    for value, count in self._labels.items():
      try:
        counts[self._classes.number(value, self.classes)] += count
      except BadRecord:
        missing += count
    whole = super().account()
    return dataclasses.replace(
      whole,
      class_counts=tuple(counts[number] for number in range(len(self.names))) if self.names else None,
      label_range=(min(counts), max(counts)) if counts else None,
      missing={**whole.missing, 'class of an object': missing} if missing else whole.missing,
    )

  @property
  @override
  def _specs(self) -> dict[str, str | None]:
    return super()._specs | {'boxes': self.boxes, 'classes': self.classes}

  @functools.cached_property
  @override
  def _labels(self) -> collections.Counter[Any]:
    """Every stored class -> the number of its objects."""
    tables, column = self._tables, self._tables.columns['classes']
    counts: collections.Counter[Any] = collections.Counter()
    for file in range(len(tables.files)):
      for scalar in whole_column(tables, column, file):
        counts.update(column.value(scalar) or ())
    return counts

  @functools.cached_property
  @override
  def _classes(self) -> values.Classes:
    tables = self._tables
    names = self.class_names or tables.class_names
    if not names and any(isinstance(value, str) for value in self._labels):
      names = values.names_among(self._labels)
    return values.Classes(names)
