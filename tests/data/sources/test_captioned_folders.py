"""Tables, metadata and text files of captions: whole captions and all images, or a line with its number."""

import csv
import io
import json
import os

import numpy as np
import pytest
from PIL import Image

from fmcv_jax.data.sources.image_folder import ImageFolder
from fmcv_jax.errors import UserError


@pytest.fixture
def photos(tmp_path):
  for name in ('x.png', 'y.png', 'sub/z.png'):
    draw(tmp_path / name)
  return tmp_path


def draw(path):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)


def texts(source):
  return {source.key_of(index): source.texts_of(index) for index in range(len(source))}


def read(folder, content, name='c.csv', **options):
  data = content.encode() if isinstance(content, str) else content
  (folder / name).write_bytes(data)
  return texts(ImageFolder(str(folder), captions=name, **options))


def refused(*args, **options):
  with pytest.raises(UserError) as error:
    read(*args, **options)
  assert '\n' not in str(error.value)
  return str(error.value)


SAME = {
  'plain': 'image,caption\nx.png,an x\ny.png,a y\n',
  'BOM': '\ufeffimage,caption\nx.png,an x\ny.png,a y\n',
  'CRLF': 'image,caption\r\nx.png,an x\r\ny.png,a y\r\n',
  'CR': 'image,caption\rx.png,an x\ry.png,a y\r',
  'spaces': ' image , caption \nx.png,an x\ny.png,a y\n',
  'empty lines': 'image,caption\n\nx.png,an x\n\n\ny.png,a y\n\n',
  'other columns': 'id,image,score,caption\n1,x.png,.5,an x\n2,y.png,,a y\n',
  'no last newline': 'image,caption\nx.png,an x\ny.png,a y',
  'quoted': '"image","caption"\n"x.png","an x"\n"y.png","a y"\n',
  './': 'image,caption\n./x.png,an x\nsub/../y.png,a y\n',
}


@pytest.mark.parametrize('content', SAME.values(), ids=SAME)
def test_the_same_table_however_it_is_written(photos, content):
  assert read(photos, content) == {'x.png': ('an x',), 'y.png': ('a y',)}
  if content != SAME['quoted']:
    for separator in ';\t':
      assert read(photos, content.replace(',', separator)) == {'x.png': ('an x',), 'y.png': ('a y',)}
    tabs = content.replace(',', '\t')
    assert read(photos, tabs, 'c.tsv') == {'x.png': ('an x',), 'y.png': ('a y',)}


CAPTIONS = [
  'a, b',
  'say "hi"',
  '"hi" she said',
  'tab\there',
  'two\nlines',
  "it's",
  'ünïcode 😀',
  '5" pipe',
  'a;b',
  ' x ',
]


@pytest.mark.parametrize('caption', CAPTIONS)
@pytest.mark.parametrize('kind', ['csv', 'tsv', 'tsv quoted', 'jsonl'])
def test_captions_come_back_as_csv_json_and_pandas_write_them(photos, caption, kind):
  rows = [('x.png', caption), ('y.png', 'plain')]
  if kind == 'jsonl':
    content = ''.join(json.dumps({'image': image, 'caption': text}) + '\n' for image, text in rows)
  elif kind == 'tsv':
    pandas = pytest.importorskip('pandas')
    content = pandas.DataFrame(rows, columns=['image', 'caption']).to_csv(sep='\t', index=False)
    if any(mark in caption for mark in '\t\n'):  # which only quoting can keep: the whole caption, or a line
      assert 'c.tsv:2: ' in refused(photos, content, 'c.tsv')
      return
  else:
    file, quoted = io.StringIO(newline=''), kind == 'tsv quoted'
    style = {'delimiter': '\t', 'quoting': csv.QUOTE_ALL} if quoted else {}
    csv.writer(file, **style).writerows([('image', 'caption'), *rows])
    content = file.getvalue()
  name = f'c.{kind.split()[0]}'
  assert read(photos, content, name) == {'x.png': (caption,), 'y.png': ('plain',)}


