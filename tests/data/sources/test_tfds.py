import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest

from fmcv_jax.data.images.decode import decode
from fmcv_jax.data.loader import TrainLoader
from fmcv_jax.data.packing import pack
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.data.sources.array_record import ArrayRecord
from fmcv_jax.data.sources.base import BadRecord
from fmcv_jax.data.sources.tfds import Tfds
from fmcv_jax.data.tokenizers import ClipBpe
from fmcv_jax.data.transforms import RandomResizedCrop
from fmcv_jax.errors import UserError

# Building and reading in a process of its own: the claim is that TensorFlow is never imported.
BUILD = """
import io, sys
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

def png(i):
  file = io.BytesIO()
  Image.fromarray(np.full((4, 5, 3), i * 10, np.uint8)).save(file, 'PNG')
  return io.BytesIO(file.getvalue())

class Tiny(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version('1.0.0')
  def _info(self):
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
      'image': tfds.features.Image(shape=(None, None, 3), encoding_format='png'),
      'label': tfds.features.ClassLabel(names=['even', 'odd']),
      'captions': tfds.features.Sequence({'text': tfds.features.Text()}),
      'title': tfds.features.Text(),
    }))
  def _split_generators(self, dl_manager):
    unlabelled = self._generate_examples(2, label=-1, texts=[])
    return {'train': self._generate_examples(7), 'test': self._generate_examples(3), 'unlabelled': unlabelled}
  def _generate_examples(self, n, label=None, texts=None):
    for i in range(n):
      captions = [{'text': f'caption {i}'}, {'text': 'é'}] if texts is None else texts
      yield i, {
        'image': png(i), 'label': i % 2 if label is None else label, 'captions': captions, 'title': f'title {i}'
      }

Tiny(data_dir=sys.argv[1], file_format='array_record').download_and_prepare()
"""

READ = """
import sys
sys.path.insert(0, '.')
from fmcv_jax.data.sources.base import BadRecord
from fmcv_jax.data.sources.tfds import Tfds
source = Tfds('tiny', 'train', data_dir=sys.argv[1])
assert len(source) == 7 and source[3]['image'][:4] == b'\\x89PNG' and source.names == ('even', 'odd')
assert 'tensorflow' not in sys.modules
print('read')
"""


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  path = str(tmp_path_factory.mktemp('tfds'))
  subprocess.run([sys.executable, '-c', BUILD, path], capture_output=True, check=True)
  return path


def test_a_built_set_is_read_without_tensorflow(data_dir):
  run = subprocess.run([sys.executable, '-c', READ, data_dir], capture_output=True, text=True)
  assert run.stdout == 'read\n', run.stderr


def test_records_without_class_or_caption_are_not_read_as_others(data_dir):
  with pytest.raises(BadRecord, match='label is -1, not one of the classes 0 to 1'):
    Tfds('tiny', 'unlabelled', data_dir=data_dir)[0]
  example = Tfds('tiny', 'unlabelled', data_dir=data_dir, label_key=None, text_key='captions/text')[0]
  assert example['texts'] == ()
  assert 'text' not in example
  with pytest.raises(BadRecord, match=r'label is 1 \(int\), not a text'):
    Tfds('tiny', 'train', data_dir=data_dir, text_key='label')[1]
  with pytest.raises(BadRecord, match='captions/text is a list of 2; expected one class'):
    Tfds('tiny', 'train', data_dir=data_dir, label_key='captions/text')[0]


def test_the_account_says_which_features_are_read(data_dir):
  account = Tfds('tiny', 'train', data_dir=data_dir, text_key='title').account()
  assert (account.records, account.classes, account.split) == (7, ('even', 'odd'), 'train')
  assert account.fields == {'image': "feature 'image'", 'label': "feature 'label'", 'text': "feature 'title'"}


