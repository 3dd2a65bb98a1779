"""Objects as other tools write them: panoptic PNGs, Pascal VOC, YOLO, tables of the Hugging Face hub."""

import io
import json
import pickle

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image

from fmcv_jax.data.sources.detection.coco_panoptic import CocoPanoptic
from fmcv_jax.data.sources.detection.parquet_objects import ParquetObjects
from fmcv_jax.data.sources.detection.voc import CLASSES, Voc
from fmcv_jax.data.sources.detection.yolo import Yolo
from fmcv_jax.errors import BadRecord, UserError

HEIGHT, WIDTH = 40, 60


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('FMCV_CACHE', str(tmp_path / 'cache'))


def png_bytes(seed=0, **options):
  pixels = np.random.default_rng(seed).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, 'PNG', **options)
  return file.getvalue()


# --- panoptic


def panoptic(folder, drop=None, extra=None):
  ids = np.zeros((HEIGHT, WIDTH), np.int64)
  ids[:20] = 70_000  # sky
  ids[25:35, 10:30] = 300  # a person
  ids[25:30, 40:50] = 5  # a group of persons
  folder.mkdir(exist_ok=True)
  (folder / 'images').mkdir(exist_ok=True)
  (folder / 'images' / '9.jpg').write_bytes(png_bytes())
  (folder / 'pan').mkdir(exist_ok=True)
  png = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
  Image.fromarray(png).save(folder / 'pan' / '9.png')
  segments = [dict(id=300, category_id=1, iscrowd=0), dict(id=70_000, category_id=187, iscrowd=0)]
  segments += [dict(id=5, category_id=1, iscrowd=1)]
  segments = [segment for segment in segments if segment['id'] != drop] + (extra or [])
  content = {
    'images': [{'id': 9, 'file_name': '9.jpg', 'height': HEIGHT, 'width': WIDTH}],
    'annotations': [{'image_id': 9, 'file_name': '9.png', 'segments_info': segments}],
    'categories': [{'id': 187, 'name': 'sky', 'isthing': 0}, {'id': 1, 'name': 'person', 'isthing': 1}],
  }
  (folder / 'pan.json').write_text(json.dumps(content))
  return CocoPanoptic(str(folder / 'pan.json'), str(folder / 'images'), crowds=False), ids


def test_panoptic_segments_are_masks_boxes_and_a_map_of_classes(tmp_path):
  source, ids = panoptic(tmp_path)
  example = source[0]
  assert (source.names, source.things) == (('person', 'sky'), (True, False))
  np.testing.assert_array_equal(example['masks'], np.stack([ids == 300, ids == 70_000]))
  np.testing.assert_array_equal(example['boxes'], [[10, 25, 30, 35], [0, 0, 60, 20]])
  np.testing.assert_array_equal(example['thing'], [True, False])
  np.testing.assert_array_equal(example['segments'], np.select([ids == 300, ids == 70_000], [0, 1], 255))
  crowded = CocoPanoptic(source.annotations, source.images, crowds=True)[0]
  np.testing.assert_array_equal(crowded['crowd'], [False, False, True])
  np.testing.assert_array_equal(crowded['segments'] == 0, (ids == 300) | (ids == 5))


def test_panoptic_segments_that_file_and_png_do_not_share_are_bad_records(tmp_path):
  with pytest.raises(BadRecord, match=r'9.png has the segment 300, which .*pan.json does not list'):
    panoptic(tmp_path / 'a', drop=300)[0][0]
  with pytest.raises(BadRecord, match=r'9.png has no pixel of the segment 77'):
    panoptic(tmp_path / 'b', extra=[dict(id=77, category_id=1, iscrowd=0)])[0][0]


# --- Pascal VOC


OBJECT = (
  '<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax>'
  '<ymax>{}</ymax></bndbox></object>'
)


