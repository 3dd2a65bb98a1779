import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmcv_jax.config import build
from fmcv_jax.data import tokenizer_files
from fmcv_jax.data import tokenizers as tokenizers_file
from fmcv_jax.data.sources.base import Source
from fmcv_jax.data.tokenizers import Bpe, ClipBpe, SentencePiece, Tokenizer, TokenizerJson
from fmcv_jax.errors import UserError
from fmcv_jax.registry import KINDS
from tests.data.counting import Counting

ODD = [
  '',
  ' ',
  '😀 مرحبا بالعالم',
  '中文',
  'x' * 1000,
  'a ' * 300,
  '\ud83d half',
  '<end>',
  '<|endoftext|>',
  '\0',
  'é\n\té',
]
BPE = Bpe(600, 12, corpus=Counting(100))
ALL = [ClipBpe(12), BPE]


@pytest.mark.parametrize('tokenizer', ALL)
def test_the_end_is_the_largest_id_and_occurs_once_whatever_the_text(tokenizer):
  tokens = tokenizer(ODD)
  assert tokens.shape == (len(ODD), 12)
  assert tokens.dtype == np.int32
  assert tokens.max() == tokenizer.vocab_size - 1
  assert ((tokens == tokenizer.vocab_size - 1).sum(1) == 1).all()
  ends = tokens.argmax(1)
  assert all((row[end + 1 :] == 0).all() and (row[:end] > 0).all() for row, end in zip(tokens, ends))
  assert len(set(tokens[:, 0])) == 1


@pytest.mark.parametrize('tokenizer', ALL)
def test_a_text_too_long_is_cut_before_its_end(tokenizer):
  (full,) = tokenizer(['number record 8 ' * 20])
  assert (full > 0).all()
  assert full[-1] == tokenizer.vocab_size - 1


@pytest.mark.parametrize('tokenizer', ALL)
def test_an_empty_text_is_start_and_end(tokenizer):
  padding = [tokenizer.pad_id] * 10
  np.testing.assert_array_equal(tokenizer(['']), [[tokenizer.start_id, tokenizer.end_id, *padding]])
  assert tokenizer([]).shape == (0, 12)


@pytest.mark.parametrize('tokenizer', ALL)
def test_case_and_white_space_do_not_matter(tokenizer):
  first, second = tokenizer(['A  Red\n Apple ', 'a red apple'])
  np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize('tokenizer', ALL)
def test_texts_come_back(tokenizer):
  texts = ['a record of', 'é 中文', '']
  assert tokenizer.decode(tokenizer(texts)) == texts


@given(st.text(max_size=30))
@settings(max_examples=60, deadline=None)
def test_any_text_becomes_ids_within_the_vocabulary(text):
  for tokenizer in ALL:
    (row,) = tokenizer([text])
    assert row.min() >= 0
    assert row.argmax() >= 1
    assert row.max() == tokenizer.vocab_size - 1


def test_the_published_ids_of_clip():
  (row,) = ClipBpe()(['a photo of a cat'])
  assert row.shape == (77,)
  assert row[:8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 0]
  assert ClipBpe().vocab_size == 49408


def test_html_entities_are_resolved_as_in_the_original():
  np.testing.assert_array_equal(*ClipBpe()(['salt &amp;amp; pepper', 'salt & pepper']))


def test_training_is_the_same_in_another_process():
  code = (
    'from fmcv_jax.data.tokenizers import Bpe; from tests.data.counting import Counting; '
    'import hashlib; print(hashlib.sha256(Bpe(600, 12, corpus=Counting(100))._json.encode()).hexdigest())'
  )
  run = [subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True) for _ in range(2)]
  import hashlib

  assert {r.stdout.strip() for r in run} == {hashlib.sha256(BPE._json.encode()).hexdigest()}


def test_frequent_words_become_single_ids_and_unknown_ones_bytes():
  record, unknown = BPE(['record', 'zyx'])
  assert np.count_nonzero(record) == 3
  assert np.count_nonzero(unknown) == 6  # start, space, three bytes, end


def test_a_corpus_too_small_leaves_ids_over_but_keeps_the_bound():
  small, large = Bpe(300, 9, corpus=Counting(3)), Bpe(5000, 9, corpus=Counting(3))
  assert small(['record']).max() == 299
  assert large(['record']).max() == 4999
  assert sorted(set(large(['record', 'é']).ravel()))[-2] < 300


