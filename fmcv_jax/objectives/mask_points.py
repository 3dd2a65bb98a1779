"""Points at which masks are compared: PointRend's sampling (Kirillov et al. 2020), as Mask2Former uses it.

Positions are fractions (x, y) of the width and height, so that masks of different resolutions share them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fmcv_jax.bounds import NonNegativeInt, PositiveFraction
from fmcv_jax.parallel.rules import platform
from fmcv_jax.shapes import AnyArray, Float, Shaped


class Points(NamedTuple):
  """Random positions, uniform in [0, 1), for images with M masks each.

  shared      [B, 1, P, 2], for the costs of all pairs of an image
  candidates  [B, M, P * oversampling, 2], of which the most uncertain are taken
  random      [B, M, R, 2], which are taken as they are
  """

  shared: jax.Array
  candidates: jax.Array
  random: jax.Array


def draw_points(
  rng: jax.Array, batch: int, masks: int, count: NonNegativeInt, oversampling: float, important: PositiveFraction
) -> Points:
  """Points for `count` comparisons per mask, of which the fraction `important` is at uncertain places."""
  rngs = jax.random.split(rng, 3)
  rest = count - int(important * count)
  shapes = (batch, 1, count), (batch, masks, int(count * oversampling)), (batch, masks, rest)
  return Points(*(jax.random.uniform(key, (*shape, 2)) for key, shape in zip(rngs, shapes, strict=True)))


def uncertain_points(
  mask_logits: Float[AnyArray, 'batch masks rows columns'], points: Points
) -> Float[jax.Array, 'batch masks points 2']:
  """The candidates whose logits are nearest to 0, then the random points: as many as are `shared`, per mask."""
  count = points.shared.shape[2] - points.random.shape[2]
  found = bilinear(mask_logits, points.candidates)
  _, nearest = jax.lax.top_k(-jnp.abs(found), count)
  chosen = jnp.take_along_axis(points.candidates, nearest[..., None], axis=2)
  return jnp.concatenate([chosen, points.random], axis=2)


def pixel_centers(rows: int, columns: int) -> Float[jax.Array, '1 1 pixels 2']:
  """The centers of all pixels, row by row."""
  y, x = jnp.meshgrid((jnp.arange(rows) + 0.5) / rows, (jnp.arange(columns) + 0.5) / columns, indexing='ij')
  return jnp.stack([x, y], -1).reshape(1, 1, -1, 2)


def bilinear(
  masks: Shaped[AnyArray, 'batch masks rows columns'], points: Float[AnyArray, 'b m points 2']
) -> Float[jax.Array, 'batch masks points']:
  """Values at points [B or 1, M or 1, P, 2] between the centers of pixels; 0 outside of the mask.

  On a TPU, which is slow at gathering and scattering single numbers, these are products with the weights of all rows
  and columns, in its default precision.
  """
  points = jnp.broadcast_to(points, (len(masks), *points.shape[1:]))
  return (by_products if platform() == 'tpu' else by_gathers)(masks, points)


def by_gathers(masks: AnyArray, points: AnyArray) -> jax.Array:
  """`bilinear` from the four pixels around each point."""
  batch, count, rows, columns = masks.shape
  x, y = points[..., 0] * columns - 0.5, points[..., 1] * rows - 0.5
  left, top = jnp.floor(x), jnp.floor(y)
  flat, found = masks.reshape(batch, count, -1), jnp.zeros((batch, count, points.shape[2]))
  for row, of_row in ((top, top + 1 - y), (top + 1, y - top)):
    for column, of_column in ((left, left + 1 - x), (left + 1, x - left)):
      inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
      at = jnp.clip(row, 0, rows - 1) * columns + jnp.clip(column, 0, columns - 1)
      values = jnp.take_along_axis(flat, at.astype(jnp.int32), axis=2).astype(jnp.float32)
      found = found + jnp.where(inside, of_row * of_column, 0.0) * values
  return found


def by_products(masks: AnyArray, points: AnyArray) -> jax.Array:
  """`bilinear` as products with weights max(0, 1 - distance) of rows and columns, one mask of each image at a time."""
  rows, columns = masks.shape[2:]

  def weights(places: jax.Array, size: int) -> jax.Array:
    return jnp.maximum(0, 1 - jnp.abs(places[..., None] * size - 0.5 - jnp.arange(size)))

  @jax.checkpoint
  def of_mask(mask: jax.Array, at: jax.Array) -> jax.Array:
    of_rows = jnp.einsum('bpr,brc->bpc', weights(at[..., 1], rows), mask.astype(jnp.float32))
    return jnp.sum(of_rows * weights(at[..., 0], columns), -1)

  by_mask = jnp.moveaxis(masks, 1, 0)
  if points.shape[1] == 1:
    found = jax.lax.map(lambda mask: of_mask(mask, points[:, 0]), by_mask)
  else:
    found = jax.lax.map(lambda pair: of_mask(*pair), (by_mask, jnp.moveaxis(points, 1, 0)))
  return jnp.moveaxis(found, 0, 1)
