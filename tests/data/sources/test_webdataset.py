import io
import logging
import pickle
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmcv_jax.data.loader import TrainLoader
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.data.sources import tar
from fmcv_jax.data.sources.base import BadRecord
from fmcv_jax.data.sources.webdataset import WebDataset
from fmcv_jax.errors import UserError
from tests.data.shards import encoded_image, write_tars


@pytest.fixture
def shards(tmp_path):
  write_tars(tmp_path / 'set', 10)
  return tmp_path / 'set'


def samples(source):
  return [source[index] for index in range(len(source))]


@given(
  names=st.lists(
    st.tuples(st.lists(st.text('aé.', min_size=1, max_size=60).filter(lambda n: n.strip('.')), min_size=1, max_size=4)),
    max_size=6,
  ),
  size=st.integers(0, 1500),
  kind=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
@settings(max_examples=40, deadline=None)
def test_members_are_those_that_pythons_tarfile_finds(names, size, kind):
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode='w', format=kind) as out:
    out.addfile(tarfile.TarInfo('./folder'), None) if size % 2 else None
    for number, (parts,) in enumerate(names):
      info = tarfile.TarInfo('/'.join(parts))
      info.size = size + number
      try:
        out.addfile(info, io.BytesIO(bytes([number]) * info.size))
      except ValueError:  # too long a name for ustar
        continue
  data = file.getvalue()
  ours = [(m.name, data[m.start : m.start + m.size]) for m in tar.members(lambda a, n: data[a : a + n], len(data))]
  with tarfile.open(fileobj=io.BytesIO(data)) as read:
    assert ours == [(m.name, read.extractfile(m).read()) for m in read.getmembers() if m.isfile()]


