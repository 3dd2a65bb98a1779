import jax
import numpy as np
import pytest

from fmcv_jax.augment.inpaint_masks import RandomInpaintMask, _distance


def test_every_image_draws_a_mask_from_its_own_key_and_the_given_fraction_is_fully_masked():
  count = 400
  keys = jax.random.split(jax.random.key(0), count)
  drawn = jax.jit(RandomInpaintMask(), static_argnums=1)
  masks = np.asarray(drawn(keys, (32, 32)))
  np.testing.assert_array_equal(drawn(keys[::-1], (32, 32)), masks[::-1])
  share = masks.mean((1, 2))
  assert share.min() > 0
  whole = (share == 1).mean()
  assert abs(whole - 0.25) < 4 * np.sqrt(0.25 * 0.75 / count)
  assert 0.1 < share[share < 1].mean() < 0.5


def test_distance_from_a_line_that_ends():
  start = np.array([(0, 0), (0, 0), (0.5, 0.8), (0, 0)])
  end = np.array([(1, 1), (1, 0), (0.5, 0.9), (0, 0)])
  np.testing.assert_allclose(_distance(0.5, 0.5, start.T, end.T), [0, 0.5, 0.3, 0.5**0.5], atol=1e-6)


def test_a_config_that_never_masks_is_refused():
  with pytest.raises(ValueError, match='boxes, strokes'):
    RandomInpaintMask(boxes=0, strokes=0)
