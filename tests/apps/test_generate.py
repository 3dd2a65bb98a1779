"""`fmcv generate` and `fmcv synthesize` on untrained models: the quality of the images is not checked here."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from fmcv_jax import __main__ as cli
from fmcv_jax.apps import generate, synthesize
from fmcv_jax.augment.control_maps import Edges
from fmcv_jax.data.images.decode import decode
from fmcv_jax.data.sources.array_record import ArrayRecord
from fmcv_jax.diffusion.options import SamplingOptions
from fmcv_jax.errors import UserError
from fmcv_jax.inference.generator import ImageGenerator
from fmcv_jax.inference.image_files import pad_for_outpainting, read_mask
from tests import runs
from tests.train.tiny import shaken


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return runs.image_folder(tmp_path_factory.mktemp('images'))


@pytest.fixture(scope='module')
def texts(folder, tmp_path_factory):
  return runs.untrained(runs.text_to_image(folder), tmp_path_factory.mktemp('text_to_image'))


@pytest.fixture(scope='module')
def generator(texts):
  opened = ImageGenerator(texts)
  # A new DiT's last layer and gates are zero: its output does not depend on the condition.
  network = opened._model.params['network']
  keys = iter(jax.random.split(jax.random.key(5), 100))
  opened._model.params['network'] = jax.tree.map(
    lambda x: x + 0.05 * jax.random.normal(next(keys), x.shape) if x.ndim > 1 else x, network
  )
  return opened


def test_an_image_depends_only_on_seed_index_and_prompt(generator):
  prompts = ['a red image', 'blue', 'a red image']
  images = generator.generate(prompts, steps=3, seed=1)
  assert images.shape == (3, 16, 16, 3)
  assert images.dtype == np.uint8
  again = generator.generate(prompts[:1], steps=3, seed=1)
  assert np.abs(again[0].astype(int) - images[0]).max() <= 1  # another batch shape, so another order of sums
  assert np.abs(images[0].astype(int) - images[2]).max() > 1
  assert (generator.generate(prompts, steps=3, seed=2) != images).any()
  assert (generator.generate(['blue'], steps=3, seed=1) != again).any()
  assert (generator.generate(prompts[:1], steps=3, seed=1, negative='blue') != again).any()


@pytest.mark.slow
def test_edit_at_low_strength_stays_close_and_fill_keeps_unmasked_pixels(generator):
  images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
  prompts = ['red', 'blue']
  masks = np.zeros((2, 16, 16), bool)
  masks[:, :8] = True
  filled = generator.fill(images, masks, prompts, steps=3)
  np.testing.assert_array_equal(filled[:, 8:], images[:, 8:])
  assert (filled[:, :8] != images[:, :8]).any()
  wide, padded = pad_for_outpainting(images[0], 0.25)
  assert padded.sum() == 256 - 64
  assert wide.shape == (16, 16, 3)

  # Little noise changes little: the result is closer to the autoencoder reconstruction.
  def distance(strength):
    return np.abs(generator.edit(images, prompts, steps=10, strength=strength).astype(int) - least_edited).mean()

  least_edited = generator.edit(images, prompts, steps=1000, strength=0.001, guidance=1.0).astype(int)
  assert distance(0.1) < distance(1.0)


@pytest.mark.slow
def test_interpolation_starts_and_ends_at_its_prompts(generator):
  between = generator.interpolate('red', 'blue', 3, steps=3, seed=1)
  ends = generator.generate(['red'], steps=3, seed=1), generator.generate(['blue'], steps=3, seed=1)
  for got, want in ((between[0], ends[0][0]), (between[2], ends[1][0])):
    assert np.abs(got.astype(int) - want).max() <= 1
  assert (between[1] != between[0]).any()


def test_command_line_writes_a_grid_with_its_settings_as_metadata(texts, tmp_path, capsys):
  prompt = 'red ' * 40
  args = ['generate', prompt, 'blue', '--model', str(texts), '-n', '2', '--steps', '2', '--seed', '7']
  assert cli.main([*args, '--output', str(tmp_path)]) == 0
  assert 'prompt too long, truncated to: red' in capsys.readouterr().out
  assert {path.name for path in tmp_path.iterdir()} == {f'000{i}.png' for i in range(4)} | {'grid.png'}
  grid = Image.open(tmp_path / 'grid.png')
  about = json.loads(grid.text['fmcv'])
  assert (about['prompts'], about['seed'], about['steps']) == ([prompt, 'blue'], 7, 2)
  assert json.loads(Image.open(tmp_path / '0003.png').text['fmcv'])['prompt'] == 'blue'
  before = (tmp_path / '0000.png').read_bytes()
  assert cli.main([*args, '--output', str(tmp_path), '--seed', '8']) == 2
  error = capsys.readouterr().err
  assert f'--output {tmp_path}: has images of an earlier call (0000.png, ...), which would be overwritten' in error
  assert f'--output {tmp_path / "2"}' in error
  assert (tmp_path / '0000.png').read_bytes() == before


@pytest.mark.slow
def test_prompts_are_class_names_or_indices_and_synthesize_writes_a_dataset(folder, tmp_path):
  model = runs.untrained(runs.class_to_image(folder), tmp_path)
  generator = ImageGenerator(model)
  np.testing.assert_array_equal(generator.generate(['b'], steps=2), generator.generate([1], steps=2))
  with pytest.raises(UserError, match="'zebra' is not a class of this model"):
    generator.generate(['zebra'], steps=2)
  to = tmp_path / 'made'
  assert cli.main(['synthesize', '--model', str(model), '--to', str(to), '-n', '2', '--steps', '2']) == 0
  made = ArrayRecord(str(to))
  assert [made[i]['label'] for i in range(len(made))] == [0, 1, 2, 0, 1, 2]
  assert made.names == ('a', 'b', 'c')
  assert made[1]['text'] == 'b'


@pytest.mark.parametrize(
  ('prompts', 'options', 'message'),
  [
    (b'red\n', ['--steps', '0'], '--steps: 0 is not at least 1'),
    (b'\n \n', [], 'prompts.txt: has no prompt'),
    (b'\xff\xfe', [], 'prompts.txt: is not text in UTF-8'),
    (None, [], 'its data has no names to sample; give a file of --prompts'),
  ],
)
def test_a_dataset_that_cannot_be_generated_is_not_started(texts, tmp_path, prompts, options, message, capsys):
  if prompts is not None:
    (tmp_path / 'prompts.txt').write_bytes(prompts)
    options = [*options, '--prompts', str(tmp_path / 'prompts.txt')]
  (tmp_path / 'to').mkdir()
  assert cli.main(['synthesize', '--model', str(texts), '--to', str(tmp_path / 'to' / 'made'), *options]) == 2
  assert message in capsys.readouterr().err
  assert not list((tmp_path / 'to').iterdir())


def opened(model):
  """Opens a model and moves every parameter away from its initial value."""
  generator = ImageGenerator(model)
  for tree in (generator._model.params, generator._model.extra):
    tree.update(shaken(tree))
  return generator


@pytest.mark.slow
def test_inpainting_depends_on_unmasked_pixels_and_not_on_masked_ones(folder, tmp_path):
  generator = opened(runs.untrained(runs.inpainting(folder), tmp_path))
  images = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), np.uint8)
  mask = np.zeros((1, 16, 16), bool)
  mask[:, 4:12, 4:12] = True
  inside, outside = (np.where(where[..., None], 0, images).astype(np.uint8) for where in (mask, ~mask))
  filled, same, other = (generator.fill(x, mask, [''], steps=2) for x in (images, inside, outside))
  np.testing.assert_array_equal(filled[~mask], images[~mask])
  np.testing.assert_array_equal(filled[mask], same[mask])
  assert (filled[mask] != other[mask]).any()
  assert generator.generate([''], steps=2).shape == (1, 16, 16, 3)
  assert (
    generator.edit(images, [''], strength=0.1, steps=10) != generator.edit(inside, [''], strength=0.1, steps=10)
  ).any()


@pytest.mark.slow
def test_a_model_with_a_controlnet_follows_the_edges_of_the_control_image(folder, tmp_path, capsys):
  model = runs.untrained(runs.controlnet(folder), tmp_path)
  args = ['generate', 'a', '--model', str(model), '-n', '1', '--steps', '2', '--output', str(tmp_path / 'out')]
  assert cli.main(args) == 2
  assert f'--control: {model} needs a control image' in capsys.readouterr().err
  file = str(folder / 'a' / '0.png')
  assert cli.main([*args, '--control', file, '--control-scale', '0.5']) == 0
  about = json.loads(Image.open(tmp_path / 'out' / 'grid.png').text['fmcv'])
  assert (about['control'], about['control_scale'], about['control_preprocessed']) == (file, 0.5, False)

  generator = opened(model)
  shapes = np.zeros((2, 16, 16, 3), np.uint8)
  shapes[0, 4:12, 4:12] = 255
  shapes[1, :, 8:] = 255
  edges = np.round(255 * np.asarray(Edges()(shapes / np.float32(255)))).astype(np.uint8)
  plain, square, half, drawn = (
    generator.generate(['a'], steps=2, **options)[0].astype(int)
    for options in (
      dict(control=shapes[:1], control_scale=0.0),
      dict(control=shapes[:1]),
      dict(control=shapes[1:]),
      dict(control=edges[:1], control_preprocessed=True),
    )
  )
  np.testing.assert_array_equal(drawn, square)
  assert np.abs(square - plain).max() > 1
  assert np.abs(square - half).max() > 1


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (['--steps', '0'], '--steps: 0 is not at least 1'),
    (['--image', 'IMAGE', '--mask', 'SMALL'], 'small.png: 12 x 10 pixels, but the image has 20 x 20'),
    (['--image', 'IMAGE', '--mask', 'IMAGE', '--expand', '0.2'], '--mask and --expand: give one of them'),
    (['--output', 'TEXT'], 'text.png: is a file; give a folder'),
    (['--image', 'IMAGE', '--expand', '0'], '--expand: 0.0 is not between 0 and 0.5'),
    (['--image', 'IMAGE', '--expand', '0.5'], '--expand: 0.5 is not between 0 and 0.5'),
    (['--image', 'IMAGE', '--strength', '0'], '--strength: 0.0 is not above 0 and at most 1'),
    (['--image', 'TEXT'], 'no image: 8 bytes'),
    (['--control', 'IMAGE'], 'has no ControlNet'),
    (['--control', 'TEXT'], 'no image: 8 bytes'),
    (['--image', 'IMAGE', '--mask', 'TEXT'], 'no image: 8 bytes'),
    (['--seed', '4294967296'], '--seed: 4294967296 is not from 0 to 2147483647'),
    (['--solver', 'ddpm_learned'], '--solver: this network has no learned variance'),
    (['--interval', '800', '200'], '--interval: 800.0 to 200.0'),
    (['--rescale', '2'], '--rescale: 2.0 is not from 0 to 1'),
    (['--negative', 'blue', '--guidance', '1'], '--negative: needs'),
    (['--batch', '0'], '--batch: 0 images at once; give at least 1'),
    (['--guidance', 'nan'], '--guidance: nan is not finite'),
    (['--strength', '0.5'], '--strength: needs an --image'),
    (['--image', 'IMAGE', '--expand', '0.2', '--strength', '0.5'], '--strength: needs an --image, and no --mask'),
    (['--control-preprocessed'], '--control-preprocessed and --control-scale: need a --control'),
    (['--output', 'BELOW'], 'text.png/below: cannot be written (Not a directory)'),
    (['--config.mesh.fsdp=3'], 'config.mesh: data=-1 x fsdp=3 needs a multiple of 3 devices'),
  ],
)
def test_bad_requests_are_one_line_errors(texts, folder, tmp_path, options, message, capsys):
  (tmp_path / 'text.png').write_text('no image')
  Image.new('RGB', (12, 10)).save(tmp_path / 'small.png')
  files = {'IMAGE': str(folder / 'a' / '0.png'), 'TEXT': str(tmp_path / 'text.png')}
  files |= {'SMALL': str(tmp_path / 'small.png'), 'BELOW': str(tmp_path / 'text.png' / 'below')}
  options = [files.get(option, option) for option in options]
  args = ['generate', 'red', '--model', str(texts), '--output', str(tmp_path / 'out'), *options]
  assert cli.main(args) == 2
  error = capsys.readouterr().err
  assert message in error
  assert error.count('\n') == 1
  assert not (tmp_path / 'out').exists()


def test_bad_requests_are_refused_before_anything_is_generated(generator):
  image = np.zeros((1, 16, 16, 3), np.uint8)
  for call, message in [
    (lambda: generator.generate(['red'], solver='eular'), "did you mean 'euler'"),
    (lambda: generator.edit(image, ['red'], strength=0.0), 'strength: 0.0 is not above 0'),
    (lambda: generator.generate('red'), "'red' is one text; give a list"),
    (lambda: generator.edit(image[:, :8], ['red']), r'images: \[1, 8, 16, 3\] of uint8, but \[1, 16, 16, 3\] of uint8'),
    (lambda: generator.edit(image / 255, ['red']), r'images: \[1, 16, 16, 3\] of float64, but'),
    (
      lambda: generator.fill(image, np.zeros((1, 8, 8), bool), ['red']),
      r'masks: \[1, 8, 8\] of bool, but \[1, 16, 16\] of bool',
    ),
    (lambda: generator.fill(image, np.zeros((1, 16, 16), np.uint8), ['red']), 'of uint8, but'),
  ]:
    with pytest.raises(UserError, match=message):
      call()
  for call, message in [
    (
      lambda: generator.generate(['red'], guidanse=2.0),
      "generate: unexpected option 'guidanse'; did you mean 'guidance'",
    ),
    (
      lambda: generator.edit(image, ['red'], progresz=print),
      "edit: unexpected option 'progresz'; did you mean 'progress'",
    ),
    (lambda: generator.generate(['red'], strength=0.5), "generate: unexpected option 'strength'; it is one of edit"),
  ]:
    with pytest.raises(TypeError, match=message):
      call()
  for options, message in [
    (dict(count=0), '-n: 0 images'),
    (dict(mask='x.png'), '--mask and --expand: need an --image'),
    (dict(interpolate=True), '--interpolate: goes from one prompt to a second'),
    (dict(image='missing.png'), 'missing.png: no such image file'),
  ]:
    with pytest.raises(UserError, match=message):
      generate.run(['red'], str(generator.workdir), **options)


def test_a_mask_is_cropped_like_its_image(tmp_path):
  wide = np.zeros((40, 100, 3), np.uint8)
  Image.fromarray(wide).save(tmp_path / 'image.png')
  wide[:, 50:] = 255  # the right half; the center crop keeps its right half
  Image.fromarray(wide).save(tmp_path / 'mask.png')
  mask = read_mask(str(tmp_path / 'mask.png'), str(tmp_path / 'image.png'), 16)
  np.testing.assert_array_equal(mask, np.broadcast_to(np.arange(16) >= 8, (16, 16)))


def test_guidance_may_differ_for_each_image(generator):
  prompts = ['red'] * 3
  each = generator.generate(prompts, steps=2, guidance=[1.0, 4.0, 8.0])
  for index, guidance in enumerate([1.0, 4.0, 8.0]):
    same = generator.generate(prompts, steps=2, guidance=guidance)[index]
    assert np.abs(each[index].astype(int) - same).max() <= 1
  with pytest.raises(UserError, match='guidance: 2 numbers for 3 images'):
    generator.generate(prompts, guidance=[1.0, 2.0])


def test_an_unconditional_model_takes_no_prompt(folder, tmp_path, capsys):
  model = runs.untrained(runs.inpainting(folder), tmp_path)
  assert cli.main(['generate', 'red', '--model', str(model)]) == 2
  assert f'{model}: is not conditioned on prompts; give none' in capsys.readouterr().err


@pytest.mark.slow
def test_the_same_seed_generates_the_same_images_on_any_mesh(folder, tmp_path, monkeypatch):
  model = runs.untrained(runs.text_to_image(folder), tmp_path / 'model', changed=shaken)
  (tmp_path / 'prompts.txt').write_text('red\nblue\na green image\n')
  options = SamplingOptions(seed=3, steps=4, solver='euler_ancestral')
  devices = jax.devices()

  def on(*overrides, count=8):
    monkeypatch.setattr(jax, 'devices', lambda *args: devices[:count])
    to = tmp_path / f'{count}{"".join(overrides)}'
    prompts = str(tmp_path / 'prompts.txt')
    synthesize.run(str(model), to, options, per_prompt=2, prompts=prompts, overrides=overrides)
    made = ArrayRecord(str(to))
    images = ImageGenerator(model, overrides=overrides).generate(['red', 'blue'] * 3, options)
    return images, np.stack([decode(made[i]['image']) for i in range(len(made))])

  one, made = on(count=1)
  assert np.abs(one[0].astype(int) - one[2]).max() > 8
  for overrides in ((), ('mesh.data=1', 'mesh.fsdp=8'), ('mesh.tensor=2',), ('mesh.fsdp=2', 'mesh.tensor=2')):
    # Rounding to 8 bits may differ by one.
    for got, want in zip(on(*overrides), (one, made), strict=True):
      assert np.abs(got.astype(int) - want).max() <= 1, overrides


def test_a_model_that_does_not_generate_is_refused(folder, tmp_path, capsys):
  model = runs.untrained(runs.classification(folder), tmp_path)
  assert cli.main(['generate', 'red', '--model', str(model)]) == 2
  assert 'does not generate images' in capsys.readouterr().err