@pytest.mark.parametrize('kind', [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_are_images_texts_and_labels(tmp_path, kind):
  write_tars(tmp_path / 'set', 10, format=kind)
  source = WebDataset(str(tmp_path / 'set'))
  for index, sample in enumerate(samples(source)):
    assert sample == {
      'image': encoded_image(index)[0],
      'text': f'caption {index}',
      'texts': (f'caption {index}',),
      'label': index % 7,
      'key': f'{tmp_path}/set/0000{0 if index < 3 else 1 if index < 6 else 2}.tar/{index:09d}',
    }
  with pytest.raises(IndexError):
    source[10]
  assert source.key_of(3) == f'{tmp_path}/set/00001.tar[0]'


def test_fields_of_json_serve_as_text_and_label(shards):
  source = WebDataset(str(shards / '{00001..00002}.tar'), text='json/caption', label='json/nested/label')
  assert [(sample['text'], sample['label']) for sample in samples(source)] == [
    (f'caption {index}', index % 7) for index in range(3, 10)
  ]
  with pytest.raises(BadRecord, match=r"its .json has no field 'nested/labl'; did you mean 'label'"):
    WebDataset(str(shards), label='json/nested/labl')[0]


def test_the_index_is_made_once_and_again_when_a_shard_changes(shards, caplog):
  def making(source):
    with caplog.at_level(logging.WARNING):
      caplog.clear()
      found = len(source)
    return found, sum('creating the index' in message for message in caplog.messages)

  assert making(WebDataset(str(shards))) == (10, 1)
  assert making(WebDataset(str(shards))) == (10, 0)
  (index,) = shards.glob('.fmcv-*.index')
  for damage in (b'', index.read_bytes()[:-1], b'{}\n' + bytes(999)):
    index.write_bytes(damage)
    assert making(WebDataset(str(shards))) == (10, 1)
  index.unlink()
  assert making(WebDataset(str(shards))) == (10, 1)
  old = WebDataset(str(shards))
  assert old[9]['label'] == 2
  write_tars(shards, 16)
  assert making(WebDataset(str(shards))) == (16, 1)
  with pytest.raises(BadRecord, match='has changed since its index'):  # of a run in progress
    old[9]


def test_an_index_lies_elsewhere_where_the_shards_cannot_be_written(shards, tmp_path, monkeypatch):
  assert len(WebDataset(str(shards), index=str(tmp_path / 'elsewhere'))) == 10
  monkeypatch.setenv('FMCV_CACHE', str(tmp_path / 'cache'))
  monkeypatch.setattr('os.access', lambda path, mode: False)
  assert len(WebDataset(str(shards))) == 10
  assert len(list((tmp_path / 'elsewhere').iterdir())) == len(list((tmp_path / 'cache/webdataset').iterdir())) == 1
  assert not list(shards.glob('.fmcv*'))
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match=r'index .* cannot be written .*; set index to a folder for it'):
    len(WebDataset(str(shards), index=str(tmp_path / 'file')))


def test_a_truncated_shard_is_refused_or_cut_at_its_last_whole_sample(shards, caplog):
  shard = shards / '00001.tar'
  sound = shard.read_bytes()
  places = [m.start + m.size for m in tar.members(lambda a, n: sound[a : a + n], len(sound))]
  ends, third_image = places[3::4], places[8]
  # A sample is known to be whole once another one follows it.
  cuts = [(0, 0), (100, 0), (ends[0] - 1, 0), (ends[1] + 100, 1), (third_image, 2), (ends[2], 2)]
  for cut, whole in cuts:
    shard.write_bytes(sound[:cut])
    with pytest.raises(
      UserError, match=r"00001.tar: it is (truncated|empty).*; fetch it again, or set on_truncated='skip_tail'"
    ):
      len(WebDataset(str(shards)))
    found = WebDataset(str(shards), on_truncated='skip_tail')
    with caplog.at_level(logging.WARNING):
      caplog.clear()
      labels = [sample['label'] for sample in samples(found)]
    taken = len(labels) - 7
    assert taken == whole
    assert labels == [*range(3), *range(3, 3 + taken), *(index % 7 for index in range(6, 10))]
    assert any(f'using its first {taken} samples' in message for message in caplog.messages)


def test_invalid_empty_and_imageless_tars_are_one_clear_line(tmp_path, caplog):
  def refuse(pattern, path, **options):
    with pytest.raises(UserError, match=pattern) as error:
      len(WebDataset(str(path), **options))
    assert '\n' not in str(error.value)

  refuse('no .tar at .*nowhere.*; give a folder', tmp_path / 'nowhere')
  refuse('no file .*00003.tar', tmp_path / '{00003..00004}.tar')
  (tmp_path / 'noise.tar').write_bytes(b'this is not a tar' * 999)
  refuse('noise.tar: there is no tar header at byte 0', tmp_path)
  (tmp_path / 'noise.tar').unlink()
  for name, members in {'0': [], '1': ['a.txt']}.items():
    with tarfile.open(tmp_path / f'{name}.tar', 'w') as out:
      for member in members:
        out.addfile(tarfile.TarInfo(member), io.BytesIO())
  refuse('no sample with an image in 2 shards', tmp_path)
  write_tars(tmp_path, 6)  # an empty shard, and samples without an image, are no fault
  with caplog.at_level(logging.WARNING):
    assert len(WebDataset(str(tmp_path))) == 6
  assert '1 samples have no image and are skipped' in caplog.text
  with pytest.raises(ValueError, match="on_truncated: 'skip' is not"):
    WebDataset(str(tmp_path), on_truncated='skip')


def test_a_source_travels_small_and_without_its_open_files(shards):
  source = WebDataset(str(shards))
  source[0]
  data = pickle.dumps(source)
  assert len(data) < 2000
  (shards / '00000.tar').rename(shards / 'away.tar')  # what it found it keeps
  assert pickle.loads(data)[9] == source[9]


def test_more_hosts_than_shards_read_each_sample_once(shards):
  labels = []
  for host in range(5):
    pipeline = Pipeline(WebDataset(str(shards), label='json/nested/label'))
    loader = TrainLoader(pipeline, batch=10, seed=0, fields=('label',), process_index=host, process_count=5)
    labels += next(loader)['label'].tolist()
    loader.close()
  assert sorted(labels) == sorted(index % 7 for index in range(10))


def test_shards_at_a_url_give_what_those_on_disk_give(shards, tmp_path):
  import fsspec

  memory = fsspec.filesystem('memory')
  for shard in shards.glob('*.tar'):
    memory.pipe(f'/bucket/{shard.name}', shard.read_bytes())
  here = [{**sample, 'key': ''} for sample in samples(WebDataset(str(shards)))]
  for path in ('memory://bucket', 'memory://bucket/*.tar', 'memory://bucket/{00000..00002}.tar'):
    assert [{**s, 'key': ''} for s in samples(WebDataset(path, index=str(tmp_path / 'index')))] == here
  with pytest.raises(UserError, match=r'no .tar at .*memory://nowhere'):
    len(WebDataset('memory://nowhere'))
  with pytest.raises(UserError, match='nosuch:// cannot be read'):
    len(WebDataset('nosuch://bucket'))
