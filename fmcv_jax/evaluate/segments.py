"""Segments of an image, at its own size, from the classes and masks of queries.

Semantic, instance and panoptic inference of MaskFormer (Cheng et al. 2021) with the rules of EoMT's image processor.
"""

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np

from fmcv_jax.data.geometry import Geometry, interpolation, original_pixels

THRESHOLD = 0.8  # of scores, as in the published evaluation
_LEAST_VISIBLE = 0.8  # fraction of a mask that no better one covers, in a panoptic map
_ROWS_AT_ONCE = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Segments:
  """N segments of an image of H x W pixels, best first.

  masks   bool [N, H, W]
  labels  int32 [N], numbers of classes; `names`: their names, () where they have none
  scores  float32 [N], from 0 to 1
  map     int32 [H, W]: the segment of each pixel as a row of `masks`, -1 for none; the better one where masks overlap
  """

  masks: np.ndarray
  labels: np.ndarray
  scores: np.ndarray
  map: np.ndarray
  names: tuple[str, ...] = ()

  @property
  def class_map(self) -> np.ndarray:
    """int32 [H, W]: the class of each pixel, -1 for none."""
    return np.append(self.labels, -1).astype(np.int32)[self.map]


def make_segments(
  masks: Sequence[np.ndarray], labels: Sequence[int], scores: Sequence[float], size: tuple[int, int]
) -> Segments:
  """Segments sorted by score; masks bool [H, W] of an image of `size`."""
  order = np.argsort(-np.array(scores, np.float32), kind='stable')
  sorted_masks = np.array([masks[row] for row in order], bool).reshape(-1, *size)
  own = np.full(size, -1, np.int32)
  for row in reversed(range(len(order))):
    own[sorted_masks[row]] = row
  return Segments(sorted_masks, np.array(labels, np.int32)[order], np.array(scores, np.float32)[order], own)


def class_segments(class_logits: np.ndarray, mask_logits: np.ndarray, geometry: Geometry) -> Segments:
  """A segment for each class that is the best one of some pixel: by the sum over queries of its probability times the
  probability that the pixel is in the mask. The score is the mean over the pixels.

  class_logits  float [Q, C + 1], the last for 'no object'; mask_logits float [Q, rows, columns]
  """
  rows, columns = (
    interpolation(old, new).astype(np.float32) for old, new in zip(mask_logits.shape[1:], geometry.size, strict=True)
  )
  masks = sigmoid((rows @ mask_logits) @ columns.T)
  scores = np.tensordot(softmax(class_logits)[:, :-1].T.astype(np.float32), masks, axes=1)
  size, pixels = (geometry.height, geometry.width), original_pixels(geometry.size, geometry)
  best, score = np.full(size, -1, np.int32), np.zeros(size, np.float32)
  for start in range(0, len(pixels.rows), _ROWS_AT_ONCE):  # scores of all classes are large
    part = pixels._replace(rows=pixels.rows[start : start + _ROWS_AT_ONCE]).of(scores)
    top = pixels.place[0].start + start
    place = slice(top, top + part.shape[1]), pixels.place[1]
    best[place], score[place] = part.argmax(0), part.max(0)
  return of_class_map(best, score)


def of_class_map(classes: np.ndarray, scores: np.ndarray) -> Segments:
  """A segment for each class of a map int [H, W], -1 for none; `scores` float [H, W] are averaged."""
  numbers = [int(number) for number in np.unique(classes) if number >= 0]
  masks = [classes == number for number in numbers]
  return make_segments(masks, numbers, [float(scores[mask].mean()) for mask in masks], classes.shape)


def resized_segments(classes: np.ndarray, scores: np.ndarray, geometry: Geometry) -> Segments:
  """Segments of a class map int [rows, columns] of the whole output, and of the scores of its pixels, resampled to the
  nearest pixel of the image."""
  left, top, right, bottom = geometry.inside
  _, _, place = original_pixels(classes.shape, geometry)
  rows, columns = (
    start + np.floor((np.arange(side.stop - side.start) + 0.5) * (end - start) / (side.stop - side.start)).astype(int)
    for start, end, side in ((top, bottom, place[0]), (left, right, place[1]))
  )
  size = (geometry.height, geometry.width)
  own, score = np.full(size, -1, np.int32), np.zeros(size, np.float32)
  own[place], score[place] = classes[np.ix_(rows, columns)], scores[np.ix_(rows, columns)]
  return of_class_map(own, score)