def test_a_saved_vocabulary_reopens_alike(tmp_path):
  BPE.save(str(tmp_path / 'vocabulary.json'))
  again = Bpe(600, 12, file=str(tmp_path / 'vocabulary.json'))
  np.testing.assert_array_equal(again(ODD), BPE(ODD))
  assert [p.name for p in tmp_path.iterdir()] == ['vocabulary.json']


def test_a_trained_tokenizer_is_not_trained_again_in_another_process(monkeypatch):
  copy = pickle.loads(pickle.dumps(BPE))
  monkeypatch.setattr(tokenizers_file, 'train_bpe', None)
  np.testing.assert_array_equal(copy(ODD), BPE(ODD))


def test_case_is_kept_on_demand():
  tokenizer = Bpe(300, 9, corpus=Counting(3), lowercase=False)
  assert (tokenizer(['A']) != tokenizer(['a'])).any()
  assert tokenizer.decode(tokenizer(['Ab'])) == ['Ab']


def test_unreadable_records_of_the_corpus_are_passed_over():
  np.testing.assert_array_equal(
    Bpe(300, 9, corpus=Counting(20, bad=(19,)))(['record 3']), Bpe(300, 9, corpus=Counting(19))(['record 3'])
  )


def test_wrong_files_are_one_clear_line(tmp_path):
  with pytest.raises(UserError, match='no file'):
    Bpe(300, 9, file=str(tmp_path / 'none.json'))([''])
  (tmp_path / 'bad.json').write_text('{}')
  with pytest.raises(UserError, match='is not a valid tokenizer file'):
    Bpe(300, 9, file=str(tmp_path / 'bad.json'))([''])
  BPE.save(str(tmp_path / 'good.json'))
  with pytest.raises(UserError, match='has 600 ids, but vocab_size is 500'):
    Bpe(500, 9, file=str(tmp_path / 'good.json'))([''])


def test_a_corpus_without_texts_is_one_clear_line():
  with pytest.raises(UserError, match='Counting has no texts'):
    Bpe(300, 9, corpus=Counting(2, bad=(0, 1)))([''])


@pytest.mark.parametrize(
  ('spec', 'message'),
  [
    ({'name': 'bpe', 'vocab_size': 258, 'length': 9}, 'vocab_size: expected at least 259'),
    ({'name': 'bpe', 'vocab_size': 300, 'length': 2}, 'length: expected at least 3'),
    ({'name': 'bpe', 'vocab_size': 300, 'length': 9}, 'exactly one of corpus and file'),
    (
      {'name': 'bpe', 'vocab_size': 300, 'length': 9, 'file': 'x', 'corpus': {'name': 'c', 'records': 2}},
      'exactly one',
    ),
    ({'name': 'clip_bpe', 'length': 1}, 'length: expected at least 3'),
  ],
)
def test_a_wrong_field_is_one_line_with_its_path(spec, message):
  with pytest.raises(UserError, match=f'^config.tokenizer: .*{message}'):
    build(Tokenizer, spec, {Tokenizer: KINDS[Tokenizer], Source: {'c': Counting}}, 'config.tokenizer')


def odd_texts(count):
  """Texts of many scripts, emoji, combining marks, controls and lengths, each from its own seed.

  Without special tokens spelt out, which transformers takes for the tokens themselves, and we for text.
  """
  alphabets = [
    'abc XYZ .,!?',
    'äéîõüßŁ',
    'абвгд',
    'مرحبا',
    'עברית',
    'हिन्दी',
    '日本語漢字',
    '한국어',
    '👩🏽‍🚀🏳️‍🌈❤️🔥',
    'é̂̈ ạ̈',
    '\t\n 　',
    '0123 €£½²',
    '\'"()[]{}<>&#;',
  ]
  texts = ['', ' ', 'a', '▁', '<end>', 'word ' * 500, 'e\u0301', '\u200b\u200d\ufeff']
  for seed in range(count - len(texts)):
    rng = np.random.default_rng(seed)
    parts = (alphabets[i] for i in rng.integers(len(alphabets), size=rng.integers(1, 5)))
    texts.append(''.join(''.join(rng.choice(list(part), rng.integers(1, 9))) for part in parts))
  return texts


