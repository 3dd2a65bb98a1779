"""Set detection (DETR, Carion et al. 2020): queries, bipartite matching on the device, class and box losses."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from fmcv_jax.augment.apply import augment_fields, check_augments
from fmcv_jax.augment.base import Augment
from fmcv_jax.augment.normalize import Normalize
from fmcv_jax.fields import FIELDS
from fmcv_jax.models.common.layers import NORM_AXES, BlockConfig, dense, layer_norm
from fmcv_jax.objectives.base import Loss, Mean, Objective
from fmcv_jax.objectives.outputs import ImageEncoder, Output, encoder_outputs
from fmcv_jax.parallel.rules import shard_mapped
from tests.systems.layers import DecoderBlock

CLASS_COST, L1_COST, GIOU_COST = 1.0, 5.0, 2.0  # of the matching, and the weights of the losses (appendix A.4)
OBJECTS = {name: FIELDS[name] for name in ('boxes', 'classes')}
NO_OBJECT = 0.1  # weight of the class of queries without a box


class SetDetector(nn.Module):
  """Normalized images -> (class logits float32 [B, N, classes + 1], the last of them 'no object'; boxes float32
  [B, N, 4]: center x, center y, width, height, as fractions of the sides)."""

  logical_axes = (
    (r'(.*/)?queries', (None, 'embed')),
    (r'(.*/)?(class|box)_head/kernel', ('embed', None)),
    (r'(.*/)?(class|box)_head/bias', (None,)),
    NORM_AXES,
  )

  encoder: nn.Module
  num_queries: int
  num_classes: int
  width: int

  @nn.compact
  def __call__(self, images):
    config = BlockConfig(num_heads=2, mlp_dim=2 * self.width)
    memory: Any = self.encoder(images).tokens
    queries = self.param('queries', nn.initializers.normal(1.0), (self.num_queries, self.width))
    x = DecoderBlock(config, name='block')(jnp.broadcast_to(queries, (len(images), *queries.shape)), memory)
    x = layer_norm(config.eps, config.dtype, 'norm')(x)
    logits = dense(self.num_classes + 1, config.dtype, 'class_head')(x)
    boxes = dense(4, config.dtype, 'box_head')(x)
    return logits.astype(jnp.float32), jax.nn.sigmoid(boxes.astype(jnp.float32))


def set_detector(encoder: nn.Module, num_queries: int = 6, num_classes: int = 2, width: int = 32) -> SetDetector:
  return SetDetector(encoder, num_queries, num_classes, width)


@dataclasses.dataclass(frozen=True)
class Detection(Objective):
  """Cross-entropy of the classes of all queries, and L1 and GIoU of those that are matched, all per box of the batch.

  max_boxes  rows of `boxes` float32 [B, M, 4], in pixels, and `classes` int32 [B, M], -1 where there is no box
  augment    'flip' and 'affine' move the boxes with the image
  """

  network: nn.Module
  augment: tuple[Augment, ...] = ()
  max_boxes: int = 4
  normalize: Normalize = Normalize()

  def __post_init__(self):
    if self.max_boxes > self.network.num_queries:  # type: ignore[attr-defined]
      raise ValueError(f'max_boxes: {self.max_boxes} boxes cannot be matched to fewer queries')
    check_augments(self.augment, OBJECTS)

  @property
  def example_batch(self):
    network: Any = self.network
    size = network.encoder.image_size
    return {
      'image': jax.ShapeDtypeStruct((size, size, 3), jnp.uint8),
      'boxes': jax.ShapeDtypeStruct((self.max_boxes, 4), jnp.float32),
      'classes': jax.ShapeDtypeStruct((self.max_boxes,), jnp.int32),
    }

  def init(self, rng):
    return self.network.init(rng, jnp.zeros((1, *self.example_batch['image'].shape)))['params'], {}

  def loss(self, params, batch, rng, extra):
    batch = augment_fields(batch, OBJECTS, self.augment, rng)
    true_boxes = center_and_size(batch['boxes'], batch['image'].shape[1:3])
    found = (*self._apply(params, batch['image']), true_boxes, batch['classes'])
    sums = jax.vmap(self._of_image)(*found, *match_all(*jax.lax.stop_gradient(found)))
    totals = {name: x.sum(dtype=jnp.float32) for name, x in sums.items()}
    count = totals.pop('count')
    total = CLASS_COST * totals['class'] + L1_COST * totals['l1'] + GIOU_COST * totals['giou']
    return Loss(total, count, {name: Mean(x, count) for name, x in totals.items()}, {})

  def _of_image(self, logits, boxes, true_boxes, true_classes, query, row):
    """Sums over the queries of one image, and its number of boxes."""
    real = true_classes >= 0
    no_object = logits.shape[-1] - 1
    matched = real[row]
    target = jnp.full(len(logits), no_object).at[query].set(jnp.where(matched, true_classes[row], no_object))
    weight = jnp.where(target == no_object, NO_OBJECT, 1.0)
    boxes, true_boxes = boxes[query], true_boxes[row]
    return {
      'class': jnp.sum(weight * optax.softmax_cross_entropy_with_integer_labels(logits, target)),
      'l1': jnp.sum(jnp.abs(boxes - true_boxes).sum(-1), where=matched),
      'giou': jnp.sum(1 - jax.vmap(generalized_iou)(boxes, true_boxes), where=matched),
      'count': matched.sum(),
    }

  def outputs(self):
    network: Any = self.network
    return {
      **encoder_outputs(network.encoder, self._encoder),
      'detections': Output(self.detections, 'boxes'),
    }

  def detections(self, params, extra, batch):
    """Of each query: 'boxes' float32 [B, N, 4], the best class 'classes' int32 [B, N] and its probability 'scores'."""
    images = batch['image'].astype(jnp.float32) / 255
    logits, boxes = self._apply(params, images)
    scores = jax.nn.softmax(logits)[..., :-1]
    return {
      'boxes': corners(boxes, images.shape[1:3]),
      'classes': scores.argmax(-1).astype(jnp.int32),
      'scores': scores.max(-1),
    }

  def _apply(self, params, images) -> Any:
    return self.network.apply({'params': params}, self.normalize(images))

  def _encoder(self, params, extra):
    network: Any = self.network
    return ImageEncoder(network.encoder, {'params': params['encoder']}, self.normalize)


def center_and_size(boxes, sides):
  """Boxes [..., 4] (left, top, right, bottom) in pixels of an image of `sides` (height, width) as fractions."""
  low, high = boxes[..., :2], boxes[..., 2:]
  return jnp.concatenate([(low + high) / 2, high - low], -1) / jnp.array([*sides[::-1]] * 2, jnp.float32)


def corners(boxes, sides):
  """The inverse of `center_and_size`."""
  center, size = boxes[..., :2], boxes[..., 2:]
  return jnp.concatenate([center - size / 2, center + size / 2], -1) * jnp.array([*sides[::-1]] * 2, jnp.float32)


def match_all(logits, boxes, true_boxes, true_classes):
  """`match` of a batch, on each device for its own images: searches of unequal length need not wait for each other."""
  queries, rows = ('batch', None, None), ('batch', None)
  return shard_mapped(jax.vmap(match), (queries, queries, queries, rows), (rows, rows))(
    logits, boxes, true_boxes, true_classes
  )


def match(logits, boxes, true_boxes, true_classes):
  """(query, row) int32 [M] each: the assignment of queries to the rows of one image that costs least.

  Rows without a box cost nothing wherever they go, and so change nothing for the others.
  """
  l1 = jnp.abs(boxes[:, None] - true_boxes).sum(-1)
  giou = jax.vmap(jax.vmap(generalized_iou, (None, 0)), (0, None))(boxes, true_boxes)
  cost = L1_COST * l1 - GIOU_COST * giou - CLASS_COST * jax.nn.softmax(logits)[:, true_classes]
  # A cost that is not finite would keep the search from ending; the step that it belongs to is skipped.
  cost = jnp.where((true_classes >= 0) & jnp.isfinite(cost), cost, 0.0)
  return optax.assignment.hungarian_algorithm(cost)


def generalized_iou(a, b):
  """Of two boxes [4] by center and size (Rezatofighi et al. 2019)."""
  a_low, a_high, b_low, b_high = a[:2] - a[2:] / 2, a[:2] + a[2:] / 2, b[:2] - b[2:] / 2, b[:2] + b[2:] / 2
  both = jnp.prod(jnp.maximum(jnp.minimum(a_high, b_high) - jnp.maximum(a_low, b_low), 0))
  hull = jnp.prod(jnp.maximum(a_high, b_high) - jnp.minimum(a_low, b_low))
  union = a[2] * a[3] + b[2] * b[3] - both
  return both / jnp.maximum(union, 1e-9) - (hull - union) / jnp.maximum(hull, 1e-9)
