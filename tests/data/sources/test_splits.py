"""Splits by the names of files and folders: those that the Hugging Face hub's library finds."""

import contextlib

import pytest

from fmcv_jax.data.sources import splits
from fmcv_jax.data.storage import File
from fmcv_jax.errors import UserError

LAYOUTS = {
  'names': ['train-00000.tar', 'test-00000.tar'],
  'sharded': [
    'data/train-00000-of-00002.parquet',
    'data/train-00001-of-00002.parquet',
    'data/test-00000-of-00001.parquet',
  ],
  'folders': ['train/0.tar', 'val/0.tar', 'val/1.tar'],
  'behind a name': ['laion_train_0.tar', 'laion_dev_0.tar', 'laion_eval.tar'],
  'words in words': ['training-0.tar', 'trainer-0.tar', 'contest-0.tar'],
  'one': ['train/0.tar', 'train/1.tar'],
  'none': ['00000.tar', '00001.tar'],
}


@pytest.mark.parametrize('names', LAYOUTS.values(), ids=LAYOUTS)
def test_splits_are_those_of_datasets(tmp_path, names):
  data_files = pytest.importorskip('datasets.data_files')
  for name in names:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b'')
  patterns = data_files.get_data_patterns(str(tmp_path))
  theirs = {}
  for split, pattern in ((str(split), pattern) for split, of in patterns.items() for pattern in of):
    with contextlib.suppress(FileNotFoundError):  # one of several patterns of a split that fits nothing
      for path in data_files.resolve_pattern(pattern, str(tmp_path)):
        theirs[path.removeprefix(f'{tmp_path}/')] = split
  if not any(map(splits.named, names)):
    assert set(theirs.values()) == {'train'}  # what it calls files that name no split
    return
  assert {name: splits.named(name) for name in names if splits.named(name)} == theirs


def test_a_partition_and_a_numbered_name_are_splits():
  assert splits.named('split=test/part-0.parquet') == 'test'
  assert splits.named('unsupervised-00000-of-00004.parquet') == 'unsupervised'
  assert splits.named('TRAIN_0.tar') == 'train'


def test_of_several_splits_one_has_to_be_chosen():
  files = [File(f'gs://b/data/{name}', 1) for name in ('train-0.tar', 'train-1.tar', 'test-0.tar', 'extra.tar')]
  with pytest.raises(
    UserError, match=r"what: 'gs://b/data/' contains several splits: train \(2 files\), test \(1 files\)"
  ):
    splits.chosen(files, None, 'what')
  assert splits.chosen(files, 'test', 'what') == (files[2:3], 'test')
  assert splits.chosen(files, 'all', 'what') == (files, 'all')
  assert splits.chosen(files[:2], None, 'what') == (files[:2], 'train')
  assert splits.chosen(files[3:], None, 'what') == (files[3:], None)
  inside = [File('/data/test/0.tar', 1), File('/data/test/1.tar', 1)]
  assert splits.chosen(inside, None, 'what') == (inside, None)  # the folder was chosen; its name is not a second split
  assert splits.chosen(inside, 'test', 'what') == (inside, 'test')
  with pytest.raises(UserError, match="split 'train': none of the 2 files"):
    splits.chosen(inside, 'train', 'what')
