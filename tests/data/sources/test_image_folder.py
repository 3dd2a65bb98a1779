import csv
import json
import os
import pickle
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from fmcv_jax.config import build
from fmcv_jax.data.images.decode import FORMATS, decode
from fmcv_jax.data.sources.base import Source
from fmcv_jax.data.sources.folder_index import EXTENSIONS
from fmcv_jax.data.sources.image_folder import ImageFolder
from fmcv_jax.errors import UserError


def draw(path, value=0):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(path)


@pytest.fixture
def classes(tmp_path):
  draw(tmp_path / 'dog' / 'b.png', 10)
  draw(tmp_path / 'dog' / 'a.PNG', 20)
  draw(tmp_path / 'cat' / 'deep' / 'c.jpg', 30)
  (tmp_path / 'emu').mkdir()
  (tmp_path / 'dog' / 'notes.txt').write_text('no image')
  (tmp_path / '.cache').mkdir()
  return tmp_path


@pytest.fixture
def photos(tmp_path):
  for name in ('x.png', 'y.png', 'sub/z.png'):
    draw(tmp_path / name)
  return tmp_path


ROWS = [('x.png', 'an x'), ('sub/z.png', 'a z, "quoted"'), ('x.png', 'still an x'), ('y.png', 'ÿ 😀')]


def write_table(file, rows=ROWS, columns=('image', 'caption')):
  if file.suffix == '.jsonl':
    file.write_text('\n'.join(json.dumps(dict(zip(columns, row))) for row in rows), encoding='utf-8')
  elif file.suffix == '.parquet':
    pyarrow = pytest.importorskip('pyarrow')
    parquet = pytest.importorskip('pyarrow.parquet')
    parquet.write_table(pyarrow.table({c: [row[i] for row in rows] for i, c in enumerate(columns)}), file)
  elif file.suffix == '.tsv':
    file.write_text('\n'.join('\t'.join(row) for row in [columns, *rows]), encoding='utf-8')
  else:
    with file.open('w', encoding='utf-8', newline='') as out:
      csv.writer(out).writerows([columns, *rows])


def test_class_folders_give_labels_and_names(classes):
  source = ImageFolder(str(classes))
  assert source.names == ('cat', 'dog', 'emu')
  assert [source.key_of(i) for i in range(len(source))] == ['cat/deep/c.jpg', 'dog/a.PNG', 'dog/b.png']
  assert [(source[i]['label'], source[i]['text']) for i in range(3)] == [(0, 'cat'), (1, 'dog'), (1, 'dog')]
  assert source[1]['image'] == (classes / 'dog' / 'a.PNG').read_bytes()
  assert decode(source[2]['image'])[0, 0].tolist() == [10, 10, 10]
  with pytest.raises(IndexError):
    source[3]


def test_a_flat_folder_gives_images_alone(tmp_path):
  draw(tmp_path / 'b.png')
  draw(tmp_path / 'a.png')
  source = ImageFolder(str(tmp_path))
  assert [source[i]['key'] for i in range(2)] == ['a.png', 'b.png']
  assert set(source[0]) == {'image', 'key'}
  assert source.names == ()


@pytest.mark.parametrize('kind', ['csv', 'tsv', 'jsonl', 'parquet'])
def test_captions_of_one_image_are_one_record(photos, kind):
  write_table(photos / f'captions.{kind}')
  source = ImageFolder(str(photos), captions=f'captions.{kind}')
  assert {source[i]['key']: source[i]['texts'] for i in range(len(source))} == {
    'sub/z.png': ('a z, "quoted"',),
    'x.png': ('an x', 'still an x'),
    'y.png': ('ÿ 😀',),
  }
  assert source[1]['text'] == 'an x'
  assert source.texts_of(1) == ('an x', 'still an x')


def test_captions_with_other_column_names_and_lists(photos, tmp_path_factory):
  table = tmp_path_factory.mktemp('elsewhere') / 'captions.jsonl'
  write_table(table, [('x.png', ['one', 'two'])], ('file', 'sentences'))
  source = ImageFolder(str(photos), captions=str(table), image_column='file', caption_column='sentences')
  assert len(source) == 1
  assert source[0]['texts'] == ('one', 'two')


def test_texts_are_known_without_reading_images(photos):
  write_table(photos / 'c.csv')
  source = ImageFolder(str(photos), captions='c.csv')
  len(source)
  (photos / 'x.png').unlink()
  assert source.texts_of(1) == ('an x', 'still an x')
  with pytest.raises(OSError, match=r'x\.png'):
    source[1]


