"""Depth of every pixel, relative (MiDaS: Ranftl et al. 2022; Depth Anything: Yang et al. 2024) or in meters."""

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
from fmcv_jax.bounds import Fraction, NonNegativeFloat, PositiveInt
from fmcv_jax.fields import FIELDS
from fmcv_jax.models.dense.dpt import Dpt
from fmcv_jax.objectives.base import Loss, Mean, Objective, image_field
from fmcv_jax.objectives.depth_losses import Alignment, masked_mean, scale_shift_invariant, silog
from fmcv_jax.objectives.outputs import Batch, ImageEncoder, Output, Params, encoder_outputs

DEPTH = {'depth': FIELDS['depth']}


@dataclasses.dataclass(frozen=True)
class DepthEstimation(Objective):
  """The mean over the images of a batch that have valid pixels; `depth` float32 [B, H, W] in meters, 0 = unknown.

  A network without a max_depth learns inverse depth, of which each image has a scale and a shift of its own, by
  `scale_shift_invariant`; one with a max_depth learns depth in meters by `silog`, of the pixels up to max_depth.

  augment          'flip' and 'affine' move the depth with the image; other changes of geometry are refused
  alignment        of inverse depth: by median and mean absolute deviation, or by least squares
  gradient_weight  weight of the differences between neighbors in inverse depth, at `gradient_scales` resolutions
  variance_focus   of metric depth: 0 is the error of the logarithms, 1 does not depend on the scale
  """

  network: nn.Module
  augment: tuple[Augment, ...] = ()
  normalize: Normalize = Normalize()
  alignment: Alignment = 'median'
  gradient_weight: NonNegativeFloat = 0.5
  gradient_scales: PositiveInt = 4
  variance_focus: Fraction = 0.5

  def __post_init__(self) -> None:
    if not isinstance(self.network, Dpt):
      raise ValueError('network: depth needs network.name=dpt or depth_anything')
    check_augments(self.augment, DEPTH)

  @property
  @override
  def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
    image = image_field(self.network)
    return {'image': image, 'depth': jax.ShapeDtypeStruct(image.shape[:2], jnp.float32)}

  @override
  def init(self, rng: jax.Array) -> tuple[Params, Any]:
    images = jnp.zeros((1, *self.network.input_shape))  # type: ignore[attr-defined]
    return self.network.init(rng, images)['params'], {}

  @override
  def loss(self, params: Params, batch: Batch, rng: jax.Array, extra: Any) -> Loss:
    augment_rng, _, dropout_rng = jax.random.split(rng, 3)
    batch = augment_fields(batch, DEPTH, self.augment, augment_rng)
    images, depth = self.normalize(batch['image']), batch['depth']
    found: Any = self.network.apply({'params': params}, images, train=True, rngs={'dropout': dropout_rng})
    valid = jnp.isfinite(depth) & (depth > 0)
    metrics = {}
    if self._max_depth is None:
      inverse = 1 / jnp.where(valid, depth, 1)
      losses = scale_shift_invariant(
        found,
        inverse,
        valid,
        alignment=self.alignment,
        gradient_weight=self.gradient_weight,
        scales=self.gradient_scales,
      )
    else:
      valid &= depth <= self._max_depth
      losses = silog(found, depth, valid, variance_focus=self.variance_focus)
      metrics['abs_rel'] = masked_mean(jnp.abs(found - depth) / jnp.where(valid, depth, 1), valid)
    some = valid.any((1, 2))
    count = some.sum(dtype=jnp.float32)
    means = {name: Mean(jnp.sum(x, where=some), count) for name, x in metrics.items()}
    means['valid_pixels'] = Mean(valid.sum(dtype=jnp.float32), jnp.float32(valid.size))
    return Loss(jnp.sum(losses, where=some), count, means, {})

  @override
  def outputs(self) -> Mapping[str, Output]:
    def depth(params: Params, extra: Any, batch: Batch) -> jax.Array:
      images = self.normalize(batch['image'].astype(jnp.float32) / 255)
      found: Any = self.network.apply({'params': params}, images)
      return found

    name = 'inverse_depth' if self._max_depth is None else 'depth'
    own = {name: Output(depth, 'map', encoder=self._encoder)}
    return {**encoder_outputs(self.network.encoder, self._encoder), **own}  # type: ignore[attr-defined]

  @property
  def _max_depth(self) -> float | None:
    found: float | None = self.network.max_depth  # type: ignore[attr-defined]
    return found

  def _encoder(self, params: Params, extra: Any) -> ImageEncoder:
    return ImageEncoder(self.network.encoder, {'params': params['encoder']}, self.normalize)  # type: ignore[attr-defined]
