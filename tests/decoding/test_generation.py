"""Search and sampling of a chain whose next token depends on the last one alone, against enumeration and formulas."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmcv_jax.decoding.choices import score
from fmcv_jax.decoding.generation import generate, restricted
from fmcv_jax.decoding.language_model import LanguageModel
from fmcv_jax.decoding.options import DecodingOptions
from fmcv_jax.errors import UserError

WORDS, PAD, END = 7, 0, 1
RANDOM = np.random.default_rng(3)
LOGITS = RANDOM.normal(size=(WORDS, WORDS)).astype(np.float32)
LOG = LOGITS - np.log(np.exp(LOGITS).sum(axis=-1, keepdims=True))


def chain(logits=LOGITS):
  table = jnp.asarray(logits)
  return LanguageModel(
    prefill=lambda batch, capacity: (table[batch['tokens'][:, 0]], batch['tokens']),
    extend=lambda tokens, state, step: (table[tokens], state),
    select=lambda state, rows: state[rows],
    pad_id=PAD,
    end_id=END,
  )


def log_likelihood(first, tokens):
  """Up to the end."""
  total, last = 0.0, first
  for token in tokens:
    total, last = total + LOG[last, token], token
    if token == END:
      break
  return total


def texts_of(length):
  """All texts of at most `length` tokens: complete ones, and those that are cut."""
  for size in range(1, length + 1):
    for body in itertools.product([i for i in range(WORDS) if i != END], repeat=size - 1):
      yield (*body, END)
      if size == length:
        yield from ((*body, last) for last in range(WORDS) if last != END)


def rows(firsts):
  return {'tokens': jnp.array(firsts, jnp.int32)[:, None]}


def test_greedy_takes_the_most_likely_token_until_the_end():
  found = generate(chain(), rows(range(2, WORDS)), DecodingOptions(max_tokens=6))
  for first, tokens, total in zip(range(2, WORDS), np.asarray(found.tokens), found.log_likelihood, strict=True):
    expected, last = [], first
    while len(expected) < 6 and END not in expected:
      last = int(LOGITS[last].argmax())
      expected.append(last)
    assert list(tokens) == expected + [PAD] * (6 - len(expected))
    assert float(total) == pytest.approx(log_likelihood(first, expected), rel=1e-5)


@pytest.mark.parametrize('penalty', [0.0, 0.6, 1.0])
def test_enough_beams_find_the_best_of_all_texts(penalty):
  """Of three tokens, 49 beams leave nothing out; the score is the log-likelihood / length ** penalty."""
  found = generate(chain(), rows([2, 5]), DecodingOptions(max_tokens=3, beams=49, length_penalty=penalty))
  for first, tokens, total in zip([2, 5], np.asarray(found.tokens), found.log_likelihood, strict=True):
    best = max(texts_of(3), key=lambda text: log_likelihood(first, text) / len(text) ** penalty)
    assert tuple(tokens[: len(best)]) == best
    assert set(tokens[len(best) :]) <= {PAD}
    assert float(total) == pytest.approx(log_likelihood(first, best), rel=1e-5)


def test_samples_follow_the_tempered_distribution():
  count = 4000
  batch = rows([3] * count) | {'index': jnp.arange(count)}
  options = DecodingOptions(max_tokens=1, temperature=0.7)
  tokens = np.asarray(generate(chain(), batch, options).tokens[:, 0])
  expected = np.exp(LOGITS[3] / 0.7)
  expected /= expected.sum()
  found = np.bincount(tokens, minlength=WORDS) / count
  assert np.all(np.abs(found - expected) < 4 * np.sqrt(expected * (1 - expected) / count))


def test_a_sample_depends_on_its_number_and_the_seed_not_on_its_batch():
  options = DecodingOptions(max_tokens=12, temperature=1.0, seed=5)
  whole = generate(chain(), rows([2, 3, 4, 5]) | {'index': jnp.array([10, 11, 12, 13])}, options).tokens
  apart = generate(chain(), rows([4, 3]) | {'index': jnp.array([12, 11])}, options).tokens
  np.testing.assert_array_equal(apart, whole[jnp.array([2, 1])])
  other = generate(chain(), rows([4, 3]) | {'index': jnp.array([12, 13])}, options).tokens
  assert not np.array_equal(other[1], apart[1])


@pytest.mark.parametrize(('top_k', 'top_p'), [(3, None), (None, 0.6), (4, 0.5), (1, None), (None, 1e-6)])
def test_top_k_and_top_p_keep_the_tokens_that_the_library_keeps(top_k, top_p):
  torch = pytest.importorskip('torch', reason='pip install fmcv-jax[parity]')
  T = pytest.importorskip('transformers', reason='pip install fmcv-jax[parity]')
  theirs = torch.from_numpy(LOGITS)
  for warper in ([T.TopKLogitsWarper(top_k)] if top_k else []) + ([T.TopPLogitsWarper(top_p)] if top_p else []):
    theirs = warper(None, theirs)
  np.testing.assert_array_equal(restricted(jnp.asarray(LOGITS), top_k, top_p), theirs.numpy())


def test_the_end_waits_for_the_least_number_of_tokens():
  eager = LOGITS.copy()
  eager[:, END] = 9.0
  for beams in (1, 2):
    options = DecodingOptions(max_tokens=6, min_tokens=3, beams=beams)
    tokens = np.asarray(generate(chain(eager), rows([2]), options).tokens[0])
    assert list(tokens).index(END) == 3


def test_a_closed_list_is_scored_by_its_log_likelihoods():
  texts = np.array([[4, 2, END, PAD], [END, PAD, PAD, PAD], [3, 3, 3, END]], np.int32)
  found = score(chain(), rows([2, 6]), jnp.asarray(texts))
  expected = [[log_likelihood(first, text) for text in texts] for first in (2, 6)]
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_batch_ends_when_all_texts_have_ended():
  """The number of tokens that are read is that of the longest text, not max_tokens."""
  steps = []
  model = chain()

  def extend(tokens, state, step):
    jax.debug.callback(lambda step: steps.append(int(step)), step)
    return model.extend(tokens, state, step)

  found = generate(model._replace(extend=extend), rows([2, 4]), DecodingOptions(max_tokens=60))
  jax.block_until_ready(found)
  jax.effects_barrier()
  longest = max(list(row).index(END) if END in row else 60 for row in np.asarray(found.tokens))
  assert longest < 59
  assert len(steps) == longest


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'max_tokens': 0}, 'max_tokens: expected at least 1'),
    ({'min_tokens': 64}, 'min_tokens: expected 0 to max_tokens - 1 = 63'),
    ({'temperature': -1.0}, 'temperature: expected at least 0'),
    ({'top_k': 5}, 'set a temperature above 0'),
    ({'temperature': 1.0, 'top_p': 1.5}, 'top_p: expected above 0 and at most 1'),
    ({'temperature': 1.0, 'beams': 2}, 'a beam search does not sample'),
    ({'beams': 0}, 'beams: expected at least 1'),
    ({'length_penalty': float('nan')}, 'length_penalty: expected a finite number'),
  ],
)
def test_options_that_contradict_are_refused(options, message):
  with pytest.raises(UserError, match=message):
    DecodingOptions(**options)
