import jax
import numpy as np
import pytest

from fmcv_jax.parallel.rules import path_of


@pytest.fixture(scope='session')
def random_variables():
  """random_variables(network, *inputs): variables all away from zero, so that each has a say; nothing is compiled."""

  def make(network, *inputs, seed=1):
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
      centre = int('scale' in path_of(path))  # of norms and of LayerScale
      return (centre + 0.2 * rng.normal(size=shape.shape)).astype(shape.dtype)

    shapes = jax.eval_shape(network.init, jax.random.key(0), *inputs)
    return jax.tree_util.tree_map_with_path(leaf, shapes)

  return make
