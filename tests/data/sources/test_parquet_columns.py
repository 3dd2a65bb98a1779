"""Columns of every type that tables have: read by their meaning, or refused by name before the first record."""

import datetime
import json

import pytest

from fmcv_jax.data.loader import TrainLoader
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.data.sources.array_record import ArrayRecord, write_array_record
from fmcv_jax.data.sources.base import BadRecord
from fmcv_jax.data.sources.parquet import Parquet
from fmcv_jax.data.tokenizers import ClipBpe
from fmcv_jax.data.transforms import Resize
from fmcv_jax.errors import UserError
from tests.data.shards import encoded_image

pa = pytest.importorskip('pyarrow')
pq = pytest.importorskip('pyarrow.parquet')

IMAGES = [encoded_image(index)[0] for index in range(3)]
STRUCT = pa.struct({'en': pa.string(), 'fr': pa.string()})


def table(folder, name='train-00000-of-00001.parquet', metadata=None, **columns):
  path = folder / name
  path.parent.mkdir(parents=True, exist_ok=True)
  arrays = {key: value if isinstance(value, pa.Array) else pa.array(value) for key, value in columns.items()}
  made = pa.table({'image': pa.array(IMAGES[: len(next(iter(arrays.values())))], pa.binary()), **arrays})
  pq.write_table(made.replace_schema_metadata(metadata), path)
  return str(folder)


def texts(source):
  return [source[index]['texts'] for index in range(len(source))]


def refused(source):
  with pytest.raises(UserError) as error:
    len(source)
  assert '\n' not in str(error.value)
  return str(error.value)


@pytest.mark.parametrize(
  'column',
  [
    pa.array(['one', 'two', None]),
    pa.array(['one', 'two', None], pa.large_string()),
    pa.array(['one', 'two', None]).dictionary_encode(),
    pa.array([b'one', b'two', None], pa.binary()),
    pa.array([b'one', b'two', None], pa.large_binary()),
    pa.array([['one', None], ['two'], []], pa.list_(pa.string())),
    pa.array([['one'], ['two', ''], None], pa.large_list(pa.binary())),
    pa.array([['one', None], ['two', ' '], [None, None]], pa.list_(pa.string(), 2)),
  ],
  ids=lambda column: str(column.type),
)
def test_texts_of_any_type_are_the_captions_and_null_is_a_record_without_one(tmp_path, column):
  source = Parquet(table(tmp_path, caption=column), text='caption')
  assert texts(source) == [('one',), ('two',), ()]
  assert 'text' not in source[2]


@pytest.mark.parametrize(
  ('column', 'spec', 'expected'),
  [
    (pa.array([{'en': 'one', 'fr': 'un'}, {'en': None, 'fr': 'deux'}, None], STRUCT), 'c/en', [('one',), (), ()]),
    (
      pa.array([[{'en': 'one', 'fr': ''}, {'en': 'uno', 'fr': ''}], [], None], pa.list_(STRUCT)),
      'c/en',
      [('one', 'uno'), (), ()],
    ),
    (
      pa.array([[('en', 'one')], [('en', 'two'), ('fr', 'deux')], None], pa.map_(pa.string(), pa.string())),
      'c/en',
      [('one',), ('two',), ()],
    ),
    (
      pa.array([{'s': ['one', 'uno']}, {'s': None}, {'s': []}], pa.struct({'s': pa.list_(pa.string())})),
      'c/s',
      [('one', 'uno'), (), ()],
    ),
  ],
  ids=['struct', 'list of structs', 'map', 'struct of lists'],
)
def test_a_field_inside_a_column_is_named_behind_it(tmp_path, column, spec, expected):
  if pa.types.is_map(column.type):
    table(tmp_path, c=column)
    source = Parquet(str(tmp_path), text=spec)
    assert [source[index]['texts'] for index in (0, 1)] == expected[:2]
    return
  assert texts(Parquet(table(tmp_path, c=column), text=spec)) == expected


