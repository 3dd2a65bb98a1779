"""Masks of patches made of rectangles (BEiT, Bao et al. 2022, algorithm 1), drawn on the device with fixed shapes."""

import math

import jax
import jax.numpy as jnp

SMALLEST = 4  # patches of a rectangle, unless fewer are left to mask
FLATTEST = 0.3  # height / width of a rectangle, and its inverse
TRIES = 32  # rectangles drawn for each mask; those that would mask too much are left out


def block_masks(
  rng: jax.Array, images: int, grid: tuple[int, int], share: tuple[float, float], probability: float
) -> jax.Array:
  """bool [images, rows * columns], True where hidden, for each image with the given probability, else all False.

  An image hides at most a share of its patches that is drawn uniformly within the bounds, and nearly as much.
  """
  goal_rng, chosen_rng, blocks_rng = jax.random.split(rng, 3)
  goal = jax.random.uniform(goal_rng, (images,), minval=share[0], maxval=share[1])
  goal = jnp.where(jax.random.bernoulli(chosen_rng, probability, (images,)), goal, 0)
  goal = jnp.floor(goal * (grid[0] * grid[1])).astype(jnp.int32)
  masks = jax.vmap(lambda key, goal: _one(key, goal, grid))(jax.random.split(blocks_rng, images), goal)
  return masks.reshape(images, -1)


def most_hidden(grid: tuple[int, int], share: tuple[float, float]) -> int:
  """The most patches that one of those masks can hide."""
  return max(1, math.floor(share[1] * grid[0] * grid[1]))


def _one(key: jax.Array, goal: jax.Array, grid: tuple[int, int]) -> jax.Array:
  rows, columns = jnp.arange(grid[0])[:, None], jnp.arange(grid[1])[None]

  def attempt(mask, draws):
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
