import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmcv_jax.data.images.decode import decode
from fmcv_jax.data.sources.array_record import ArrayRecord, decode_record, encode_record, write_array_record
from fmcv_jax.data.sources.base import BadRecord, Source
from fmcv_jax.data.sources.digits import Digits
from fmcv_jax.errors import UserError
from tests.data.counting import Counting


class Encoded(Source):
  """Records with bytes, as from files."""

  names = ('none', 'some')

  def __len__(self):
    return 23

  def __getitem__(self, index):
    return {'image': bytes([index]) * 5000, 'label': index % 2, 'text': 'é😀', 'key': f'k{index}', 'texts': ('a', 'b')}


@pytest.fixture
def written(tmp_path):
  write_array_record(Encoded(), str(tmp_path / 'set'), shards=4)
  return tmp_path / 'set'


@given(
  example=st.fixed_dictionaries(
    {},
    optional={
      'image': st.binary(max_size=50),
      'label': st.integers(0, 2**40),
      'text': st.text(max_size=20),
      'texts': st.lists(st.text(max_size=9), max_size=3).map(tuple),
      'key': st.text(max_size=9),
    },
  )
)
@settings(max_examples=60, deadline=None)
def test_an_example_survives_encoding(example):
  assert decode_record(encode_record(example)) == example


def test_arrays_are_stored_without_loss():
  image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
  stored = decode_record(encode_record({'image': image, 'label': np.int64(3)}))
  np.testing.assert_array_equal(decode(stored['image']), image)
  assert stored['label'] == 3


def test_every_record_comes_back_to_the_byte_and_in_order(written):
  assert sorted(p.name for p in written.iterdir())[:2] == [
    'data-00000-of-00004.array_record',
    'data-00001-of-00004.array_record',
  ]
  source, original = ArrayRecord(str(written)), Encoded()
  assert len(source) == 23
  assert source.names == ('none', 'some')
  for index in range(23):
    assert source[index] == original[index]
  with pytest.raises(IndexError):
    source[23]


def test_records_without_a_key_are_named_by_shard_and_row(tmp_path):
  write_array_record(Counting(5), str(tmp_path / 'set'), shards=2)
  source = ArrayRecord(str(tmp_path / 'set'))
  assert source.key_of(2).endswith('data-00001-of-00002.array_record[0]')
  assert source[2]['key'] == source.key_of(2)


def test_a_pattern_reads_its_shards_alone(written):
  assert len(ArrayRecord(str(written / 'data-0000[01]-*'))) == 11


def test_a_read_source_is_pickled_without_its_open_files(written):
  source = ArrayRecord(str(written))
  source[0]
  assert source._shards.readers
  again = pickle.loads(pickle.dumps(source))
  assert not again._shards.readers
  assert again[22] == source[22]


def test_real_images_come_back_pixel_for_pixel(tmp_path):
  write_array_record(Digits('test'), str(tmp_path / 'digits'))
  source = ArrayRecord(str(tmp_path / 'digits'))
  assert source.names == Digits().names
  for index in (0, 100, 359):
    np.testing.assert_array_equal(decode(source[index]['image']), Digits('test')[index]['image'])


def test_a_flipped_bit_costs_one_record_and_is_never_silent(written):
  shard, original = written / 'data-00001-of-00004.array_record', Encoded()
  sound = shard.read_bytes()
  first = sound.index(bytes([6]) * 100)
  for at in range(first, first + 4000, 977):
    shard.write_bytes(sound[:at] + bytes([sound[at] ^ 4]) + sound[at + 1 :])
    source, bad = ArrayRecord(str(written)), []
    for index in range(23):
      try:
        assert source[index] == original[index]
      except BadRecord as error:
        bad.append((index, str(error)))
    assert [index for index, _ in bad] == [6]
    assert 'hash mismatch' in bad[0][1]


def refuse(pattern, path):
  with pytest.raises(UserError, match=pattern) as error:
    len(ArrayRecord(str(path)))
  assert '\n' not in str(error.value)


def test_truncated_missing_and_foreign_shards_are_one_clear_line(written, tmp_path):
  refuse(r'no .array_record at .*nowhere.* give a folder', tmp_path / 'nowhere')
  shard = written / 'data-00003-of-00004.array_record'
  sound = shard.read_bytes()
  for damage in (sound[:-1], sound[: len(sound) // 2], b'', b'not a shard' * 9999):
    shard.write_bytes(damage)
    refuse('00003-of-00004.array_record.* cannot be read: it is truncated, damaged', written)
  shard.unlink()
  refuse('3 shards .* have 17 records, but info.json counts 23 in 4', written)
  (written / 'info.json').write_text('{')
  refuse('info.json.* is damaged', written)


def test_foreign_records_are_bad_records():
  for data in (b'', b'\xc1', b'text', pickle.dumps({'image': b''}), encode_record({'label': 1})[:-1], b'\x81\xa1x\x01'):
    with pytest.raises(BadRecord):
      decode_record(data)


def test_unknown_fields_are_not_dropped_silently():
  with pytest.raises(ValueError, match='mask'):
    encode_record({'image': b'', 'mask': b''})


def test_a_failed_writing_leaves_nothing(tmp_path):
  with pytest.raises(BadRecord):
    write_array_record(Counting(9, bad=(5,)), str(tmp_path / 'set'))
  assert not list(tmp_path.iterdir())


def test_an_existing_data_set_is_not_overwritten(written):
  with pytest.raises(UserError, match='exists already'):
    write_array_record(Counting(3), str(written))
  assert json.loads((written / 'info.json').read_text())['records'] == 23


def test_shards_at_a_url_are_fetched_once_when_they_are_read(tmp_path, monkeypatch):
  import fsspec

  from fmcv_jax.data.packing import pack

  pack(Encoded(), tmp_path / 'set', origin=1, shards=4)
  memory = fsspec.filesystem('memory')
  memory.put(str(tmp_path / 'set'), '/packed', recursive=True)
  monkeypatch.setenv('FMCV_CACHE', str(tmp_path / 'cache'))
  source = ArrayRecord('memory://packed')
  assert (len(source), source.names) == (23, ('none', 'some'))
  assert not list((tmp_path / 'cache').rglob('*.array_record'))
  assert [source[index] for index in (22, 20)] == [Encoded()[22], Encoded()[20]]
  (copy,) = (tmp_path / 'cache').rglob('*.array_record')
  assert copy.name == 'data-00003-of-00004.array_record'
  copied = copy.stat().st_ino
  assert [ArrayRecord('memory://packed')[index] for index in range(23)] == [Encoded()[index] for index in range(23)]
  assert copy.stat().st_ino == copied