FAULTS = {
  'comma': (
    'image,caption\nx.png,an x\ny.png,a y, and more\n',
    r':3: has 3 cells, but there are 2 columns \(image, caption\); put the text',
  ),
  'comma in front': ('caption,image\na x, red,x.png\n', ':2: has 3 cells'),
  'never closed': ('image,caption\nx.png,"an x\ny.png,a y\nsub/z.png,a z\n', ':2: a quotation mark opened in this row'),
  'closed later': (
    'image,caption\nx.png,"an x\ny.png,a y"\nsub/z.png,a z\n',
    ":2: the text contains the line 'y.png,a y'",
  ),
  'closed by another': (
    'image,caption\nx.png,"an x\ny.png,"a y"\n',
    ':2: .*expected after.*, at line 3; a quotation mark inside',
  ),
  'text behind quotes': ('image,caption\nx.png,"An x" she said\n', ':2: .*; a quotation mark inside a quoted text is'),
  'two columns': ('image,caption,caption\nx.png,a,b\n', ":1: has two columns 'caption'; rename one"),
  'Latin-1': ('image,caption\nx.png,ol\xe9\n'.encode('latin-1'), ' is not UTF-8 text .*; save it as UTF-8'),
  'UTF-16': ('image,caption\nx.png,a\n'.encode('utf-16'), ' is not UTF-8 text'),
  'semicolons': (
    'image;caption\nx.png;a;b\n',
    r':2: has 3 cells, but there are 2 columns \(image, caption\); put the text with a semicolon in quotation marks',
  ),
  'two classes': (
    'image,caption,label\nx.png,a,cat\nx.png,b,dog\n',
    ":3: 'x.png' is of class 'dog', but of 'cat' in .*:2",
  ),
}


@pytest.mark.parametrize(('content', 'message'), FAULTS.values(), ids=FAULTS)
def test_what_would_lose_words_or_rows_is_a_line_with_its_number(photos, content, message):
  options = (
    {'label_column': 'label'} if b'label' in (content if isinstance(content, bytes) else content.encode()) else {}
  )
  (photos / 'c.csv').write_bytes(content if isinstance(content, bytes) else content.encode())
  with pytest.raises(UserError, match=r'c\.csv' + message):
    len(ImageFolder(str(photos), captions='c.csv', **options))


def test_a_surplus_tab_is_a_line_with_its_number(photos):
  message = refused(photos, 'image\tcaption\nx.png\tan x\ny.png\ta y\tand more\n', 'c.tsv')
  assert 'c.tsv:3: has 3 cells, but there are 2 columns (image, caption); put the text with a tab' in message


@pytest.mark.parametrize('null', ['', ' ', 'NULL', 'nan', 'None', 'N/A', '<NA>'])
def test_a_null_caption_is_left_out_and_counted_as_pandas_reads_it(photos, null):
  pandas = pytest.importorskip('pandas')
  content = f'image,caption\nx.png,an x\ny.png,{null}\nsub/z.png,a z\n'
  frame = pandas.read_csv(io.StringIO(content), skipinitialspace=True).dropna()
  assert read(photos, content) == {image: (caption,) for image, caption in zip(frame['image'], frame['caption'])}
  source = ImageFolder(str(photos), captions='c.csv')
  left = [str(left) for left in source.account().left_out]
  assert left == ["rows without 'caption': 1 (c.csv:3)", 'images that no table names: 1 (y.png)']


def test_rows_with_too_few_cells_are_left_out_and_counted(photos):
  assert read(photos, 'image,caption\nx.png\ny.png,a y\n') == {'y.png': ('a y',)}
  assert "rows without 'caption': 1 (c.csv:2)" in map(
    str, ImageFolder(str(photos), captions='c.csv').account().left_out
  )


JSON = {
  'text': ('an x', ('an x',)),
  'list': (['an x', 'the x'], ('an x', 'the x')),
  'list with null': (['an x', None], ('an x',)),
}


@pytest.mark.parametrize(('caption', 'expected'), JSON.values(), ids=JSON)
def test_captions_in_jsonl_are_texts_or_lists_of_texts(photos, caption, expected):
  line = json.dumps({'image': 'x.png', 'caption': caption})
  null = json.dumps({'image': 'y.png', 'caption': None})
  absent = json.dumps({'image': 'y.png'})
  assert read(photos, f'{line}\n{null}\n{absent}\n', 'c.jsonl') == {'x.png': expected}
  left = ImageFolder(str(photos), captions='c.jsonl').account().left_out
  assert "rows without 'caption': 2 (c.jsonl:2, c.jsonl:3)" in map(str, left)


