"""A COCO or LVIS file as flat arrays, written once and memory-mapped, so that readers need not parse the JSON."""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fmcv_jax.data import storage
from fmcv_jax.data.sources import annotation_json
from fmcv_jax.data.sources.account import LeftOut, left_out
from fmcv_jax.data.sources.detection import flat_files, polygons
from fmcv_jax.data.sources.detection.flat_files import Strings
from fmcv_jax.data.sources.detection.objects import SLACK, clipped
from fmcv_jax.errors import UserError

_FORMAT = 2
_ARRAYS = ('ids', 'sizes', 'ends', 'boxes', 'classes', 'crowd', 'area')
_CLASS_LISTS = {'negatives': 'neg_category_ids', 'not_exhaustive': 'not_exhaustive_category_ids'}  # of LVIS
_CROWD, _NO_BOX, _NO_MASK = (
  'groups of objects (iscrowd)',
  'objects without a box',
  'objects without a polygon or run lengths',
)
_NO_IMAGE = 'objects of images that are not in the file'


Rows = Sequence[annotation_json.Row]


class ClassLists(Sequence[np.ndarray]):
  """A list of classes for each image, int32."""

  def __init__(self, folder: pathlib.Path, name: str):
    self._data, self._ends = flat_files.load(folder, name), flat_files.load(folder, f'{name}_ends')

  def __len__(self) -> int:
    return len(self._ends)

  def __getitem__(self, index: Any) -> Any:
    return np.array(self._data[int(self._ends[index - 1]) if index else 0 : int(self._ends[index])])


class CocoIndex:
  """The images of a file and their objects, grouped by image.

  names        categories by increasing id
  left_out     objects that are not read, by reason; `beyond`: the number of boxes that reach beyond their image
  paths        of the images; `shapes`: the segmentation of each object as JSON, if masks are read
  ids, sizes   int64 [images], int32 [images, 2]: height, width
  ends         int64 [images]: where the objects of each image end in the following
  boxes, classes, crowd, area  float32 [objects, 4] (left, top, right, bottom), int32, bool, float32
  class_lists  name -> a list of classes for each image
  """

  def __init__(self, folder: pathlib.Path):
    about = json.loads((folder / 'about.json').read_text())
    self.names: tuple[str, ...] = tuple(about['names'])
    self.left_out = tuple(LeftOut(reason, count, tuple(examples)) for reason, count, examples in about['left_out'])
    self.beyond = int(about['beyond'])
    self.paths, self.shapes = Strings(folder, 'paths'), Strings(folder, 'shapes')
    arrays = {name: flat_files.load(folder, name) for name in _ARRAYS}
    self.ids, self.sizes, self.ends = arrays['ids'], arrays['sizes'], arrays['ends']
    self.boxes, self.classes = arrays['boxes'], arrays['classes']
    self.crowd, self.area = arrays['crowd'], arrays['area']
    self.class_lists = {name: ClassLists(folder, name) for name in about['class_lists']}

  def rows(self, image: int) -> slice:
    """The objects of an image."""
    return slice(int(self.ends[image - 1]) if image else 0, int(self.ends[image]))


def open_index(annotations: str, masks: bool, crowds: bool) -> CocoIndex:
  """Opens the index of a file, or creates it in the cache; raises UserError for a file that cannot be meant."""
  (file,) = storage.find(annotations, '.json', 'coco')
  key = f'{_FORMAT} {file.path} {file.size} {file.stamp} {masks} {crowds}'
  folder = flat_files.cached('coco', key, lambda to: _write(file.path, to, masks, crowds))
  return CocoIndex(folder)


