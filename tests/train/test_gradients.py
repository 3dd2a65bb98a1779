"""Accumulated gradients equal those of the whole batch, for coupled losses too."""

import jax
import numpy as np
import pytest

from fmcv_jax.train.gradients import gradients, join_batch, split_batch
from tests.train.tiny import batch_of, classification, contrastive

OBJECTIVES = {'classification': classification(), 'softmax': contrastive(), 'sigmoid': contrastive('sigmoid')}


@pytest.mark.parametrize('name', OBJECTIVES)
@pytest.mark.parametrize('pieces', [2, pytest.param(8, marks=pytest.mark.slow)])
def test_gradient_of_pieces_equals_gradient_of_the_whole(name, pieces):
  objective = OBJECTIVES[name]
  params, extra = jax.jit(objective.init)(jax.random.key(0))
  # A head initialized to zero would hide the gradient of everything below it.
  params = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(jax.random.key(x.size), x.shape), params)
  batch = batch_of(objective)
  run = jax.jit(lambda n: gradients(objective, params, batch, jax.random.key(1), extra, n), static_argnums=0)
  whole, in_pieces = run(1), run(pieces)
  np.testing.assert_allclose(whole[0], in_pieces[0], rtol=1e-5)
  largest = max(float(abs(x).max()) for x in jax.tree.leaves(whole[3]))
  assert largest > 1e-3
  for x, y in zip(jax.tree.leaves(whole[3]), jax.tree.leaves(in_pieces[3]), strict=True):
    np.testing.assert_allclose(x, y, atol=1e-5 * largest)
  assert whole[1].keys() == in_pieces[1].keys()
  np.testing.assert_allclose(whole[1]['accuracy'], in_pieces[1]['accuracy'], rtol=1e-5)


def test_pieces_are_strided_and_join_again():
  x = np.arange(24).reshape(12, 2)
  pieces = split_batch(x, 3)
  np.testing.assert_array_equal(pieces[1], x[1::3])
  np.testing.assert_array_equal(join_batch(pieces), x)
  with pytest.raises(ValueError, match='12 is not divisible by 5'):
    split_batch(x, 5)
