"""`fmcv export --format fmcv`, and the folders that it writes."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from fmcv_jax.__main__ import main
from fmcv_jax.apps.package import package
from fmcv_jax.errors import UserError
from fmcv_jax.inference.generator import ImageGenerator
from fmcv_jax.inference.model import Model
from fmcv_jax.pretrained import packaged
from fmcv_jax.run import Run
from tests.runs import classification, contrastive, image_folder, language, text_to_image, untrained
from tests.train.tiny import shaken


@pytest.fixture(scope='module')
def images(tmp_path_factory):
  return image_folder(tmp_path_factory.mktemp('images'))


@pytest.fixture(scope='module')
def workdir(images, tmp_path_factory):
  return untrained(contrastive(images), tmp_path_factory.mktemp('package') / 'run')


def test_an_exported_model_gives_what_its_workdir_gives_up_to_rounding(workdir, tmp_path, capsys):
  assert main(['export', str(workdir), '--format', 'fmcv', '--to', str(tmp_path / 'small')]) == 0
  images = list(np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8))
  small, whole = Model(tmp_path / 'small'), Model(workdir)
  texts = ['a red image', 'blue']
  # A bfloat16 has 8 bits: every weight is within 2**-9 of its size.
  np.testing.assert_allclose(small.encode_image(images), whole.encode_image(images), atol=0.01)
  np.testing.assert_allclose(small.encode_text(texts), whole.encode_text(texts), atol=0.01)


def test_matrices_are_the_nearest_bfloat16_and_vectors_are_exact(workdir, tmp_path):
  package(workdir, tmp_path / 'small')
  subject, _ = Run.reopen(workdir).restored_model()
  arrays = safetensors.numpy.load_file(tmp_path / 'small' / packaged.PARAMS)
  block = subject.params['image']['blocks']['mlp']['up']
  assert arrays['params/image/blocks/mlp/up/kernel'].dtype == ml_dtypes.bfloat16
  np.testing.assert_allclose(
    arrays['params/image/blocks/mlp/up/kernel'].astype(np.float32), block['kernel'], rtol=2**-8, atol=1e-12
  )
  np.testing.assert_array_equal(arrays['params/temperature'], subject.params['temperature'])


def test_an_exported_generator_keeps_its_frozen_networks(images, tmp_path):
  whole = untrained(text_to_image(images), tmp_path / 'run')
  package(whole, tmp_path / 'small')
  names = set(safetensors.numpy.load_file(tmp_path / 'small' / packaged.PARAMS))
  assert {name.split('/')[1] for name in names} == {'network', 'text', 'autoencoder'}
  assert not (tmp_path / 'small/classes.json').exists()  # it is conditioned on texts
  a, b = (ImageGenerator(folder, batch=8).generate(['red'] * 2, steps=2) for folder in (tmp_path / 'small', whole))
  np.testing.assert_allclose(a.astype(int), b.astype(int), atol=3)


def test_an_exported_classifier_names_its_classes_without_the_training_data(tmp_path):
  images = image_folder(tmp_path / 'images')
  package(untrained(classification(images), tmp_path / 'run', changed=shaken), tmp_path / 'small')
  image = np.zeros((16, 16, 3), np.uint8)
  expected = Model(tmp_path / 'run').predict(image, count=3)
  images.rename(tmp_path / 'elsewhere')
  found = Model(tmp_path / 'small').predict(image, count=3)
  assert {name for name, _ in found} == {'a', 'b', 'c'}
  assert dict(found) == pytest.approx(dict(expected), abs=0.01)


def test_an_exported_language_model_has_the_words_of_its_prompted_tokenizer(images, tmp_path):
  whole = tmp_path / 'run'
  untrained(language(images), whole)
  package(whole, tmp_path / 'small')
  assert (tmp_path / 'small/tokenizer.json').read_bytes() == (whole / 'tokenizer.json').read_bytes()


def test_a_file_that_does_not_fit_its_config_is_refused_by_name(workdir, tmp_path):
  package(workdir, tmp_path / 'small')
  file = tmp_path / 'small' / packaged.PARAMS
  arrays = safetensors.numpy.load_file(file)
  arrays['params/image/other'] = arrays.pop('params/temperature')
  safetensors.numpy.save_file(arrays, file, {'step': '0'})
  with pytest.raises(UserError, match=r'params/image/other is .* in the file and missing in its config'):
    Model(tmp_path / 'small')
  file.write_bytes(file.read_bytes()[:-100])
  with pytest.raises(UserError, match='cannot be read'):
    Model(tmp_path / 'small')


def test_an_exported_folder_has_one_step_and_no_field_of_training_files(workdir, tmp_path):
  package(workdir, tmp_path / 'small')
  with pytest.raises(UserError, match='has step 0 only, not 5'):
    Model(tmp_path / 'small', step=5)
  assert not {'init_from', 'checkpoint', 'mesh'} & json.loads((tmp_path / 'small/config.json').read_text()).keys()


def test_a_run_in_a_folder_named_demo_comes_before_the_model_of_the_package(workdir, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert packaged.locate('demo').endswith('weights/clip')
  with pytest.raises(UserError, match='demo: no model of this package generates images'):
    packaged.locate('demo', 'generate')
  assert packaged.locate('other') == 'other'
  (tmp_path / 'demo').symlink_to(workdir)
  assert packaged.locate('demo') == packaged.locate('demo', 'generate') == 'demo'