def read_lists(path: str, what: str, annotation: Mapping[str, type]) -> tuple[Rows, Rows, Rows]:
  """Images, annotations and categories of a file; UserError, begun by `what`, if it has them not.

  annotation  fields that each annotation needs, with their types
  """
  whole = annotation_json.read(path, what)
  for first in whole.get('annotations', [])[:1] if isinstance(whole.get('annotations'), list) else ():
    if 'caption' in first:
      raise UserError(f'{what}: {path} has captions, not objects; give instances_*.json')
    if 'segments_info' in first and 'segments_info' not in annotation:
      raise UserError(f'{what}: {path} has panoptic segments; read it by the source coco_panoptic')
  where = f'{what}: {path}'
  images = annotation_json.rows(whole, 'images', {'id': int, 'height': int, 'width': int}, where)
  if not images:
    raise UserError(f'{where}: has no images')
  annotation_json.by_id(images, 'id', f'{where}: images')
  annotations = annotation_json.rows(whole, 'annotations', annotation, where)
  categories = annotation_json.rows(whole, 'categories', {'id': int, 'name': str}, where)
  annotation_json.by_id(categories, 'id', f'{where}: categories')
  return images, annotations, categories


@dataclasses.dataclass(frozen=True)
class Categories:
  """Names by class, and the class of each category id."""

  names: tuple[str, ...]
  numbers: Mapping[int, int]

  @classmethod
  def of(cls, path: str, categories: Sequence[Mapping[str, Any]], used: set[int]) -> 'Categories':
    """Categories by increasing id. Of several with one name, those without objects go (as Roboflow's first has it)."""
    kept = sorted(categories, key=lambda category: category['id'])
    named: dict[str, list[int]] = {}
    for category in kept:
      named.setdefault(category['name'], []).append(category['id'])
    for name, ids in named.items():
      if len(ids) > 1:
        with_objects = [number for number in ids if number in used]
        if len(with_objects) > 1:
          raise UserError(
            f'coco: {path}: the categories {_listed(with_objects)} are all called {name!r}; rename all but one'
          )
        (stays,) = with_objects or ids[:1]
        kept = [category for category in kept if category['name'] != name or category['id'] == stays]
    if missing := used - {category['id'] for category in kept}:
      raise UserError(
        f'coco: {path}: annotations of category {_listed(sorted(missing)[:3])}, which is not in categories'
      )
    return cls(tuple(str(c['name']) for c in kept), {category['id']: number for number, category in enumerate(kept)})


def _listed(numbers: Iterable[Any]) -> str:
  return ', '.join(map(str, numbers))


def path_of(image: Mapping[str, Any], where: str) -> str:
  """The file of an image, relative to the folder of images; LVIS has the last two parts of a URL instead."""
  if image.get('file_name'):
    return str(image['file_name'])
  if image.get('coco_url'):
    return '/'.join(str(image['coco_url']).split('/')[-2:])
  raise UserError(f'coco: {where}: image {image.get("id")} has neither file_name nor coco_url')


