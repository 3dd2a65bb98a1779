import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmcv_jax.models.common.positions import resize_grid, rope_2d, rotate, sincos_2d


def mae_table(side, dim):
  """He et al. 2022, util/pos_embed.py, entry by entry: the first half tells the column, the second the row."""
  table = np.zeros((side * side, dim))
  quarter = dim // 4
  for row in range(side):
    for column in range(side):
      for i in range(quarter):
        omega = 1 / 10000 ** (i / quarter)
        table[row * side + column, i] = math.sin(column * omega)
        table[row * side + column, quarter + i] = math.cos(column * omega)
        table[row * side + column, 2 * quarter + i] = math.sin(row * omega)
        table[row * side + column, 3 * quarter + i] = math.cos(row * omega)
  return table


@pytest.mark.parametrize(('side', 'dim'), [(4, 8), (14, 192)])
def test_the_sine_cosine_table_is_that_of_mae(side, dim):
  np.testing.assert_allclose(sincos_2d(side, side, dim), mae_table(side, dim), rtol=0, atol=1e-6)


def test_a_larger_grid_extends_a_smaller_one():
  small, large = sincos_2d(3, 4, 8).reshape(3, 4, 8), sincos_2d(5, 6, 8).reshape(5, 6, 8)
  np.testing.assert_array_equal(small, large[:3, :4])


def cubic_weights(old, new):
  """[new, old]: Keys' cubic (a = -0.5) between pixel centers, pad_input_channels where it shrinks."""
  shrink = max(1.0, old / new)
  center = (np.arange(new) + 0.5) * old / new - 0.5
  t = np.abs(np.arange(old)[None] - center[:, None]) / shrink
  near, far = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
  weights = np.where(t <= 1, near, np.where(t < 2, far, 0))
  return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize('new', [(7, 7), (3, 2), (6, 3), (4, 9)])
def test_a_resized_table_is_the_antialiased_bicubic_one(new):
  table = np.random.default_rng(0).normal(size=(4, 6, 5))
  expected = np.einsum('yr,xc,rcd->yxd', cubic_weights(4, new[0]), cubic_weights(6, new[1]), table)
  resized = resize_grid(jnp.asarray(table.reshape(24, 5), jnp.float32), (4, 6), new)
  np.testing.assert_allclose(resized, expected.reshape(-1, 5), rtol=0, atol=1e-5)


def test_a_table_at_its_own_size_is_left_as_it_is():
  table = jnp.ones((24, 5))
  assert resize_grid(table, (4, 6), (4, 6)) is table


def test_rotary_logits_depend_only_on_relative_position():
  rows, columns, dim, prefix = 5, 6, 16, 2
  angles = rope_2d(rows, columns, dim, prefix)
  assert angles.shape == (prefix + rows * columns, dim // 2)
  q, k = jax.random.normal(jax.random.key(0), (2, dim))

  def everywhere(x):
    return rotate(jnp.broadcast_to(x, (1, len(angles), 1, dim)), angles)[0, :, 0]

  logits = everywhere(q) @ everywhere(k).T
  grid = logits[prefix:, prefix:].reshape(rows, columns, rows, columns)
  np.testing.assert_allclose(grid[1:, :, 1:], grid[:-1, :, :-1], atol=2e-5)  # both one row down
  np.testing.assert_allclose(grid[:, 1:, :, 1:], grid[:, :-1, :, :-1], atol=2e-5)  # both one column right
  assert jnp.ptp(grid[2, 2, :, 2]) > 0.1  # it tells rows apart
  assert jnp.ptp(grid[2, 2, 2, :]) > 0.1  # and columns
  np.testing.assert_allclose(logits[:prefix, :prefix], q @ k, atol=2e-5)  # tokens without a place are not turned


def test_rotation_keeps_lengths_and_takes_angles_of_each_example():
  x = jax.random.normal(jax.random.key(0), (2, 9, 3, 8))
  angles = rope_2d(3, 3, 8, 0)
  np.testing.assert_allclose(jnp.linalg.norm(rotate(x, angles), axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
  np.testing.assert_allclose(rotate(x, jnp.stack([angles, angles])), rotate(x, angles))


def test_widths_that_are_not_divisible_are_an_error():
  with pytest.raises(ValueError, match='divisible by 4, got 6'):
    sincos_2d(2, 2, 6)
  with pytest.raises(ValueError, match='divisible by 4, got 6'):
    rope_2d(2, 2, 6, 1)
