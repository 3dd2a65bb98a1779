"""Average precision of detected boxes by the rules of COCO (Lin et al. 2014), computed by pycocotools."""

import contextlib
import dataclasses
import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from typing_extensions import override

from fmcv_jax.bounds import NonNegativeInt, PositiveInt
from fmcv_jax.data.geometry import original_boxes
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.data.sources.base import Example
from fmcv_jax.errors import UserError
from fmcv_jax.evaluate.base import EvaluatedModel, Evaluator, Metrics
from fmcv_jax.evaluate.zero_shot import check_label_room, class_embeddings
from fmcv_jax.fields import height_width

_NAMES = ('ap', 'ap50', 'ap75', 'ap_small', 'ap_medium', 'ap_large', 'ar1', 'ar10', 'ar100', 'ar_small', 'ar_medium',
          'ar_large')  # fmt: skip


@dataclasses.dataclass(frozen=True)
class AveragePrecision(Evaluator):
  """Boxes of the classes of a data set, found by their names: 'ap' (mean over IoU 0.5 to 0.95), 'ap50', 'ap75', those
  of small, medium and large objects, and the recalls 'ar1', 'ar10', 'ar100', all from 0 to 1.

  data       images with boxes and classes; `crowd`, `area` and `image_id` are used if the source has them
  templates  sentences with a '{}' for the name of a class, whose embeddings are averaged

  Boxes are compared in pixels of the original images. What a data set has no objects for, such as large ones, is left
  out. The federated annotations of LVIS, and objects that are marked as difficult, have other rules and are refused.
  """

  data: Pipeline
  templates: tuple[str, ...] = ('{}',)
  batch_size: PositiveInt = 32
  every: NonNegativeInt = 0

  @override
  def prepare(self, subject: EvaluatedModel) -> None:
    coco_modules()
    subject.check_dataset('detections', self.data, self.batch_size, ('geometry',), ('query_embeddings',))
    subject.check_texts()
    check_label_room(subject.tokenizer, self.data.source.names, self.templates)
    _check(self.data.source.annotations_of(0))

  @override
  def __call__(self, subject: EvaluatedModel) -> Metrics:
    source = self.data.source
    texts = class_embeddings(subject, source.names, self.templates, self.batch_size)
    found, indices, truth = subject.map_dataset(
      'detections', self.data, self.batch_size, ('geometry',), {'query_embeddings': texts}
    )
    size = height_width(subject.image_size or (1, 1))
    found = {**found, 'boxes': original_boxes(found['boxes'], truth['geometry'], size)}
    true = [_check(source.annotations_of(int(index))) for index in indices]
    return average_precision(true, found, len(source.names))


def average_precision(true: Sequence[Example], found: Any, classes: int) -> Metrics:
  """COCO's twelve figures by name, without those that no object counts for.

  true   for each of B images its 'boxes' and 'classes', and 'crowd', 'area', 'image_id' if there are such
  found  arrays 'boxes' float [B, N, 4] (left, top, right, bottom), 'classes' int and 'scores' float [B, N]
  """
  coco, evaluation = coco_modules()
  ids = [int(image.get('image_id', number)) for number, image in enumerate(true)]
  if len(set(ids)) < len(ids):  # of several data sets, each with its own
    ids = list(range(len(true)))
  with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
    truth = coco()
    truth.dataset = {
      'images': [{'id': number} for number in ids],
      'annotations': list(_annotations(true, ids)),
      'categories': [{'id': number} for number in range(classes)],
    }
    truth.createIndex()
    count = found['scores'].shape[1]
    rows = np.concatenate(
      [
        np.repeat(ids, count)[:, None],
        _x_y_width_height(found['boxes'].reshape(-1, 4)),
        found['scores'].reshape(-1, 1),
        found['classes'].reshape(-1, 1),
      ],
      axis=1,
    ).astype(np.float64)
    run = evaluation(truth, truth.loadRes(rows), 'bbox')
    run.evaluate()
    run.accumulate()
    run.summarize()
  return {name: float(value) for name, value in zip(_NAMES, run.stats, strict=True) if value >= 0}


def _annotations(true: Sequence[Example], ids: Sequence[int]) -> Iterable[dict[str, Any]]:
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
      }


def _x_y_width_height(boxes: np.ndarray) -> np.ndarray:
  return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def _check(image: Example) -> Example:
  if 'boxes' not in image or 'classes' not in image:
    raise UserError(f'evaluators: average precision needs boxes and classes; the source has {", ".join(image)}')
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
