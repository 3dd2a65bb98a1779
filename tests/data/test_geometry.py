"""One drawn geometry moves image, clip, map, masks, boxes and points alike; the expectation is drawn, not computed."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from fmcv_jax.data.geometry import Geometry
from fmcv_jax.data.loader import TrainLoader, evaluation_batches
from fmcv_jax.data.pillow_resize import PillowResize
from fmcv_jax.data.pipeline import MultiCrop, Pipeline
from fmcv_jax.data.sources.array_record import ArrayRecord, write_array_record
from fmcv_jax.data.sources.base import Source
from fmcv_jax.data.transforms import RandomResizedCrop, Resize, ResizeCrop, ResizePad, ScaleJitter
from fmcv_jax.errors import UserError
from fmcv_jax.fields import Field

HEIGHT, WIDTH = 90, 120
OBJECTS = (((8, 6, 40, 30), 3), ((50, 20, 110, 84), 7))  # (left, top, right, bottom) and gray level / 32


@dataclasses.dataclass(frozen=True)
class Scenes(Source):
  """Gray rectangles on black, with everything that a crop has to move; each field tells where the rectangles are."""

  encoded: bool = False
  extra: tuple[str, ...] = ()

  @property
  def fields(self):
    return {'frames': Field('clip'), 'depth': Field('map', fill=-1), 'corners': Field('points'), 'area': AREA}

  def __len__(self):
    return 6

  def __getitem__(self, index):
    masks = np.zeros((2, HEIGHT, WIDTH), bool)
    for row, ((left, top, right, bottom), _) in enumerate(OBJECTS):
      masks[row, top:bottom, left:right] = True
    gray = (masks * np.array([level * 32 for _, level in OBJECTS])[:, None, None]).sum(0)
    image = np.repeat(gray[..., None], 3, -1).astype(np.uint8)
    boxes = np.array([box for box, _ in OBJECTS], np.float32)
    record = {
      'image': png(image) if self.encoded else image,
      'frames': tuple(map(png, (image, image))) if self.encoded else np.stack([image, image // 2]),
      'segments': gray.astype(np.uint8),
      'depth': gray.astype(np.float32) / 2,
      'masks': masks,
      'boxes': boxes,
      'classes': np.array([level for _, level in OBJECTS], np.int32),
      'area': (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]),
      'corners': np.concatenate([boxes.reshape(-1, 2, 2), np.ones((2, 2, 1), np.float32)], -1),
    }
    return record | {name: np.zeros((5, 4), np.float32) for name in self.extra}


AREA = Field('array', group='objects', pad_value=0)
MASKED = ('image', 'masks', 'classes')
EVERY = ('image', 'frames', 'segments', 'depth', 'masks', 'boxes', 'classes', 'area', 'corners')


def png(image):
  file = io.BytesIO()
  Image.fromarray(image).save(file, 'PNG')
  return file.getvalue()


def batch_of(transform, source=None, fields=EVERY, rows=3, **options):
  padded = {'masks': Field('masks', 'objects', rows), 'boxes': Field('boxes', 'objects', rows)}
  padded |= {'classes': Field('array', 'objects', rows, -1), 'area': dataclasses.replace(AREA, pad_to=rows)}
  pipeline = Pipeline(source or Scenes(), transform, fields=padded, **options)
  loader = TrainLoader(pipeline, batch=6, seed=3, fields=fields)
  try:
    return next(loader)
  finally:
    loader.close()


TRANSFORMS = [
  RandomResizedCrop((48, 64), interpolation='nearest'),
  RandomResizedCrop(40, scale=(0.02, 0.2), interpolation='nearest'),
  ResizeCrop((40, 30), interpolation='nearest'),
  Resize((60, 30), interpolation='nearest'),
  ResizePad((50, 80), interpolation='nearest'),
  ResizePad((80, 50), interpolation='nearest'),
  ScaleJitter((64, 48), interpolation='nearest'),
]


@pytest.mark.parametrize('encoded', [False, True])
@pytest.mark.parametrize('transform', TRANSFORMS, ids=lambda t: f'{type(t).__name__}-{t.size}')
def test_every_kind_follows_the_pixels_of_the_image(transform, encoded):
  batch = batch_of(transform, Scenes(encoded))
  for row in range(6):
    gray = batch['image'][row, ..., 0]
    inside = batch['depth'][row] >= 0
    np.testing.assert_array_equal(batch['segments'][row] == 255, ~inside)
    np.testing.assert_array_equal(gray[inside], batch['segments'][row][inside])
    np.testing.assert_array_equal(gray[inside], 2 * batch['depth'][row][inside])
    np.testing.assert_array_equal(batch['frames'][row, 0], batch['image'][row])
    found = set()
    for box, label, mask in zip(batch['boxes'][row], batch['classes'][row], batch['masks'][row], strict=True):
      if label == -1:
        assert not box.any()
        assert not mask.any()
        continue
      found.add(int(label))
      np.testing.assert_array_equal(mask, inside & (gray == 32 * label))
      ys, xs = np.nonzero(mask)
      # A pixel belongs to the object under its center, so an edge may lie half a pixel from it.
      np.testing.assert_allclose(box, (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1), atol=0.51)
    shown = set(np.unique(gray[inside]) // 32) - {0}
    assert found >= shown
    assert found - shown == set() or transform.size == 40  # a sliver narrower than the distance of two centers


def test_clips_of_frames_are_cropped_alike():
  batch = batch_of(RandomResizedCrop(32, interpolation='bilinear'))
  assert batch['frames'].shape == (6, 2, 32, 32, 3)
  np.testing.assert_array_equal(batch['frames'][:, 0], batch['image'])
  assert np.abs(batch['frames'][:, 1].astype(int) - batch['image'] // 2).max() <= 1


def test_points_follow_and_those_outside_become_invisible():
  batch = batch_of(RandomResizedCrop(32, scale=(0.1, 0.3)))
  corners, sides = batch['corners'], batch['corners'][..., :2]
  inside = ((sides >= 0) & (sides < 32)).all(-1)
  np.testing.assert_array_equal(corners[..., 2], inside)
  assert 0 < inside.sum() < inside.size
  whole = batch_of(Resize((45, 240)))['corners']
  np.testing.assert_allclose(whole[0, :, :, :2], np.array([b for b, _ in OBJECTS]).reshape(2, 2, 2) * (2, 0.5))


def test_an_object_that_is_cropped_off_leaves_all_fields_of_its_group():
  geometry = Geometry(HEIGHT, WIDTH, (45, 0, 115, 90), (90, 70))
  np.testing.assert_array_equal(geometry.kept('boxes', [box for box, _ in OBJECTS]), [False, True])
  sliver = [[0, 0, 45.5, 30], [44, 0, 45.9, 30], [50, 50, 50.2, 50.2]]  # half a pixel cut, and a whole tiny box
  np.testing.assert_array_equal(geometry.kept('boxes', sliver), [False, False, True])
  corner = ScaleJitter(30, scale=(3.0, 3.0))
  batch = batch_of(corner)
  for row in range(6):
    gone = batch['classes'][row] == -1
    assert (batch['area'][row][gone] == 0).all()
    assert set(batch['area'][row][~gone]) <= {32 * 24, 60 * 64}


def test_rows_of_objects_are_padded_and_never_cut_off():
  batch = batch_of(Resize(32), rows=5)
  assert batch['boxes'].shape == (6, 5, 4)
  np.testing.assert_array_equal(batch['classes'][0], [3, 7, -1, -1, -1])
  with pytest.raises(UserError, match='boxes has 2 rows in one record, more than the 1 that it is padded to'):
    batch_of(Resize(32), rows=1, fields=('boxes',))


def test_rows_take_the_number_that_the_objective_expects():
  example = {'image': np.zeros((8, 8, 3)), 'boxes': np.zeros((7, 4)), 'classes': np.zeros(7)}
  pipeline = Pipeline(Scenes(), Resize(8)).padded_as(example)
  (batch,) = evaluation_batches(pipeline, batch=6, fields=('image', 'boxes', 'classes'))
  assert batch['boxes'].shape == (6, 7, 4)
  assert batch['classes'].shape == (6, 7)


def test_numbers_of_objects_that_differ_need_a_padding():
  @dataclasses.dataclass(frozen=True)
  class Growing(Source):
    def __len__(self):
      return 3

    def __getitem__(self, index):
      return {'image': np.zeros((4, 4, 3), np.uint8), 'boxes': np.zeros((index, 4), np.float32)}

  with pytest.raises(UserError, match=r'boxes differ in number: .*; set data\.fields\.boxes\.pad_to'):
    list(evaluation_batches(Pipeline(Growing()), batch=3, fields=('image', 'boxes')))


def test_arrays_of_unknown_meaning_are_refused_with_a_change_of_geometry():
  with pytest.raises(UserError, match=r"whether bboxes float32 \[5, 4\] has to change .*dict\(kind='boxes'\)"):
    batch_of(Resize(32), Scenes(extra=('bboxes',)), (*EVERY, 'bboxes'))
  stated = Pipeline(Scenes(extra=('bboxes',)), Resize(32), fields={'bboxes': Field('array')})
  (batch,) = evaluation_batches(stated, batch=6, fields=('image', 'bboxes'))
  assert batch['bboxes'].shape == (6, 5, 4)
  unmoved = Pipeline(Scenes(extra=('bboxes',)))
  (batch,) = evaluation_batches(unmoved, batch=6, fields=('image', 'bboxes'))
  assert batch['bboxes'].shape == (6, 5, 4)


def test_a_view_is_a_crop_that_boxes_cannot_follow():
  views = {'views': MultiCrop(RandomResizedCrop(8), 2)}
  with pytest.raises(UserError, match=r'each of data\.views is a crop of its own, which boxes cannot follow'):
    batch_of(Resize(32), fields=('image', 'boxes', 'views'), views=views)


@pytest.mark.parametrize(
  ('name', 'value', 'reason'),
  [
    (
      'segments',
      np.zeros((80, WIDTH), np.uint8),
      r'segments uint8 \[80, 120\] is not of the size of the image, 90 x 120',
    ),
    ('masks', np.zeros((2, WIDTH, HEIGHT), bool), r'masks bool \[2, 120, 90\] is not of the size'),
    ('boxes', np.full((2, 4), np.nan), r'boxes float64 \[2, 4\] is not finite numbers'),
    (
      'boxes',
      np.array([[8, 6, 4, 30], [50, 20, 110, 84]]),
      'boxes: a right or bottom edge lies before its',
    ),
    ('boxes', np.array([[0.1, 0.2, 0.4, 0.9], [0, 0, 1, 1]]), 'boxes: all edges lie within one pixel; they look like'),
    ('classes', np.zeros(3, np.int32), 'rows of the objects differ: .*boxes 2.*classes 3'),
    ('frames', np.zeros((2, 9, 9, 3), np.uint8), 'frames has 9 x 9 pixels, but image 90 x 120'),
  ],
)
def test_fields_that_do_not_fit_the_image_are_bad_records(name, value, reason):
  @dataclasses.dataclass(frozen=True)
  class Broken(Scenes):
    def __getitem__(self, index):
      return super().__getitem__(index) | {name: value}

  with pytest.raises(UserError, match=f'records could not be read; the first, .*{reason}'):
    batch_of(Resize(32), Broken())


def test_rows_of_objects_that_differ_are_refused_without_a_crop_too():
  @dataclasses.dataclass(frozen=True)
  class Unequal(Scenes):
    def __getitem__(self, index):
      return super().__getitem__(index) | {'classes': np.zeros(1, np.int32)}

  with pytest.raises(UserError, match='rows of the objects differ: boxes 2, classes 1'):
    batch_of(None, Unequal(), ('image', 'boxes', 'classes'))


def test_objects_with_masks_and_without_boxes_leave_by_their_masks():
  @dataclasses.dataclass(frozen=True)
  class Masks(Scenes):
    def __getitem__(self, index):
      record = super().__getitem__(index)
      return {name: record[name] for name in ('image', 'masks', 'classes')}

  pipeline = Pipeline(Masks(), ScaleJitter(30, scale=(3.0, 3.0)), shuffle=False)
  loader = TrainLoader(
    pipeline.padded_as({'masks': np.zeros((2, 30, 30)), 'classes': np.zeros(2)}), batch=6, seed=3, fields=MASKED
  )
  batch = next(loader)
  loader.close()
  np.testing.assert_array_equal(batch['classes'] == -1, ~batch['masks'].any((2, 3)))
  assert 0 < (batch['classes'] != -1).sum() < 12


def test_a_misspelled_name_in_data_fields_and_an_unknown_kind_are_refused():
  with pytest.raises(UserError, match=r"data\.fields: 'cornerz' is not a field of the records; did you mean 'corners'"):
    TrainLoader(
      Pipeline(Scenes(), Resize(8), fields={'cornerz': Field('points')}), batch=2, seed=0, fields=('image', 'corners')
    )
  with pytest.raises(ValueError, match="kind: 'box' is not one of image, clip, map"):
    Field('box')


def test_images_of_other_channels_are_resized_channel_by_channel():
  @dataclasses.dataclass(frozen=True)
  class Spectra(Source):
    def __len__(self):
      return 2

    def __getitem__(self, index):
      return {'image': np.random.default_rng(index).integers(0, 256, (30, 40, 5)).astype(np.uint8)}

  (batch,) = evaluation_batches(
    Pipeline(Spectra(), Resize((20, 24), 'bilinear'), channels=5), batch=2, fields=('image',)
  )
  assert batch['image'].shape == (2, 20, 24, 5)
  for channel in range(5):
    plane = Image.fromarray(Spectra()[1]['image'][..., channel]).resize((24, 20), Image.Resampling.BILINEAR)
    assert np.abs(batch['image'][1, ..., channel].astype(int) - np.asarray(plane)).max() <= 1
  with pytest.raises(UserError, match=r'expected an image uint8 \[H, W, 3\], got uint8 \[30, 40, 5\]'):
    list(evaluation_batches(Pipeline(Spectra(), Resize(8)), batch=2, fields=('image',)))


@pytest.mark.parametrize(
  'transform',
  [PillowResize(32, 'shortest'), PillowResize(32, 'longest', fill=(9, 9, 9)), PillowResize(48, 'squash', 0.75)],
)
def test_publishers_processors_move_boxes_as_their_pixels(transform):
  transform = dataclasses.replace(transform, interpolation='nearest')
  (batch,) = evaluation_batches(
    Pipeline(Scenes(), transform).padded_as({'boxes': np.zeros((2, 4)), 'classes': np.zeros(2)}),
    batch=6,
    fields=('image', 'boxes', 'classes'),
  )
  for box, label in zip(batch['boxes'][0], batch['classes'][0], strict=True):
    ys, xs = np.nonzero(batch['image'][0, ..., 0] == 32 * label)
    np.testing.assert_allclose(box, (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1), atol=0.51)


def test_packed_records_keep_the_meaning_of_their_fields(tmp_path):
  write_array_record(Scenes(encoded=True), str(tmp_path / 'packed'))
  packed = ArrayRecord(str(tmp_path / 'packed'))
  assert packed.fields == Scenes().fields
  transform = RandomResizedCrop(24)
  theirs, ours = batch_of(transform, Scenes(encoded=True)), batch_of(transform, packed)
  for name in EVERY:
    np.testing.assert_array_equal(theirs[name], ours[name])
