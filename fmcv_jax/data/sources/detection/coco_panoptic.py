"""Panoptic annotations in COCO's format: a PNG of segment ids for each image, and a JSON file that gives their classes.

https://cocodataset.org/#format-data; ids are red + 256 green + 65536 blue, and 0 is void.
"""

import dataclasses
import functools
import io
import json
import os
import pathlib

import numpy as np
from PIL import Image
from typing_extensions import override

from fmcv_jax.data import storage
from fmcv_jax.data.sources import annotation_json
from fmcv_jax.data.sources.account import Account
from fmcv_jax.data.sources.base import BadRecord, Example
from fmcv_jax.data.sources.detection import coco_index, flat_files
from fmcv_jax.data.sources.detection.objects import Objects, ObjectSource, make_example
from fmcv_jax.errors import UserError

_FORMAT = 1
VOID = 255  # of `segments`


@dataclasses.dataclass(frozen=True)
class CocoPanoptic(ObjectSource):
  """Images whose pixels all belong to a segment: an object of a class of things, or all there is of a class of stuff.

  annotations  the JSON file, or its URL
  images       folder of the images
  segments     folder of the PNGs; None: the path of the JSON file without `.json`, as COCO has it
  crowds       keeps segments that are groups of objects, with `crowd` True

  Fields: `masks`, `boxes`, `classes`, `thing` (bool: an object, not stuff), `crowd` and `area` with a row per segment,
  and the map `segments` of classes, 255 where it is void or what is left out.
  """

  annotations: str
  images: str
  segments: str | None = None
  crowds: bool = False

  @property
  @override
  def names(self) -> tuple[str, ...]:
    return self._index.names

  @property
  def things(self) -> tuple[bool, ...]:
    """For each class, whether it is one of things."""
    return self._index.things

  def __len__(self) -> int:
    return len(self._index.about)

  def __getitem__(self, index: int) -> Example:
    self._check(index)
    about = json.loads(self._index.about[index])
    folder = os.path.expanduser(self.segments or self.annotations.removesuffix('.json'))
    with storage.open_file(storage.join(folder, about['png'])) as file:
      ids = np.asarray(Image.open(io.BytesIO(file.read())).convert('RGB')).astype(np.int64) @ (1, 256, 65536)
    listed = {number: row for row, (number, *_) in enumerate(about['segments'])}
    if unknown := set(np.unique(ids).tolist()) - {0} - set(listed):
      raise BadRecord(f'{about["png"]} has the segment {min(unknown)}, which {self.annotations} does not list')
    segments = [row for row in about['segments'] if self.crowds or not row[2]]
    masks = np.array([ids == row[0] for row in segments], bool).reshape(-1, *ids.shape)
    if not masks.any((1, 2)).all():
      missing = segments[int(np.argmin(masks.any((1, 2))))][0]
      raise BadRecord(f'{about["png"]} has no pixel of the segment {missing}, which {self.annotations} lists')
    classes = np.array([row[1] for row in segments], np.int32)
    objects = Objects(
      np.array([box_of(mask) for mask in masks], np.float32).reshape(-1, 4),
      classes,
      {
        'thing': np.array([self.things[number] for number in classes], bool),
        'crowd': np.array([row[2] for row in segments], bool),
        'area': masks.sum((1, 2), dtype=np.float32),
      },
      masks,
    )
    with storage.open_file(storage.join(os.path.expanduser(self.images), about['path'])) as file:
      example = make_example(file.read(), about['path'], objects, ids.shape[:2])
    return example | {'segments': class_map(example['masks'], classes), 'image_id': np.int64(about['id'])}

  @override
  def key_of(self, index: int) -> str:
    return json.loads(self._index.about[index])['path']

  @override
  def account(self) -> Account:
    found = self._index
    return Account(
      records=len(self),
      fields={'segments': f'{found.count} segments of {self.annotations}'},
      classes=found.names,
      class_counts=found.class_counts,
    )

  @functools.cached_property
  def _index(self) -> '_Index':
    (file,) = storage.find(self.annotations, '.json', 'coco_panoptic')
    key = f'{_FORMAT} {file.path} {file.size} {file.stamp}'
    return _Index(flat_files.cached('coco_panoptic', key, lambda to: _write(file.path, to)))


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
  """(left, top, right, bottom) of the pixels of a mask [H, W], right and bottom excluded."""
  rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
  return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def class_map(masks: np.ndarray, classes: np.ndarray) -> np.ndarray:
  """int32 [H, W]: the class of each pixel, VOID outside of all masks; later masks lie above earlier ones."""
  out = np.full(masks.shape[1:], VOID, np.int32)
  for mask, number in zip(masks, classes):
    out[mask] = number
  return out


class _Index:
  """`about` is of each image, as JSON: id, path, png, and the id, class and crowd of its segments."""

  def __init__(self, folder: pathlib.Path):
    whole = json.loads((folder / 'about.json').read_text())
    self.names, self.things = tuple(whole['names']), tuple(whole['things'])
    self.count, self.class_counts = int(whole['count']), tuple(whole['class_counts'])
    self.about = flat_files.Strings(folder, 'images')


def _write(path: str, folder: pathlib.Path) -> None:
  images, annotations, listed = coco_index.read_lists(path, 'coco_panoptic', {'image_id': int, 'segments_info': list})
  annotation_json.by_id(annotations, 'image_id', f'coco_panoptic: {path}: annotations')
  used = {segment['category_id'] for annotation in annotations for segment in annotation['segments_info']}
  categories = coco_index.Categories.of(path, listed, used)
  if len(categories.names) > VOID:
    raise UserError(f'coco_panoptic: {path} has {len(categories.names)} classes; maps of classes have at most {VOID}')
  things = {category['id']: bool(category.get('isthing', 1)) for category in listed}
  of_id = {image['id']: image for image in images}
  counts, about = np.zeros(len(categories.names), np.int64), []
  for annotation in annotations:
    if annotation['image_id'] not in of_id:
      raise UserError(f'coco_panoptic: {path}: segments of image {annotation["image_id"]}, which is not in images')
    image = of_id[annotation['image_id']]
    segments = [
      (info['id'], categories.numbers[info['category_id']], int(info.get('iscrowd', 0)))
      for info in annotation['segments_info']
    ]
    annotation_json.by_id(annotation['segments_info'], 'id', f'coco_panoptic: {path}: image {image["id"]}')
    counts[list({number for _, number, _ in segments})] += 1
    own = {'id': image['id'], 'path': coco_index.path_of(image, path), 'png': annotation['file_name']}
    about.append(json.dumps(own | {'segments': segments}))
  flat_files.Strings.save(folder, 'images', about)
  by_class = {number: things[category] for category, number in categories.numbers.items()}
  whole_file = {
    'names': categories.names,
    'things': [by_class[number] for number in range(len(categories.names))],
    'count': sum(len(annotation['segments_info']) for annotation in annotations),
    'class_counts': counts.tolist(),
  }
  (folder / 'about.json').write_text(json.dumps(whole_file))
