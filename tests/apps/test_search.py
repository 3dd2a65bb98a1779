"""`fmcv classify` and `fmcv search`."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from fmcv_jax.__main__ import main
from fmcv_jax.errors import UserError
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
  assert 'broken.png cannot be read' in one_line(capsys, 'search', str(tmp_path / 'broken.png'), *search)
  assert 'broken.png cannot be read' in one_line(
    capsys, 'classify', str(tmp_path / 'broken.png'), '--text', 'red', '--model', clip
  )
  assert '--top: expected at least 1' in one_line(capsys, 'search', str(folder), *search, '--top', '0')
  assert '--text: is empty' in one_line(capsys, 'search', str(folder), '--text', ' ', '--model', clip)
  assert '--image none.png: no such file' in one_line(
    capsys, 'search', str(folder), '--image', 'none.png', '--model', clip
  )
  assert 'no text encoder' in one_line(capsys, 'search', str(folder), '--text', 'red', '--model', classifier)
  assert 'none.png: no such file' in one_line(capsys, 'classify', 'none.png', '--text', 'red', '--model', clip)
  assert '--top: expected at least 1' in one_line(capsys, 'classify', 'x', '--model', clip, '--top', '0')


@pytest.fixture
def damaged(folder, tmp_path):
  """The images of `folder`, and more files that cannot be read than may follow one another in a run."""
  shutil.copytree(folder, tmp_path / 'all')
  for number in range(101):
    (tmp_path / f'all/b/{number:03d}.png').write_bytes(b'' if number % 2 else b'text')
  return tmp_path / 'all'


@pytest.mark.parametrize(
  'command', [('search', '--text', 'a red image', '--top', '200'), ('classify', '--text', 'a', 'b')]
)
def test_unreadable_files_of_a_folder_are_named_counted_and_left_out(
  command, folder, damaged, clip, tmp_path, capsys, caplog
):
  def found(images):
    argv = [command[0], str(images), *command[1:], '--model', clip, '--json', str(tmp_path / 'x')]
    assert main(argv) == 0
    rows = json.loads((tmp_path / 'x').read_text())
    values = [row.get('similarity') or [best['probability'] for best in row['classes']] for row in rows]
    return [row['image'].removeprefix(str(images)) for row in rows], np.array(values)

  whole = found(folder)
  caplog.clear()
  files, values = found(damaged)
  assert files == whole[0]
  np.testing.assert_allclose(values, whole[1], atol=1e-6)
  named = [record.getMessage() for record in caplog.records if record.getMessage().startswith('skipped ')]
  assert len(named) == 101
  assert any('b/000.png: no image: 4 bytes' in line for line in named)
  assert '101 of 107 images cannot be read and are left out' in capsys.readouterr().err


def test_images_of_a_format_that_is_not_decoded_are_counted(folder, clip, tmp_path, caplog):
  shutil.copytree(folder, tmp_path / 'all')
  for name in ('a/x.HEIC', 'b/y.heic', 'z.CR2', 'notes.txt'):
    (tmp_path / 'all' / name).write_bytes(b'')
  assert main(['search', str(tmp_path / 'all'), '--text', 'red', '--model', clip]) == 0
  assert 'not read: files .heic: 2 (a/x.HEIC, b/y.heic); files .cr2: 1 (z.CR2); convert them' in caplog.text
  assert 'notes.txt' not in caplog.text


def test_nan_stands_for_an_unreadable_image_and_nothing_else(folder, clip, classifier, tmp_path):
  (tmp_path / 'broken.png').write_bytes(b'')
  files = [str(tmp_path / 'broken.png'), str(folder / 'a/0.png')]
  for model, call in ((clip, 'encode_image'), (classifier, 'classify')):
    rows = getattr(Model(model, unreadable='nan'), call)(files)
    assert np.isnan(rows[0]).all()
    np.testing.assert_array_equal(rows[1], getattr(Model(model), call)(files[1]))
  assert [len(best) for best in Model(classifier, unreadable='nan').predict(files)] == [0, 3]
  with pytest.raises(UserError, match=r"unreadable: 'skip' is not 'error' or 'nan'"):
    Model(clip, unreadable='skip')


def test_a_model_whose_outputs_are_not_finite_is_refused(folder, tmp_path):
  def broken(params):
    return jax.tree.map(lambda x: x * np.nan, params)

  config = runs.classification(folder, train__ema_decay=None)
  workdir = runs.untrained(config, tmp_path / 'run', changed=broken)
  with pytest.raises(UserError, match=r'logits is not finite for 1 images, first .*0\.png'):
    Model(workdir, unreadable='nan').classify([str(folder / 'a/0.png')])


def test_brackets_in_a_file_name_are_printed_as_they_are(folder, clip, tmp_path, capsys):
  Image.open(folder / 'a/0.png').save(tmp_path / '[red].png')
  assert main(['search', str(tmp_path), '--text', 'red', '--model', clip]) == 0
  assert '[red].png' in capsys.readouterr().out
