"""Masks of what points and boxes indicate in an image, with a model of the objective `prompted_segmentation`."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmcv_jax.data.geometry import Geometry, original_pixels
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.errors import UserError
from fmcv_jax.evaluate.base import EvaluatedModel
from fmcv_jax.fields import height_width
from fmcv_jax.models.dense.sam import make_prompts
from fmcv_jax.objectives.outputs import listed

Numbers = Sequence[Any] | np.ndarray


class PromptedMask(NamedTuple):
  """A mask in the size of the image.

  mask   bool [H, W]
  score  its predicted intersection over union with the true mask, about 0 to 1
  """

  mask: np.ndarray
  score: float


class PromptedImage:
  """An image that is encoded already: `segment` costs a fraction of the encoding, and is called for each prompt.

  size  (height, width) of the image in pixels
  """

  def __init__(self, subject: EvaluatedModel, embedding: np.ndarray, geometry: Geometry):
    self._subject, self._embedding = subject, embedding
    self.size = geometry.height, geometry.width
    left, top, right, bottom = geometry.box
    self._scale = np.array([geometry.size[1] / (right - left), geometry.size[0] / (bottom - top)])
    self._pixels = original_pixels((4 * embedding.shape[0], 4 * embedding.shape[1]), geometry)

  def segment(
    self,
    *,
    points: Numbers = (),
    point_labels: Numbers | None = None,
    boxes: Numbers = (),
    multimask: bool = True,
  ) -> Any:
    """The masks of an object, best first: three (whole, part, and part of it, in no order), or one without `multimask`.

    points        [N, 2], x and y in pixels from the top left corner of the image, all of one object; [P, N, 2] of P
                  objects, for which a list of P lists is returned
    point_labels  [N] or [P, N]: 1 inside of the object, 0 outside; default 1
    boxes         [4] of one object, or [P, 4]: left, top, right, bottom; with points, both are of the same objects
    """
    given, labels, edges, is_one = checked_prompts(points, point_labels, boxes, self.size)
    prompts = make_prompts(
      None if given is None else jnp.asarray(given * self._scale, jnp.float32)[None],
      None if labels is None else jnp.asarray(labels)[None],
      None if edges is None else jnp.asarray(edges * np.tile(self._scale, 2), jnp.float32)[None],
    )
    batch = {'image_embedding': self._embedding[None], 'points': prompts.points, 'point_labels': prompts.labels}
    subject = self._subject
    # Without a placement: one image is not split over the devices.
    program = subject.cached('prompted_masks', lambda: jax.jit(subject.outputs['prompted_masks'].call))
    found = jax.device_get(program(subject.params, subject.extra, batch))
    own = slice(1, None) if multimask else slice(1)
    masks = [self._best(logits, scores) for logits, scores in zip(found['logits'][0, :, own], found['iou'][0, :, own])]
    return masks[0] if is_one else masks

  def _best(self, logits: np.ndarray, scores: np.ndarray) -> list[PromptedMask]:
    shown = self._pixels.of(logits) > 0
    order = np.argsort(-scores, kind='stable')
    return [PromptedMask(shown[at], float(scores[at])) for at in order]


class PromptedSegmenter:
  """The promptable segmentation of an `EvaluatedModel`; UserError for a model without it."""

  def __init__(self, subject: EvaluatedModel):
    if 'prompted_masks' not in subject.outputs:
      raise UserError(f'this model does not segment by points or boxes; its outputs are {listed(subject.outputs)}')
    self._subject = subject

  def encode_single(self, data: Pipeline) -> PromptedImage:
    """The encoded image of a pipeline with a single one; UserError if it cannot be read."""
    if len(data.source) != 1:
      raise UserError(f'image: expected a single image, got {len(data.source)}')
    (found,) = self.encode(data)
    if found is None:
      raise UserError(f'image: {data.source.key_of(0)} cannot be read')
    return found

  def encode(self, data: Pipeline) -> Iterator[PromptedImage | None]:
    """The encoded images of a pipeline, in their order; None for one that cannot be read."""
    subject = self._subject
    ways, size = subject.placement.mesh.size, height_width(subject.image_size or (1, 1))
    for record in subject.map_records(('image_embedding',), data, ways, ('geometry',)):
      if record is None:
        yield None
      else:
        yield PromptedImage(subject, record['image_embedding'], Geometry.of(record['geometry'], size))


def checked_prompts(
  points: Numbers, labels: Numbers | None, boxes: Numbers, size: tuple[int, int]
) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None, bool]:
  """(points [P, N, 2], labels int32 [P, N], boxes [P, 4], whether they are of a single object); None for what is not
  given. Raises UserError for prompts of other shapes, outside of the image, or for other numbers of objects."""
  given, edges = np.asarray(points, float), np.asarray(boxes, float)
  if not given.size and not edges.size:
    raise UserError('points, boxes: give at least a point [x, y] or a box [left, top, right, bottom]')
  single = given.ndim == 2 if given.size else edges.ndim == 1
  height, width = size
  out_points: np.ndarray | None = None
  out_labels: np.ndarray | None = None
  out_boxes: np.ndarray | None = None
  if given.size:
    if given.ndim not in (2, 3) or given.shape[-1] != 2:
      raise UserError(f'points: expected [N, 2] of one object or [P, N, 2] of several, got {list(given.shape)}')
    if not ((given >= 0) & (given <= (width, height))).all():
      raise UserError(f'points: a point lies outside of the image of {width} x {height} pixels (width x height)')
    own = np.ones(given.shape[:-1], np.int32) if labels is None else np.asarray(labels)
    if own.shape != given.shape[:-1] or not np.isin(own, (0, 1)).all():
      raise UserError(
        f'point_labels: expected 0 or 1 for each point, {list(given.shape[:-1])}, got {own.tolist()!r:.60}'
      )
    out_points = given.reshape(-1, *given.shape[-2:])
    out_labels = own.reshape(out_points.shape[:-1]).astype(np.int32)
  elif labels is not None and np.asarray(labels).size:
    raise UserError('point_labels: there are no points')
  if edges.size:
    if edges.ndim not in (1, 2) or edges.shape[-1] != 4 or (given.size and (edges.ndim == 1) != single):
      raise UserError(
        f'boxes: expected [4] of one object or [P, 4] of several, as of the points, got {list(edges.shape)}'
      )
    if not (edges[..., :2] < edges[..., 2:]).all():
      raise UserError('boxes: a right or bottom edge is not beyond its left or top one; give left, top, right, bottom')
    if not ((edges >= 0) & (edges <= (width, height) * 2)).all():
      raise UserError(f'boxes: a box reaches out of the image of {width} x {height} pixels (width x height)')
    out_boxes = edges.reshape(-1, 4)
    if out_points is not None and len(out_points) != len(out_boxes):
      raise UserError(f'boxes: {len(out_boxes)} boxes, but points of {len(out_points)} objects')
  return out_points, out_labels, out_boxes, single
