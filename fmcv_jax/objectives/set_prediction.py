"""Sets of boxes: how they differ, which prediction is matched to which object, and the losses of both.

DETR (Carion et al. 2020), generalized IoU (Rezatofighi et al. 2019), focal loss (Lin et al. 2017).
"""

import jax
import jax.numpy as jnp
import optax

from fmcv_jax.parallel.rules import shard_mapped


def centers_and_sizes(boxes: jax.Array, sides: tuple[int, ...]) -> jax.Array:
  """Boxes [..., 4], left, top, right, bottom in pixels of an image of `sides` (height, width), as fractions: center x,
  center y, width, height."""
  low, high = boxes[..., :2], boxes[..., 2:]
  return jnp.concatenate([(low + high) / 2, high - low], -1) / _both(sides)


def edges(boxes: jax.Array, sides: tuple[int, ...] = (1, 1)) -> jax.Array:
  """The inverse of `centers_and_sizes`."""
  center, size = boxes[..., :2], boxes[..., 2:]
  return jnp.concatenate([center - size / 2, center + size / 2], -1) * _both(sides)


def _both(sides: tuple[int, ...]) -> jax.Array:
  return jnp.array([sides[1], sides[0]] * 2, jnp.float32)


def generalized_iou(a: jax.Array, b: jax.Array) -> jax.Array:
  """[...] of pairs of boxes [..., 4] as left, top, right, bottom: from -1 to 1."""
  both = _area(jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:]))
  hull = _area(jnp.minimum(a[..., :2], b[..., :2]), jnp.maximum(a[..., 2:], b[..., 2:]))
  union = _area(a[..., :2], a[..., 2:]) + _area(b[..., :2], b[..., 2:]) - both
  return both / jnp.maximum(union, 1e-9) - (hull - union) / jnp.maximum(hull, 1e-9)


def _area(low: jax.Array, high: jax.Array) -> jax.Array:
  return jnp.prod(jnp.maximum(high - low, 0), -1)


def focal_loss(logits: jax.Array, positive: jax.Array, alpha: float, gamma: float) -> jax.Array:
  """Sigmoid focal loss of each logit, float32 [...]; `positive` bool [...], `alpha` the weight of the positive ones."""
  return jnp.where(
    positive,
    alpha * jax.nn.sigmoid(-logits) ** gamma * jax.nn.softplus(-logits),
    (1 - alpha) * jax.nn.sigmoid(logits) ** gamma * jax.nn.softplus(logits),
  )


def focal_cost(logits: jax.Array, alpha: float, gamma: float) -> jax.Array:
  """Difference of the focal loss between a positive and a negative label, [...]."""
  return focal_loss(logits, jnp.array(True), alpha, gamma) - focal_loss(logits, jnp.array(False), alpha, gamma)


def match(cost: jax.Array, real: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(prediction, row) int32 [B, M] each: for each image the assignment of predictions to rows that costs least.

  cost  float [B, N, M] of giving prediction n to row m, N >= M
  real  bool [B, M]: rows with an object; the others cost nothing wherever they go, and change nothing for these

  Each device searches for its own images, of which none waits for another device's.
  """
  # A cost that is not finite would keep the search from ending; the step that it belongs to is skipped.
  cost = jnp.where(real[:, None] & jnp.isfinite(cost), cost, 0.0)
  search = jax.vmap(optax.assignment.hungarian_algorithm)
  return shard_mapped(search, (('batch', None, None),), (('batch', None), ('batch', None)))(cost)
