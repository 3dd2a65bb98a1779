"""Object annotations in COCO's JSON format, and in that of LVIS: one file with images, categories and annotations.

Read as the training code of DETR and Detectron2 reads it: classes are the categories by increasing id, without gaps;
boxes are cut at the edges of their image. https://cocodataset.org/#format-data, https://www.lvisdataset.org/dataset.
"""

import collections
import dataclasses
import functools
import json
import os
from collections.abc import Mapping

import numpy as np
from typing_extensions import override

from fmcv_jax.data import storage
from fmcv_jax.data.sources import annotation_json
from fmcv_jax.data.sources.account import Account, LeftOut
from fmcv_jax.data.sources.base import Example
from fmcv_jax.data.sources.detection import coco_index, polygons
from fmcv_jax.data.sources.detection.objects import OBJECT_FIELDS, Objects, ObjectSource, make_example
from fmcv_jax.fields import Field


@dataclasses.dataclass(frozen=True)
class Coco(ObjectSource):
  """Images with boxes, classes and, if `masks`, the pixels of each object.

  annotations  the JSON file, or its URL
  images       folder that the file names are relative to; for LVIS, which has none, the folder with train2017, val2017
  masks        also reads `masks` bool [N, height, width], from polygons or run lengths (needs pycocotools)
  crowds       keeps groups of objects that have one box (`iscrowd`), with `crowd` True. Training leaves them out;
               metrics ignore what is found inside of them
  empty        also reads images without objects

  Further fields: `crowd` bool [N], `area` float32 [N] in pixels of the file, as annotated; `image_id` int64; for LVIS
  `negatives` and `not_exhaustive` int32 [M], the classes that are known to be absent, and those of which not every
  object is annotated.

  Objects that are left out are counted by reason in `account`. A file with ids that occur twice is an error: evaluation
  tools take the last of them without a word. Objects are of the upright image (see `make_example`).
  """

  annotations: str
  images: str
  masks: bool = False
  crowds: bool = False
  empty: bool = True

  @property
  @override
  def names(self) -> tuple[str, ...]:
    return self._index.names

  @property
  @override
  def fields(self) -> Mapping[str, Field]:
    classes = Field('array', group='classes of an image', pad_value=-1, numbered=True)
    return {
      **OBJECT_FIELDS,
      'negatives': classes,
      'not_exhaustive': dataclasses.replace(classes, group='not exhaustive'),
    }

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> Example:
    self._check(index)
    found, image = self._index, int(self._records[index])
    path, (height, width) = found.paths[image], found.sizes[image].tolist()
    rows = found.rows(image)
    arrays = {'crowd': found.crowd[rows], 'area': found.area[rows]}
    masks = None
    if self.masks:
      shapes = [json.loads(found.shapes[row]) for row in range(rows.start, rows.stop)]
      masks = polygons.masks(shapes, height, width)
    objects = Objects(np.asarray(found.boxes[rows]), found.classes[rows], arrays, masks)
    with storage.open_file(storage.join(os.path.expanduser(self.images), path)) as file:
      example = make_example(file.read(), path, objects, (height, width))
    example['image_id'] = np.int64(found.ids[image])
    for name, lists in found.class_lists.items():
      example[name] = lists[image]
    return example

  @override
  def key_of(self, index: int) -> str:
    return self._index.paths[int(self._records[index])]

  @override
  def account(self) -> Account:
    found = self._index
    per_class: collections.Counter[int] = collections.Counter()
    for image in self._records:
      per_class.update(set(found.classes[found.rows(int(image))].tolist()))
    left = found.left_out
    if len(self) < len(found.paths):
      left = (*left, LeftOut('images without objects', len(found.paths) - len(self)))
    cut = f'; {found.beyond} reach beyond their image and are cut' if found.beyond else ''
    return Account(
      records=len(self),
      fields={'boxes': f'{len(found.boxes)} annotations of {self.annotations}{cut}'},
      classes=found.names,
      class_counts=tuple(per_class[number] for number in range(len(found.names))),
      label_range=(int(found.classes.min()), int(found.classes.max())) if len(found.classes) else None,
      left_out=left,
    )

  @functools.cached_property
  def _records(self) -> np.ndarray:
    """The images that are records, by their number in the file."""
    found = self._index
    return np.arange(len(found.paths)) if self.empty else np.flatnonzero(np.diff(found.ends, prepend=0))

  @functools.cached_property
  def _index(self) -> coco_index.CocoIndex:
    found = coco_index.open_index(self.annotations, self.masks, self.crowds)
    annotation_json.check_folder(self.images, found.paths[0], 'coco')
    return found
