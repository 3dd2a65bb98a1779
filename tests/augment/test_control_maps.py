import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmcv_jax.augment.control_maps import Edges, Gray, Pixelate


def test_edges_of_a_disc_are_its_outline_one_pixel_wide():
  size, radius = 64, 20.0
  y, x = np.mgrid[:size, :size] - (size - 1) / 2
  distance = np.hypot(y, x)
  disc = (distance < radius).astype(np.float32)
  images = np.repeat(np.stack([disc, 0.02 * disc])[..., None], 3, axis=-1)
  edges = np.asarray(jax.jit(Edges())(images))[..., 0]
  found = edges[0] > 0
  assert np.abs(distance[found] - radius).max() < 1.5
  # Every direction from the center meets the outline; nowhere does it fill a square of four pixels.
  angles = np.arctan2(y, x)[found]
  assert np.diff(np.sort(angles)).max() < np.radians(8)
  assert not (found[1:, 1:] & found[1:, :-1] & found[:-1, 1:] & found[:-1, :-1]).any()
  assert not edges[1].any()


def test_a_weak_edge_counts_where_it_continues_a_strong_one():
  """A step down the middle whose height falls along the rows: strong at the top, below `high` from row 20 on."""
  height = np.linspace(1, 0, 40)[:, None] * np.ones(16)
  image = np.where(np.arange(16) < 8, 0.0, height)[None, ..., None].astype(np.float32).repeat(3, -1)
  # Of a step the largest gradient by Sobel's operator is 4 times its height, times what the blur leaves of it.
  edges = {reach: np.asarray(jax.jit(Edges(low=0.4, high=1.2, reach=reach))(image))[0, ..., 0] for reach in (0, 4, 40)}
  rows = {reach: np.flatnonzero(x.any(axis=1)) for reach, x in edges.items()}
  assert all((x.sum(axis=1) <= 1).all() for x in edges.values())
  assert len(rows[4]) == len(rows[0]) + 4
  assert len(rows[40]) > len(rows[4])
  assert rows[40].max() < 39
  np.testing.assert_array_equal(rows[40], np.arange(len(rows[40])))


def test_gray_and_coarse_keep_the_means():
  images = np.random.default_rng(0).uniform(size=(2, 8, 8, 3)).astype(np.float32)
  np.testing.assert_allclose(Gray()(images)[..., 0], images @ np.array([0.299, 0.587, 0.114]), atol=1e-6)
  coarse = Pixelate(4)(jnp.asarray(images))
  np.testing.assert_allclose(coarse[:, 5, 3], images[:, 4:, :4].mean((1, 2)), atol=1e-6)
  with pytest.raises(ValueError, match='8 x 8 pixels are not divisible by 3'):
    Pixelate(3)(images)
