import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmcv_jax.data.tokenizers import Bpe, ClipBpe
from fmcv_jax.models.backbones.text import text_transformer
from fmcv_jax.objectives.text_condition import SpecialTokens, TextCondition
from tests.data.counting import Counting

TEXTS = ['', 'a record', 'number record 8 ' * 20]


def condition(vocab_size, length=12, **options):
  encoder = text_transformer(vocab_size, length, 8, 1, 2, causal=False, attend_padding=False)
  return TextCondition(encoder, **options)


@pytest.mark.parametrize('tokenizer', [ClipBpe(12), Bpe(600, 12, corpus=Counting(100))])
@pytest.mark.parametrize('padding', ['masked', 'zeros', 'end'])
def test_the_ids_of_a_tokenizer_give_what_the_largest_id_of_a_row_gave(tokenizer, padding):
  guessed = condition(tokenizer.vocab_size, padding=padding)
  known = guessed.with_tokenizer(tokenizer)
  tokens = jnp.asarray(tokenizer(TEXTS))
  np.testing.assert_array_equal(known.empty_text(tokens), np.repeat(tokenizer(['']), 3, axis=0))
  np.testing.assert_array_equal(guessed.empty_text(tokens), known.empty_text(tokens))
  extra = jax.jit(guessed.init)(jax.random.key(0))
  for a, b in zip(guessed.encode(extra, tokens), known.encode(extra, tokens), strict=True):
    np.testing.assert_array_equal(a, b)


def test_an_end_id_that_is_not_the_largest_is_taken_from_the_tokenizer():
  tokens = jnp.array([[7, 9, 2, 0, 0], [7, 8, 9, 9, 2]])
  known = condition(16, 5, special=SpecialTokens(pad=0, start=7, end=2))
  np.testing.assert_array_equal(known.empty_text(tokens), [[7, 2, 0, 0, 0]] * 2)
  extra = known.init(jax.random.key(0))
  np.testing.assert_array_equal(known.encode(extra, tokens)[1], [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])


def test_without_an_end_id_the_padding_is_what_is_not_attended_to():
  tokens = jnp.array([[9, 5, 1, 1], [9, 5, 6, 8]])
  known = condition(16, 4, special=SpecialTokens(pad=1))
  np.testing.assert_array_equal(known.empty_text(tokens), [[1, 1, 1, 1]] * 2)
  np.testing.assert_array_equal(known.encode(known.init(jax.random.key(0)), tokens)[1], [[1, 1, 0, 0], [1, 1, 1, 1]])


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (dict(train=True), 'train: there is no text encoder'),
    (dict(precomputed=True), 'precomputed: needs a frozen text encoder'),
  ],
)
def test_what_needs_an_encoder_is_refused_without_one(options, message):
  with pytest.raises(ValueError, match=message):
    TextCondition(**options)
