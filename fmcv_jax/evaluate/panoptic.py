"""Panoptic quality (Kirillov et al. 2019), by the rules of COCO's evaluation."""

import dataclasses
from typing import NamedTuple

import numpy as np
from typing_extensions import override

from fmcv_jax.bounds import Fraction, NonNegativeInt, PositiveInt
from fmcv_jax.data.geometry import Geometry
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.data.sources.base import Source
from fmcv_jax.errors import UserError
from fmcv_jax.evaluate.base import EvaluatedModel, Evaluator, Metrics
from fmcv_jax.evaluate.labels import align_labels, check_labels
from fmcv_jax.evaluate.segments import THRESHOLD, panoptic_segments
from fmcv_jax.fields import height_width


class Counts(NamedTuple):
  """By class, float64 [C]: the sum of the IoUs of matched segments, and true positives, false positives, and false
  negatives."""

  iou: np.ndarray
  matched: np.ndarray
  wrong: np.ndarray
  missed: np.ndarray


@dataclasses.dataclass(frozen=True)
class PanopticQuality(Evaluator):
  """'pq' and its factors 'sq' (mean IoU of matched segments) and 'rq' (their F1), means over the classes that occur;
  and those of things, such as 'pq_things', and of stuff, such as 'pq_stuff'; all from 0 to 1.

  data       a source that knows which classes are things, with crowds: coco_panoptic with crowds=True
  threshold  least probability of the class of a segment

  A segment is found if one of its class overlaps it by more than half of their union, void left out. Segments are
  compared at the size of the original images. A segment of which more than half lies on void, or on a crowd of its
  class, is not counted as wrong.
  """

  data: Pipeline
  threshold: Fraction = THRESHOLD
  batch_size: PositiveInt = 16
  every: NonNegativeInt = 0

  @override
  def prepare(self, subject: EvaluatedModel) -> None:
    _things(self.data.source)
    subject.check_dataset('mask_queries', self.data, self.batch_size, ('geometry',))

  @override
  def __call__(self, subject: EvaluatedModel) -> Metrics:
    source, names = self.data.source, tuple(subject.class_names())

    def numbered(labels: np.ndarray) -> np.ndarray:
      return align_labels(labels, source.names, names, 'the model')

    stuff = frozenset(numbered(np.flatnonzero(~_things(source))).tolist())
    size, total = height_width(subject.image_size or (1, 1)), None
    records = subject.map_records(('mask_queries',), self.data, self.batch_size, ('geometry',))
    for index, record in enumerate(records):
      if record is None:
        continue
      queries, geometry = record['mask_queries'], Geometry.of(record['geometry'], size)
      found = panoptic_segments(queries['class_logits'], queries['mask_logits'], geometry, self.threshold, stuff)
      true = source.annotations_of(index)
      own = segment_map(true['masks'])
      if own.shape != found.map.shape:
        raise UserError(f'evaluators: the masks of {source.key_of(index)} are {own.shape}, the image {found.map.shape}')
      classes, labels = queries['class_logits'].shape[-1] - 1, numbered(true['classes'])
      check_labels(labels, classes)
      counts = count_segments(found.map, found.labels, own, labels, np.asarray(true['crowd'], bool), classes)
      total = counts if total is None else Counts(*(a + b for a, b in zip(total, counts, strict=True)))
    if total is None:
      raise UserError('evaluators: no image of the data could be read')
    is_stuff = np.isin(np.arange(len(total.iou)), list(stuff))
    parts = {'': np.ones_like(is_stuff), '_things': ~is_stuff, '_stuff': is_stuff}
    return {f'{name}{part}': value for part, chosen in parts.items() for name, value in quality(total, chosen).items()}


def segment_map(masks: np.ndarray) -> np.ndarray:
  """int32 [H, W]: for each pixel the number of its mask, bool [N, H, W], of which the last lies above, or -1."""
  own = np.full(masks.shape[1:], -1, np.int32)
  for number, mask in enumerate(masks):
    own[mask] = number
  return own


def count_segments(
  found: np.ndarray, found_labels: np.ndarray, true: np.ndarray, labels: np.ndarray, crowd: np.ndarray, classes: int
) -> Counts:
  """The counts of one image.

  found, true          int [H, W]: the segment of each pixel, -1 for none (void)
  found_labels, labels int: the class of each segment; `crowd` bool: true segments that are groups of objects
  """
  shape = len(labels) + 1, len(found_labels) + 1
  pairs = np.bincount((true.ravel() + 1) * shape[1] + found.ravel() + 1, minlength=shape[0] * shape[1])
  overlap = pairs.reshape(shape).astype(np.float64)  # the first row is void, the first column is not in a segment
  area, true_area, void = overlap[:, 1:].sum(0), overlap[1:].sum(1), overlap[0, 1:]
  both, same = overlap[1:, 1:], labels[:, None] == found_labels
  union = true_area[:, None] + area - both - void
  iou = np.where(same & ~crowd[:, None] & (both > 0), both / np.maximum(union, 1), 0)
  match_true, match_found = np.nonzero(iou > 0.5)
  out = Counts(*(np.zeros(classes) for _ in range(4)))
  np.add.at(out.iou, labels[match_true], iou[match_true, match_found])
  np.add.at(out.matched, labels[match_true], 1)
  missed = np.setdiff1d(np.flatnonzero(~crowd & (true_area > 0)), match_true)
  np.add.at(out.missed, labels[missed], 1)
  ignored = void + (both * (same & crowd[:, None])).sum(0)
  rest = np.setdiff1d(np.flatnonzero(area > 0), match_found)
  wrong = rest[ignored[rest] / area[rest] <= 0.5]
  np.add.at(out.wrong, found_labels[wrong], 1)
  return out


def quality(counts: Counts, chosen: np.ndarray) -> Metrics:
  """'pq', 'sq' and 'rq' over the classes that are `chosen`, bool [C], and occur; {} where none does."""
  iou, matched, wrong, missed = (x[chosen] for x in counts)
  occurs = matched + wrong + missed > 0
  if not occurs.any():
    return {}
  iou, matched, wrong, missed = (x[occurs] for x in (iou, matched, wrong, missed))
  whole = matched + wrong / 2 + missed / 2
  return {
    'pq': float((iou / whole).mean()),
    'sq': float((iou / np.maximum(matched, 1)).mean()),
    'rq': float((matched / whole).mean()),
  }


def _things(source: Source) -> np.ndarray:
  things = getattr(source, 'things', None)
  if things is None:
    raise UserError(
      f'evaluators: panoptic quality needs to know which classes are things, and {type(source).__name__} does not '
      f'say so; use coco_panoptic'
    )
  if getattr(source, 'crowds', True) is False:
    raise UserError('evaluators: panoptic quality ignores crowds, which the source leaves out; set crowds=True')
  return np.asarray(things, bool)
