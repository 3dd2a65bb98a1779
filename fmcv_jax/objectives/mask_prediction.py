"""Mask prediction by a set of queries (MaskFormer, Cheng et al. 2021), with the loss of Mask2Former (2022) and EoMT."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from typing_extensions import override

from fmcv_jax.augment.apply import augment_fields, check_augments
from fmcv_jax.augment.base import Augment
from fmcv_jax.augment.normalize import Normalize
from fmcv_jax.bounds import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveFraction, PositiveInt
from fmcv_jax.fields import FIELDS
from fmcv_jax.models.dense.eomt import Eomt, QueryMasks
from fmcv_jax.objectives.base import CoupledObjective, Loss, Mean, image_field
from fmcv_jax.objectives.mask_points import Points, bilinear, draw_points, pixel_centers, uncertain_points
from fmcv_jax.objectives.outputs import Batch, ImageEncoder, Output, Params, encoder_outputs
from fmcv_jax.objectives.segmentation import IGNORE_INDEX, confusions
from fmcv_jax.objectives.set_prediction import match

Task = Literal['semantic', 'instance', 'panoptic']
SEGMENTS = {name: FIELDS[name] for name in ('masks', 'classes')}
PADDING = -1  # class of rows without a segment
_ANNEALING_POWER = 0.9


class ImageSums(NamedTuple):
  """Sums of the losses of each image, float32 [B], over all blocks with a prediction.

  classes       weighted cross-entropy of all queries; masks, dice: of the matched ones
  class_weight  sum of the weights of the cross-entropy in one block
  segments      number of segments of the image
  """

  classes: jax.Array
  masks: jax.Array
  dice: jax.Array
  class_weight: jax.Array
  segments: jax.Array

  def plus(self, other: 'ImageSums') -> 'ImageSums':
    """The sums over the blocks of both."""
    classes, masks, dice = self.classes + other.classes, self.masks + other.masks, self.dice + other.dice
    return self._replace(classes=classes, masks=masks, dice=dice)


@dataclasses.dataclass(frozen=True)
class MaskPrediction(CoupledObjective):
  """Cross-entropy of the classes of all queries, binary cross-entropy and dice loss of the masks that are matched.

  max_segments  rows of `masks` bool [B, M, H, W] and `classes` int32 [B, M], -1 where there is no segment; at most as
                many as there are queries
  task          what the segments are, and so what `Model.segment` gives by default
  stuff         classes without separate objects: of each, a panoptic map has one segment
  class_weight, mask_weight, dice_weight  of the losses and of the matching
  no_object_weight   of queries without a segment in the cross-entropy
  num_points         points per mask at which masks are compared; 0: all pixels of the predicted masks
  oversample_ratio, importance_sample_ratio  points are `oversample_ratio` times as many at first, of which the most
                     uncertain make up the fraction `importance_sample_ratio`, and the others are random
  annealing          fractions of `annealing_steps` (None: of the run) between which masked attention ends, one block
                     after another

  The loss is the mean over the weights of the cross-entropy and the mean over the segments of the whole batch, added up
  over the blocks with a prediction: it couples the examples by these two counts alone. Segments are matched by the
  Hungarian algorithm on the device. Crowds have no place in training: sources leave them out (crowds=False).
  """

  network: nn.Module
  max_segments: PositiveInt = 100
  task: Task = 'panoptic'
  stuff: tuple[NonNegativeInt, ...] = ()
  class_weight: NonNegativeFloat = 2.0
  mask_weight: NonNegativeFloat = 5.0
  dice_weight: NonNegativeFloat = 5.0
  no_object_weight: PositiveFloat = 0.1
  num_points: NonNegativeInt = 12_544
  oversample_ratio: PositiveFloat = 3.0
  importance_sample_ratio: PositiveFraction = 0.75
  annealing: tuple[Fraction, Fraction] = (1 / 6, 5 / 6)
  annealing_steps: PositiveInt | None = None
  augment: tuple[Augment, ...] = ()
  normalize: Normalize = Normalize()

  def __post_init__(self) -> None:
    if not isinstance(self.network, Eomt):
      raise ValueError('network: mask prediction needs network.name=eomt')
    if self.max_segments > self.network.queries:
      raise ValueError(
        f'max_segments: {self.max_segments} segments cannot be matched to {self.network.queries} queries'
      )
    if unknown := [number for number in self.stuff if number >= self.network.num_classes]:
      raise ValueError(f'stuff: {unknown[0]} is not one of the {self.network.num_classes} classes of the network')
    if not self.annealing[0] < self.annealing[1]:
      raise ValueError(f'annealing: expected an increasing pair, got {self.annealing}')
    if self.oversample_ratio < self.importance_sample_ratio:
      raise ValueError('oversample_ratio: expected at least importance_sample_ratio')
    check_augments(self.augment, SEGMENTS)

  @property
  @override
  def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
    image = image_field(self.network)
    return {
      'image': image,
      'masks': jax.ShapeDtypeStruct((self.max_segments, *image.shape[:2]), jnp.bool_),
      'classes': jax.ShapeDtypeStruct((self.max_segments,), jnp.int32),
    }

  @property
  @override
  def class_counts(self) -> Mapping[str, tuple[int, int | None]]:
    return {'classes': (self._network.num_classes, PADDING)}

  @override
  def with_total_steps(self, steps: int) -> 'MaskPrediction':
    return self if self.annealing_steps else dataclasses.replace(self, annealing_steps=steps or None)

  @override
  def init(self, rng: jax.Array) -> tuple[Params, Any]:
    images = jnp.zeros((1, *self._network.input_shape))
    probability = jnp.ones(self._network.blocks, jnp.float32)
    return self.network.init(rng, images)['params'], {'mask_probability': probability}

  @override
  def embed(self, params: Params, batch: Batch, rng: jax.Array, extra: Any) -> tuple[Any, dict[str, Any]]:
    augment_rng, dropout_rng, points_rng = jax.random.split(rng, 3)
    batch = augment_fields(batch, SEGMENTS, self.augment, augment_rng)
    predictions: Any = self.network.apply(
      {'params': params},
      self.normalize(batch['image']),
      mask_probability=extra['mask_probability'],
      train=True,
      rngs={'dropout': dropout_rng},
    )
    images, rows = batch['classes'].shape
    total: ImageSums | None = None
    for block, found in enumerate(predictions):
      points = None
      if self.num_points:
        key, ratios = jax.random.fold_in(points_rng, block), (self.oversample_ratio, self.importance_sample_ratio)
        points = draw_points(key, images, rows, self.num_points, *ratios)
      own = self.image_sums(found, batch['masks'], batch['classes'], points)
      total = own if total is None else total.plus(own)
    return total, {}

  @override
  def couple(self, params: Params, embeddings: Any, batch: Batch, extra: Any) -> Loss:
    count = jnp.maximum(embeddings.segments.sum(), 1.0)
    means = {
      'class': embeddings.classes.sum() / embeddings.class_weight.sum(),
      'mask': embeddings.masks.sum() / count,
      'dice': embeddings.dice.sum() / count,
    }
    weights = {'class': self.class_weight, 'mask': self.mask_weight, 'dice': self.dice_weight}
    total = sum((weights[name] * mean for name, mean in means.items()), jnp.zeros(()))
    one = jnp.ones((), jnp.float32)
    metrics = means | {'mask_probability': extra['mask_probability'].mean()}
    return Loss(total, one, {name: Mean(value, one) for name, value in metrics.items()}, {})

  @override
  def update_extra(self, extra: Any, params: Params, aux: Any, step: jax.Array) -> Any:
    if self.annealing_steps is None:
      raise ValueError('annealing_steps is not set; train objective.with_total_steps(steps)')
    return {'mask_probability': self.mask_probability((step + 1) / self.annealing_steps)}

  def mask_probability(self, progress: jax.Array) -> jax.Array:
    """float32 [blocks] after the fraction `progress` of a run: 1 at first, and 0 for all blocks after `annealing`."""
    limits = jnp.linspace(*self.annealing, self._network.blocks + 1)
    passed = jnp.clip((progress - limits[:-1]) / (limits[1:] - limits[:-1]), 0, 1)
    return (1 - passed) ** _ANNEALING_POWER

  def image_sums(self, found: QueryMasks, masks: jax.Array, classes: jax.Array, points: Points | None) -> ImageSums:
    """The sums of one block's predictions; `points` None compares all pixels of the predicted masks."""
    real, centers = classes != PADDING, pixel_centers(*found.mask_logits.shape[2:])
    cost = self._cost(found, masks, classes, centers if points is None else points.shared)
    chosen, row = match(jax.lax.stop_gradient(cost), real)
    query = jnp.take_along_axis(chosen, jnp.argsort(row, axis=1), 1)  # in the order of the segments
    predicted = jnp.take_along_axis(found.mask_logits, query[..., None, None], 1)
    at = centers
    if points is not None:
      at = jax.lax.stop_gradient(uncertain_points(jax.lax.stop_gradient(predicted), points))
    logits, true = bilinear(predicted, at), bilinear(masks, at)
    both = 2 * jnp.sum(jax.nn.sigmoid(logits) * true, -1) + 1
    dice = 1 - both / (jnp.sum(jax.nn.sigmoid(logits), -1) + jnp.sum(true, -1) + 1)
    cross_entropy = jnp.mean(jax.nn.softplus(logits) - logits * true, -1)

    none = self._network.num_classes
    examples = jnp.arange(len(real))[:, None]
    labels = jnp.full(found.class_logits.shape[:2], none).at[examples, query].set(jnp.where(real, classes, none))
    weights = jnp.where(labels == none, self.no_object_weight, 1.0)
    losses = weights * optax.softmax_cross_entropy_with_integer_labels(found.class_logits, labels)
    return ImageSums(
      losses.sum(1),
      jnp.sum(cross_entropy, 1, where=real),
      jnp.sum(dice, 1, where=real),
      weights.sum(1),
      real.sum(1, dtype=jnp.float32),
    )

  def _cost(self, found: QueryMasks, masks: jax.Array, classes: jax.Array, points: jax.Array) -> jax.Array:
    """float32 [B, Q, M] of matching each query to each segment, by the masks at points [B or 1, 1, P, 2]."""
    logits, true = bilinear(found.mask_logits, points), bilinear(masks, points)
    probability = jax.nn.softmax(found.class_logits)
    of_class = -jnp.take_along_axis(probability, jnp.maximum(classes, 0)[:, None], 2)

    def pairs(a: jax.Array) -> jax.Array:
      return jnp.einsum('bqp,bmp->bqm', a, true, precision='highest')

    cross_entropy = (jax.nn.softplus(logits).sum(-1)[..., None] - pairs(logits)) / logits.shape[-1]
    inside = jax.nn.sigmoid(logits)
    dice = 1 - (2 * pairs(inside) + 1) / (inside.sum(-1)[..., None] + true.sum(-1)[:, None] + 1)
    return self.class_weight * of_class + self.mask_weight * cross_entropy + self.dice_weight * dice

  @override
  def outputs(self) -> Mapping[str, Output]:
    def mask_queries(params: Params, extra: Any, batch: Batch) -> dict[str, jax.Array]:
      return self._predict(params, batch)._asdict()

    def segments(params: Params, extra: Any, batch: Batch) -> jax.Array:
      return class_map(self._predict(params, batch), batch['image'].shape[1:3], self._network.encoder.patch_size)

    def confusion(params: Params, extra: Any, batch: Batch) -> jax.Array:
      return confusions(segments(params, extra, batch), batch['segments'], self._network.num_classes)

    found = {
      **encoder_outputs(self._network.encoder, self._encoder),
      'mask_queries': Output(mask_queries, encoder=self._encoder),
    }
    if self._network.num_classes <= IGNORE_INDEX:  # maps are of bytes
      found['segments'] = Output(segments, 'map', encoder=self._encoder)
      found['confusion'] = Output(confusion, reads=('image', 'segments'))
    return found

  def _predict(self, params: Params, batch: Batch) -> QueryMasks:
    images = self.normalize(batch['image'].astype(jnp.float32) / 255)
    predictions: Any = self.network.apply({'params': params}, images)
    return predictions[-1]

  def _encoder(self, params: Params, extra: Any) -> ImageEncoder:
    return ImageEncoder(self._network.encoder, {'params': params['encoder']}, self.normalize)

  @property
  def _network(self) -> Eomt:
    network: Any = self.network
    return network


