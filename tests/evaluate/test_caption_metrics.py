"""CIDEr, BLEU, ROUGE-L and words against stored values of pycocoevalcap 1.2; CLIPScore against its formula."""

import json

import numpy as np
import pytest

from fmcv_jax.evaluate.caption_metrics import bleu, caption_scores, cider, rouge_l
from fmcv_jax.evaluate.caption_words import caption_words
from fmcv_jax.evaluate.clip_score import clip_score, ref_clip_score
from tests.evaluate import caption_references

STORED = json.loads(caption_references.FILE.read_text())
OTHER_WORDS = (':)', "rock'n'roll", '25¢', 'Boston, Mass.')  # which Stanford's tokenizer has other rules for


def split(name):
  captions, references = caption_references.corpus(*caption_references.CORPORA[name])
  return [text.split() for text in captions], [[text.split() for text in own] for own in references]


@pytest.mark.parametrize('name', caption_references.CORPORA)
def test_scores_are_those_of_pycocoevalcap(name):
  captions, references = split(name)
  expected = STORED['scores'][name]
  np.testing.assert_allclose(cider(captions, references), expected['cider'], rtol=1e-12, atol=1e-12)
  # It adds 1e-15 to matches and 1e-9 to counts, which is 4e-4 of BLEU-4 where there are no matches.
  np.testing.assert_allclose(bleu(captions, references), expected['bleu'], rtol=1e-7, atol=1e-3)
  found = [rouge_l(*pair) for pair in zip(captions, references, strict=True)]
  np.testing.assert_allclose(found, expected['rouge_l'], rtol=1e-12)
  means = caption_scores(captions, references)
  assert means['cider'] == pytest.approx(np.mean(expected['cider']), rel=1e-12, abs=1e-12)
  assert list(means) == ['cider', 'bleu1', 'bleu2', 'bleu3', 'bleu4', 'rouge_l', 'exact_match']


def test_the_installed_scorers_give_the_stored_values():
  pytest.importorskip('pycocoevalcap')
  for name, arguments in caption_references.CORPORA.items():
    found = caption_references.scores(*caption_references.corpus(*arguments))
    for metric, values in STORED['scores'][name].items():
      np.testing.assert_allclose(found[metric], values, rtol=1e-12)


def test_scores_of_captions_that_are_a_reference_are_the_largest():
  references = [
    [text.split()] for text in ('a man rides a brown horse', 'two dogs run on grass', 'the cat sleeps all day')
  ]
  captions = [own[0] for own in references]
  scores = caption_scores(captions, references)
  assert scores == pytest.approx(dict.fromkeys(scores, 1.0) | {'cider': 10.0})


def test_scores_by_hand():
  """'the' occurs once in the references, so one of its three counts: 2 / 3 of words match, and 'the cat' of 2 pairs."""
  captions, references = [['the', 'the', 'cat']], [[['the', 'cat', 'sat'], ['a', 'cat']]]
  assert bleu(captions, references)[:2] == pytest.approx([2 / 3, (2 / 3 * 1 / 2) ** 0.5])
  # The longest common subsequence has 2 words: precision 2 / 3, recall 2 / 3.
  assert rouge_l(captions[0], references[0]) == pytest.approx(2 / 3)
  short = bleu([['a']], [[['a', 'b', 'c']]])
  assert short[0] == pytest.approx(np.exp(1 - 3 / 1))
  assert rouge_l([], [['a']]) == 0
  own = caption_scores([['a', 'cat'], ['cat', 'a']], [[['the', 'cat'], ['a', 'cat']], [['a', 'cat']]])
  assert own['exact_match'] == 0.5


@pytest.mark.parametrize('row', STORED['words'], ids=lambda row: row[0][:40])
def test_words_are_those_of_the_ptb_tokenizer(row):
  caption, expected = row
  equal = ' '.join(caption_words(caption)) == expected
  assert equal != any(text in caption for text in OTHER_WORDS)


def test_clip_scores_by_hand():
  images = np.array([[1.0, 0], [1, 0], [0, 1]])
  captions = np.array([[0.6, 0.8], [-1, 0], [0, 1]])
  assert clip_score(images, captions) == pytest.approx([2.5 * 0.6, 0, 2.5])
  references = [np.array([[0.0, 1], [1, 0]]), np.array([[-1.0, 0]]), np.array([[0.0, -1]])]
  # 1.5 and 0.8: 2 * 1.5 * 0.8 / 2.3; a harmonic mean with 0 is 0, and negative cosines count as 0.
  assert ref_clip_score(images, captions, references) == pytest.approx([2.4 / 2.3, 0, 0])
