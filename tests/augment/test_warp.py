import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from fmcv_jax.augment.warp import by_gathers, by_kernel

HEIGHT, WIDTH = 21, 150  # two tiles of lanes
FORMS = [by_gathers, functools.partial(by_kernel, interpret=True)]
RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(size=(5, HEIGHT, WIDTH, 3)).astype(np.float32)
MATRICES = np.array(
  [
    [[1, 0, 0], [0, 1, 0]],
    [[1, 0, 140], [0, 1, -3.5]],
    [[0.9, -0.4, 3.7], [0.061, 1.1, -2.2]],
    [[-1.0, 0.2, 149], [0.05, -0.8, 20]],
    [[30.0, 7.0, -900], [0.1, 9.0, 5]],
  ],
  np.float32,
)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('fill', [0.25, None])
def test_the_warp_equals_scipys_affine_transform_in_the_inside_and_the_edge(form, fill):
  image, matrix = IMAGES[2], MATRICES[2].astype(np.float64)
  ours = jax.jit(form, static_argnums=2)(IMAGES, MATRICES, fill)[2]
  # scipy counts (row, column) from the center of the first pixel.
  swapped, half = matrix[::-1, 1::-1], np.array([0.5, 0.5])
  offset = matrix[::-1, 2] + swapped @ half - half
  theirs = [ndimage.affine_transform(image[..., c], swapped, offset, order=1, mode='nearest') for c in range(3)]
  theirs = np.stack(theirs, -1)
  if fill is not None:
    rows, columns = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    y, x = (swapped[i, 0] * rows + swapped[i, 1] * columns + matrix[::-1, 2][i] for i in (0, 1))
    theirs[(y < 0) | (y >= HEIGHT) | (x < 0) | (x >= WIDTH)] = fill
    assert 0.1 < (theirs == fill).mean() < 0.7
  np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize('fill', [0.25, None])
@pytest.mark.parametrize('width', [150, 128, 40])
def test_the_tpu_kernel_equals_gathers(fill, width):
  images = jnp.asarray(IMAGES[:, :, :width])
  gathered, ours = (jax.jit(form, static_argnums=2)(images, MATRICES, fill) for form in FORMS)
  np.testing.assert_allclose(ours, gathered, atol=1e-6)
  np.testing.assert_array_equal(ours[0], images[0])  # an image that does not move is copied
