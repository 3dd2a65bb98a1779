"""Which members form a sample, and what they mean: as the webdataset library says."""

import io
import json
import tarfile

import pytest

from fmcv_jax.data.loader import TrainLoader
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.data.sources.base import BadRecord
from fmcv_jax.data.sources.webdataset import WebDataset
from fmcv_jax.data.tokenizers import ClipBpe
from fmcv_jax.errors import UserError
from tests.data.shards import encoded_image

JPG, PNG = encoded_image(0)[0], encoded_image(1)[0]


def shard(path, members, **options):
  """A tar of (name, bytes or text), in this order."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, 'w', **options) as out:
    for name, data in members:
      data = data.encode() if isinstance(data, str) else data
      info = tarfile.TarInfo(name)
      info.size = len(data)
      out.addfile(info, io.BytesIO(data))
  return str(path)


def read(source):
  return [source[index] for index in range(len(source))]


def refused(path, **options):
  with pytest.raises(UserError) as error:
    WebDataset(path, **options)[0]
  assert '\n' not in str(error.value)
  return str(error.value)


GROUPS = {
  'plain': ['0.jpg', '0.txt', '0.cls', '1.png', '1.txt', '1.cls'],
  "a Mac's": ['._0.jpg', '0.jpg', '._0.txt', '0.txt', '._0.cls', '0.cls', '._1.png', '1.png', '1.txt', '1.cls'],
  'dot names': ['.DS_Store', '0.jpg', '.hidden.txt', '0.txt', '0.cls'],
  'other case': ['0.JPG', '0.Txt', '0.CLS'],
  'dots in folders': ['a.b/0.jpg', 'a.b/0.txt', 'a.b/0.cls', 'a.b/1.jpg', 'a.b/1.txt', 'a.b/1.cls'],
  './': ['./0.jpg', './0.txt', './0.cls'],
  'names without an end': ['0.jpg', 'README', '0.txt', '0.cls', 'LICENSE'],
  'meta': ['__info__.json', '__meta__/x.jpg', '0.jpg', '0.txt', '0.cls'],
  'one name in two folders': ['a/0.jpg', 'a/0.txt', 'a/0.cls', 'b/0.jpg', 'b/0.txt', 'b/0.cls'],
  'without texts': ['0.jpg', '0.cls', '1.txt', '1.cls', '2.png', '2.txt', '2.cls'],
  'the same sample twice': ['0.jpg', '0.txt', '0.cls', '1.jpg', '1.txt', '1.cls', '0.jpg', '0.txt', '0.cls'],
}


@pytest.mark.parametrize('names', GROUPS.values(), ids=GROUPS)
def test_samples_are_those_of_the_webdataset_library(tmp_path, names):
  webdataset = pytest.importorskip('webdataset')

  def content(number, name):
    return (
      JPG
      if name.lower().endswith(('jpg', 'png'))
      else f'{number}'
      if name.lower().endswith('cls')
      else f'text {number}'
    )

  path = shard(tmp_path / '0.tar', [(name, content(number, name)) for number, name in enumerate(names)])
  theirs = list(webdataset.WebDataset(path, shardshuffle=False, empty_check=False))
  expected = [
    (f'{path}/{sample["__key__"]}', sample.get('txt', b'').decode(), int(sample['cls']))
    for sample in theirs
    if any(key in sample for key in ('jpg', 'png'))
  ]
  assert [(sample['key'], sample.get('text', ''), sample['label']) for sample in read(WebDataset(path))] == expected


def test_a_macs_archive_keeps_images_texts_and_labels_together_in_folders_too(tmp_path):
  names = [
    ('x/._0.jpg', 'resource'),
    ('x/0.jpg', JPG),
    ('x/._0.txt', 'resource'),
    ('x/0.txt', 'a cat'),
    ('x/0.cls', '3'),
  ]
  source = WebDataset(shard(tmp_path / '0.tar', names, format=tarfile.PAX_FORMAT))
  assert [(s['text'], s['label'], s['image']) for s in read(source)] == [('a cat', 3, JPG)]
  (left,) = source.account().left_out
  assert str(left) == 'files that are no members of a sample: 2 (x/._0.jpg, x/._0.txt)'


def test_a_member_twice_in_a_sample_is_refused_as_by_webdataset(tmp_path):
  path = shard(tmp_path / '0.tar', [('0.jpg', JPG), ('0.JPG', JPG), ('0.txt', 'a')])
  assert "0.tar: sample '0' has two members 'jpg'" in refused(path)


def test_members_that_lie_apart_are_said_before_images_lose_their_texts(tmp_path):
  path = shard(tmp_path / '0.tar', [('0.jpg', JPG), ('1.jpg', JPG), ('0.txt', 'a'), ('1.txt', 'b')])
  assert "members of sample '0' are not adjacent" in refused(path)
  path = shard(tmp_path / '1.tar', [('0.txt', 'a'), ('1.txt', 'b'), ('0.jpg', JPG), ('1.jpg', JPG)])
  assert 'write the shard sorted by name' in refused(path)


def test_members_are_named_by_the_config_where_their_names_have_several_parts(tmp_path):
  members = [('x.input.jpg', JPG), ('x.outputs.txt', 'a cat'), ('x.meta.json', '{"y": 2}')]
  path = shard(tmp_path / '0.tar', members)
  (sample,) = read(WebDataset(path, text='outputs.txt', label='meta.json/y'))
  assert (sample['image'], sample['text'], sample['label']) == (JPG, 'a cat', 2)
  assert WebDataset(path, text='Outputs.TXT', label=None)[0]['text'] == 'a cat'
  two = shard(tmp_path / '1.tar', [('x.input.jpg', JPG), ('x.target.png', PNG)])
  assert 'samples have several images (input.jpg, target.png); set image to the one to read' in refused(two)
  assert WebDataset(two, image='target.png')[0]['image'] == PNG
  assert "no sample has a member 'targt.png', set image; did you mean 'target.png'" in refused(two, image='targt.png')
  assert "no sample has a member 'caption', set text (None reads none)" in refused(path, text='caption')
  assert "no sample has a member 'class', set label" in refused(path, label='class')


def test_of_several_images_the_jpg_is_read_as_open_clip_does(tmp_path):
  path = shard(tmp_path / '0.tar', [('0.jpeg', PNG), ('0.jpg', JPG), ('0.png', PNG), ('0.mask.png', PNG)])
  assert WebDataset(path)[0]['image'] == JPG  # open_clip: rename(image="jpg;png;jpeg;webp")
  path = shard(tmp_path / '1.tar', [('0.jfif', JPG)])
  assert WebDataset(path)[0]['image'] == JPG


CAPTIONS = {
  'text': ({'c': 'a cat'}, ('a cat',)),
  'list': ({'c': ['a', 'b']}, ('a', 'b')),
  'list with null': ({'c': ['a', None, '']}, ('a',)),
  'null': ({'c': None}, ()),
  'blank': ({'c': ' '}, ()),
}


@pytest.mark.parametrize(('stored', 'expected'), CAPTIONS.values(), ids=CAPTIONS)
def test_a_caption_in_json_is_text_and_null_is_none(tmp_path, stored, expected):
  source = WebDataset(shard(tmp_path / '0.tar', [('0.jpg', JPG), ('0.json', json.dumps(stored))]), text='json/c')
  assert source[0]['texts'] == expected


@pytest.mark.parametrize(
  ('stored', 'spec', 'message'),
  [
    ({'c': {'en': 'a', 'fr': 'b'}}, 'json/c', "json/c is an object of 'en', 'fr', not a text; name the field"),
    ({'c': 7}, 'json/c', r'json/c is 7 \(int\), not a text'),
    ({'c': 'a'}, 'json', "json is an object of 'c', not a text; name the field, such as json/c"),
    ({'c': [1]}, 'json/c', r'json/c is 1 \(int\), not a text'),
    ({'c': 'a'}, 'json/d', "its .json has no field 'd'; known: c"),
    ('{"c": ', 'json/c', 'its .json is not JSON'),
    (b'\xff\xfe', 'json/c', 'its .json is not UTF-8 text'),
  ],
)
def test_a_caption_that_is_not_text_is_a_bad_record_with_its_field(tmp_path, stored, spec, message):
  data = json.dumps(stored) if isinstance(stored, dict) else stored
  source = WebDataset(shard(tmp_path / '0.tar', [('0.jpg', JPG), ('0.json', data)]), text=spec)
  with pytest.raises(BadRecord, match=message):
    source[0]
  nested = {'c': {'en': 'a'}, 's': [{'raw': 'b'}, {'raw': 'c'}]}
  shard(tmp_path / '1.tar', [('0.jpg', JPG), ('0.json', json.dumps(nested))])
  assert WebDataset(str(tmp_path / '1.tar'), text='json/c/en')[0]['texts'] == ('a',)
  assert WebDataset(str(tmp_path / '1.tar'), text='json/s/raw')[0]['texts'] == ('b', 'c')


@pytest.mark.parametrize(
  ('stored', 'expected'),
  [('2', 2), ('2\n', 2), ('2.0', 2), ('dog', 1), ('0.7', 'not a whole number'), ('', 'has no'), ('cow', 'not one of')],
)
def test_a_class_member_is_a_number_or_a_name(tmp_path, stored, expected):
  path = shard(tmp_path / '0.tar', [('0.jpg', JPG), ('0.cls', stored)])
  source = WebDataset(path, class_names=('cat', 'dog', 'emu'))
  if isinstance(expected, int):
    assert source[0]['label'] == expected
  else:
    with pytest.raises(BadRecord, match=expected):
      source[0]


@pytest.mark.parametrize(
  ('stored', 'expected'),
  [(2, 2), (2.0, 2), (True, 1), ('dog', 1), (0.7, 'whole'), ([1], 'a list of 1'), (None, 'has no')],
)
def test_a_class_in_json_is_a_number_or_a_name(tmp_path, stored, expected):
  path = shard(tmp_path / '0.tar', [('0.jpg', JPG), ('0.json', json.dumps({'y': stored}))])
  source = WebDataset(path, label='json/y', class_names=('cat', 'dog', 'emu'))
  if isinstance(expected, int):
    assert source[0]['label'] == expected
  else:
    with pytest.raises(BadRecord, match=expected):
      source[0]


def test_one_missing_caption_is_skipped_and_counted_not_refused_whole(tmp_path):
  members = [('0.jpg', JPG), ('0.txt', 'one'), ('1.jpg', JPG), ('2.jpg', JPG), ('2.txt', '')]
  source = WebDataset(shard(tmp_path / '0.tar', members))
  loader = TrainLoader(
    Pipeline(source, shuffle=False, max_bad=1.0), batch=3, seed=0, fields=('tokens',), tokenizer=ClipBpe(8)
  )
  assert set(ClipBpe(8).decode(next(loader)['tokens'])) == {'one'}
  loader.close()
  assert set(loader.skipped.values()) == {'has no text'}
  assert source.account().missing == {'text': 1}


def test_shards_of_several_splits_are_not_read_as_one(tmp_path):
  for name in ('train-0000', 'train-0001', 'test-0000', 'val_0'):
    shard(tmp_path / f'{name}.tar', [('0.jpg', JPG), ('0.txt', name)])
  message = refused(str(tmp_path))
  assert 'contains several splits: test (1 files), train (2 files), validation (1 files); set split' in message
  assert [sample['text'] for sample in read(WebDataset(str(tmp_path), split='train'))] == ['train-0000', 'train-0001']
  assert WebDataset(str(tmp_path), split='val')[0]['text'] == 'val_0'
  assert len(WebDataset(str(tmp_path), split='all')) == 4
  assert len(WebDataset(str(tmp_path / 'train-*.tar'))) == 2
  source = WebDataset(str(tmp_path), split='train')
  assert source.account().split == 'train'
  assert "split 'extra': none of the 4 files" in refused(str(tmp_path), split='extra')


def test_shards_in_subfolders_are_read_and_those_of_splits_are_distinguished(tmp_path):
  shard(tmp_path / 'train' / '0.tar', [('0.jpg', JPG), ('0.txt', 'a')])
  assert len(WebDataset(str(tmp_path))) == 1
  shard(tmp_path / 'test' / '0.tar', [('0.jpg', JPG), ('0.txt', 'b')])
  assert 'several splits' in refused(str(tmp_path))
  assert WebDataset(str(tmp_path), split='test')[0]['text'] == 'b'
  assert len(WebDataset(str(tmp_path / 'train'), split='train')) == 1


def test_compressed_shards_are_named_where_there_are_no_others(tmp_path):
  shard(tmp_path / '0.tar', [('0.jpg', JPG)])
  (tmp_path / '0.tar').rename(tmp_path / '0.tar.gz')
  assert 'it contains 1 .gz' in refused(str(tmp_path))
  shard(tmp_path / '1.tar', [('0.jpg', JPG)])
  (tmp_path / '._1.tar').write_bytes(b'')
  account = WebDataset(str(tmp_path)).account()
  assert [str(left) for left in account.left_out] == ['files .gz: 1 (0.tar.gz)']
