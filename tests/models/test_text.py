import jax
import numpy as np
import pytest

from fmcv_jax.models.backbones.text import text_transformer

EOT = 19
TOKENS = np.array([[18, 4, 7, EOT, 0, 0], [18, 5, EOT, 0, 0, 0]])
CHANGED = np.where(np.arange(6) == 2, 11, TOKENS)  # another third token


def network(**options):
  return text_transformer(20, 8, 16, 2, 2, **options)


@pytest.fixture(scope='module')
def variables(random_variables):
  return random_variables(network(), TOKENS)


def apply(variables, tokens, **options):
  return jax.tree.map(np.asarray, jax.jit(network(**options).apply)(variables, tokens))


def test_what_follows_the_end_of_text_does_not_change_a_causal_feature(variables):
  after = np.array([[18, 4, 7, EOT, 9, 3], [18, 5, EOT, 1, 2, 3]])
  a, b = apply(variables, TOKENS), apply(variables, after)
  np.testing.assert_allclose(a.pooled, b.pooled, atol=1e-6)
  assert np.abs(a.tokens[:, -1] - b.tokens[:, -1]).max() > 1e-3


def test_in_a_causal_transformer_each_token_attends_only_to_earlier_ones(variables):
  changed = apply(variables, CHANGED).tokens
  whole = apply(variables, TOKENS).tokens
  np.testing.assert_allclose(changed[:, :2], whole[:, :2], atol=1e-6)
  assert (np.abs(changed[:, 2:] - whole[:, 2:]).max(axis=-1) > 1e-5).all()


def test_a_bidirectional_transformer_attends_to_all_tokens(variables):
  changed = apply(variables, CHANGED, causal=False).tokens
  assert (np.abs(changed - apply(variables, TOKENS, causal=False).tokens).max(axis=-1) > 1e-5).all()


@pytest.mark.parametrize('pool', ['eot', 'mean'])
@pytest.mark.parametrize('causal', [False, True])
def test_padding_that_is_not_attended_to_does_not_change_outputs(variables, causal, pool):
  options = {'causal': causal, 'pool': pool, 'attend_padding': False}
  short = apply(variables, TOKENS, **options)
  long = apply(variables, np.pad(TOKENS, ((0, 0), (0, 2))), **options)
  np.testing.assert_allclose(short.output, long.output, rtol=1e-5, atol=1e-6)
  words = TOKENS != 0
  np.testing.assert_allclose(short.tokens[words], long.tokens[:, :6][words], rtol=1e-5, atol=1e-6)


def test_padding_is_attended_to_by_default(variables):
  short = apply(variables, TOKENS, causal=False)
  long = apply(variables, np.pad(TOKENS, ((0, 0), (0, 2))), causal=False)
  assert np.abs(short.output - long.output).max() > 1e-4


def test_a_text_of_padding_only_gives_finite_outputs(variables):
  empty = apply(variables, np.zeros_like(TOKENS), causal=False, pool='mean', attend_padding=False)
  assert np.isfinite(empty.tokens).all()
  np.testing.assert_array_equal(empty.output, 0)


def test_pooling_reads_what_it_says(variables):
  end = apply(variables, TOKENS)
  np.testing.assert_array_equal(end.pooled, end.tokens[np.arange(2), np.array([3, 2])])
  last = apply(variables, TOKENS, pool='last')
  np.testing.assert_array_equal(last.pooled, last.tokens[:, -1])
  mean = apply(variables, TOKENS, pool='mean')
  expected = np.stack([mean.tokens[0, :4].mean(axis=0), mean.tokens[1, :3].mean(axis=0)])
  np.testing.assert_allclose(mean.pooled, expected, atol=1e-6)


def test_a_text_longer_than_the_transformer_is_an_error(variables):
  with pytest.raises(ValueError, match='texts of 9 tokens for a text transformer of length 8'):
    jax.eval_shape(network().apply, variables, np.zeros((1, 9), np.int32))