def test_examples_hold_encoded_images_labels_and_texts(data_dir):
  source = Tfds('tiny:1.0.0', 'train', data_dir=data_dir, text_key='captions/text')
  examples = [source[i] for i in range(len(source))]
  values = [int(decode(example['image'])[0, 0, 0]) // 10 for example in examples]
  assert sorted(values) == list(range(7))
  for value, example in zip(values, examples):
    assert example['label'] == value % 2
    assert example['texts'] == (f'caption {value}', 'é')
    assert example['text'] == f'caption {value}'
  assert examples[2]['key'] == source.key_of(2) == 'tiny:1.0.0/train[2]'
  with pytest.raises(IndexError):
    source[7]


def test_slices_and_single_texts(data_dir):
  source = Tfds('tiny', 'train[:4]+test', data_dir=data_dir, image_key=None, label_key=None, text_key='title')
  assert len(source) == 7
  assert set(source[0]) == {'text', 'texts', 'key'}
  assert source[0]['text'].startswith('title ')
  assert source.names == ()


def test_a_read_source_is_pickled_as_its_fields(data_dir):
  source = Tfds('tiny', 'test', data_dir=data_dir)
  first = source[0]
  assert len(pickle.dumps(source)) < 500
  again = pickle.loads(pickle.dumps(source))
  assert again == source
  assert again[0] == first
  np.testing.assert_array_equal(decode(again[0]['image']), decode(first['image']))


def test_a_flipped_bit_is_a_bad_record(data_dir, tmp_path):
  copy = tmp_path / 'data'
  shutil.copytree(data_dir, copy)
  (shard,) = copy.glob('tiny/1.0.0/tiny-test.array_record*')
  data = bytearray(shard.read_bytes())
  data[data.index(b'\x89PNG') + 9 if b'\x89PNG' in data else 200] ^= 1
  shard.write_bytes(data)
  source, bad = Tfds('tiny', 'test', data_dir=str(copy)), 0
  for index in range(3):
    try:
      assert decode(source[index]['image']).shape == (4, 5, 3)
    except BadRecord as error:
      bad += 'hash mismatch' in str(error)
  assert bad == 1


def refuse(pattern, *args, **kwargs):
  with pytest.raises(UserError, match=pattern) as error:
    Tfds(*args, **kwargs)[0]
  assert '\n' not in str(error.value)


def test_imagenet_that_is_not_there_says_where_it_looked_and_how_to_get_it(tmp_path, monkeypatch):
  refuse(
    f"'imagenet2012' is not prepared; searched in {tmp_path}; run `tfds build imagenet2012 "
    f'--file_format=array_record --data_dir={tmp_path}` .*by hand into {tmp_path}/downloads/manual',
    'imagenet2012',
    data_dir=str(tmp_path),
  )
  monkeypatch.delenv('TFDS_DATA_DIR', raising=False)
  refuse(r'searched in .*tensorflow_datasets.* \(TFDS_DATA_DIR is not set\)', 'imagenet2012')


def test_unknown_names_splits_and_features_are_one_clear_line(data_dir):
  refuse("no data set 'imagenet2021', neither prepared .* did you mean 'imagenet2012'", 'imagenet2021')
  refuse(
    r"cannot read split 'validation' of 'tiny' \(train, test, unlabelled\)", 'tiny', 'validation', data_dir=data_dir
  )
  refuse("'tiny' has no label_key 'class'", 'tiny', data_dir=data_dir, label_key='class')
  refuse(r"has no text_key 'captions/txt' .* did you mean 'text'", 'tiny', data_dir=data_dir, text_key='captions/txt')
  refuse("no data set 'tiny:2.0.0', neither prepared in", 'tiny:2.0.0', data_dir=data_dir)
  refuse("cannot open 'mnist:9.9.9', searched in", 'mnist:9.9.9', data_dir=data_dir)


def test_a_set_without_random_access_says_how_to_prepare_it(data_dir, tmp_path, monkeypatch):
  source = Tfds('tiny', data_dir=data_dir)
  builder = source._builder

  def refused(**_):
    raise NotImplementedError('several\nlines')

  monkeypatch.setattr(builder, 'as_data_source', refused)
  with pytest.raises(UserError, match='has no random access; run `tfds build tiny --file_format=array_record'):
    len(source)


def test_batches_are_the_same_bytes_before_and_after_packing(data_dir, tmp_path):
  source = Tfds('tiny', 'train', data_dir=data_dir, text_key='captions/text')
  pack(source, tmp_path / 'packed', origin='tiny', shards=2)
  loaders = [
    TrainLoader(
      Pipeline(each, image=RandomResizedCrop(8), caption_templates=('a {}', '{}')),
      batch=5,
      seed=3,
      fields=('image', 'label', 'tokens'),
      tokenizer=ClipBpe(9),
    )
    for each in (source, ArrayRecord(str(tmp_path / 'packed')))
  ]
  for _ in range(4):
    ours, packed = (next(loader) for loader in loaders)
    for field in ours:
      np.testing.assert_array_equal(ours[field], packed[field])
  for loader in loaders:
    loader.close()