def voc(folder, *objects, size=(HEIGHT, WIDTH)):
  for name in ('JPEGImages', 'Annotations', 'ImageSets/Main', 'ImageSets/Segmentation', 'SegmentationClass'):
    (folder / name).mkdir(parents=True, exist_ok=True)
  (folder / 'JPEGImages' / '2007_1.jpg').write_bytes(png_bytes())
  sides = f'<size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size>'
  body = ''.join(OBJECT.format(*values) for values in objects)
  xml = f'<annotation><filename>elsewhere.jpg</filename>{sides}{body}</annotation>'
  (folder / 'Annotations' / '2007_1.xml').write_text(xml)
  for kind in ('Main', 'Segmentation'):
    (folder / f'ImageSets/{kind}/train.txt').write_text('2007_1\n')
  (folder / 'ImageSets/Main/cat_train.txt').write_text('2007_1  1\n')
  numbers = np.zeros((HEIGHT, WIDTH), np.uint8)
  numbers[4:9, 4:9], numbers[9, 4:9] = 8, 255
  image = Image.fromarray(numbers, 'P')
  image.putpalette([n for index in range(256) for n in (index, 255 - index, 7)])
  image.save(folder / 'SegmentationClass' / '2007_1.png')
  return str(folder)


def test_voc_boxes_count_pixels_from_one(tmp_path):
  """A box of the whole image is 1, 1, width, height there."""
  path = voc(tmp_path, ('cat', 0, 1, 1, WIDTH, HEIGHT), ('dog', 1, 11, 6, 30.5, 20))
  source = Voc(path)
  example = source[0]
  np.testing.assert_array_equal(example['boxes'], [[0, 0, WIDTH, HEIGHT], [10, 5, 30.5, 20]])
  np.testing.assert_array_equal(example['classes'], [CLASSES.index('cat'), CLASSES.index('dog')])
  np.testing.assert_array_equal(example['difficult'], [False, True])
  easy = Voc(path, difficult=False)
  assert len(easy[0]['boxes']) == 1
  assert [str(left) for left in easy.account().left_out] == ['objects marked as difficult: 1 (2007_1: dog)']
  assert len(pickle.dumps(source)) < 300


def test_voc_segments_have_a_background_and_void(tmp_path):
  source = Voc(voc(tmp_path, ('cat', 0, 5, 5, 9, 9)), segments=True)
  example = source[0]
  assert source.names[:2] == ('background', 'aeroplane')
  assert source.names[8] == 'cat'
  assert example['classes'] == [8]
  assert (example['segments'][5, 5], example['segments'][9, 5], example['segments'][0, 0]) == (8, 255, 0)


def test_voc_folders_of_other_classes_are_named_by_what_occurs(tmp_path):
  path = voc(tmp_path, ('mask', 0, 1, 1, 9, 9), ('helmet', 0, 1, 1, 9, 9), ('mask', 0, 7, 7, 7, 3))
  source = Voc(path)
  assert source.names == ('helmet', 'mask')
  assert [str(left) for left in source.account().left_out] == [
    'boxes with a negative width or height: 1 (2007_1: mask)'
  ]
  other = OBJECT.format('glove', 0, 1, 1, 9, 9)  # of another split
  (tmp_path / 'Annotations' / '2007_2.xml').write_text(f'<annotation>{other}</annotation>')
  assert Voc(path).names == ('glove', 'helmet', 'mask')
  with pytest.raises(UserError, match='segments: the numbers of other classes than the 20 of VOC'):
    Voc(path, segments=True).names  # noqa: B018
  with pytest.raises(UserError, match=r'has no val.txt; known: train'):
    Voc(path, split='val').names  # noqa: B018
  with pytest.raises(BadRecord, match='annotations are of an image of 30 x 60'):
    Voc(voc(tmp_path / 'b', ('cat', 0, 1, 1, 9, 9), size=(30, 60)))[0]


# --- YOLO


