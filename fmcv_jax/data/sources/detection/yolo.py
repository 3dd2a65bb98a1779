"""Folders in the layout of Ultralytics' YOLO: data.yaml, images, and a text file of objects for each image.

A row is `class x y width height` (center and sides) or `class x0 y0 x1 y1 ...` (a polygon), as fractions of the upright
image. https://docs.ultralytics.com/datasets/detect/ and /segment/.
"""

import collections
import dataclasses
import functools
import math
import os
from typing import Any, NamedTuple

import numpy as np
import yaml
from typing_extensions import override

from fmcv_jax.data import storage
from fmcv_jax.data.sources import values
from fmcv_jax.data.sources.account import Account, left_out
from fmcv_jax.data.sources.base import BadRecord, Example
from fmcv_jax.data.sources.detection import polygons
from fmcv_jax.data.sources.detection.objects import Objects, ObjectSource, clipped, make_example, stored_size
from fmcv_jax.data.sources.folder_index import EXTENSIONS
from fmcv_jax.errors import UserError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Yolo(ObjectSource):
  """Images with boxes, classes and, if `masks`, the pixels of each object, of whose rows all are polygons then.

  data   the data.yaml, with `names` and for each split a folder, a list of files, or several of them, relative to
         `path` in it (by default its own folder)
  split  a key of data.yaml: 'train', 'val' or 'test'
  masks  also reads `masks` bool [N, height, width] (needs pycocotools)

  The objects of .../images/x.jpg are in .../labels/x.txt. An image without that file, or with an empty one, has no
  objects. As by Ultralytics, rows that occur twice count once, and a file with a class or a position out of range is a
  bad record, which names the row.
  """

  data: str
  split: str = 'train'
  masks: bool = False

  @property
  @override
  def names(self) -> tuple[str, ...]:
    return self._index.names

  def __len__(self) -> int:
    return len(self._index.images)

  def __getitem__(self, index: int) -> Example:
    self._check(index)
    path = self._index.images[index]
    with storage.open_file(path) as file:
      image = file.read()
    height, width = stored_size(image).upright
    rows = self._rows(index)
    boxes = np.array([row.box for row in rows], np.float64).reshape(-1, 4) * [width, height, width, height]
    boxes, reasons = clipped(boxes, np.full(len(rows), height), np.full(len(rows), width))
    kept = [row for row, reason in zip(rows, reasons) if not reason]
    masks = None
    if self.masks:
      if boxed := [row for row in kept if row.polygon is None]:
        raise BadRecord(f'{_labels_of(path)}: an object of class {boxed[0].number} is a box, and masks need polygons')
      scaled = [[(np.reshape(row.polygon or (), (-1, 2)) * (width, height)).ravel().tolist()] for row in kept]
      masks = polygons.masks(scaled, height, width)
    objects = Objects(boxes[reasons == ''], np.array([row.number for row in kept], np.int32), {}, masks)
    return make_example(image, path, objects, None)

  @override
  def key_of(self, index: int) -> str:
    return self._index.images[index]

  @override
  def account(self) -> Account:
    found = self._index
    per_class: collections.Counter[int] = collections.Counter()
    without, bad, count = 0, [], 0
    for index in range(len(self)):
      try:
        rows = self._rows(index)
      except BadRecord as error:
        bad.append(('label files that cannot be used', str(error)))
        continue
      boxes = np.array([row.box for row in rows], np.float64).reshape(-1, 4)
      _, reasons = clipped(boxes, np.ones(len(rows)), np.ones(len(rows)))
      bad += [(reason, self.key_of(index)) for reason in reasons if reason]
      per_class.update({row.number for row in rows})
      without, count = without + (not rows), count + len(rows)
    return Account(
      records=len(self),
      fields={'boxes': f'{count} rows of label files; {without} images without objects'},
      classes=found.names,
      class_counts=tuple(per_class[number] for number in range(len(found.names))),
      split=self.split,
      left_out=left_out(bad),
    )

  def _rows(self, index: int) -> list['_Row']:
    """The objects of an image; raises BadRecord with the file and line of one that cannot be meant."""
    file = _labels_of(self._index.images[index])
    if file not in self._index.labels:
      return []
    with storage.open_file(file) as opened:
      text = values.decoded(opened.read(), file)
    lines = dict.fromkeys(line.strip() for line in text.splitlines())
    return [_row(line, len(self.names), f'{file}: {line[:60]!r}') for line in lines if line]

  @functools.cached_property
  def _index(self) -> '_Index':
    data = os.path.expanduser(self.data)
    about = _about(data)
    names = about.get('names')
    if isinstance(names, dict):
      if sorted(names) != list(range(len(names))):
        raise UserError(f'yolo: {self.data}: names are numbered {sorted(names)[:5]}, not from 0 without gaps')
      names = [names[number] for number in range(len(names))]
    if not isinstance(names, list) or not names:
      raise UserError(f'yolo: {self.data} has no names; list the names of the classes')
    if 'nc' in about and about['nc'] != len(names):
      raise UserError(f'yolo: {self.data}: nc is {about["nc"]}, but there are {len(names)} names')
    if 'kpt_shape' in about:
      raise UserError(f'yolo: {self.data} has keypoints (kpt_shape), which are not read; give a set for detection')
    splits = [key for key in ('train', 'val', 'test') if about.get(key)]
    if self.split not in splits:
      raise UserError(f'yolo: split: {self.data} has no {self.split!r}; {did_you_mean(self.split, splits)}')
    folder = os.path.dirname(data)
    root = storage.join(folder, str(about.get('path') or ''))
    given = about[self.split]
    images = [image for path in ([given] if isinstance(given, str) else given) for image in _images(root, folder, path)]
    if not images:
      raise UserError(f'yolo: no images in {given!r} of {self.data}, below {root!r}')
    folders = {os.path.dirname(_labels_of(image)) for image in images}
    labels = {f'{folder}/{name}' for folder in folders for name in storage.files_below(folder, deep=False) or ()}
    if not any(_labels_of(image) in labels for image in images):
      raise UserError(f'yolo: no image of {given!r} has a label file, such as {_labels_of(images[0])}')
    return _Index(tuple(sorted(images)), tuple(map(str, names)), frozenset(labels))


