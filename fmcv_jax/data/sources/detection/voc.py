"""Pascal VOC folders: JPEGImages, Annotations with an XML file for each image, ImageSets with the names of each split.

Everingham et al. 2010. Pixels are counted from 1 there, and right and bottom are the last pixel inside: as in
Detectron2, 1 is taken from left and top, so that edges are those between pixels.
"""

import collections
import dataclasses
import functools
import io
import os
import xml.etree.ElementTree
from typing import NamedTuple

import numpy as np
from PIL import Image
from typing_extensions import override

from fmcv_jax.data import storage
from fmcv_jax.data.sources.account import Account, left_out
from fmcv_jax.data.sources.base import BadRecord, Example
from fmcv_jax.data.sources.detection.objects import Objects, ObjectSource, clipped, make_example
from fmcv_jax.errors import UserError, did_you_mean

# The classes of the challenge by label, which a split need not have all of.
CLASSES = (
  'aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat', 'chair', 'cow', 'diningtable', 'dog', 'horse',
  'motorbike', 'person', 'pottedplant', 'sheep', 'sofa', 'train', 'tvmonitor',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Voc(ObjectSource):
  """Images with boxes and classes, or with `segments` the class of each pixel too.

  path       folder such as VOCdevkit/VOC2012, or its URL
  split      a file of ImageSets/Main (of ImageSets/Segmentation, if `segments`): 'train', 'val', 'trainval', 'test'
  segments   also reads SegmentationClass as the map `segments`; `names` then begin with 'background', and 255 is void
             (the outline of an object)
  difficult  keeps objects that are marked as difficult, with `difficult` True: training uses them, metrics ignore them

  Classes are the 20 of the challenge if all names are among these, otherwise the names that occur in the folder's
  annotations, in order.
  """

  path: str
  split: str = 'train'
  segments: bool = False
  difficult: bool = True

  @property
  @override
  def names(self) -> tuple[str, ...]:
    return self._index.names

  def __len__(self) -> int:
    return len(self._index.images)

  def __getitem__(self, index: int) -> Example:
    self._check(index)
    found = self._index.images[index]
    numbers = {name: number for number, name in enumerate(self.names)}
    boxes = np.array([row.box for row in found.objects], np.float64).reshape(-1, 4)
    boxes = np.clip(boxes, 0, [found.size[1], found.size[0]] * 2) if found.size else boxes
    objects = Objects(
      boxes,
      np.array([numbers[row.name] for row in found.objects], np.int32),
      {'difficult': np.array([row.difficult for row in found.objects], bool)},
    )
    example = make_example(self._read('JPEGImages', found.file), found.file, objects, found.size)
    return example | ({'segments': self._segments(found.name)} if self.segments else {})

  @override
  def key_of(self, index: int) -> str:
    return self._index.images[index].file

  @override
  def account(self) -> Account:
    found = self._index
    per_class = collections.Counter(name for image in found.images for name in {row.name for row in image.objects})
    return Account(
      records=len(self),
      fields={'boxes': f'{sum(len(image.objects) for image in found.images)} objects of Annotations'},
      classes=found.names,
      class_counts=tuple(per_class[name] for name in found.names),
      split=self.split,
      left_out=left_out(found.left_out),
    )

  def _read(self, folder: str, file: str) -> bytes:
    with storage.open_file(storage.join(storage.join(os.path.expanduser(self.path), folder), file)) as opened:
      return opened.read()

  def _segments(self, name: str) -> np.ndarray:
    """The palette's numbers: 0 for the background, the challenge's classes from 1. A PNG of colors has lost them."""
    image = Image.open(io.BytesIO(self._read('SegmentationClass', f'{name}.png')))
    if image.mode not in ('P', 'L'):
      raise BadRecord(f'SegmentationClass/{name}.png is {image.mode}, not class numbers')
    numbers = np.asarray(image).astype(np.int32)
    if ((numbers >= len(self.names)) & (numbers != 255)).any():
      raise BadRecord(f'SegmentationClass/{name}.png has numbers up to {numbers[numbers != 255].max()}')
    return numbers

  @functools.cached_property
  def _index(self) -> '_Index':
    kind = 'Segmentation' if self.segments else 'Main'
    folder = storage.join(os.path.expanduser(self.path), f'ImageSets/{kind}')
    lists = [name for name in self._files(f'ImageSets/{kind}') if name.endswith('.txt')]
    if f'{self.split}.txt' not in lists:
      splits = [name.removesuffix('.txt') for name in lists if '_' not in name]  # cat_train.txt: of one class
      raise UserError(f'voc: split: {folder!r} has no {self.split}.txt; {did_you_mean(self.split, splits)}')
    with storage.open_file(storage.join(folder, f'{self.split}.txt')) as file:
      names = [line.split()[0] for line in file.read().decode().splitlines() if line.split()]
    left: list[tuple[str, str]] = []
    files = {name.rpartition('.')[0]: name for name in self._files('JPEGImages')}
    if missing := [name for name in names if name not in files]:
      raise UserError(f'voc: {len(missing)} images of {self.split}.txt are not in JPEGImages, the first {missing[0]!r}')
    images = []
    for image, own in storage.in_threads(lambda name: self._parse(name, files[name]), names):
      images.append(image)
      left += own
    found = {name for of_file in storage.in_threads(self._names_in, self._files('Annotations')) for name in of_file}
    classes = CLASSES if found <= set(CLASSES) else tuple(sorted(found))
    if self.segments and classes is not CLASSES:
      raise UserError(
        f'voc: segments: the numbers of other classes than the 20 of VOC are not known ({sorted(found)[:3]})'
      )
    return _Index(images, ('background', *classes) if self.segments else classes, tuple(left))

  def _files(self, folder: str) -> list[str]:
    whole = storage.join(os.path.expanduser(self.path), folder)
    found = storage.files_below(whole, deep=False)
    if found is None:
      raise UserError(f'voc: no folder {whole!r}; set path to a folder such as VOCdevkit/VOC2012')
    return found

  def _names_in(self, file: str) -> set[str]:
    """Names of the objects of an annotation file: those of all splits, so that each numbers the classes alike."""
    return (
      {found.findtext('name') or '' for found in self._tree(file).findall('object')} if file.endswith('.xml') else set()
    )

  def _tree(self, file: str) -> xml.etree.ElementTree.Element:
    try:
      root = xml.etree.ElementTree.fromstring(self._read('Annotations', file))
    except (OSError, xml.etree.ElementTree.ParseError) as error:
      raise UserError(f'voc: Annotations/{file} cannot be read: {error}') from error
    if any(not found.findtext('name') for found in root.findall('object')):
      raise UserError(f'voc: Annotations/{file} has an object without a name')
    return root

  def _parse(self, name: str, file: str) -> tuple['_Image', list[tuple[str, str]]]:
    where, root = f'Annotations/{name}.xml', self._tree(f'{name}.xml')
    size = (int(root.findtext('size/height') or 0), int(root.findtext('size/width') or 0))
    rows = []
    for found in root.findall('object'):
      edges = [found.findtext(f'bndbox/{edge}') for edge in ('xmin', 'ymin', 'xmax', 'ymax')]
      try:
        left_, top, right, bottom = (float(edge or '') for edge in edges)
      except ValueError as error:
        raise UserError(f'voc: {where}: {found.findtext("name")} has the box {edges}, not four numbers') from error
      rows.append(
        _Object(found.findtext('name') or '', (left_ - 1, top - 1, right, bottom), found.findtext('difficult') == '1')
      )
    boxes = np.array([row.box for row in rows], np.float64).reshape(-1, 4)
    height, width = size if all(size) else (np.inf, np.inf)
    _, reasons = clipped(boxes, np.full(len(rows), height), np.full(len(rows), width))
    left = [(reason, f'{name}: {row.name}') for row, reason in zip(rows, reasons) if reason]
    hidden = [row for row in rows if row.difficult and not self.difficult]
    left += [('objects marked as difficult', f'{name}: {row.name}') for row in hidden]
    kept = [row for row, reason in zip(rows, reasons) if not reason and row not in hidden]
    return _Image(name, file, size if all(size) else None, tuple(kept)), left


class _Object(NamedTuple):
  name: str
  box: tuple[float, float, float, float]
  difficult: bool


class _Image(NamedTuple):
  name: str
  file: str
  size: tuple[int, int] | None
  objects: tuple[_Object, ...]


class _Index(NamedTuple):
  images: list[_Image]
  names: tuple[str, ...]
  left_out: tuple[tuple[str, str], ...]
