import pickle

import numpy as np
import pytest

from fmcv_jax.data.loader import TrainLoader, fingerprint
from fmcv_jax.data.order import WindowedOrder
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.data.sources.base import BadRecord
from fmcv_jax.data.sources.parquet import Parquet
from fmcv_jax.errors import UserError
from tests.data.shards import encoded_image, write_parquet

pytest.importorskip('pyarrow')


@pytest.fixture
def tables(tmp_path):
  write_parquet(tmp_path / 'set', 20)
  return tmp_path / 'set'


def test_rows_are_images_texts_and_labels_with_their_names(tables):
  source = Parquet(str(tables), text='caption', label='label')
  assert source.names == tuple('abcdefg')
  assert len(source) == 20
  for index in (19, *range(19)):
    assert {**source[index], 'key': ''} == {
      'image': encoded_image(index)[0],
      'label': index % 7,
      'text': f'caption {index}',
      'texts': (f'caption {index}',),
      'key': '',
    }
  assert source[13]['key'] == f'{tables}/train-00001-of-00002.parquet[1][0]'
  assert Parquet(str(tables), text='captions')[4]['texts'] == ('caption 4', 'other 4')
  assert set(Parquet(str(tables / 'train-00000-*'))[3]) == {'image', 'key'}
  with pytest.raises(IndexError):
    source[20]


def test_training_reads_each_row_group_about_once_an_epoch_and_each_row_once(tmp_path, monkeypatch):
  write_parquet(tmp_path / 'set', 60, files=3, group=5)
  source = Parquet(str(tmp_path / 'set'), label='label', window=3)
  read, groups = source._read, []
  monkeypatch.setattr(Parquet, '_read', lambda self, group: groups.append(group) or read(group))
  loader = TrainLoader(Pipeline(source), batch=6, seed=0, fields=('label',))
  drawn = np.concatenate([next(loader)['label'] for _ in range(10)])
  loader.close()
  assert np.bincount(drawn).tolist() == np.bincount(np.arange(60) % 7).tolist()
  # Of the next epoch, which is prefetched, as many follow as there is time for.
  assert len(set(groups[: 12 + 5])) == 12
  assert 'records=60 window=3' in fingerprint(Pipeline(source), 0)


def test_a_source_travels_without_what_it_has_read(tables):
  source = Parquet(str(tables))
  source[0]
  again = pickle.loads(pickle.dumps(source))
  assert len(pickle.dumps(source)) < 5000
  assert not again._groups._held
  assert again[19] == source[19]


def test_tables_at_a_url_give_what_those_on_disk_give(tables):
  import fsspec

  memory = fsspec.filesystem('memory')
  for table in tables.iterdir():
    memory.pipe(f'/tables/{table.name}', table.read_bytes())
  assert Parquet('memory://tables')[13]['image'] == Parquet(str(tables))[13]['image']


def test_damage_and_mistakes_are_one_clear_line(tables, tmp_path):
  def refuse(pattern, path, **options):
    with pytest.raises(UserError, match=pattern) as error:
      len(Parquet(str(path), **options))
    assert '\n' not in str(error.value)

  refuse(r"no column 'img', set image; did you mean 'image'", tables, image='img')
  refuse(r"no column 'captoin', set text; did you mean 'caption'", tables, text='captoin')
  refuse(r'no .parquet at .*nowhere', tmp_path / 'nowhere')
  refuse("column 'label' holds int64, not encoded images", tables, image='label')
  table = tables / 'train-00001-of-00002.parquet'
  sound = table.read_bytes()
  for damaged in (sound[:-1], sound[:200], b''):
    table.write_bytes(damaged)
    refuse('train-00001-of-00002.parquet is truncated, damaged or no Parquet file', tables)
  write_parquet(tmp_path / 'none', 0)
  refuse('no rows in 2 tables', tmp_path / 'none')


def test_a_flipped_bit_costs_its_row_group_where_pages_have_checksums(tmp_path):
  write_parquet(tmp_path / 'set', 9, files=1, write_page_checksum=True, compression='none', use_dictionary=False)
  (table,) = (tmp_path / 'set').iterdir()
  sound = table.read_bytes()
  at = sound.index(encoded_image(4)[0]) + 100
  table.write_bytes(sound[:at] + bytes([sound[at] ^ 4]) + sound[at + 1 :])
  source, bad = Parquet(str(tmp_path / 'set')), []
  for index in range(9):
    try:
      assert source[index]['image'] == encoded_image(index)[0]
    except BadRecord as error:
      bad.append((index, str(error)))
  assert [index for index, _ in bad] == [3, 4, 5]
  assert 'row group 1 cannot be read' in bad[0][1]


def test_a_window_of_blocks_is_mixed_as_said():
  # Blocks of one class each, the worst case: two records of a batch share their block with a probability of 1 / window.
  window, size = 8, 50
  order = WindowedOrder(np.arange(1, 101) * size, window)
  for epoch in range(2):
    records = np.array([order(position) for position in range(epoch * 5000, (epoch + 1) * 5000)])
    assert sorted(records) == list(range(5000))
    batches = (records // size)[: 96 * 50].reshape(-1, 50)
    same = np.mean([np.mean(batch[:, None] == batch) for batch in batches])
    # Of the same window 1 / 8, less the record itself; a batch of 50 in windows of 400 sometimes straddles two.
    assert abs(same - (1 / 50 + (49 / 50) / window)) < 0.02
  assert [WindowedOrder(np.array([3, 5]), 2, shuffle=False)(p) for p in range(7)] == [0, 1, 2, 3, 4, 0, 1]
  ragged = WindowedOrder(np.array([1, 4, 4 + 7, 30]), 3, seed=5)
  for epoch in range(3):
    assert sorted(ragged(position) for position in range(epoch * 30, epoch * 30 + 30)) == list(range(30))
  assert {ragged(7, attempt) for attempt in range(1, 31)} == set(range(30))
