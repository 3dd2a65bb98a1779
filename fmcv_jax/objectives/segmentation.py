"""Semantic segmentation: the class of every pixel, by cross-entropy (Long et al. 2015)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from typing_extensions import override

from fmcv_jax.augment.apply import augment_fields, check_augments
from fmcv_jax.augment.base import Augment
from fmcv_jax.augment.normalize import Normalize
from fmcv_jax.fields import Field
from fmcv_jax.models.dense.segmenter import Segmenter
from fmcv_jax.objectives.base import Loss, Mean, Objective, image_field
from fmcv_jax.objectives.outputs import Batch, ImageEncoder, Output, Params, encoder_outputs

IGNORE_INDEX = 255  # label of pixels that are excluded from the loss and all metrics
LABEL_MAP = {'segments': Field('map', fill=IGNORE_INDEX)}


@dataclasses.dataclass(frozen=True)
class Segmentation(Objective):
  """Mean cross-entropy over the labeled pixels of a batch; uint8 `segments` [B, H, W] are the label maps, 255 = ignore.

  augment   'flip' and 'affine' move the label map with the image; other changes of geometry are refused
  """

  network: nn.Module
  augment: tuple[Augment, ...] = ()
  normalize: Normalize = Normalize()

  def __post_init__(self) -> None:
    if not isinstance(self.network, Segmenter):
      raise ValueError('network: segmentation needs network.name=segmenter')
    check_augments(self.augment, LABEL_MAP)

  @property
  @override
  def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
    image = image_field(self.network)
    return {
      'image': image,
      'segments': jax.ShapeDtypeStruct(image.shape[:2], jnp.uint8),
    }

  @property
  @override
  def class_counts(self) -> Mapping[str, tuple[int, int | None]]:
    return {'segments': (self.network.num_classes, IGNORE_INDEX)}

  @override
  def init(self, rng: jax.Array) -> tuple[Params, Any]:
    images = jnp.zeros((1, *self.network.input_shape))  # type: ignore[attr-defined]
    return self.network.init(rng, images)['params'], {}

  @override
  def loss(self, params: Params, batch: Batch, rng: jax.Array, extra: Any) -> Loss:
    augment_rng, _, dropout_rng = jax.random.split(rng, 3)
    batch = augment_fields(batch, LABEL_MAP, self.augment, augment_rng)
    images, segments = self.normalize(batch['image']), batch['segments'].astype(jnp.int32)
    logits: Any = self.network.apply({'params': params}, images, train=True, rngs={'dropout': dropout_rng})
    known = segments != IGNORE_INDEX
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(known, segments, 0))
    count = known.sum(dtype=jnp.float32)
    right = jnp.sum(logits.argmax(-1) == segments, where=known, dtype=jnp.float32)
    return Loss(jnp.sum(losses, where=known), count, {'accuracy': Mean(right, count)}, {})

  @override
  def outputs(self) -> Mapping[str, Output]:
    def logits_of(params: Params, batch: Batch) -> jax.Array:
      images = self.normalize(batch['image'].astype(jnp.float32) / 255)
      logits: Any = self.network.apply({'params': params}, images)
      return logits

    def segments(params: Params, extra: Any, batch: Batch) -> jax.Array:
      return logits_of(params, batch).argmax(-1).astype(jnp.uint8)

    def scores(params: Params, extra: Any, batch: Batch) -> jax.Array:
      return jax.nn.softmax(logits_of(params, batch)).max(-1)

    def confusion(params: Params, extra: Any, batch: Batch) -> jax.Array:
      return confusions(segments(params, extra, batch), batch['segments'], self.network.num_classes)

    return {
      **encoder_outputs(self.network.encoder, self._encoder),
      'segments': Output(segments, 'map', encoder=self._encoder),
      'segment_scores': Output(scores, 'map', encoder=self._encoder),
      'confusion': Output(confusion, reads=('image', 'segments')),
    }

  def _encoder(self, params: Params, extra: Any) -> ImageEncoder:
    return ImageEncoder(self.network.encoder, {'params': params['encoder']}, self.normalize)


def confusions(found: jax.Array, true: jax.Array, classes: int) -> jax.Array:
  """Confusion matrices int32 [B, i, j] from uint8 [B, H, W]: pixels of class i that were predicted as class j."""
  known = true != IGNORE_INDEX
  pairs = jnp.where(known, true.astype(jnp.int32) * classes + found, classes * classes)
  counts = jax.vmap(lambda row: jnp.bincount(row, length=classes * classes + 1))(pairs.reshape(len(pairs), -1))
  return counts[:, :-1].reshape(-1, classes, classes)
