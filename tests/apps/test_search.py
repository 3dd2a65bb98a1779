"""`fmcv classify` and `fmcv search`."""

import json

import numpy as np
import pytest
from PIL import Image

from fmcv_jax.__main__ import main
from fmcv_jax.inference.model import Model
from tests import runs
from tests.train.tiny import shaken


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return runs.image_folder(tmp_path_factory.mktemp('images'), count=6)


@pytest.fixture(scope='module')
def clip(folder, tmp_path_factory):
  config = runs.contrastive(folder, data__image={'name': 'resize', 'size': 16})
  return str(runs.untrained(config, tmp_path_factory.mktemp('clip') / 'run', changed=shaken))


@pytest.fixture(scope='module')
def classifier(folder, tmp_path_factory):
  return str(runs.untrained(runs.classification(folder), tmp_path_factory.mktemp('labels') / 'run', changed=shaken))


def one_line(capsys, *argv):
  assert main(argv) == 2
  lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith('fmcv ')]
  assert len(lines) == 1
  return lines[0]


def test_classify_prints_and_stores_the_most_probable_labels(folder, clip, tmp_path, capsys):
  files, labels = [str(folder / 'a/0.png'), str(folder / 'b/1.png')], ['red', 'green', 'blue']
  assert (
    main(['classify', *files, '--model', clip, '--text', *labels, '--top', '2', '--json', str(tmp_path / 'x')]) == 0
  )
  rows = json.loads((tmp_path / 'x').read_text())
  probabilities = Model(clip).classify(files, labels)
  printed = capsys.readouterr().out
  for file, row, of_file in zip(files, probabilities, rows, strict=True):
    best = np.argsort(-row)[:2]
    assert of_file['image'] == file
    assert [entry['name'] for entry in of_file['classes']] == [labels[index] for index in best]
    np.testing.assert_allclose([entry['probability'] for entry in of_file['classes']], row[best], atol=1e-6)
    assert file in printed
    assert f'{row[best[0]]:.3f}' in printed


def test_classify_without_labels_names_the_classes_of_a_classifier(folder, classifier, tmp_path):
  assert main(['classify', str(folder / 'a/0.png'), '--model', classifier, '--json', str(tmp_path / 'x')]) == 0
  [row] = json.loads((tmp_path / 'x').read_text())
  assert {entry['name'] for entry in row['classes']} == {'a', 'b', 'c'}


def test_the_default_labels_are_those_of_the_zero_shot_evaluator_with_the_most(folder, clip, tmp_path):
  image = {'name': 'resize', 'size': 16}
  few = {'source': {'name': 'image_folder', 'path': str(tmp_path / 'few')}, 'image': image}
  many = {'source': {'name': 'image_folder', 'path': str(folder)}, 'image': image}
  runs.image_folder(tmp_path / 'few', count=2)
  evaluators = {
    name: {'name': 'zero_shot', 'batch_size': 16, 'data': data} for name, data in (('a', few), ('b', many), ('c', few))
  }
  config = runs.contrastive(folder, data__image=image, evaluators=evaluators)
  assert Model(runs.untrained(config, tmp_path / 'run')).class_names == ('a', 'b', 'c')


def test_an_image_text_model_without_known_classes_asks_for_labels(folder, clip, capsys):
  assert '--text LABEL' in one_line(capsys, 'classify', str(folder / 'a/0.png'), '--model', clip)


def test_search_by_text_sorts_the_images_of_a_folder_by_cosine_similarity(folder, clip, tmp_path, capsys):
  (folder / 'notes.txt').write_text('not an image')
  assert main(['search', str(folder), '--text', 'a red image', '--model', clip, '--json', str(tmp_path / 'x')]) == 0
  rows = json.loads((tmp_path / 'x').read_text())
  files = sorted(str(file) for file in folder.rglob('*.png'))
  assert sorted(row['image'] for row in rows) == files
  opened = Model(clip)
  expected = opened.encode_image([row['image'] for row in rows]) @ opened.encode_text('a red image')
  np.testing.assert_allclose([row['similarity'] for row in rows], expected, atol=1e-5)
  assert (np.diff(expected) <= 1e-6).all()
  assert 'nearest of 6 images' in capsys.readouterr().out


@pytest.mark.parametrize('kind', ['clip', 'classifier'])
def test_search_by_image_finds_that_image_first(folder, kind, tmp_path, request):
  model, query = request.getfixturevalue(kind), str(folder / 'b/1.png')
  argv = ['search', str(folder), '--image', query, '--model', model, '--top', '1', '--json', str(tmp_path / 'x')]
  assert main(argv) == 0
  assert json.loads((tmp_path / 'x').read_text()) == [{'image': query, 'similarity': pytest.approx(1, abs=1e-5)}]


def test_an_image_given_twice_is_listed_once(folder, clip, tmp_path):
  file = str(folder / 'a/0.png')
  argv = ['search', file, str(folder), file, '--text', 'red', '--model', clip, '--json', str(tmp_path / 'x')]
  assert main(argv) == 0
  assert len(json.loads((tmp_path / 'x').read_text())) == 6


def test_mistakes_are_one_line(folder, clip, classifier, tmp_path, capsys):
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'broken.png').write_bytes(b'nothing')
  search = ('--text', 'red', '--model', clip)
  assert 'none.png: no such file' in one_line(capsys, 'search', 'none.png', *search)
  assert 'no images in this folder' in one_line(capsys, 'search', str(tmp_path / 'empty'), *search)
  assert 'broken.png' in one_line(capsys, 'search', str(tmp_path / 'broken.png'), *search)
  assert '--top: expected at least 1' in one_line(capsys, 'search', str(folder), *search, '--top', '0')
  assert '--image none.png: no such file' in one_line(
    capsys, 'search', str(folder), '--image', 'none.png', '--model', clip
  )
  assert 'no text encoder' in one_line(capsys, 'search', str(folder), '--text', 'red', '--model', classifier)
  assert "no file 'none.png'" in one_line(capsys, 'classify', 'none.png', '--text', 'red', '--model', clip)
  assert '--top: expected at least 1' in one_line(capsys, 'classify', 'x', '--model', clip, '--top', '0')


def test_brackets_in_a_file_name_are_printed_as_they_are(folder, clip, tmp_path, capsys):
  Image.open(folder / 'a/0.png').save(tmp_path / '[red].png')
  assert main(['search', str(tmp_path), '--text', 'red', '--model', clip]) == 0
  assert '[red].png' in capsys.readouterr().out