def test_a_column_whose_name_has_a_slash_is_meant_before_a_field(tmp_path):
  assert texts(Parquet(table(tmp_path, **{'c/en': ['one']}), text='c/en')) == [('one',)]


@pytest.mark.parametrize(
  ('column', 'message'),
  [
    (pa.array([{'en': 'a', 'fr': 'b'}]), "holds objects of 'en', 'fr', not texts; set text to a field, such as c/en"),
    (pa.array([[{'raw': 'a'}]]), "holds objects of 'raw', not texts; set text to a field, such as c/raw"),
    (pa.array([[('en', 'a')]], pa.map_(pa.string(), pa.string())), 'holds maps, not texts; set text to a key'),
    (pa.array([7]), 'holds int64, not texts'),
    (pa.array([0.5]), 'holds double, not texts'),
    (pa.array([True]), 'holds bool, not texts'),
    (pa.array([datetime.date(2026, 1, 1)]), 'holds date32.*, not texts'),
    (pa.array([[1, 2]]), 'holds int64, not texts'),
    (pa.array([None]), "column 'c' at .* holds only nulls"),
  ],
  ids=lambda value: str(value.type) if isinstance(value, pa.Array) else None,
)
def test_a_column_that_holds_no_texts_is_one_line_before_the_first_record(tmp_path, column, message):
  with pytest.raises(UserError, match=message):
    len(Parquet(table(tmp_path, c=column), text='c'))


def test_one_null_caption_is_skipped_and_counted_and_an_image_run_keeps_it(tmp_path):
  path = table(tmp_path, caption=['one', None, 'three'])
  pipeline = Pipeline(Parquet(path, text='caption'), Resize(8), shuffle=False, max_bad=0.5)
  loader = TrainLoader(pipeline, batch=3, seed=0, fields=('image', 'tokens'), tokenizer=ClipBpe(8))
  next(loader)
  loader.close()
  assert list(loader.skipped.values()) == ['has no text']
  loader = TrainLoader(pipeline, batch=3, seed=0, fields=('image',))
  next(loader)
  loader.close()
  assert not loader.skipped
  assert Parquet(path, text='caption').account().missing == {'text': 1}


def test_a_null_caption_is_not_replaced_by_the_name_of_the_class(tmp_path):
  path = table(tmp_path, caption=['one', None, 'three'], label=['cat', 'cat', 'dog'])
  pipeline = Pipeline(Parquet(path, text='caption', label='label'), shuffle=False, max_bad=1.0)
  loader = TrainLoader(pipeline, batch=3, seed=0, fields=('tokens',), tokenizer=ClipBpe(8))
  shown = ClipBpe(8).decode(next(loader)['tokens'])
  assert sorted(set(shown)) == ['one', 'three']
  loader.close()


@pytest.mark.parametrize(
  'column',
  [
    pa.array([2, 0, 1], pa.int8()),
    pa.array([2, 0, 1], pa.uint64()),
    pa.array([2.0, 0.0, 1.0]),
    pa.array(['2', '0', '1']),
    pa.array([2, 0, 1]).cast(pa.decimal128(30, 2)),
    pa.array([2, 0, 1]).dictionary_encode(),
  ],
  ids=lambda column: str(column.type),
)
def test_whole_numbers_of_any_type_are_the_classes(tmp_path, column):
  source = Parquet(table(tmp_path, y=column), label='y')
  assert [source[index]['label'] for index in range(3)] == [2, 0, 1]
  assert source.names == ()
  assert source.account().label_range == (0, 2)


def test_true_and_false_are_classes_1_and_0(tmp_path):
  source = Parquet(table(tmp_path, y=[True, False]), label='y')
  assert [source[index]['label'] for index in range(2)] == [1, 0]