def yolo(folder, *labels, names=None, more=None):
  for number, text in enumerate(labels):
    for kind in ('images', 'labels'):
      (folder / kind / 'train').mkdir(parents=True, exist_ok=True)
    (folder / 'images' / 'train' / f'{number}.png').write_bytes(png_bytes(number))
    if text is not None:
      (folder / 'labels' / 'train' / f'{number}.txt').write_text(text)
  about = {'path': str(folder), 'train': 'images/train', 'names': names or {0: 'cat', 1: 'red apple'}} | (more or {})
  (folder / 'data.yaml').write_text(yaml.safe_dump(about))
  return str(folder / 'data.yaml')


def test_yolo_rows_are_centers_and_sides_of_the_upright_image(tmp_path):
  source = Yolo(yolo(tmp_path, '1 0.5 0.5 0.2 0.5\n0 0.1 0.1 0.3 0.1\n1 0.5 0.5 0.2 0.5\n', '', None))
  np.testing.assert_allclose(source[0]['boxes'], [[24, 10, 36, 30], [0, 2, 15, 6]], atol=1e-4)
  np.testing.assert_array_equal(source[0]['classes'], [1, 0])
  assert [len(source[index]['boxes']) for index in range(3)] == [2, 0, 0]
  assert source.account().fields == {'boxes': '2 rows of label files; 2 images without objects'}
  tag = Image.Exif()
  tag[0x0112] = 6
  (tmp_path / 'images' / 'train' / '0.png').write_bytes(png_bytes(exif=tag))  # 60 high, 40 wide when upright
  np.testing.assert_allclose(source[0]['boxes'][0], [16, 15, 24, 45], atol=1e-4)


def test_yolo_polygons_are_masks(tmp_path):
  source = Yolo(yolo(tmp_path, '0 0.25 0.25 0.75 0.25 0.75 0.75 0.25 0.75\n'), masks=True)
  example = source[0]
  np.testing.assert_allclose(example['boxes'], [[15, 10, 45, 30]])
  expected = np.zeros((HEIGHT, WIDTH), bool)
  expected[10:30, 15:45] = True
  np.testing.assert_array_equal(example['masks'][0], expected)
  boxed = Yolo(yolo(tmp_path / 'b', '0 0.25 0.25 0.75 0.25 0.75 0.75\n0 .5 .5 .1 .1'), masks=True)
  with pytest.raises(BadRecord, match='an object of class 0 is a box, and masks need polygons'):
    boxed[0]


@pytest.mark.parametrize(
  ('row', 'message'),
  [
    ('2 .5 .5 .1 .1', 'is of class 2, and there are 2'),
    ('-1 .5 .5 .1 .1', 'is of class -1'),
    ('0.5 .5 .5 .1 .1', 'is of class 0.5'),
    ('0 30 20 10 10', 'has positions outside of 0 to 1'),
    ('0 .5 .5 .1', 'has 4 columns'),
    ('0 .5 .5 .1 .1 .9', 'has 6 columns'),
    ('cat .5 .5 .1 .1', 'is not numbers'),
  ],
)
def test_a_yolo_row_that_cannot_be_meant_is_a_bad_record(tmp_path, row, message):
  source = Yolo(yolo(tmp_path, row))
  with pytest.raises(BadRecord, match=f'labels/train/0.txt: .*{message}'):
    source[0]
  assert [left.count for left in source.account().left_out] == [1]


@pytest.mark.parametrize(
  ('more', 'message'),
  [
    ({'names': {1: 'cat', 2: 'dog'}}, r'names are numbered \[1, 2\]'),
    ({'nc': 3}, 'nc is 3, but there are 2 names'),
    ({'names': []}, 'has no names'),
    ({'train': 'images/val'}, "no images in 'images/val'"),
    ({'train': None, 'val': 'images/train'}, "has no 'train'; known: val"),
    ({'kpt_shape': [17, 3]}, 'has keypoints'),
  ],
)
def test_a_yolo_file_that_cannot_be_meant_is_refused(tmp_path, more, message):
  with pytest.raises(UserError, match=message):
    Yolo(yolo(tmp_path, '0 .5 .5 .1 .1', more=more)).names  # noqa: B018