def test_captions_that_are_objects_are_named_or_refused(photos):
  line = json.dumps({'image': 'x.png', 'caption': {'en': 'an x', 'fr': 'un x'}})
  assert read(photos, line, 'c.jsonl', caption_column='caption/fr') == {'x.png': ('un x',)}
  assert "c.jsonl:1: caption is an object of 'en', 'fr', not a text; name the field, such as caption/en" in refused(
    photos, line, 'c.jsonl'
  )
  assert 'c.jsonl:1: caption is 7 (int), not a text' in refused(photos, '{"image": "x.png", "caption": 7}', 'c.jsonl')
  for label, shown in (([1], 'a list of 1'), ({'id': 1}, "an object of 'id'")):
    line = json.dumps({'image': 'x.png', 'caption': 'a', 'y': label})
    assert f'c.jsonl:1: label is {shown}; expected one class' in refused(photos, line, 'c.jsonl', label_column='y')
  assert 'do not exist, first' in refused(photos, 'image,caption\nX.PNG,a\n')
  assert "(there is 'x.png')" in refused(photos, 'image,caption\nX.PNG,a\n')
  assert "c.jsonl:1: 'image' is 3, not the path" in refused(photos, '{"image": 3, "caption": "a"}', 'c.jsonl')


@pytest.mark.parametrize('kind', ['csv', 'jsonl', 'parquet'])
@pytest.mark.parametrize('column', ['text', 'caption'])
def test_metadata_of_the_hub_is_read_without_being_named_as_datasets_reads_it(photos, kind, column):
  rows = [{'file_name': 'x.png', column: 'an x'}, {'file_name': 'sub/z.png', column: 'a z'}]
  file = photos / f'metadata.{kind}'
  if kind == 'parquet':
    pa, pq = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    pq.write_table(pa.Table.from_pylist(rows), file)
  elif kind == 'jsonl':
    file.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  else:
    file.write_text(f'file_name,{column}\nx.png,an x\nsub/z.png,a z\n')
  source = ImageFolder(str(photos))
  assert texts(source) == {'x.png': ('an x',), 'sub/z.png': ('a z',)}
  assert source.names == ()
  assert 'images that no table names: 1 (y.png)' in map(str, source.account().left_out)
  datasets = pytest.importorskip('datasets')
  theirs = datasets.load_dataset('imagefolder', data_dir=str(photos), split='train', cache_dir=str(photos / '.cache'))
  theirs = theirs.cast_column('image', datasets.Image(decode=False))
  assert {os.path.relpath(row['image']['path'], photos): (row[column],) for row in theirs} == texts(source)


def test_metadata_in_subfolders_is_read_from_there_as_datasets_reads_it(tmp_path):
  for name in ('cat/x.png', 'dog/x.png', 'dog/y.png'):
    draw(tmp_path / name)
  (tmp_path / 'cat/metadata.jsonl').write_text('{"file_name": "x.png", "text": "a cat"}')
  (tmp_path / 'dog/metadata.jsonl').write_text('{"file_name": "x.png", "text": "a dog"}')
  source = ImageFolder(str(tmp_path))
  assert texts(source) == {'cat/x.png': ('a cat',), 'dog/x.png': ('a dog',)}
  assert source.names == ()
  assert 'images that no table names: 1 (dog/y.png)' in map(str, source.account().left_out)
  datasets = pytest.importorskip('datasets')
  theirs = datasets.load_dataset(
    'imagefolder', data_dir=str(tmp_path), split='train', cache_dir=str(tmp_path / '.cache')
  )
  theirs = theirs.cast_column('image', datasets.Image(decode=False))
  assert {os.path.relpath(row['image']['path'], tmp_path): (row['text'],) for row in theirs} == texts(source)