def test_source_travels_with_what_it_found(classes):
  source = ImageFolder(str(classes))
  assert len(source) == 3
  draw(classes / 'cat' / 'aaa.png')
  assert pickle.loads(pickle.dumps(source))[2] == source[2]
  assert pickle.loads(pickle.dumps(source)) == source


@pytest.mark.parametrize('kind', ['csv', 'tsv', 'jsonl', 'parquet'])
def test_missing_columns_are_named_with_those_found(photos, kind):
  write_table(photos / f'c.{kind}', columns=('file', 'words'))
  with pytest.raises(UserError, match="no column 'image' and no column 'caption'; it has 'file', 'words'; set"):
    len(ImageFolder(str(photos), captions=f'c.{kind}'))
  with pytest.raises(UserError, match="no column 'caption'; it has 'file', 'words'; set"):
    len(ImageFolder(str(photos), captions=f'c.{kind}', image_column='file'))


def test_images_of_the_table_that_do_not_exist_are_counted_and_the_first_is_named(photos):
  write_table(photos / 'c.csv', [*ROWS, ('gone.png', 'a'), ('sub/lost.png', 'b')])
  with pytest.raises(UserError, match=r"2 of the 5 images in .*c.csv' do not exist, first .*/gone.png"):
    len(ImageFolder(str(photos), captions='c.csv'))


def refuse(pattern, *args, **kwargs):
  with pytest.raises(UserError, match=pattern) as error:
    len(ImageFolder(*args, **kwargs))
  assert '\n' not in str(error.value)


def test_missing_and_empty_folders_and_tables_are_one_clear_line(photos, tmp_path_factory):
  empty = tmp_path_factory.mktemp('empty')
  refuse(r"no folder '/no/such' \(relative to .*\); set path", '/no/such')
  refuse(r'no images in .* supported: \.jpg', str(empty))
  refuse(r"no captions at '.*/c.csv'; captions is a path from", str(photos), captions='c.csv')
  (photos / 'c.csv').write_text('image,caption\n')
  refuse('have no rows', str(photos), captions='c.csv')
  (photos / 'c.csv').write_text('image,caption\nx.png\n')
  refuse(r"no rows that can be used: rows without 'caption': 1 \(c.csv:2\)", str(photos), captions='c.csv')
  (photos / 'c.jsonl').write_text('{"image": "x.png", "caption": "a"}\n{"image": \n')
  refuse(r'c.jsonl:2: is not JSON ', str(photos), captions='c.jsonl')
  (photos / 'c.jsonl').write_text('[1]\n')
  refuse(r'c.jsonl:1: is not a JSON object', str(photos), captions='c.jsonl')
  (photos / 'c.tsv').write_bytes(b'image\tcaption\nx.png\t\xff\xfe\n')
  refuse(r'c.tsv is not UTF-8 text .*; save it as UTF-8', str(photos), captions='c.tsv')
  (photos / 'c.parquet').write_bytes(b'no parquet')
  refuse(r'c.parquet is damaged', str(photos), captions='c.parquet')


def test_images_next_to_class_folders_are_not_ignored_silently(classes):
  draw(classes / 'stray.png')
  refuse(r'1 images \(stray.png, ...\) are next to the class folders \(cat, ...\)', str(classes))


def test_parquet_without_pyarrow_says_what_to_install(photos, monkeypatch):
  (photos / 'c.parquet').write_bytes(b'')
  monkeypatch.setitem(sys.modules, 'pyarrow', None)
  refuse('pip install pyarrow', str(photos), captions='c.parquet')


def test_an_unknown_kind_of_table_is_refused_with_its_field():
  with pytest.raises(UserError, match=r"config.data: captions: 'c.xml' is not a table of .csv"):
    build(
      Source, {'name': 'folder', 'path': 'x', 'captions': 'c.xml'}, {Source: {'folder': ImageFolder}}, 'config.data'
    )


