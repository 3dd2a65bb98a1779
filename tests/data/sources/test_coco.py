"""COCO and LVIS files: what is read equals what pycocotools reads, and what nobody can mean is refused."""

import copy
import io
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from fmcv_jax.data.loader import evaluation_batches
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.data.sources.detection.coco import Coco
from fmcv_jax.data.transforms import Resize
from fmcv_jax.errors import BadRecord, UserError

coco = pytest.importorskip('pycocotools.coco', reason='pip install fmcv-jax[detection]')
rle = pytest.importorskip('pycocotools.mask')

HEIGHT, WIDTH = 40, 60
CATEGORIES = [{'id': 90, 'name': 'toothbrush'}, {'id': 1, 'name': 'person'}, {'id': 7, 'name': 'train'}]
CLASS_OF = {1: 0, 7: 1, 90: 2}  # without gaps, by increasing id


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('FMCV_CACHE', str(tmp_path / 'cache'))


def blob(seed=0):
  """A mask as run lengths, as a string (compressed) and as a list."""
  mask = np.zeros((HEIGHT, WIDTH), np.uint8)
  mask[5:20, 10 + seed : 30] = np.random.default_rng(seed).integers(0, 2, (15, 20 - seed))
  encoded = rle.encode(np.asfortranarray(mask))
  flat = mask.ravel(order='F')
  edges = np.flatnonzero(np.diff(flat, prepend=0, append=0))
  counts = np.diff([0, *edges, len(flat)]).tolist()
  return (
    mask.astype(bool),
    {'size': [HEIGHT, WIDTH], 'counts': encoded['counts'].decode()},
    {'size': [HEIGHT, WIDTH], 'counts': counts},
  )


def annotated():
  images = [{'id': number, 'file_name': f'{number}.png', 'height': HEIGHT, 'width': WIDTH} for number in (42, 0, 7)]
  _, compressed, plain = blob()
  box = [10.0, 5.0, 20.0, 15.0]
  annotations = [
    dict(id=1, image_id=42, category_id=7, bbox=[1.5, 2, 10, 12.25], iscrowd=0, area=80.5,
         segmentation=[[2, 2, 11, 3, 8, 14], [1, 1, 4, 4]]),
    dict(id=0, image_id=7, category_id=90, bbox=box, iscrowd=0, area=99.0, segmentation=compressed),
    dict(id=5, image_id=42, category_id=1, bbox=[30, 20, 40.5, 30], iscrowd=0, area=700.0,
         segmentation=[[30, 20, 59, 20, 59, 39, 30, 39]]),
    dict(id=9, image_id=42, category_id=1, bbox=box, iscrowd=1, area=99.0, segmentation=plain),
  ]  # fmt: skip
  return {'images': images, 'annotations': annotations, 'categories': copy.deepcopy(CATEGORIES)}


def written(folder, content, name='instances.json', exif=1):
  folder.mkdir(exist_ok=True)
  tag = Image.Exif()
  tag[0x0112] = exif
  for image in content['images']:
    pixels = np.random.default_rng(image['id']).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    path = folder / image.get('file_name', '/'.join(image.get('coco_url', '').split('/')[-2:]))
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path, exif=tag)
  (folder / name).write_text(json.dumps(content))
  return str(folder / name)