def test_metadata_in_the_folder_of_a_split_counts_from_there(tmp_path):
  for split in ('train', 'test'):
    draw(tmp_path / split / 'x.png')
    (tmp_path / split / 'metadata.csv').write_text(f'file_name,text\nx.png,{split}\n')
  with pytest.raises(UserError, match='are splits, not classes; set split to one of them'):
    len(ImageFolder(str(tmp_path)))
  assert texts(ImageFolder(str(tmp_path), split='test')) == {'x.png': ('test',)}
  assert texts(ImageFolder(str(tmp_path), captions='train/metadata.csv')) == {'train/x.png': ('train',)}


def test_classes_in_a_table_are_names_in_order_or_numbers(photos):
  (photos / 'metadata.csv').write_text('file_name,label\nx.png,dog\ny.png,cat\nsub/z.png,\n')
  source = ImageFolder(str(photos))
  assert [(source[i]['key'], source[i]['label'], source[i]['text']) for i in range(2)] == [
    ('x.png', 1, 'dog'),
    ('y.png', 0, 'cat'),
  ]
  assert source.names == ('cat', 'dog')
  assert source.account().class_counts == (1, 1)
  (photos / 'c.csv').write_text('image,caption,y\nx.png,an x,1\ny.png,a y,0\n')
  source = ImageFolder(str(photos), captions='c.csv', label_column='y')
  assert [(source[i]['label'], source[i]['text']) for i in range(2)] == [(1, 'an x'), (0, 'a y')]
  (photos / 'c.csv').write_text('image,caption,y\nx.png,an x,0.7\n')
  with pytest.raises(UserError, match=r'c\.csv:2: label is 0.7, which is not a whole number'):
    len(ImageFolder(str(photos), captions='c.csv', label_column='y'))


def test_text_files_next_to_images_are_their_captions(photos):
  (photos / 'x.txt').write_text('\ufeffan x,\nred\n', encoding='utf-8')
  (photos / 'sub/z.txt').write_text('a z')
  source = ImageFolder(str(photos), captions='.txt')
  assert texts(source) == {'x.png': ('an x,\nred',), 'sub/z.png': ('a z',)}
  assert source[1]['text'] == 'an x,\nred'
  assert [str(left) for left in source.account().left_out] == ['images without a text file: 1 (y.png)']
  assert source.account().fields['text'] == '2 files .txt'


def test_text_files_are_read_without_being_named_where_most_images_have_one(tmp_path):
  for name in 'abc':
    draw(tmp_path / f'{name}.png')
  (tmp_path / 'a.txt').write_text('an a')
  few = ImageFolder(str(tmp_path))
  assert (len(few), 'text' in few[0]) == (3, False)
  assert 'files .txt: 1 (a.txt)' in map(str, few.account().left_out)
  (tmp_path / 'b.txt').write_text('')
  most = ImageFolder(str(tmp_path))
  assert texts(most) == {'a.png': ('an a',), 'b.png': ()}
  assert 'images without a text file: 1 (c.png)' in map(str, most.account().left_out)


def test_boxes_of_a_detector_next_to_images_are_not_captions(tmp_path):
  for name in 'ab':
    draw(tmp_path / f'{name}.png')
    (tmp_path / f'{name}.txt').write_text('0 0.5 0.5 0.1 1e-1\n17 0.25 0.5 0.1 0.1\n')
  source = ImageFolder(str(tmp_path))
  assert (len(source), source.texts_of(0)) == (2, ())
  assert 'files .txt: 2 (a.txt, b.txt)' in map(str, source.account().left_out)
  assert ImageFolder(str(tmp_path), captions='.txt').texts_of(0)[0].startswith('0 0.5')  # on explicit request


def test_class_folders_with_text_files_keep_their_classes(tmp_path):
  for name in ('cat/a', 'cat/b', 'dog/c'):
    draw(tmp_path / f'{name}.png')
  for name in ('cat/a', 'dog/c'):
    (tmp_path / f'{name}.caption').write_text(f'text of {name}')
  source = ImageFolder(str(tmp_path), captions='.caption')
  assert [(source[i]['label'], source[i]['text']) for i in range(3)] == [
    (0, 'text of cat/a'),
    (0, 'cat'),
    (1, 'text of dog/c'),
  ]
  with pytest.raises(UserError, match=r'no \.txt file has the name of an image'):
    len(ImageFolder(str(tmp_path), captions='.txt'))