def test_a_column_of_names_gives_the_classes_that_datasets_encodes(tmp_path):
  column = ['emu', 'cat', 'dog']
  source = Parquet(table(tmp_path, y=column), label='y')
  assert source.names == ('cat', 'dog', 'emu')  # sorted, as Dataset.class_encode_column numbers them
  assert [source[index]['label'] for index in range(3)] == [2, 0, 1]
  account = source.account()
  assert account.class_counts == (1, 1, 1)
  assert account.fields['label'] == "column 'y': string"
  named = Parquet(str(tmp_path), label='y', class_names=('emu', 'dog', 'cat'))
  assert [named[index]['label'] for index in range(3)] == [0, 2, 1]
  datasets = pytest.importorskip('datasets')
  encoded = datasets.Dataset.from_dict({'y': column}).class_encode_column('y')
  assert encoded.features['y'].names == list(source.names)
  assert encoded['y'][:] == [source[index]['label'] for index in range(3)]


@pytest.mark.parametrize(
  ('column', 'message'),
  [
    (pa.array([[1]]), 'holds list<.*>, not one class number or name a row'),
    (pa.array([{'id': 1}]), "holds objects of 'id', not a class; set label to a field, such as y/id"),
    (pa.array([None]), 'holds only nulls, set label'),
  ],
  ids=lambda value: str(value.type) if isinstance(value, pa.Array) else None,
)
def test_a_column_that_holds_no_classes_is_one_line_before_the_first_record(tmp_path, column, message):
  with pytest.raises(UserError, match=message):
    len(Parquet(table(tmp_path, y=column), label='y'))


def test_a_class_that_is_not_whole_missing_or_unknown_is_a_bad_record_and_never_class_0(tmp_path):
  source = Parquet(table(tmp_path, y=[0.7, None, 2.0]), label='y', class_names=('a', 'b', 'c'))
  for index, message in [(0, 'y is 0.7, which is not a whole number'), (1, 'has no y')]:
    with pytest.raises(BadRecord, match=message):
      source[index]
  assert source[2]['label'] == 2
  account = source.account()
  assert (account.class_counts, account.missing) == ((0, 0, 1), {'label': 2})
  unlabelled = Parquet(table(tmp_path / 'test', y=[-1]), label='y')  # how `datasets` marks a test set without classes
  with pytest.raises(BadRecord, match='y is -1, which stands for no class'):
    unlabelled[0]


def test_images_are_bytes_of_any_type_and_paths_are_reported_as_not_being_images(tmp_path):
  for name, kind in {'large': pa.large_binary(), 'plain': pa.binary()}.items():
    table(tmp_path / name, img=pa.array(IMAGES, kind))
    assert Parquet(str(tmp_path / name), image='img')[1]['image'] == IMAGES[1]
  nested = pa.array([{'front': {'bytes': IMAGES[2], 'path': None}}])
  assert Parquet(table(tmp_path / 'nested', view=nested), image='view/front')[0]['image'] == IMAGES[2]
  paths = table(tmp_path / 'paths', photo=['x.jpg'])
  assert "column 'photo' holds paths or text, not encoded images" in refused(Parquet(paths, image='photo'))
  pixels = table(tmp_path / 'pixels', photo=[[1, 2, 3]])
  assert 'not encoded images; set image to the column of their bytes' in refused(Parquet(pixels, image='photo'))
  lost = pa.array([{'bytes': None, 'path': 'x.jpg'}], pa.struct({'bytes': pa.binary(), 'path': pa.string()}))
  with pytest.raises(BadRecord, match=r"has no bytes in 'lost', only the path 'x\.jpg'"):
    Parquet(table(tmp_path / 'lost', lost=lost), image='lost')[0]


