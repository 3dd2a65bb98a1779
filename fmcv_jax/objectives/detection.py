"""Open-vocabulary detection: boxes of the things that texts name (Minderer et al. 2022)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from typing_extensions import override

from fmcv_jax.augment.apply import augment_fields, check_augments
from fmcv_jax.augment.base import Augment
from fmcv_jax.augment.normalize import Normalize
from fmcv_jax.bounds import NonNegativeFloat, PositiveFraction, PositiveInt
from fmcv_jax.fields import FIELDS
from fmcv_jax.models.dense.owl import OwlDetector, PatchObjects
from fmcv_jax.objectives.base import Loss, Mean, Objective, image_field
from fmcv_jax.objectives.outputs import Batch, Output, Params
from fmcv_jax.objectives.set_prediction import centers_and_sizes, edges, focal_cost, focal_loss, generalized_iou, match

OBJECTS = {name: FIELDS[name] for name in ('boxes', 'classes')}


@dataclasses.dataclass(frozen=True)
class Detection(Objective):
  """Focal loss of all patches and texts, L1 and GIoU of the boxes that are matched, all per object of the batch.

  max_boxes    rows of `boxes` float32 [B, M, 4], in pixels, and `classes` int32 [B, M], which number the texts of their
               image; -1 where there is no object
  num_queries  texts of an image, `queries` int32 [B, Q, T]; see data.queries
  alpha, gamma           of the focal loss
  class_weight, l1_weight, giou_weight, objectness_weight  of the losses; the first three also of the matching
  max_detections  objects of the output 'detections'
  """

  network: nn.Module
  max_boxes: PositiveInt = 100
  num_queries: PositiveInt = 50
  alpha: PositiveFraction = 0.3
  gamma: NonNegativeFloat = 2.0
  class_weight: NonNegativeFloat = 1.0
  l1_weight: NonNegativeFloat = 1.0
  giou_weight: NonNegativeFloat = 1.0
  objectness_weight: NonNegativeFloat = 1.0
  max_detections: PositiveInt = 100
  augment: tuple[Augment, ...] = ()
  normalize: Normalize = Normalize()

  def __post_init__(self) -> None:
    if not isinstance(self.network, OwlDetector):
      raise ValueError('network: detection needs network.name=owl or owl_detector')
    rows, columns = self.network.image.grid
    if self.max_boxes > rows * columns:
      raise ValueError(f'max_boxes: {self.max_boxes} objects cannot be matched to {rows * columns} patches')
    check_augments(self.augment, OBJECTS)

  @property
  @override
  def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
    length = self.network.text.length
    return {
      'image': image_field(self.network),
      'boxes': jax.ShapeDtypeStruct((self.max_boxes, 4), jnp.float32),
      'classes': jax.ShapeDtypeStruct((self.max_boxes,), jnp.int32),
      'queries': jax.ShapeDtypeStruct((self.num_queries, length), jnp.int32),
    }

  @override
  def init(self, rng: jax.Array) -> tuple[Params, Any]:
    image, _, _, queries = (jnp.zeros((1, *x.shape), x.dtype) for x in self.example_batch.values())
    return self.network.init(rng, image.astype(jnp.float32), queries)['params'], {}

  @override
  def loss(self, params: Params, batch: Batch, rng: jax.Array, extra: Any) -> Loss:
    augment_rng, dropout_rng = jax.random.split(rng)
    batch = augment_fields(batch, OBJECTS, self.augment, augment_rng)
    network: Any = self.network
    found, texts = network.apply(
      {'params': params}, self.normalize(batch['image']), batch['queries'], train=True, rngs={'dropout': dropout_rng}
    )
    sums = self.sums(found, texts, batch)
    count = sums.pop('count')
    weights = {
      'class': self.class_weight,
      'l1': self.l1_weight,
      'giou': self.giou_weight,
      'objectness': self.objectness_weight if network.has_objectness else 0.0,
    }
    total = sum((weights[name] * value for name, value in sums.items()), jnp.zeros(()))
    return Loss(total, count, {name: Mean(value, count) for name, value in sums.items()}, {})

  def sums(self, found: PatchObjects, texts: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """Sums of the losses over a batch, float32, and 'count', the number of its objects."""
    real, classes = batch['classes'] >= 0, batch['classes']
    boxes = centers_and_sizes(batch['boxes'], batch['image'].shape[1:3])
    logits = found.logits(texts)
    known = (batch['queries'] != 0).any(-1)  # texts that are there
    chosen, row = match(jax.lax.stop_gradient(self._cost(logits, found.boxes, boxes, classes)), real)
    # Rows in the order of the predictions that they are matched to.
    real, classes = jnp.take_along_axis(real, row, 1), jnp.take_along_axis(classes, row, 1)
    boxes = jnp.take_along_axis(boxes, row[..., None], 1)
    predicted = jnp.take_along_axis(found.boxes, chosen[..., None], 1)
    examples = jnp.arange(len(real))[:, None]
    positive = jnp.zeros(logits.shape, bool).at[examples, chosen, classes].max(real)
    objects = jnp.zeros(logits.shape[:2], bool).at[examples, chosen].max(real)
    focal = focal_loss(logits, positive, self.alpha, self.gamma)
    return {
      'class': jnp.sum(focal, where=known[:, None]),
      'l1': jnp.sum(jnp.abs(edges(predicted) - edges(boxes)).sum(-1), where=real),
      'giou': jnp.sum(1 - generalized_iou(edges(predicted), edges(boxes)), where=real),
      'objectness': jnp.sum(focal_loss(found.objectness, objects, self.alpha, self.gamma)),
      'count': real.sum(dtype=jnp.float32),
    }

  def _cost(self, logits: jax.Array, boxes: jax.Array, true_boxes: jax.Array, classes: jax.Array) -> jax.Array:
    """float32 [B, N, M] of matching each prediction to each object."""
    of_class = jnp.take_along_axis(focal_cost(logits, self.alpha, self.gamma), jnp.maximum(classes, 0)[:, None], 2)
    predicted, true = edges(boxes)[:, :, None], edges(true_boxes)[:, None]
    l1 = jnp.abs(predicted - true).sum(-1)
    return self.class_weight * of_class + self.l1_weight * l1 - self.giou_weight * generalized_iou(predicted, true)

  @override
  def outputs(self) -> Mapping[str, Output]:
    network: Any = self.network

    def embed_text(params: Params, extra: Any, batch: Batch) -> jax.Array:
      return network.apply({'params': params}, batch['tokens'], method='encode_text')

    def detections(params: Params, extra: Any, batch: Batch) -> dict[str, jax.Array]:
      images = self.normalize(batch['image'].astype(jnp.float32) / 255)
      found = network.apply({'params': params}, images, method='find_objects')
      scores = jax.nn.sigmoid(found.logits(batch['query_embeddings']))
      return self.best(found.boxes, scores, batch['image'].shape[1:3])

    def embed_object(params: Params, extra: Any, batch: Batch) -> jax.Array:
      images = self.normalize(batch['image'].astype(jnp.float32) / 255)
      found = network.apply({'params': params}, images, method='find_objects')
      best = found.objectness.argmax(1)
      return jnp.take_along_axis(found.embeddings, best[:, None, None], 1)[:, 0]

    of_examples = {'embed_object': Output(embed_object, 'embedding')} if network.has_objectness else {}
    return {
      **of_examples,
      'detections': Output(detections, 'boxes', ('image', 'query_embeddings')),
      'embed_text': Output(embed_text, 'embedding', ('tokens',)),
    }

  def best(self, boxes: jax.Array, scores: jax.Array, sides: tuple[int, ...]) -> dict[str, jax.Array]:
    """Of each image the `max_detections` highest scores [B, N, Q]: 'boxes' in pixels, 'classes', the text, 'scores'."""
    queries = scores.shape[-1]
    best, place = jax.lax.top_k(scores.reshape(len(scores), -1), min(self.max_detections, scores[0].size))
    return {
      'boxes': jnp.take_along_axis(edges(boxes, sides), (place // queries)[..., None], 1),
      'classes': (place % queries).astype(jnp.int32),
      'scores': best,
    }
