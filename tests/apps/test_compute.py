"""`fmcv compute`: outputs of a model for image files, in files of their kind."""

import json

import numpy as np
import pytest
from PIL import Image

from fmcv_jax.__main__ import main
from fmcv_jax.apps.compute import check_reads_images
from fmcv_jax.errors import UserError
from fmcv_jax.inference.model import Model
from fmcv_jax.objectives.outputs import Output
from tests import runs
from tests.train.tiny import shaken


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return runs.image_folder(tmp_path_factory.mktemp('images'), count=6)


@pytest.fixture(scope='module')
def classifier(folder, tmp_path_factory):
  return str(runs.untrained(runs.classification(folder), tmp_path_factory.mktemp('labels') / 'run', changed=shaken))


@pytest.fixture(scope='module')
def autoencoder(folder, tmp_path_factory):
  return str(runs.untrained(runs.autoencoder(folder), tmp_path_factory.mktemp('coder') / 'run', changed=shaken))


def rows_of(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def one_line(capsys, *argv):
  assert main(argv) == 2
  lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith('fmcv ')]
  assert len(lines) == 1
  return lines[0]


def test_logits_of_a_folder_are_those_of_classify_and_an_unreadable_file_is_counted(
  folder, classifier, tmp_path, capsys, caplog
):
  broken = tmp_path / 'broken.png'
  broken.write_bytes(b'\x89PNG nothing')
  command = ('compute', 'logits', str(broken), str(folder), '--model', classifier, '--to', str(tmp_path / 'out'))
  assert main([*command, '--batch', '4']) == 0
  assert 'logits of 6 images' in (printed := capsys.readouterr().out)
  assert '1 were skipped' in printed
  assert f'skipped {broken}' in caplog.text
  first, *rows = rows_of(tmp_path / 'out/logits.jsonl')
  assert first == {'file': str(broken), 'error': 'the image cannot be read'}
  probabilities = Model(classifier).classify([row['file'] for row in rows])
  for row, expected in zip(rows, probabilities, strict=True):
    scores = np.exp([c['logit'] for c in sorted(row['classes'], key=lambda c: c['index'])])
    assert [c['name'] for c in sorted(row['classes'], key=lambda c: c['index'])] == ['a', 'b', 'c']
    np.testing.assert_allclose(scores / scores.sum(), expected, atol=1e-6)
  assert 'would be overwritten' in one_line(capsys, *command)


def test_features_are_those_of_the_python_api(folder, classifier, tmp_path):
  assert main(['compute', 'features', str(folder / 'a'), '--model', classifier, '--to', str(tmp_path)]) == 0
  found = np.load(tmp_path / 'features.npz')
  np.testing.assert_allclose(found['features'], Model(classifier).encode_image(found['files'].tolist()), atol=1e-6)


def test_a_reconstruction_is_a_png_of_the_networks_size(folder, autoencoder, tmp_path):
  file = str(folder / 'b/1.png')
  assert main(['compute', 'reconstruction', file, '--model', autoencoder, '--to', str(tmp_path)]) == 0
  [row] = rows_of(tmp_path / 'reconstruction.jsonl')
  opened = Image.open(tmp_path / row['output'])
  assert opened.size == (16, 16)
  assert json.loads(opened.text['fmcv'])['file'] == file


def test_an_output_that_is_not_there_or_reads_more_than_images_is_refused(folder, classifier, tmp_path, capsys):
  given = (str(folder), '--to', str(tmp_path / 'out'))
  line = one_line(capsys, 'compute', 'logit', *given, '--model', classifier)
  assert "'logit' is not an output of" in line
  assert 'outputs of images: features, logits, patch_features, attention' in line
  assert "did you mean 'logits'?" in line
  generative = str(runs.untrained(runs.class_to_image(folder), tmp_path / 'run'))
  line = one_line(capsys, 'compute', 'samples', *given, '--model', generative)
  assert 'reads label, which image files do not have; outputs of images: none' in line
  assert not (tmp_path / 'out').exists()
  unconditional = {'samples': Output(lambda params, extra, batch: None, 'image', ())}
  with pytest.raises(UserError, match="'samples' of x does not depend on images; outputs of images: none"):
    check_reads_images('samples', unconditional, 'x')