def test_yolo_files_are_found_from_their_own_folder_and_boxes_without_area_are_counted(tmp_path, monkeypatch):
  yolo(tmp_path, '0 .5 .5 .1 .1\n1 .5 .5 0 .1', more={'path': ''})
  monkeypatch.chdir(tmp_path)
  source = Yolo('data.yaml')
  np.testing.assert_array_equal(source[0]['classes'], [0])
  assert [str(left) for left in source.account().left_out] == ['boxes without area: 1 (images/train/0.png)']
  (tmp_path / 'labels' / 'train' / '0.txt').write_bytes(b'\xff 1 2')
  with pytest.raises(BadRecord, match='is not UTF-8'):
    source[0]


def test_yolo_images_of_which_none_has_labels_are_refused(tmp_path):
  with pytest.raises(UserError, match=r'no image of .* has a label file'):
    Yolo(yolo(tmp_path, None, None)).names  # noqa: B018


# --- tables


def table(path, boxes, classes, names=('cat', 'dog')):
  features = datasets.Features(
    {
      'image': datasets.Image(),
      'objects': datasets.Sequence(
        {
          'bbox': datasets.Sequence(datasets.Value('float32'), length=4),
          'category': datasets.ClassLabel(names=list(names)),
        }
      ),
    }
  )
  rows = [
    {'image': {'bytes': png_bytes(number), 'path': None}, 'objects': {'bbox': box, 'category': label}}
    for number, (box, label) in enumerate(zip(boxes, classes, strict=True))
  ]
  datasets.Dataset.from_list(rows, features=features).to_parquet(path)
  return str(path)


def test_objects_of_a_hub_table_have_its_class_names(tmp_path):
  path = table(tmp_path / 'train.parquet', [[[10, 5, 20, 10], [0, 0, 60, 40]], []], [[1, 0], []])
  source = ParquetObjects(path)
  assert source.names == ('cat', 'dog')
  np.testing.assert_array_equal(source[0]['boxes'], [[10, 5, 30, 15], [0, 0, 60, 40]])
  np.testing.assert_array_equal(source[0]['classes'], [1, 0])
  assert source[1]['boxes'].shape == (0, 4)
  assert source.account().class_counts == (1, 1)


def test_boxes_that_fit_only_in_the_other_format_are_a_bad_record(tmp_path):
  """Of two hub tables with equal columns, cppe-5 has left, top, width, height; fashionpedia has edges."""
  path = table(tmp_path / 'train.parquet', [[[30, 5, 50, 35]]], [[1]])
  with pytest.raises(
    BadRecord, match=r'do not fit into the image of 60 x 40 pixels .* as xywh, but as xyxy; set box_format'
  ):
    ParquetObjects(path)[0]
  np.testing.assert_array_equal(ParquetObjects(path, box_format='xyxy')[0]['boxes'], [[30, 5, 50, 35]])
  path = table(tmp_path / 'other.parquet', [[[30, 5, 20, 30]]], [[1]])
  with pytest.raises(BadRecord, match='as xyxy, but as xywh'):
    ParquetObjects(path, box_format='xyxy')[0]


def test_boxes_that_are_fractions_are_a_bad_record(tmp_path):
  path = table(tmp_path / 'train.parquet', [[[0.1, 0.2, 0.5, 0.5]]], [[1]])
  with pytest.raises(BadRecord, match='are within 0 to 1; they have to be pixels'):
    ParquetObjects(path)[0]


def test_tables_without_boxes_say_which_column_is_missing(tmp_path):
  path = table(tmp_path / 'train.parquet', [[[10, 5, 20, 10]]], [[1]])
  with pytest.raises(UserError, match=r"'objects' has no field 'box', set boxes; .*'bbox'"):
    len(ParquetObjects(path, boxes='objects/box'))
  with pytest.raises(UserError, match='not a class of each box; set classes'):
    len(ParquetObjects(path, classes='objects/bbox'))
