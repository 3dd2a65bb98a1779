"""Rows of prompts and answers; those of a published tokenizer are in tests/pretrained/test_paligemma.py."""

import numpy as np
import pytest

from fmcv_jax.data.prompts import Prompted
from fmcv_jax.data.tokenizers import Bpe, ClipBpe
from fmcv_jax.errors import UserError
from tests.data.counting import Counting

WORDS = Bpe(300, 8, corpus=Counting(40))
ROWS = Prompted(WORDS, length=32)


def body(text):
  return WORDS.encode_bodies([text])[0]


def test_a_row_is_start_prompt_newline_answer_end_and_padding():
  row = ROWS(['how many?\ntwo\nthree'])[0]
  ids = [1, *body('how many?'), ROWS.separator_id, *body('two\nthree'), 299]
  assert list(row[: len(ids)]) == ids
  assert set(row[len(ids) :]) <= {0}
  # White space in a text is one blank in this vocabulary.
  assert ROWS.decode(row[None]) == ['how many?\ntwo three']


def test_a_text_without_a_newline_is_an_answer_to_no_prompt():
  row = ROWS(['two'])[0]
  ids = [1, ROWS.separator_id, *body('two'), 299]
  assert list(row[: len(ids)]) == ids


def test_a_long_answer_is_cut_and_ends():
  row = ROWS(['how?\n' + 'two ' * 50])[0]
  assert (row != 0).all()
  assert row[-1] == 299
  assert list(row).count(299) == 1


def test_prompts_and_answers_are_the_parts_of_a_row():
  row = ROWS(['how many?\ntwo'])[0]
  prompt, answers = ROWS.prompts(['how many?'])[0], ROWS.answers(['two', 'a longer one'])
  length = int((prompt != 0).sum())
  np.testing.assert_array_equal(prompt[:length], row[:length])
  end = list(answers[0]).index(299) + 1
  np.testing.assert_array_equal(answers[0][:end], row[length : length + end])
  assert set(answers[0][end:]) <= {0}
  assert answers[1][-1] == 299


@pytest.mark.parametrize('make', [lambda text: ROWS([f'{text}\nyes']), lambda text: ROWS.prompts([text])])
def test_a_prompt_that_is_too_long_is_one_clear_line(make):
  with pytest.raises(
    UserError, match=r"^prompt: 'xyzw.*' has \d+ tokens, more than the (29|30) that rows of 32 tokens"
  ):
    make('xyzw' * 20)


def test_a_prompt_with_a_newline_is_refused():
  with pytest.raises(UserError, match='holds a newline, which ends a prompt'):
    ROWS.prompts(['one\ntwo'])


def test_a_vocabulary_without_a_newline_is_refused():
  with pytest.raises(ValueError, match='words: the vocabulary of prompts is bpe or tokenizer_json'):
    Prompted(ClipBpe())
  with pytest.raises(ValueError, match='start and end: only a tokenizer_json has tokens with names'):
    Prompted(WORDS, start='<bos>')