def class_map(found: QueryMasks, size: tuple[int, ...], rows_at_once: int) -> jax.Array:
  """uint8 [B, H, W] of `size`: the class with the largest sum over queries of its probability times that of the mask.

  rows_at_once  divides H: scores of all classes exist for so many rows at a time
  """
  height, width = size
  rows, columns = (_bilinear_matrix(old, new) for old, new in zip(found.mask_logits.shape[2:], size, strict=True))
  classes = jax.nn.softmax(found.class_logits)[..., :-1]
  wide = jnp.einsum('bqhw,xw->bqhx', found.mask_logits, columns, precision='highest')

  def of_rows(part: jax.Array) -> jax.Array:
    masks = jax.nn.sigmoid(jnp.einsum('yh,bqhx->bqyx', part, wide, precision='highest'))
    return jnp.einsum('bqc,bqyx->byxc', classes, masks, precision='highest').argmax(-1).astype(jnp.uint8)

  found_rows = jax.lax.map(of_rows, rows.reshape(-1, rows_at_once, rows.shape[1]))
  return jnp.moveaxis(found_rows, 0, 1).reshape(-1, height, width)


def _bilinear_matrix(old: int, new: int) -> jax.Array:
  """float32 [new, old]: interpolation between the centers of pixels, without a filter."""
  return jax.image.resize(jnp.eye(old), (new, old), 'bilinear', antialias=False)
