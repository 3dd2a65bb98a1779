"""Block-wise patch masks (BEiT, Bao et al. 2022, algorithm 1), sampled on the device with fixed shapes."""

import math
from typing import Any

import jax
import jax.numpy as jnp

SMALLEST = 4  # minimum number of patches of a rectangle, unless fewer are left to mask
FLATTEST = 0.3  # minimum height / width of a rectangle; the inverse is the maximum
TRIES = 32  # rectangles drawn per mask; those that would mask too much are skipped


def block_masks(
  rng: jax.Array, images: int, grid: tuple[int, int], share: tuple[float, float], probability: float
) -> jax.Array:
  """Masks bool [images, rows * columns], True for masked patches; all False with 1 - the given probability.

  The target mask ratio of an image is drawn uniformly within the bounds; the actual ratio is at most, and close to, it.
  """
  goal_rng, chosen_rng, blocks_rng = jax.random.split(rng, 3)
  goal = jax.random.uniform(goal_rng, (images,), minval=share[0], maxval=share[1])
  goal = jnp.where(jax.random.bernoulli(chosen_rng, probability, (images,)), goal, 0)
  goal = jnp.floor(goal * (grid[0] * grid[1])).astype(jnp.int32)
  masks = jax.vmap(lambda key, goal: _one(key, goal, grid))(jax.random.split(blocks_rng, images), goal)
  return masks.reshape(images, -1)


def most_hidden(grid: tuple[int, int], share: tuple[float, float]) -> int:
  """Maximum number of masked patches."""
  return max(1, math.floor(share[1] * grid[0] * grid[1]))


def _one(key: jax.Array, goal: jax.Array, grid: tuple[int, int]) -> jax.Array:
  rows, columns = jnp.arange(grid[0])[:, None], jnp.arange(grid[1])[None]

  def attempt(mask: jax.Array, draws: Any) -> Any:
    left = goal - mask.sum()
    area = jnp.minimum(SMALLEST, left) + draws[0] * jnp.maximum(left - SMALLEST, 0)
    ratio = jnp.exp((2 * draws[1] - 1) * math.log(1 / FLATTEST))
    height = jnp.clip(jnp.round(jnp.sqrt(area * ratio)), 1, grid[0])
    width = jnp.clip(jnp.round(jnp.sqrt(area / ratio)), 1, grid[1])
    top = jnp.floor(draws[2] * (grid[0] - height + 1))
    start = jnp.floor(draws[3] * (grid[1] - width + 1))
    block = (rows >= top) & (rows < top + height) & (columns >= start) & (columns < start + width)
    more = mask | block
    return jnp.where(more.sum() <= goal, more, mask), None

  return jax.lax.scan(attempt, jnp.zeros(grid, bool), jax.random.uniform(key, (TRIES, 4)))[0]
