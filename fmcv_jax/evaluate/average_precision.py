"""Average precision of boxes or masks by the rules of COCO (Lin et al. 2014), computed by pycocotools."""

import contextlib
import dataclasses
import io
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from typing_extensions import override

from fmcv_jax.bounds import NonNegativeInt, PositiveInt
from fmcv_jax.data.geometry import Geometry, original_boxes
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.data.sources.base import Example
from fmcv_jax.data.sources.detection.polygons import pycocotools_mask
from fmcv_jax.errors import UserError
from fmcv_jax.evaluate.base import EvaluatedModel, Evaluator, Metrics
from fmcv_jax.evaluate.labels import align_labels
from fmcv_jax.evaluate.segments import instance_segments
from fmcv_jax.evaluate.zero_shot import check_label_room, class_embeddings
from fmcv_jax.fields import height_width

Compared = Literal['boxes', 'masks']
_MOST = 100  # objects of an image that count
_NAMES = ('ap', 'ap50', 'ap75', 'ap_small', 'ap_medium', 'ap_large', 'ar1', 'ar10', 'ar100', 'ar_small', 'ar_medium',
          'ar_large')  # fmt: skip


@dataclasses.dataclass(frozen=True)
class AveragePrecision(Evaluator):
  """Objects of the classes of a data set: 'ap' (mean over IoU 0.5 to 0.95), 'ap50', 'ap75', those of small, medium and
  large objects, and the recalls 'ar1', 'ar10', 'ar100', all from 0 to 1.

  data       images with boxes and classes; `crowd`, `area` and `image_id` are used if the source has them
  templates  sentences with a '{}' for the name of a class, whose embeddings are averaged, for a model that detects
             objects by texts
  of         what is compared: 'boxes', or 'masks', which the source has to provide. Boxes of a model that predicts
             masks are those around them

  Boxes and masks are compared in pixels of the original images. What a data set has no objects for, such as large ones,
  is left out. The federated annotations of LVIS, and objects that are marked as difficult, have other rules and are
  refused.
  """

  data: Pipeline
  templates: tuple[str, ...] = ('{}',)
  of: Compared = 'boxes'
  batch_size: PositiveInt = 32
  every: NonNegativeInt = 0

  @override
  def prepare(self, subject: EvaluatedModel) -> None:
    coco_modules()
    if 'mask_queries' in subject.outputs:
      subject.check_dataset('mask_queries', self.data, self.batch_size, ('geometry',))
    elif self.of == 'masks':
      raise UserError("evaluators: this model predicts boxes, not masks; set of='boxes'")
    else:
      subject.check_dataset('detections', self.data, self.batch_size, ('geometry',), ('query_embeddings',))
      subject.check_texts()
      check_label_room(subject.tokenizer, self.data.source.names, self.templates)
    _check(self.data.source.annotations_of(0), self.of)

  @override
  def __call__(self, subject: EvaluatedModel) -> Metrics:
    source = self.data.source
    indices, found, names = (self._by_masks if 'mask_queries' in subject.outputs else self._by_texts)(subject)
    true = [_check(source.annotations_of(int(index)), self.of) for index in indices]
    numbered = [
      {**image, 'classes': align_labels(np.asarray(image['classes']), source.names, names, 'the model')}
      for image in true
    ]
    return average_precision(numbered, found, max(len(names), len(source.names)), self.of)

  def _by_texts(self, subject: EvaluatedModel) -> tuple[Sequence[int], Any, Sequence[str]]:
    source = self.data.source
    texts = class_embeddings(subject, source.names, self.templates, self.batch_size)
    found, indices, truth = subject.map_dataset(
      'detections', self.data, self.batch_size, ('geometry',), {'query_embeddings': texts}
    )
    size = height_width(subject.image_size or (1, 1))
    boxes = original_boxes(found['boxes'], truth['geometry'], size)
    rows = zip(boxes, found['classes'], found['scores'], strict=True)
    return indices.tolist(), [Found(*row) for row in rows], source.names

  def _by_masks(self, subject: EvaluatedModel) -> tuple[Sequence[int], Any, Sequence[str]]:
    size, rle = height_width(subject.image_size or (1, 1)), pycocotools_mask()
    indices, found = [], []
    records = subject.map_records(('mask_queries',), self.data, self.batch_size, ('geometry',))
    for index, record in enumerate(records):
      if record is None:
        continue
      queries, geometry = record['mask_queries'], Geometry.of(record['geometry'], size)
      own = instance_segments(queries['class_logits'], queries['mask_logits'], geometry, 0.0, pairs=_MOST)
      masks = [rle.encode(np.asfortranarray(mask, np.uint8)) for mask in own.masks]
      boxes = np.array([rle.toBbox(mask) for mask in masks]).reshape(-1, 4)
      boxes[:, 2:] += boxes[:, :2]
      indices.append(index)
      found.append(Found(boxes, own.labels, own.scores, masks))
    return indices, found, tuple(subject.class_names()) or self.data.source.names