class _Row(NamedTuple):
  """An object; positions are fractions of the image."""

  number: int
  box: tuple[float, float, float, float]
  polygon: tuple[float, ...] | None


class _Index(NamedTuple):
  images: tuple[str, ...]
  names: tuple[str, ...]
  labels: frozenset[str]  # paths of the files that exist


def _about(path: str) -> dict[str, Any]:
  try:
    with storage.open_file(path) as file:
      about = yaml.safe_load(file.read())
  except (OSError, yaml.YAMLError) as error:
    raise UserError(f'yolo: {path} cannot be read: {" ".join(str(error).split())}') from error
  if not isinstance(about, dict):
    raise UserError(f'yolo: {path} is not a data.yaml of names and splits')
  return about


def _images(root: str, folder: str, given: str) -> list[str]:
  """The images of a split: of a folder, or of a text file of paths, in which './' is the folder of that file."""
  path = storage.join(root, given)
  if storage.files_below(path) is None and given.startswith(
    '../'
  ):  # as Roboflow writes it, of a folder next to data.yaml
    path = storage.join(folder, given.removeprefix('../'))
  if given.endswith('.txt'):
    with storage.open_file(path) as file:
      lines = [line.strip() for line in file.read().decode().splitlines() if line.strip()]
    return [storage.join(os.path.dirname(path), line.removeprefix('./')) for line in lines]
  return [storage.join(path, name) for name in storage.files_below(path) or () if name.lower().endswith(EXTENSIONS)]


def _labels_of(image: str) -> str:
  """The file of objects of an image: the last folder `images` becomes `labels`."""
  before, found, after = f'/{image}'.rpartition('/images/')
  stem = (f'{before}/labels/{after}'[1:] if found else image).rpartition('.')[0]
  return f'{stem}.txt'


def _row(line: str, classes: int, where: str) -> _Row:
  try:
    first, *numbers = (float(word) for word in line.split())
  except ValueError as error:
    raise BadRecord(f'{where} is not numbers') from error
  if len(numbers) < 4 or len(numbers) == 5 or len(numbers) % 2:
    raise BadRecord(f'{where} has {len(numbers) + 1} columns: neither a box (5) nor a class and a polygon of points')
  if not (first == math.floor(first) and 0 <= first < classes):
    raise BadRecord(f'{where} is of class {first:g}, and there are {classes}')
  if not all(0 <= number <= 1 for number in numbers):
    raise BadRecord(f'{where} has positions outside of 0 to 1; they are fractions of the width and height')
  if len(numbers) == 4:
    x, y, width, height = numbers
    return _Row(int(first), (x - width / 2, y - height / 2, x + width / 2, y + height / 2), None)
  across, down = numbers[::2], numbers[1::2]
  return _Row(int(first), (min(across), min(down), max(across), max(down)), tuple(numbers))
