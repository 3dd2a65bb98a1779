"""Data of newcomers for fine-tuning: layouts, tables and shards that are read, what is said, and refusals."""

import json
import re

import pytest

from fmcv_jax import __main__ as cli
from fmcv_jax.errors import UserError
from fmcv_jax.run import Run
from tests.apps.own_images import COLORS, NAMES, class_folder, completed, draw, encoded, table, tar


@pytest.mark.parametrize(
  ('prepare', 'message'),
  [
    (lambda path: None, 'own: no such folder or file'),
    (lambda path: path.mkdir(), 'own: is empty; give a folder of images'),
    (lambda path: class_folder(path, 5, ('red',)), r"own: has one class \('red'\); at least two are needed"),
    (lambda path: [draw(path / f'{i}.png', 'red', i) for i in range(5)], 'have neither classes nor captions'),
    (lambda path: [path.mkdir(), (path / 'a.pdf').write_bytes(b'%PDF')], 'no images in'),
    (lambda path: [class_folder(path), (path / 'x').mkdir()], r'1 of 4 classes have no image to train on \(x\)'),
    (lambda path: [draw(path / name / '0.png', name, 1) for name in COLORS], 'no image is left to hold out'),
    (lambda path: [class_folder(path / 'test'), class_folder(path / 'val')], 'none to train on; rename one to train'),
    (
      lambda path: [draw(path / 'a.png', 'red', 1), (path / 't.csv').write_text('image,x\na.png,1\n')],
      'neither captions',
    ),
    (lambda path: [path.mkdir(), (path / 'a.tar').write_bytes(b'')], r'a\.tar'),
    (
      lambda path: tar(path / 'a.tar', [{'png': encoded('red', 0)}]),
      'neither labels .* nor captions .*, only png; set',
    ),
    (lambda path: table(path, ''), r't\.csv: has no rows below line 1'),
    (lambda path: table(path, 'image,label\n'), r't\.csv: has no rows below line 1'),
    (
      lambda path: table(path, 'a.png,red\nb.png,blue\n'),
      r'no column of images .* \(a\.png, red\), which line 1 names',
    ),
    (
      lambda path: [class_folder(path / 'train'), class_folder(path / 'extra')],
      r"'train' and 'extra' in .* have the same subfolders \(blue, green, red\), as splits have, but 'extra' is not",
    ),
    (
      lambda path: [
        *(draw(path / split / f'{i}.png', 'red', i) for split in ('train', 'test') for i in range(4)),
        (path / 'metadata.csv').write_text('file_name,label\ntrain/0.png,1\ntest/0.png,0\n'),
      ],
      'metadata.csv. is next to the folder of the split .train., where it is not read',
    ),
    (lambda path: [path.mkdir(), (path / 'a.parquet').write_bytes(b'PAR1')], 'is not a Parquet table'),
  ],
)
def test_data_that_cannot_be_used_is_one_line(prepare, message, tmp_path, classifier, capsys):
  prepare(tmp_path / 'own')
  args = ['finetune', str(tmp_path / 'own'), '--model', classifier, '--workdir', str(tmp_path / 'run')]
  assert cli.main(args) == 2
  error = capsys.readouterr().err
  assert re.search(message, error), error
  assert error.count('\n') == 1
  assert not (tmp_path / 'run').exists()


SHARDS = {
  'numbers': (lambda i: {'cls': str(i % 3)}, (), 'label'),
  'names': (lambda i: {'cls': NAMES[i % 3], 'txt': 'a ball'}, tuple(NAMES), 'label'),
  'json numbers': (lambda i: {'json': json.dumps({'label': i % 3, 'caption': 'a'})}, (), 'label'),
  'json names': (lambda i: {'json': json.dumps({'Category': NAMES[i % 3]})}, tuple(NAMES), 'label'),
  'captions': (lambda i: {'txt': f'a {NAMES[i % 3]} ball'}, (), 'text'),
  'json captions': (lambda i: {'json': json.dumps({'caption': f'a {NAMES[i % 3]} ball', 'url': 'x'})}, (), 'text'),
}


@pytest.mark.parametrize('kind', SHARDS)
def test_tar_shards_are_a_classification_or_pairs_by_their_members(kind, tmp_path, classifier, pairs):
  members, names, field = SHARDS[kind]
  samples = [{'png': encoded(NAMES[i % 3], i), **members(i)} for i in range(12)]
  tar(tmp_path / 'own/0.tar', samples[:5])
  tar(tmp_path / 'own/1.tar', samples[5:])
  for path in (tmp_path / 'own', tmp_path / 'own/{0..1}.tar'):
    config = completed(path, classifier if field == 'label' else pairs)
    source = Run(config).experiment.data.source.source
    assert source.names == names
    examples = [source[index] for index in range(12)]
    if field == 'text':
      assert config['objective']['name'] == 'contrastive'
      assert [example['text'] for example in examples] == [f'a {NAMES[i % 3]} ball' for i in range(12)]
    else:
      assert config['objective']['network']['num_classes'] == 3
      assert [example['label'] for example in examples] == [i % 3 for i in range(12)]
      assert not any('text' in example for example in examples)


