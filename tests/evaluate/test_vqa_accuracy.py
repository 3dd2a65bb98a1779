"""VQA accuracy by hand, and the published normalization against the reference implementation's own answers."""

import json
import pathlib

import pytest

from fmcv_jax.evaluate.vqa_accuracy import normalized, vqa_accuracy

# [answer, processDigitArticle(processPunctuation(answer))] of vqaEval.py, GT-Vision-Lab/VQA a013f00, in Python 3: some
# answers with every rule in them, then each of its contractions.
REFERENCE = json.loads((pathlib.Path(__file__).parent.parent / 'fixtures' / 'vqa_normalized.json').read_text())


@pytest.mark.parametrize(('answer', 'expected'), REFERENCE, ids=[repr(answer) for answer, _ in REFERENCE])
def test_answers_are_normalized_as_in_the_reference(answer, expected):
  assert normalized(answer) == expected


@pytest.mark.parametrize(
  ('answer', 'expected'),
  [
    ('The two dogs.', '2 dogs'),
    ("dont know", "don't know"),
    ('1,000', '1000'),
    ('red, white', 'red white'),
    ('black/white', 'black white'),
    ('3.5', '3.5'),
    ('none', '0'),
    ('U.S.A.', 'usa'),
  ],
)  # fmt: skip
def test_normalized_by_hand(answer, expected):
  assert normalized(answer) == expected


def test_accuracy_by_hand():
  """k of ten people gave the answer: k choices of nine leave k - 1 of them, 10 - k leave k."""

  def people(count):
    return ['yes'] * count + [f'other {i}' for i in range(10 - count)]

  assert vqa_accuracy('yes', people(0)) == 0
  assert vqa_accuracy('yes', people(1)) == pytest.approx((1 * 0 + 9 * 1 / 3) / 10)  # 0.3
  assert vqa_accuracy('yes', people(2)) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)  # 0.6
  assert vqa_accuracy('yes', people(3)) == pytest.approx((3 * 2 / 3 + 7 * 1) / 10)  # 0.9
  assert vqa_accuracy('yes', people(4)) == 1
  assert vqa_accuracy('yes', people(10)) == 1


def test_answers_are_normalized_only_where_people_differ():
  assert vqa_accuracy('2', ['two'] * 9 + ['three']) == 1
  assert vqa_accuracy('2', ['two'] * 10) == 0
  assert vqa_accuracy(' two\n', ['two '] * 10) == 1