def _write(path: str, folder: pathlib.Path, masks: bool, crowds: bool) -> None:
  images, annotations, listed = read_lists(path, 'coco', {'image_id': int, 'category_id': int})
  annotation_json.by_id([found for found in annotations if 'id' in found], 'id', f'coco: {path}: annotations')
  places = {image['id']: number for number, image in enumerate(images)}
  categories = Categories.of(path, listed, {found['category_id'] for found in annotations})
  sizes = np.array([(image['height'], image['width']) for image in images], np.int32)

  boxes = np.array([_box(found) for found in annotations], np.float64).reshape(-1, 4)
  of_image = np.array([places.get(found['image_id'], -1) for found in annotations], np.int64)
  crowd = np.array([bool(found.get('iscrowd', 0)) for found in annotations], bool)
  given = boxes
  boxes, reasons = clipped(boxes, *sizes[of_image].T) if len(annotations) else (boxes, np.zeros(0, object))
  if masks:
    polygons.pycocotools_mask()
    shapeless = np.array([not polygons.is_shape(found.get('segmentation')) for found in annotations], bool)
    reasons[shapeless & (reasons == '')] = _NO_MASK
  reasons[np.array([not found.get('bbox') for found in annotations], bool)] = _NO_BOX
  reasons[of_image < 0] = _NO_IMAGE
  if not crowds:
    reasons[crowd & (reasons == '')] = _CROWD
  order = np.argsort(of_image, kind='stable')
  order = order[reasons[order] == '']
  left = left_out((reason, f'annotation {found.get("id")}') for reason, found in zip(reasons, annotations) if reason)
  if len(annotations) and not len(order):
    raise UserError(f'coco: {path}: none of the {len(annotations)} annotations can be used: {_listed(left)}')
  beyond = _beyond(path, given[order], sizes[of_image[order]])
  kept = [annotations[row] for row in order]
  counts = np.bincount(of_image[order], minlength=len(images))
  arrays = {
    'ids': np.array([image['id'] for image in images], np.int64),
    'sizes': sizes,
    'ends': np.cumsum(counts, dtype=np.int64),
    'boxes': boxes[order].astype(np.float32),
    'classes': np.array([categories.numbers[found['category_id']] for found in kept], np.int32),
    'crowd': crowd[order],
    'area': np.array([_area(found, path) for found in kept], np.float32),
  }
  for name, array in arrays.items():
    np.save(folder / f'{name}.npy', array)
  Strings.save(folder, 'paths', (path_of(image, path) for image in images))
  Strings.save(folder, 'shapes', (json.dumps(found['segmentation']) for found in kept) if masks else ())
  lists = {name: key for name, key in _CLASS_LISTS.items() if all(key in image for image in images)}
  for name, key in lists.items():
    if unknown := {number for image in images for number in image[key]} - set(categories.numbers):
      raise UserError(f'coco: {path}: {key} has category {min(unknown)}, which is not in categories')
    numbers = [[categories.numbers[number] for number in image[key]] for image in images]
    np.save(folder / f'{name}.npy', np.array([number for row in numbers for number in row], np.int32))
    np.save(folder / f'{name}_ends.npy', np.cumsum([len(row) for row in numbers], dtype=np.int64))
  about = {
    'names': categories.names,
    'class_lists': list(lists),
    'beyond': beyond,
    'left_out': [(item.reason, item.count, item.examples) for item in left],
  }
  (folder / 'about.json').write_text(json.dumps(about))


def _box(found: Mapping[str, Any]) -> tuple[float, float, float, float]:
  """(left, top, right, bottom) of an annotation's x, y, width, height."""
  box = found.get('bbox') or (np.nan,) * 4
  if len(box) != 4:
    return (np.nan,) * 4
  if any(isinstance(number, bool) or not isinstance(number, (int, float)) for number in box):
    return (np.nan,) * 4
  x, y, width, height = (float(number) for number in box)
  return x, y, x + width, y + height


def _area(found: Mapping[str, Any], path: str) -> float:
  """The area of an annotation; that of its box where it has none."""
  area = found.get('area')
  if area is None:
    return float(np.prod(found['bbox'][2:]))
  if isinstance(area, bool) or not isinstance(area, (int, float)):
    raise UserError(f'coco: {path}: annotation {found.get("id")}: area is {area!r:.60}, expected a number')
  return float(area)


def _beyond(path: str, boxes: np.ndarray, sizes: np.ndarray) -> int:
  """The number of boxes that reach beyond their image.

  boxes  float [N, 4]: left, top, right, bottom, before they are cut; sizes int [N, 2]: height, width

  Raises UserError for boxes that are fractions, and where most reach beyond their image, and all fit if what should be
  width and height is the right and the bottom: of boxes at random places three quarters would.
  """
  if not len(boxes):
    return 0
  if boxes.max() <= 1 and sizes.max() > 1:
    raise UserError(f'coco: {path}: all boxes are within 0 to 1; they have to be pixels, not fractions of the image')
  limits = sizes[:, ::-1] + SLACK
  outside = (boxes[:, 2:] > limits).any(-1)
  corners = boxes[:, 2:] - boxes[:, :2]  # what the file has in the place of width and height
  if outside.mean() > 0.5 and ((corners > boxes[:, :2]) & (corners <= limits)).all():
    raise UserError(
      f'coco: {path}: {outside.sum()} boxes reach beyond their image as left, top, width, height, and all fit as left, '
      'top, right, bottom; convert them'
    )
  return int(outside.sum())
