"""`fmcv generate` and `fmcv synthesize` on models that were hardly trained: what is painted is not looked at here."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from fmcv_jax import __main__ as door
from fmcv_jax.apps import generate
from fmcv_jax.apps.generate import Painter, expanded
from fmcv_jax.data.array_record import ArrayRecord
from fmcv_jax.data.controls import Edges
from fmcv_jax.errors import UserError
from tests import runs


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return runs.image_folder(tmp_path_factory.mktemp('images'))


@pytest.fixture(scope='module')
def texts(folder, tmp_path_factory):
  return runs.untrained(runs.painter(folder), tmp_path_factory.mktemp('painter'))


@pytest.fixture(scope='module')
def painter(texts):
  opened = Painter(texts)
  # A new DiT's last layer and gates are zero: it paints the same whatever it is told.
  network = opened._subject.params['network']
  keys = iter(jax.random.split(jax.random.key(5), 100))
  opened._subject.params['network'] = jax.tree.map(
    lambda x: x + 0.05 * jax.random.normal(next(keys), x.shape) if x.ndim > 1 else x, network
  )
  return opened


def test_a_picture_depends_on_seed_number_and_prompt_alone(painter):
  prompts = ['a red picture', 'blue', 'a red picture']
  pictures = painter.generate(prompts, steps=3, seed=1)
  assert pictures.shape == (3, 16, 16, 3)
  assert pictures.dtype == np.uint8
  again = painter.generate(prompts[:1], steps=3, seed=1)
  assert np.abs(again[0].astype(int) - pictures[0]).max() <= 1  # a shape of its own, so another order of sums
  assert np.abs(pictures[0].astype(int) - pictures[2]).max() > 1
  assert (painter.generate(prompts, steps=3, seed=2) != pictures).any()
  assert (painter.generate(['blue'], steps=3, seed=1) != again).any()
  assert (painter.generate(prompts[:1], steps=3, seed=1, negative='blue') != again).any()


@pytest.mark.slow
def test_editing_keeps_what_is_not_lost_and_filling_what_is_not_masked(painter):
  images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
  prompts = ['red', 'blue']
  masks = np.zeros((2, 16, 16), bool)
  masks[:, :8] = True
  filled = painter.fill(images, masks, prompts, steps=3)
  np.testing.assert_array_equal(filled[:, 8:], images[:, 8:])
  assert (filled[:, :8] != images[:, :8]).any()
  wide, hole = expanded(images[0], 0.25)
  assert hole.sum() == 256 - 64
  assert wide.shape == (16, 16, 3)

  # Of little noise little comes: nearer to what the autoencoder itself gives back.
  def distance(strength):
    return np.abs(painter.edit(images, prompts, steps=10, strength=strength).astype(int) - painted).mean()

  painted = painter.edit(images, prompts, steps=1000, strength=0.001, guidance=1.0).astype(int)
  assert distance(0.1) < distance(1.0)


@pytest.mark.slow
def test_interpolation_begins_and_ends_at_its_texts(painter):
  between = painter.interpolate('red', 'blue', 3, steps=3, seed=1)
  ends = painter.generate(['red'], steps=3, seed=1), painter.generate(['blue'], steps=3, seed=1)
  for got, want in ((between[0], ends[0][0]), (between[2], ends[1][0])):
    assert np.abs(got.astype(int) - want).max() <= 1
  assert (between[1] != between[0]).any()


def test_command_line_writes_a_grid_that_says_how_it_was_made(texts, tmp_path, capsys):
  prompt = 'red ' * 40
  args = ['generate', prompt, 'blue', '--model', str(texts), '-n', '2', '--steps', '2', '--seed', '7']
  assert door.main([*args, '--output', str(tmp_path)]) == 0
  assert 'prompt too long, cut to: red' in capsys.readouterr().out
  assert {path.name for path in tmp_path.iterdir()} == {f'000{i}.png' for i in range(4)} | {'grid.png'}
  grid = Image.open(tmp_path / 'grid.png')
  about = json.loads(grid.text['fmcv'])
  assert (about['prompts'], about['seed'], about['steps']) == ([prompt, 'blue'], 7, 2)
  assert json.loads(Image.open(tmp_path / '0003.png').text['fmcv'])['prompt'] == 'blue'


@pytest.mark.slow
def test_classes_are_named_or_numbered_and_become_a_data_set(folder, tmp_path):
  model = runs.untrained(runs.class_painter(folder), tmp_path)
  painter = Painter(model)
  np.testing.assert_array_equal(painter.generate(['b'], steps=2), painter.generate([1], steps=2))
  with pytest.raises(UserError, match="'zebra' is no class of this model"):
    painter.generate(['zebra'], steps=2)
  to = tmp_path / 'made'
  assert door.main(['synthesize', '--model', str(model), '--to', str(to), '-n', '2', '--steps', '2']) == 0
  made = ArrayRecord(str(to))
  assert [made[i]['label'] for i in range(len(made))] == [0, 1, 2, 0, 1, 2]
  assert made.names == ('a', 'b', 'c')
  assert made[1]['text'] == 'b'


def shaken(painter):
  """With every parameter away from its initial value."""
  keys = iter(jax.random.split(jax.random.key(5), 1000))
  for tree in (painter._subject.params, painter._subject.extra):
    tree.update(jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), tree))
  return painter


@pytest.mark.slow
def test_a_model_that_fills_sees_what_is_around_the_hole_and_not_what_was_in_it(folder, tmp_path):
  painter = shaken(Painter(runs.untrained(runs.filler(folder), tmp_path)))
  images = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), np.uint8)
  mask = np.zeros((1, 16, 16), bool)
  mask[:, 4:12, 4:12] = True
  inside, outside = (np.where(where[..., None], 0, images).astype(np.uint8) for where in (mask, ~mask))
  filled, same, other = (painter.fill(x, mask, [''], steps=2) for x in (images, inside, outside))
  np.testing.assert_array_equal(filled[~mask], images[~mask])
  np.testing.assert_array_equal(filled[mask], same[mask])
  assert (filled[mask] != other[mask]).any()
  assert painter.generate([''], steps=2).shape == (1, 16, 16, 3)
  assert (
    painter.edit(images, [''], strength=0.1, steps=10) != painter.edit(inside, [''], strength=0.1, steps=10)
  ).any()


@pytest.mark.slow
def test_a_model_with_a_controlnet_follows_the_edges_of_a_picture(folder, tmp_path, capsys):
  model = runs.untrained(runs.follower(folder), tmp_path)
  args = ['generate', 'a', '--model', str(model), '-n', '1', '--steps', '2', '--output', str(tmp_path / 'out')]
  assert door.main(args) == 2
  assert f'--control: {model} follows a picture; give one' in capsys.readouterr().err
  file = str(folder / 'a' / '0.png')
  assert door.main([*args, '--control', file, '--control-scale', '0.5']) == 0
  about = json.loads(Image.open(tmp_path / 'out' / 'grid.png').text['fmcv'])
  assert (about['control'], about['control_scale'], about['drawn']) == (file, 0.5, False)

  painter = shaken(Painter(model))
  shapes = np.zeros((2, 16, 16, 3), np.uint8)
  shapes[0, 4:12, 4:12] = 255
  shapes[1, :, 8:] = 255
  edges = np.round(255 * np.asarray(Edges()(shapes / np.float32(255)))).astype(np.uint8)
  plain, square, half, drawn = (
    painter.generate(['a'], steps=2, **options)[0].astype(int)
    for options in (
      dict(control=shapes[:1], control_scale=0.0),
      dict(control=shapes[:1]),
      dict(control=shapes[1:]),
      dict(control=edges[:1], drawn=True),
    )
  )
  np.testing.assert_array_equal(drawn, square)
  assert np.abs(square - plain).max() > 1
  assert np.abs(square - half).max() > 1


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (['--steps', '0'], '--steps: 0 is not between 1 and 1000'),
    (['--image', 'IMAGE', '--mask', 'IMAGE'], 'IMAGE: [20, 20] pixels, but the pictures of this model have [16, 16]'),
    (['--image', 'TEXT'], 'no image: 8 bytes'),
    (['--control', 'IMAGE'], 'has no ControlNet that could follow a picture'),
    (['--control', 'TEXT'], 'no image: 8 bytes'),
    (['--image', 'IMAGE', '--mask', 'TEXT'], 'no image: 8 bytes'),
    (['--seed', '4294967296'], '--seed: 4294967296 is not from 0 to 2147483647'),
    (['--solver', 'ddpm_learned'], '--solver.variance: this network has not learned any'),
  ],
)
def test_bad_requests_end_in_one_line(texts, folder, tmp_path, options, message, capsys):
  (tmp_path / 'text.png').write_text('no image')
  files = {'IMAGE': str(folder / 'a' / '0.png'), 'TEXT': str(tmp_path / 'text.png')}
  options = [files.get(option, option) for option in options]
  args = ['generate', 'red', '--model', str(texts), '--output', str(tmp_path / 'out'), *options]
  assert door.main(args) == 2
  error = capsys.readouterr().err
  assert message.replace('IMAGE', files['IMAGE']) in error
  assert error.count('\n') == 1
  assert not (tmp_path / 'out').exists()


def test_bad_requests_are_refused_before_anything_is_painted(painter):
  image = np.zeros((1, 16, 16, 3), np.uint8)
  for call, message in [
    (lambda: painter.generate(['red'], solver='eular'), "did you mean 'euler'"),
    (lambda: painter.edit(image, ['red'], strength=0.0), '--strength: 0.0 is not above 0'),
    (lambda: painter.edit(image[:, :8], ['red']), 'but 1 of 16 are needed'),
    (lambda: painter.fill(image, np.zeros((1, 8, 8), bool), ['red']), r'--mask: \[8, 8\] pixels'),
  ]:
    with pytest.raises(UserError, match=message):
      call()
  for options, message in [
    (dict(count=0), '-n: 0 pictures'),
    (dict(mask='x.png'), '--mask and --expand: need an --image'),
    (dict(interpolate=True), '--interpolate: goes from one prompt to a second'),
    (dict(image='missing.png'), 'missing.png: no such image file'),
  ]:
    with pytest.raises(UserError, match=message):
      generate.run(['red'], str(painter.workdir), **options)


def test_a_model_of_another_kind_is_refused(folder, tmp_path, capsys):
  model = runs.untrained(runs.classification(folder), tmp_path)
  assert door.main(['generate', 'red', '--model', str(model)]) == 2
  assert 'its objective makes no pictures' in capsys.readouterr().err