def instance_segments(
  class_logits: np.ndarray,
  mask_logits: np.ndarray,
  geometry: Geometry,
  threshold: float = THRESHOLD,
  stuff: Collection[int] = (),
  pairs: int | None = None,
) -> Segments:
  """A segment for each query with a mask and at least the score `threshold`: the probability of its class times the
  mean probability of the pixels in its mask. Masks may overlap.

  stuff  classes that are left out
  pairs  None: the best class of each query; a number: the best pairs of a query and a class, as COCO's metric counts
  """
  probability = softmax(class_logits)[:, :-1]
  if pairs is None:
    rows = [(query, int(probability[query].argmax())) for query in range(len(probability))]
  else:
    best = np.argsort(-probability.ravel(), kind='stable')[:pairs]
    rows = [(int(place) // probability.shape[1], int(place) % probability.shape[1]) for place in best]
  size, pixels = (geometry.height, geometry.width), original_pixels(mask_logits.shape[1:], geometry)
  masks: list[np.ndarray] = []
  labels: list[int] = []
  scores: list[float] = []
  known: dict[int, tuple[np.ndarray, float]] = {}
  for query, label in rows:
    if label in stuff or probability[query, label] < threshold:
      continue
    if query not in known:
      values, mask = pixels.of(mask_logits[query]), np.zeros(size, bool)
      mask[pixels.place] = values > 0
      inside = values[values > 0]
      known[query] = mask, float(sigmoid(inside).sum() / (inside.size + 1e-6))
    mask, certainty = known[query]
    score = float(probability[query, label]) * certainty
    if certainty > 0 and score >= threshold:
      masks.append(mask)
      labels.append(label)
      scores.append(score)
  return make_segments(masks, labels, scores, size)


def panoptic_segments(
  class_logits: np.ndarray,
  mask_logits: np.ndarray,
  geometry: Geometry,
  threshold: float = THRESHOLD,
  stuff: Collection[int] = (),
) -> Segments:
  """Segments without overlap, of queries whose class has a probability above `threshold`.

  A pixel belongs to the query with the largest probability of its class times that of its mask, if the latter is at
  least 0.5. A segment of which less than 0.8 is left is dropped. All queries of a class in `stuff` are one segment.
  """
  probability = softmax(class_logits)
  labels, scores = probability.argmax(1), probability.max(1)
  kept = np.flatnonzero((labels < probability.shape[1] - 1) & (scores > threshold))
  size, pixels = (geometry.height, geometry.width), original_pixels(mask_logits.shape[1:], geometry)
  owner, best, masks = np.full(size, -1, np.int32), np.full(size, -1, np.float32), []
  for row, query in enumerate(kept):
    inside = np.full(size, -1, np.float32)
    inside[pixels.place] = sigmoid(pixels.of(mask_logits[query]))
    masks.append(inside >= 0.5)
    weighted = np.where(inside < 0, -1, scores[query] * inside)
    owner[weighted > best] = row
    best = np.maximum(best, weighted)
  found: list[tuple[np.ndarray, int, float]] = []
  of_stuff: dict[int, int] = {}
  for row, query in enumerate(kept):
    own, label = owner == row, int(labels[query])
    final = own & masks[row]
    if not final.any() or not own.sum() / masks[row].sum() > _LEAST_VISIBLE:
      continue
    if label in of_stuff:
      place_of = of_stuff[label]
      found[place_of] = (found[place_of][0] | final, *found[place_of][1:])
      continue
    if label in stuff:
      of_stuff[label] = len(found)
    found.append((final, label, float(scores[query])))
  return make_segments([mask for mask, *_ in found], [row[1] for row in found], [row[2] for row in found], size)


def softmax(logits: np.ndarray) -> np.ndarray:
  """Over the last axis, in float64."""
  shifted = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
  return shifted / shifted.sum(-1, keepdims=True)


def sigmoid(logits: np.ndarray) -> np.ndarray:
  """1 / (1 + exp(-x)), without overflow."""
  return 0.5 * (1 + np.tanh(0.5 * logits))