def test_boxes_classes_and_masks_equal_those_of_pycocotools(tmp_path, capsys):
  path = written(tmp_path / 'images', annotated())
  source, theirs = Coco(path, str(tmp_path / 'images'), masks=True, crowds=True), coco.COCO(path)
  assert source.names == ('person', 'train', 'toothbrush')
  assert [source.key_of(index) for index in range(3)] == ['42.png', '0.png', '7.png']
  for example in (source[index] for index in range(len(source))):
    found = theirs.loadAnns(theirs.getAnnIds(imgIds=int(example['image_id'])))
    boxes = np.array([f['bbox'] for f in found], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    np.testing.assert_array_equal(example['boxes'], np.minimum(boxes, [WIDTH, HEIGHT, WIDTH, HEIGHT]))
    np.testing.assert_array_equal(example['classes'], [CLASS_OF[f['category_id']] for f in found])
    np.testing.assert_array_equal(example['crowd'], [f['iscrowd'] for f in found])
    np.testing.assert_array_equal(example['area'], np.float32([f['area'] for f in found]))
    for mask, f in zip(example['masks'], found, strict=True):
      np.testing.assert_array_equal(mask, theirs.annToMask(f).astype(bool))
  np.testing.assert_array_equal(source[2]['masks'][0], blob()[0])


def test_crowds_and_images_without_objects_are_left_out_on_request_and_counted(tmp_path):
  path = written(tmp_path / 'images', annotated())
  source = Coco(path, str(tmp_path / 'images'), empty=False)
  assert [source.key_of(index) for index in range(len(source))] == ['42.png', '7.png']
  np.testing.assert_array_equal(source[0]['classes'], [1, 0])
  account = source.account()
  assert account.class_counts == (1, 1, 1)
  assert {left.reason: left.count for left in account.left_out} == {
    'groups of objects (iscrowd)': 1,
    'images without objects': 1,
  }


def test_objects_that_cannot_be_learned_are_counted_by_reason(tmp_path):
  content = annotated()
  for number, box in enumerate(([3, 3, 0, 5], [70, 3, 5, 5], [9, 9, -3, 4], [1, 1, float('nan'), 2])):
    content['annotations'].append(dict(id=100 + number, image_id=7, category_id=1, bbox=box, segmentation=[]))
  content['annotations'].append(dict(id=200, image_id=8, category_id=1, bbox=[1, 1, 2, 2]))
  content['annotations'].append(dict(id=201, image_id=7, category_id=1))
  source = Coco(written(tmp_path / 'images', content), str(tmp_path / 'images'))
  assert {left.reason: left.count for left in source.account().left_out} == {
    'groups of objects (iscrowd)': 1,
    'boxes without area': 1,
    'boxes outside of their image': 1,
    'boxes with a negative width or height': 1,
    'boxes that are not four finite numbers': 1,
    'objects of images that are not in the file': 1,
    'objects without a box': 1,
  }
  assert len(source[2]['boxes']) == 1


def test_boxes_that_are_cut_are_counted_and_an_area_of_null_is_that_of_the_box(tmp_path):
  content = annotated()
  content['annotations'].append(dict(id=100, image_id=7, category_id=1, bbox=[3, 4, 90, 5], area=None, segmentation=[]))
  source = Coco(written(tmp_path / 'images', content), str(tmp_path / 'images'))
  assert source.account().fields['boxes'].endswith('; 2 reach beyond their image and are cut')
  (row,) = [row for index in range(len(source)) for row in source[index]['area'] if row == 450]
  assert row == 90 * 5


def change(path, value):
  def apply(content):
    *outer, last = path
    for key in outer:
      content = content[key]
    content[last] = value

  return apply


@pytest.mark.parametrize(
  ('changed', 'message'),
  [
    (change(['images', 1, 'id'], 42), 'images: id 42 occurs twice'),
    (change(['annotations', 1, 'id'], 1), 'annotations: id 1 occurs twice'),
    (change(['categories', 1, 'id'], 7), 'categories: id 7 occurs twice'),
    (change(['categories', 1, 'name'], 'train'), "the categories 1, 7 are all called 'train'"),
    (change(['annotations', 0, 'category_id'], 3), 'annotations of category 3, which is not in categories'),
    (change(['annotations', 0, 'caption'], 'a train'), 'has captions, not objects'),
    (change(['annotations', 0, 'segments_info'], []), 'has panoptic segments'),
    (change(['annotations', 0, 'area'], 'large'), "annotation 1: area is 'large', expected a number"),
    (
      lambda content: [found.update(bbox=['1', '2', '3', '4']) for found in content['annotations']],
      'none of the .* annotations can be used: boxes that are not four finite numbers: ',
    ),
    (
      lambda content: [found.update(bbox=[0.1, 0.2, 0.3, 0.4]) for found in content['annotations']],
      'all boxes are within 0 to 1; they have to be pixels',
    ),
    (
      lambda content: [found.update(bbox=[30, 20, 50, 35]) for found in content['annotations']],
      'reach beyond their image as left, top, width, height, and all fit as left, top, right, bottom',
    ),
    (lambda content: content.pop('categories'), "has no list 'categories'"),
    (lambda content: content.pop('annotations'), "has no list 'annotations'"),
  ],
)
def test_a_file_that_cannot_be_meant_is_refused(tmp_path, changed, message):
  content = annotated()
  changed(content)
  path = written(tmp_path / 'images', annotated())
  (tmp_path / 'images' / 'instances.json').write_text(json.dumps(content))
  with pytest.raises(UserError, match=message):
    Coco(path, str(tmp_path / 'images')).names  # noqa: B018


def test_an_unused_category_of_another_ones_name_takes_no_class(tmp_path):
  """Roboflow's exports begin with a category for the whole set, which may be called as one of its classes."""
  content = annotated()
  content['categories'].insert(0, {'id': 0, 'name': 'train', 'supercategory': 'none'})
  source = Coco(written(tmp_path / 'images', content), str(tmp_path / 'images'))
  assert source.names == ('person', 'train', 'toothbrush')


def test_lvis_files_are_found_by_their_url_and_know_absent_classes(tmp_path):
  content = annotated()
  for image in content['images']:
    image['coco_url'] = f'http://images.cocodataset.org/val2017/{image.pop("file_name")}'
    image |= {'neg_category_ids': [90], 'not_exhaustive_category_ids': [1, 7] if image['id'] == 7 else []}
  source = Coco(written(tmp_path / 'images', content), str(tmp_path / 'images'))
  assert source.key_of(0) == 'val2017/42.png'
  assert source[0]['image'] == (tmp_path / 'images' / 'val2017' / '42.png').read_bytes()
  np.testing.assert_array_equal(source[2]['negatives'], [2])
  np.testing.assert_array_equal(source[2]['not_exhaustive'], [0, 1])
  np.testing.assert_array_equal(source[0]['not_exhaustive'], np.zeros(0))


@pytest.mark.parametrize('orientation', [5, 6, 7, 8])
def test_objects_of_the_stored_image_turn_with_it(tmp_path, orientation):
  content = annotated()
  source = Coco(written(tmp_path / 'images', content, exif=orientation), str(tmp_path / 'images'), masks=True)
  example = source[2]
  tag = Image.Exif()
  tag[0x0112] = orientation
  file = io.BytesIO()
  Image.fromarray(blob()[0].astype(np.uint8) * 255).save(file, 'PNG', exif=tag)
  with Image.open(file) as image:
    upright = np.asarray(image.transpose({5: 5, 6: 4, 7: 6, 8: 2}[orientation])) > 0
  np.testing.assert_array_equal(example['masks'][0], upright)
  rows, columns = np.flatnonzero(upright.any(1)), np.flatnonzero(upright.any(0))
  left, top, right, bottom = example['boxes'][0]
  assert left <= columns[0] <= columns[-1] < right
  assert top <= rows[0] <= rows[-1] < bottom


def test_a_file_of_another_size_is_a_bad_record(tmp_path):
  path = written(tmp_path / 'images', annotated())
  Image.new('RGB', (30, 20)).save(tmp_path / 'images' / '42.png')
  with pytest.raises(BadRecord, match='annotations are of an image of 40 x 60 pixels, but the file has 20 x 30'):
    Coco(path, str(tmp_path / 'images'))[0]


def test_a_changed_file_is_read_anew_and_readers_share_the_index(tmp_path):
  content = annotated()
  path = written(tmp_path / 'images', content)
  source = Coco(path, str(tmp_path / 'images'))
  assert len(source) == 3
  assert len(pickle.dumps(source)) < 400
  content['images'].append({'id': 8, 'file_name': '8.png', 'height': HEIGHT, 'width': WIDTH})
  assert len(Coco(written(tmp_path / 'images', content), str(tmp_path / 'images'))) == 4


def test_a_loader_resizes_and_pads_what_belongs_together(tmp_path):
  source = Coco(written(tmp_path / 'images', annotated()), str(tmp_path / 'images'), masks=True)
  shapes = {name: np.zeros((4, *shape)) for name, shape in {'boxes': (4,), 'classes': (), 'masks': (20, 30)}.items()}
  pipeline = Pipeline(source, Resize((20, 30))).padded_as(shapes)
  (batch,) = evaluation_batches(pipeline, batch=3, fields=('image', 'boxes', 'classes', 'masks'))
  np.testing.assert_array_equal(batch['classes'], [[1, 0, -1, -1], [-1] * 4, [2, -1, -1, -1]])
  np.testing.assert_allclose(batch['boxes'][2, 0], [5, 2.5, 15, 10])
  assert batch['masks'].shape == (3, 4, 20, 30)
