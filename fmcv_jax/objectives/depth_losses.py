"""Losses of depth: scale- and shift-invariant for relative inverse depth, logarithmic for metric depth.

All are of one image each, [B], over its valid pixels; 0 for an image without any.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from fmcv_jax.shapes import Bool, Float

Alignment = Literal['median', 'least_squares']
EPS = 1e-6
Maps = Float[jax.Array, 'batch height width']
Masks = Bool[jax.Array, 'batch height width']


def masked_mean(x: jax.Array, valid: jax.Array) -> jax.Array:
  """Mean over the valid pixels of each image [B, H, W] -> [B]; 0 without any."""
  total = jnp.sum(jnp.where(valid, x, 0), (1, 2), dtype=jnp.float32)
  return total / jnp.maximum(valid.sum((1, 2)), 1)


def masked_median(x: jax.Array, valid: jax.Array) -> jax.Array:
  """Median over the valid pixels of each image [B, H, W] -> [B]; 0 without any."""
  count = valid.sum((1, 2))
  ordered = jnp.sort(jnp.where(valid, x, jnp.inf).reshape(len(x), -1), axis=1)
  middle = jnp.stack([jnp.maximum(count - 1, 0) // 2, count // 2], 1)
  both = jnp.take_along_axis(ordered, jnp.minimum(middle, ordered.shape[1] - 1), axis=1)
  return jnp.where(count > 0, jnp.where(jnp.isfinite(both), both, 0).mean(1), 0)


def normalized(x: jax.Array, valid: jax.Array) -> jax.Array:
  """(x - median) / mean absolute deviation, of the valid pixels of each image (Ranftl et al. 2022, eq. 5)."""
  centered = x - masked_median(x, valid)[:, None, None]
  return centered / jnp.maximum(masked_mean(jnp.abs(centered), valid), EPS)[:, None, None]


def least_squares(x: jax.Array, target: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(scale, shift) [B] that minimize the mean of (scale * x + shift - target)^2; scale 0 for an x that is constant."""
  mean_x, mean_target = masked_mean(x, valid), masked_mean(target, valid)
  centered = x - mean_x[:, None, None]
  variance = masked_mean(centered**2, valid)
  covariance = masked_mean(centered * (target - mean_target[:, None, None]), valid)
  scale = jnp.where(variance > EPS**2, covariance / jnp.maximum(variance, EPS**2), 0)
  return scale, mean_target - scale * mean_x


def gradient_difference(difference: jax.Array, valid: jax.Array, scales: int = 4) -> jax.Array:
  """Absolute differences of neighbors in `difference` at `scales` resolutions, each half the one before (eq. 11).

  The sum over both directions, divided by the number of valid pixels of the resolution; pairs with an invalid pixel
  are left out.
  """
  total = jnp.zeros(len(difference))
  for step in (2**k for k in range(scales)):
    x, known = difference[:, ::step, ::step], valid[:, ::step, ::step]
    down = jnp.where(known[:, 1:] & known[:, :-1], jnp.abs(x[:, 1:] - x[:, :-1]), 0).sum((1, 2))
    right = jnp.where(known[:, :, 1:] & known[:, :, :-1], jnp.abs(x[:, :, 1:] - x[:, :, :-1]), 0).sum((1, 2))
    total += (down + right) / jnp.maximum(known.sum((1, 2)), 1)
  return total


def scale_shift_invariant(
  prediction: Maps, target: Maps, valid: Masks, *, alignment: Alignment, gradient_weight: float, scales: int
) -> jax.Array:
  """Half the mean error of aligned inverse depth, and `gradient_weight` times `gradient_difference`.

  'median': absolute errors of both after `normalized` (Ranftl et al. 2022, eq. 5 and 6; Yang et al. 2024, eq. 2 and 3).
  'least_squares': squared errors of the prediction aligned to the target in closed form (eq. 3 and 4).
  """
  if alignment == 'median':
    difference = normalized(prediction, valid) - normalized(target, valid)
    error = jnp.abs(difference)
  else:
    scale, shift = least_squares(prediction, target, valid)
    difference = scale[:, None, None] * prediction + shift[:, None, None] - target
    error = difference**2
  return masked_mean(error, valid) / 2 + gradient_weight * gradient_difference(difference, valid, scales)


def silog(prediction: Maps, target: Maps, valid: Masks, *, variance_focus: float) -> jax.Array:
  """sqrt(mean(d^2) - variance_focus * mean(d)^2) for d = log(prediction / target) (Eigen et al. 2014, eq. 4)."""
  logs = jnp.log(jnp.maximum(prediction, EPS)) - jnp.log(jnp.where(valid, target, 1))
  spread = masked_mean(logs**2, valid) - variance_focus * masked_mean(logs, valid) ** 2
  return jnp.sqrt(jnp.maximum(spread, 0) + EPS**2) - EPS