class Found(NamedTuple):
  """N objects that were found in an image.

  boxes            float [N, 4]: left, top, right, bottom; classes int [N]; scores float [N]
  masks            N run lengths as pycocotools encodes them, where masks are compared
  """

  boxes: np.ndarray
  classes: np.ndarray
  scores: np.ndarray
  masks: Sequence[Any] = ()


def average_precision(true: Sequence[Example], found: Sequence[Found], classes: int, of: Compared = 'boxes') -> Metrics:
  """COCO's twelve figures by name, without those that no object counts for.

  true   for each of B images its 'boxes' and 'classes', and 'crowd', 'area', 'image_id' if there are such; and 'masks'
         bool [N, H, W], where masks are compared
  found  the objects that were found in each of them
  """
  coco, evaluation = coco_modules()
  ids = [int(image.get('image_id', number)) for number, image in enumerate(true)]
  if len(set(ids)) < len(ids):  # of several data sets, each with its own
    ids = list(range(len(true)))
  images, categories = [{'id': number} for number in ids], [{'id': number} for number in range(classes)]
  if of == 'masks':
    for row, image in zip(images, true, strict=True):
      row['height'], row['width'] = image['masks'].shape[1:]
  results = list(_results(found, ids, of))
  with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
    truth, detected = coco(), coco()
    truth.dataset = {'images': images, 'annotations': list(_annotations(true, ids, of)), 'categories': categories}
    truth.createIndex()
    if results:
      detected = truth.loadRes(results)
    else:  # which it does not read
      detected.dataset = {'images': images, 'annotations': [], 'categories': categories}
      detected.createIndex()
    run = evaluation(truth, detected, {'boxes': 'bbox', 'masks': 'segm'}[of])
    run.evaluate()
    run.accumulate()
    run.summarize()
  return {name: float(value) for name, value in zip(_NAMES, run.stats, strict=True) if value >= 0}


def _results(found: Sequence[Found], ids: Sequence[int], of: Compared) -> Iterable[dict[str, Any]]:
  for image, image_id in zip(found, ids, strict=True):
    shapes = image.masks if of == 'masks' else _x_y_width_height(np.asarray(image.boxes, np.float64)).tolist()
    key = 'segmentation' if of == 'masks' else 'bbox'
    for shape, label, score in zip(shapes, image.classes, image.scores, strict=True):
      yield {'image_id': image_id, 'category_id': int(label), 'score': float(score), key: shape}


def _annotations(true: Sequence[Example], ids: Sequence[int], of: Compared) -> Iterable[dict[str, Any]]:
  number = 0
  for image, image_id in zip(true, ids, strict=True):
    boxes = _x_y_width_height(np.asarray(image['boxes'], np.float64).reshape(-1, 4))
    crowd = np.asarray(image.get('crowd', np.zeros(len(boxes))))
    area = np.asarray(image.get('area', boxes[:, 2] * boxes[:, 3]))
    for row, box in enumerate(boxes):
      number += 1  # pycocotools takes the id 0 for 'not matched'
      yield {
        'id': number,
        'image_id': image_id,
        'category_id': int(image['classes'][row]),
        'bbox': box.tolist(),
        'area': float(area[row]),
        'iscrowd': int(crowd[row]),
        **({'segmentation': _run_lengths(image['masks'][row])} if of == 'masks' else {}),
      }


def _run_lengths(mask: np.ndarray) -> Any:
  return pycocotools_mask().encode(np.asfortranarray(mask, np.uint8))


def _x_y_width_height(boxes: np.ndarray) -> np.ndarray:
  return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def _check(image: Example, of: Compared = 'boxes') -> Example:
  if 'boxes' not in image or 'classes' not in image:
    raise UserError(f'evaluators: average precision needs boxes and classes; the source has {", ".join(image)}')
  if of == 'masks' and 'masks' not in image:
    raise UserError('evaluators: average precision of masks needs masks; set masks=True in the source')
  if 'negatives' in image:
    raise UserError(
      "evaluators: LVIS knows only some classes of each image, which COCO's average precision does not heed"
    )
  if np.any(image.get('difficult', False)):
    raise UserError(
      'evaluators: objects marked as difficult have rules of their own; set difficult=False in the source'
    )
  return image


def coco_modules() -> tuple[Any, Any]:
  """(COCO, COCOeval) of pycocotools; raises UserError if it is not installed."""
  try:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
  except ImportError as error:
    raise UserError('average precision needs pycocotools: pip install fmcv-jax[detection]') from error
  return COCO, COCOeval