def test_images_at_a_url_are_those_on_disk(classes):
  import fsspec

  write_table(classes / 'table.csv', [('dog/a.PNG', 'a dog'), ('cat/deep/c.jpg', 'a cat')])
  fsspec.filesystem('memory').put(f'{classes}/', '/folder/', recursive=True)
  here, there = ImageFolder(str(classes)), ImageFolder('memory://folder')
  assert set(there.names) <= set(here.names)
  assert [(there[index]['image'], there[index]['text'], there[index]['key']) for index in range(3)] == [
    (here[index]['image'], here[index]['text'], here[index]['key']) for index in range(3)
  ]
  here, there = (ImageFolder(root, captions='table.csv') for root in (str(classes), 'memory://folder'))
  assert [there[index] for index in range(2)] == [here[index] for index in range(2)]
  with pytest.raises(UserError, match="no folder 'memory://nowhere'"):
    len(ImageFolder('memory://nowhere'))


def test_classes_and_labels_are_those_of_torchvision(classes):
  torchvision = pytest.importorskip('torchvision.datasets')
  draw(classes / 'Zebra' / 'z.jpeg')
  draw(classes / 'emu' / 'e.webp')
  theirs = torchvision.ImageFolder(str(classes), is_valid_file=lambda p: not p.endswith('.txt'), allow_empty=True)
  names = [name for name in theirs.classes if not name.startswith('.')]  # it takes .cache for a class without images
  source = ImageFolder(str(classes))
  assert list(source.names) == names
  ours = {source.key_of(index): source.names[source[index]['label']] for index in range(len(source))}
  assert ours == {os.path.relpath(path, classes): theirs.classes[label] for path, label in theirs.samples}


def test_every_extension_of_a_format_that_is_decoded_is_an_image(tmp_path):
  Image.init()
  known = {extension for extension, kind in Image.registered_extensions().items() if kind in FORMATS}
  assert known <= set(EXTENSIONS)
  draw(tmp_path / 'a' / 'x.png')
  for name in ('y.jfif', 'z.JPE', 'w.Pgm'):
    shutil.copy(tmp_path / 'a' / 'x.png', tmp_path / 'a' / name)
  assert len(ImageFolder(str(tmp_path))) == 4


def test_files_that_are_not_read_and_classes_without_images_are_counted_by_reason(tmp_path):
  for number in range(8):
    draw(tmp_path / 'cat' / f'{number}.png')
    (tmp_path / 'dog').mkdir(exist_ok=True)
    (tmp_path / 'dog' / f'{number}.HEIC').write_bytes(b'')
  (tmp_path / 'cat' / 'Thumbs.db').write_bytes(b'')
  (tmp_path / 'cat' / '._0.png').write_bytes(b'')
  (tmp_path / '__MACOSX' / 'cat').mkdir(parents=True)
  (tmp_path / '__MACOSX' / 'cat' / '0.png').write_bytes(b'')
  account = ImageFolder(str(tmp_path)).account()
  assert (account.records, account.classes, account.class_counts) == (8, ('cat', 'dog'), (8, 0))
  assert [str(left) for left in account.left_out] == [
    'class folders without images: 1 (dog)',
    'files .heic: 8 (dog/0.HEIC, dog/1.HEIC, dog/2.HEIC, ...)',
    'files .db: 1 (cat/Thumbs.db)',
  ]
  assert account.fields['image'] == '8 .png'
  assert 'left out: class folders without images: 1 (dog)' in account.lines()


def test_a_folder_of_images_that_cannot_be_read_says_which_they_are(tmp_path):
  (tmp_path / 'x.heic').write_bytes(b'')
  refuse(r'no images in .*, which contain files .heic: 1 \(x.heic\); .*convert others', str(tmp_path))


@pytest.mark.parametrize('folders', [('train', 'test'), ('train', 'val'), ('Train_images', 'valid_2'), ('train',)])
def test_folders_of_splits_are_not_classes(tmp_path, folders):
  for name in folders:
    draw(tmp_path / name / 'cat' / 'x.png')
    draw(tmp_path / name / 'dog' / 'y.png')
  refuse(r'are splits, not classes; set split to one of them', str(tmp_path))
  source = ImageFolder(str(tmp_path), split=folders[0])
  assert (source.names, source.account().split) == (('cat', 'dog'), folders[0])
  assert ImageFolder(str(tmp_path), split='train').names == ('cat', 'dog')
  assert ImageFolder(str(tmp_path), split='all').names == tuple(sorted(folders))
  refuse(r"split 'extra': .* has no subfolders of it; ", str(tmp_path), split='extra')
  draw(tmp_path / 'bus' / 'x.png')  # next to a bus, `train` is a vehicle and not a split
  assert 'bus' in ImageFolder(str(tmp_path)).names