def test_damaged_tar_shards_are_read_as_far_as_they_are_whole(tmp_path, classifier, capsys):
  samples = [{'png': encoded(NAMES[i % 3], i), 'json': json.dumps({'label': NAMES[i % 3]})} for i in range(13)]
  samples[0]['json'] = '{'
  path = tar(tmp_path / '0.tar', samples)
  path.write_bytes(path.read_bytes()[:-11_000])  # the end of the archive, and a part of the last sample
  with pytest.raises(UserError, match='skip_tail'):
    completed(path, classifier)
  config = completed(path, classifier, 'data.source.on_truncated=skip_tail')
  assert Run(config).experiment.data.source.source.names == tuple(NAMES)
  assert 'left out: its .json is not JSON' in capsys.readouterr().out


def test_tar_shards_are_split_by_their_names(tmp_path, classifier, capsys):
  for split, count in (('train', 9), ('val', 3)):
    samples = [{'png': encoded(NAMES[i % 3], len(split) * 100 + i), 'cls': NAMES[i % 3]} for i in range(count)]
    tar(tmp_path / f'own/{split}-00000.tar', samples)
  config = completed(tmp_path / 'own', classifier)
  assert '9 images of 3 classes (blue, green, red): 9 to train, 3 validation' in capsys.readouterr().out
  assert Run(config).experiment.data.source.account().split == 'train'


@pytest.mark.parametrize(
  'header', ['Filename,Class', 'path,LABEL', ' image , label ', 'file_name;category', 'img\tfine_label']
)
def test_usual_names_of_columns_are_found_however_they_are_written(header, tmp_path, classifier):
  separator = next(mark for mark in ';\t,' if mark in header)
  rows = [f'{index}.png{separator}{NAMES[index % 3]}' for index in range(12)]
  for index in range(12):
    draw(tmp_path / 'own' / f'{index}.png', NAMES[index % 3], index)
  for name in ('t.csv', 'metadata.csv'):
    (tmp_path / 'own' / name).write_text('\n'.join([header, *rows]))
    source = Run(completed(tmp_path / 'own', classifier)).experiment.data.source.source
    assert source.names == tuple(NAMES)
    assert {source.key_of(row): NAMES[source[row]['label']] for row in range(12)} == {
      f'{index}.png': NAMES[index % 3] for index in range(12)
    }
    (tmp_path / 'own' / name).unlink()


def test_a_table_of_other_facts_leaves_class_folders_as_they_are(tmp_path, classifier, capsys):
  class_folder(tmp_path / 'own')
  (tmp_path / 'own/metadata.csv').write_text('id,camera\n1,x\n')
  assert completed(tmp_path / 'own', classifier)['objective']['network']['num_classes'] == 3
  assert 'left out: files .csv: 1 (metadata.csv)' in capsys.readouterr().out


def test_a_folder_around_the_data_is_not_a_class(tmp_path, classifier, pairs, capsys):
  class_folder(tmp_path / 'a/data')
  config = completed(tmp_path / 'a', classifier)
  assert config['objective']['network']['num_classes'] == 3
  assert f'finetune: the data is read from {tmp_path}/a/data\n' in capsys.readouterr().out
  completed(f'{tmp_path}/a/data/', classifier)
  assert 'is read from' not in capsys.readouterr().out
  for index in range(6):
    draw(tmp_path / f'b/images/{index}.png', NAMES[index % 3], index)
    (tmp_path / f'b/images/{index}.txt').write_text(f'a {NAMES[index % 3]} ball')
  assert completed(tmp_path / 'b', pairs)['objective']['name'] == 'contrastive'


def test_classes_that_are_probably_not_meant_are_said(tmp_path, classifier, capsys):
  def said(labels, header='image,label'):
    for index in range(len(labels)):
      draw(tmp_path / f'{header}{labels[0]}' / f'{index}.png', NAMES[index % 3], index)
    rows = [f'{index}.png,{label}' for index, label in enumerate(labels)]
    (tmp_path / f'{header}{labels[0]}' / 't.csv').write_text('\n'.join([header, *rows]))
    completed(tmp_path / f'{header}{labels[0]}', classifier)
    return capsys.readouterr().out

  assert 'finetune: 1 of 4 classes have no record (0)\n' in said([1, 2, 3] * 4)
  assert 'finetune: 898 of 901 classes have no record (1, 2, 3, ...)\n' in said([0, 5, 900] * 4)
  assert "finetune: classes 'Red' and 'red' are taken as different\n" in said(['red', 'Red', 'blue'] * 4)
  assert 'left out: columns that are not read: 1 (id)\n' in said(['a,1', 'b,2', 'c,3'] * 4, 'image,label,id')
  plain = said(['x', 'y', 'z'] * 4)
  assert 'no record' not in plain
  assert 'taken as different' not in plain
  for index in range(6):
    draw(tmp_path / f'nested/{NAMES[index % 2]}/inner/{index}.png', NAMES[index % 3], index)
  completed(tmp_path / 'nested', classifier)
  assert 'folders inside them are not classes: blue/inner, green/inner)' in capsys.readouterr().out