def test_hive_partitions_are_read_with_their_columns_as_arrow_reads_them(tmp_path):
  import pyarrow.dataset

  for year, kind, name in [('2023', 'cat', 'a'), ('2024', 'big%20dog', 'b'), ('2024', 'cat', 'c')]:
    table(tmp_path, f'year={year}/kind={kind}/part-0.parquet', caption=[name])
  table(tmp_path, '_temporary/part-0.parquet', caption=['lost'])
  source = Parquet(str(tmp_path), text='caption', label='kind')
  theirs = pyarrow.dataset.dataset(tmp_path, partitioning='hive').to_table().to_pylist()
  ours = [(source[i]['text'], source.names[source[i]['label']]) for i in range(len(source))]
  assert sorted(ours) == sorted((row['caption'], row['kind']) for row in theirs)
  assert source.names == ('big dog', 'cat')
  assert source.account().class_counts == (1, 2)
  assert Parquet(str(tmp_path), text='year')[0]['text'] == '2023'
  assert "no column 'kin', set label; did you mean 'kind'" in refused(Parquet(str(tmp_path), label='kin'))


def test_hive_partitions_at_a_url_are_those_on_disk(tmp_path):
  fsspec = pytest.importorskip('fsspec')
  for kind in ('cat', 'dog'):
    table(tmp_path, f'train/kind={kind}/part-0.parquet', caption=[kind])
  table(tmp_path, 'test/part-0.parquet', caption=['other'])
  fsspec.filesystem('memory').put(f'{tmp_path}/', '/hive/', recursive=True)
  here, there = (
    Parquet(path, text='caption', label='kind', split='train') for path in (str(tmp_path), 'memory://hive')
  )
  assert [there[i]['text'] for i in range(2)] == [here[i]['text'] for i in range(2)] == ['cat', 'dog']
  assert there.names == here.names == ('cat', 'dog')
  assert (here.account().class_counts, there.account().class_counts) == ((1, 1), None)  # reading a column may be dear
  assert 'several splits: test (1 files), train (2 files)' in refused(Parquet('memory://hive'))


def test_a_name_that_two_columns_have_is_refused(tmp_path):
  pq.write_table(pa.table([pa.array(IMAGES[:1]), ['a'], ['b']], names=['image', 'c', 'c']), tmp_path / 'x.parquet')
  assert "has 2 columns 'c'; rename all but one" in refused(Parquet(str(tmp_path), text='c'))


def test_class_names_that_differ_between_tables_are_not_read_as_one(tmp_path):
  for number, names in enumerate((['cat', 'dog'], ['dog', 'cat'])):
    info = {'info': {'features': {'y': {'names': names, '_type': 'ClassLabel'}}}}
    table(tmp_path, f'{number}.parquet', {'huggingface': json.dumps(info)}, y=[0])
  assert 'has other class names (dog, cat, ...)' in refused(Parquet(str(tmp_path), label='y'))


def test_a_table_in_which_every_caption_is_null_is_read_among_others(tmp_path):
  table(tmp_path, '0.parquet', caption=[None, None])
  table(tmp_path, '1.parquet', caption=['one'])
  table(tmp_path, '2.parquet', caption=pa.array([], pa.null()))
  assert texts(Parquet(str(tmp_path), text='caption')) == [(), (), ('one',)]


def test_packing_keeps_texts_as_texts(tmp_path):
  captions = pa.array([b'one', None, b'three'], pa.binary())
  write_array_record(Parquet(table(tmp_path / 'in', c=captions), text='c'), str(tmp_path / 'out'))
  packed = ArrayRecord(str(tmp_path / 'out'))
  assert [packed[index]['texts'] for index in range(3)] == [('one',), (), ('three',)]


def test_the_account_names_columns_and_files_that_are_not_read(tmp_path):
  path = table(tmp_path, caption=['one', 'two'], url=['u', 'v'], score=[1.0, 2.0])
  (tmp_path / 'README.md').write_text('')
  account = Parquet(path, text='caption').account()
  assert account.records == 2
  assert account.fields == {'image': "column 'image': binary", 'text': "column 'caption': string"}
  assert account.split == 'train'
  assert [str(left) for left in account.left_out] == [
    'columns that are not read: 2 (url, score)',
    'files .md: 1 (README.md)',
  ]