def train_sentencepiece(prefix, texts, **options):
  """Writes PREFIX.model, a vocabulary of 400 pieces with SigLIP's end and unknown ids."""
  sentencepiece = pytest.importorskip('sentencepiece', reason='pip install fmcv-jax[parity]')
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter([text.replace('\n', ' ') for text in texts]),
    model_prefix=str(prefix),
    vocab_size=400,
    pad_id=-1,
    bos_id=-1,
    eos_id=1,
    unk_id=2,
    hard_vocab_limit=False,
    minloglevel=2,
    **options,
  )


def test_sentencepiece_gives_the_ids_of_transformers_siglip(tmp_path):
  transformers = pytest.importorskip('transformers', reason='pip install fmcv-jax[parity]')
  texts = odd_texts(1000)
  train_sentencepiece(tmp_path / 'spiece', texts, character_coverage=0.99, control_symbols=['<pad>'])
  theirs = transformers.SiglipTokenizer(str(tmp_path / 'spiece.model'))
  expected = theirs(texts, padding='max_length', truncation=True, max_length=64, return_tensors='np')['input_ids']
  ours = SentencePiece(str(tmp_path / 'spiece.model'))
  ids = ours(texts)
  # transformers puts a token before each text, which settles ties of equally likely pieces the other way round.
  np.testing.assert_array_equal(np.sort(ids), np.sort(expected))
  assert (ids != expected).any(axis=1).sum() <= 10
  assert ours.decode(ours(['CA,\t a!'])) == ['ca a']
  assert (ours.pad_id, ours.start_id, ours.end_id) == (theirs.pad_token_id, None, theirs.eos_token_id)


def test_a_tokenizer_json_gives_the_ids_of_transformers(tmp_path):
  transformers = pytest.importorskip('transformers', reason='pip install fmcv-jax[parity]')
  import tokenizers

  texts = odd_texts(1000)
  trained = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, fuse_unk=True, unk_token='<unk>'))
  trained.pre_tokenizer = tokenizers.pre_tokenizers.Split(' ', 'merged_with_previous')
  trained.normalizer = tokenizers.normalizers.Replace(' ', '▁')
  special = ['<pad>', '<eos>', '<bos>', '<unk>']
  trained.train_from_iterator(
    texts, tokenizers.trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
  )
  trained.save(str(tmp_path / 'tokenizer.json'))
  theirs = transformers.PreTrainedTokenizerFast(
    tokenizer_file=str(tmp_path / 'tokenizer.json'), pad_token='<pad>', eos_token='<eos>', padding_side='right'
  )
  cut = [theirs(text.lower(), truncation=True, max_length=63)['input_ids'] for text in texts]
  expected = np.array([[*ids, 1, *[0] * (63 - len(ids))] for ids in cut])
  ours = TokenizerJson(str(tmp_path / 'tokenizer.json'), end='<eos>', lowercase=True)
  np.testing.assert_array_equal(ours(texts), expected)
  assert (ours.pad_id, ours.start_id, ours.end_id) == (theirs.pad_token_id, None, theirs.eos_token_id)


def test_the_start_and_end_ids_of_a_tokenizer_json_are_those_of_its_own_rules(tmp_path):
  tokenizers = pytest.importorskip('tokenizers')

  vocabulary = {'[PAD]': 0, '[CLS]': 1, '[SEP]': 2, '[UNK]': 3, 'a': 4}
  file, words = str(tmp_path / 'tokenizer.json'), tokenizers.models.WordLevel(vocabulary, unk_token='[UNK]')
  for template, expected in [('[CLS] $A [SEP]', (1, 2)), ('$A [SEP]', (None, 2)), ('[CLS] $A', (1, None))]:
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
      single=template, special_tokens=[(token, vocabulary[token]) for token in ('[CLS]', '[SEP]') if token in template]
    )
    tokenizer_files.open_tokenizer_json.cache_clear()
    tokenizer.save(file)
    ours = TokenizerJson(file, padding='[PAD]')
    assert (ours.pad_id, ours.start_id, ours.end_id) == (0, *expected)


@pytest.mark.parametrize('kind', [SentencePiece, TokenizerJson])
def test_a_file_that_is_missing_or_another_is_one_line(tmp_path, kind):
  with pytest.raises(UserError, match='no file'):
    kind(str(tmp_path / 'none'))(['a'])
  (tmp_path / 'other').write_text('{"model": 3}')
  with pytest.raises(UserError, match=r'is not a|pip install sentencepiece'):
    kind(str(tmp_path / 'other'))(['a'])
