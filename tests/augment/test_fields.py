"""Augmentations on the device move what belongs to positions in an image along with its pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from fmcv_jax.augment.apply import apply_augments, augment_fields, check_augments, move_boxes
from fmcv_jax.augment.color import ColorJitter
from fmcv_jax.augment.geometry import Affine, Flip
from fmcv_jax.augment.randaugment import RandAugment
from fmcv_jax.augment.registry import AUGMENTS
from fmcv_jax.fields import Field

HEIGHT, WIDTH, BATCH = 60, 80, 16
BOXES = np.array([[10, 8, 40, 30], [44, 32, 76, 56], [0, 0, 0, 0]], np.float32)
FIELDS = {
  'clip': Field('clip'),
  'map': Field('map', fill=255),
  'masks': Field('masks', group='objects'),
  'boxes': Field('boxes', group='objects'),
  'classes': Field('array', group='objects', pad_value=-1),
  'points': Field('points'),
  'action': Field('array'),
}
WARP = Affine(scale=(0.7, 1.6), ratio=(0.8, 1.25), rotation=25, translate=0.3, shear=0.1, fill=0.0)


def scenes():
  """Two gray rectangles, and a padded row."""
  masks = np.zeros((3, HEIGHT, WIDTH), bool)
  for row, (left, top, right, bottom) in enumerate(BOXES.astype(int)):
    masks[row, top:bottom, left:right] = True
  gray = (masks * np.array([100, 200, 0])[:, None, None]).sum(0).astype(np.uint8)
  image = np.repeat(gray[..., None], 3, -1)
  corners = [[10, 8], [40, 30], [44, 32], [76, 56]]
  one = {
    'image': image,
    'clip': np.stack([image, image // 2]),
    'map': gray,
    'masks': masks,
    'boxes': BOXES,
    'classes': np.array([1, 2, -1], np.int32),
    'points': np.array([[*corner, 1] for corner in corners], np.float32),
    'action': np.array([3.0], np.float32),
  }
  return {name: np.repeat(x[None], BATCH, 0) for name, x in one.items()}


moved = jax.jit(lambda batch, augments, rng: augment_fields(batch, FIELDS, augments, rng), static_argnums=1)


@pytest.mark.parametrize('augments', [(Flip(),), (WARP,), (ColorJitter(), Flip(), WARP, Flip(0.3))], ids=str)
def test_maps_masks_boxes_and_clips_are_where_the_pixels_are(augments):
  batch = scenes()
  out = jax.device_get(moved(batch, augments, jax.random.key(0)))
  assert {name: x.shape for name, x in out.items()} == {name: x.shape for name, x in batch.items()}
  assert {name: x.dtype for name, x in out.items() if name != 'image'} == {
    name: x.dtype for name, x in batch.items() if name != 'image'
  }
  np.testing.assert_array_equal(out['action'], batch['action'])
  kept = 0
  for row in range(BATCH):
    unknown = out['map'][row] == 255
    for index, gray in enumerate((100, 200)):
      mask = out['masks'][row, index]
      if out['classes'][row, index] == -1:
        assert not mask.any()
        assert not out['boxes'][row, index].any()
        assert ((out['map'][row] == gray).sum() == 0) or len(augments) > 1 or WARP in augments
        continue
      kept += 1
      np.testing.assert_array_equal(mask, out['map'][row] == gray)
      if mask.any():
        ys, xs = np.nonzero(mask)
        left, top, right, bottom = out['boxes'][row, index]
        # The box around the moved corners holds the object, up to the half pixel between an edge and a center.
        assert left - 0.51 <= xs.min()
        assert xs.max() + 1 <= right + 0.51
        assert top - 0.51 <= ys.min()
        assert ys.max() + 1 <= bottom + 0.51
    np.testing.assert_array_equal(out['classes'][row, 2], -1)
    if ColorJitter() not in augments:
      pixels = np.round(out['image'][row, ..., 0] * 255)
      flat = ndimage.maximum_filter(out['map'][row], 5) == ndimage.minimum_filter(out['map'][row], 5)
      flat &= np.pad(np.ones((HEIGHT - 6, WIDTH - 6), bool), 3)  # no edge is near
      assert (flat & ~unknown).sum() > 50
      np.testing.assert_array_equal(pixels[flat & ~unknown], out['map'][row][flat & ~unknown])
      np.testing.assert_array_equal(np.abs(out['clip'][row, 0, ..., 0] - pixels) <= 1, True)
  assert kept > BATCH


def test_a_flip_is_exact():
  batch = scenes()
  out = jax.device_get(moved(batch, (Flip(1.0),), jax.random.key(0)))
  for name in ('clip', 'masks'):
    np.testing.assert_array_equal(out[name], batch[name][..., ::-1, :] if name == 'clip' else batch[name][..., ::-1])
  np.testing.assert_array_equal(out['map'], batch['map'][..., ::-1])
  np.testing.assert_array_equal(out['boxes'][0, :2], [[40, 8, 70, 30], [4, 32, 36, 56]])
  np.testing.assert_array_equal(out['points'][0], [[70, 8, 1], [40, 30, 1], [36, 32, 1], [4, 56, 1]])


def test_boxes_of_a_rotation_by_a_right_angle_are_known():
  matrix = jnp.array([[[0.0, 1.0, 0.0], [-1.0, 0.0, 40.0]]])  # output (x, y) -> input (y, 40 - x)
  boxes, kept = move_boxes(jnp.array([[[5.0, 10.0, 9.0, 30.0]]]), matrix, (40, 40))
  np.testing.assert_allclose(boxes[0, 0], [10, 5, 30, 9], atol=1e-5)  # x' = 40 - y, y' = x
  assert kept.all()


def test_padded_rows_stay_as_they_are_and_masks_alone_decide_which_objects_leave():
  batch = scenes()
  out = jax.device_get(moved(batch, (WARP,), jax.random.key(0)))
  np.testing.assert_array_equal(out['boxes'][:, 2], 0)
  fields = {name: FIELDS[name] for name in ('masks', 'classes')}
  out = jax.device_get(augment_fields(batch, fields, (Affine(translate=0.9),), jax.random.key(1)))
  np.testing.assert_array_equal(out['classes'] == -1, ~out['masks'].any((2, 3)))
  assert 0 < (out['classes'] != -1).sum() < 2 * BATCH


def test_points_outside_of_the_image_become_invisible():
  out = jax.device_get(moved(scenes(), (Affine(translate=0.9),), jax.random.key(1)))['points']
  inside = ((out[..., :2] >= 0) & (out[..., :2] < (WIDTH, HEIGHT))).all(-1)
  np.testing.assert_array_equal(out[..., 2], inside)
  assert 0 < inside.sum() < inside.size


def test_images_are_drawn_alike_with_and_without_further_fields():
  batch = scenes()
  alone = jax.jit(apply_augments, static_argnums=1)(batch['image'], (WARP, Flip()), jax.random.key(2))
  further = moved(batch, (WARP, Flip()), jax.random.key(2))['image']
  np.testing.assert_allclose(alone, further, atol=1e-5)  # compiled differently


def test_what_moves_pixels_but_not_boxes_is_refused_by_name():
  for name, augment in AUGMENTS.items():
    if name in ('affine', 'flip') or not augment().moves:
      check_augments((augment(),), FIELDS)
  with pytest.raises(ValueError, match='RandAugment moves the pixels of the image, but not clip, map, masks, boxes'):
    check_augments((Flip(), RandAugment()), FIELDS)
  check_augments((RandAugment(),), {'action': FIELDS['action']})


def test_no_augmentation_moves_pixels_that_says_it_does_not():
  """A bright dot in the center of a dark image stays the brightest place."""
  images = np.full((64, 21, 21, 3), 30, np.uint8)
  images[:, 10, 10] = 200
  for augment in [a() for a in AUGMENTS.values()] + [RandAugment(2, 9, operations=('rotate', 'color'))]:
    out = np.asarray(apply_augments(jnp.asarray(images), (augment,) * 2, jax.random.key(0)))
    contrast = np.abs(out.sum(-1) - np.median(out.sum(-1), axis=(1, 2), keepdims=True)).reshape(64, -1)
    stayed = contrast.argmax(1) == 10 * 21 + 10
    if not augment.moves and type(augment).__name__ != 'RandomErasing':
      assert stayed.all(), augment
