"""Augmentations on the device, against PIL, scipy and closed forms, and what holds for all of them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage, stats

from fmcv_jax.augment.apply import apply_augments
from fmcv_jax.augment.base import Augment
from fmcv_jax.augment.color import Blur, ColorJitter, Invert, Solarize, apply_color_matrix, blurred
from fmcv_jax.augment.erasing import RandomErasing
from fmcv_jax.augment.geometry import Affine, Flip
from fmcv_jax.augment.randaugment import RandAugment
from fmcv_jax.augment.randaugment_ops import OPERATIONS
from fmcv_jax.augment.registry import AUGMENTS
from fmcv_jax.augment.three_augment import ThreeAugment
from fmcv_jax.config import build
from fmcv_jax.errors import UserError
from tests.augment.photos import HEIGHT, KEY, PHOTO, RNG, WIDTH, compiled

EVERY = [
  Affine((0.7, 1.4), (0.8, 1.25), rotation=40, translate=0.2, shear=0.2, fill=0.5),
  Affine((0.5, 2.0), rotation=180, fill=None),
  Blur(1.0),
  ColorJitter(0.4, 0.4, 0.4, 0.3, grayscale=0.2, probability=0.8),
  Flip(),
  Invert(),
  RandAugment(3, 9, magnitude_std=0.5, probability=0.9, recipe='timm', operations=OPERATIONS),
  RandomErasing(1.0),
  Solarize(probability=1.0),
  ThreeAugment(),
]


def show(augment):
  return repr(augment).split('(')[0]


as_floats = jax.jit(apply_augments, static_argnums=1)  # compiled, a division by 255 may differ in the last bit


def batch(count=8, height=HEIGHT, width=WIDTH):
  return RNG.random((count, height, width, 3), dtype=np.float32)


def test_affine_zooms_and_stretches_about_the_center():
  ours = compiled(Affine(scale=(2.0, 2.0), ratio=(4.0, 4.0)))(PHOTO[None] / 255.0, KEY)[0]
  pil_image, affine = Image.fromarray(PHOTO), Image.Transform.AFFINE
  reference = (0.25, 0, WIDTH * 3 / 8, 0, 1, 0)  # four times as wide, and as high as before
  theirs = pil_image.transform(pil_image.size, affine, reference, Image.Resampling.BILINEAR)
  np.testing.assert_allclose(ours, np.asarray(theirs) / 255, atol=1.01 / 255)


def test_affine_draws_each_parameter_within_its_bounds():
  count, height, width = 500, 30, 40
  affine = Affine((0.8, 1.25), (0.5, 2.0), rotation=30.0, translate=0.25, shear=0.3)
  matrices = np.asarray(jax.jit(affine.draw, static_argnums=(0, 1, 2))(count, height, width, KEY), np.float64)
  right, down, shift = matrices[..., 0], matrices[..., 1], matrices[..., 2]  # where a step to the right or down leads

  angle = np.arctan2(right[:, 1], right[:, 0])
  across, along = np.hypot(*right.T), down[:, 1] / np.cos(angle)
  shear = down[:, 0] / along + np.sin(angle)
  center = np.array([width, height]) / 2
  move = np.linalg.solve(matrices[..., :2], (center - shift)[..., None])[..., 0] - center  # of the point in the center
  for drawn, most in [
    (-np.log(across * along) / 2, math.log(1.25)),
    (np.log(along / across), math.log(2)),
    (np.degrees(angle), 30),
    (shear, 0.3),
    (move[:, 0] / width, 0.25),
    (move[:, 1] / height, 0.25),
  ]:
    assert np.abs(drawn).max() < most * 1.0001
    assert stats.kstest(drawn, stats.uniform(-most, 2 * most).cdf).pvalue > 0.01


def jitter(brightness=1.0, contrast=1.0, saturation=1.0, turn=0.0, gray=False):
  values = [np.array([value], np.float32) for value in (brightness, contrast, saturation, turn)]
  return np.asarray(jax.jit(apply_color_matrix)(PHOTO[None] / np.float32(255), *values, np.array([gray]))[0])


@pytest.mark.parametrize(
  ('field', 'enhance'),
  [('brightness', ImageEnhance.Brightness), ('contrast', ImageEnhance.Contrast), ('saturation', ImageEnhance.Color)],
)
def test_brightness_contrast_and_saturation_equal_pils(field, enhance):
  for factor in (0.0, 0.4, 1.0, 1.7):
    theirs = np.asarray(enhance(Image.fromarray(PHOTO)).enhance(factor)) / 255
    # PIL rounds the mean gray first, which a factor of up to 1.7 passes on, and rounds the result down.
    np.testing.assert_allclose(jitter(**{field: factor}), theirs, atol=1.5 / 255)


def test_hue_rotates_colors_about_the_gray_axis():
  turned = jitter(turn=1 / 3)
  np.testing.assert_allclose(turned, PHOTO[..., [2, 0, 1]] / 255, atol=1e-5)  # red becomes green becomes blue
  sixth = jitter(turn=0.1)
  inside = ((sixth > 0) & (sixth < 1)).all(-1)
  np.testing.assert_allclose(sixth.mean(-1)[inside], PHOTO.mean(-1)[inside] / 255, atol=1e-5)
  distance = [np.linalg.norm(x - x.mean(-1, keepdims=True), axis=-1)[inside] for x in (sixth, PHOTO / 255)]
  np.testing.assert_allclose(*distance, atol=1e-5)


def test_combined_color_changes_equal_a_sequence_clipped_once():
  image = PHOTO / 255 * 1.2
  image = 0.7 * image + 0.3 * (image @ [0.299, 0.587, 0.114]).mean()
  image = 1.3 * image - 0.3 * (image @ [0.299, 0.587, 0.114])[..., None]
  np.testing.assert_allclose(jitter(1.2, 0.7, 1.3, 1 / 3), np.clip(image[..., [2, 0, 1]], 0, 1), atol=1e-5)
  gray = np.broadcast_to(image[..., [2, 0, 1]] @ [[0.299], [0.587], [0.114]], image.shape)
  np.testing.assert_allclose(jitter(1.2, 0.7, 1.3, 1 / 3, gray=True), gray, atol=1e-5)


@pytest.mark.parametrize(('height', 'width'), [(50, 70), (9, 12)])
def test_blur_equals_scipys_gaussian_filter(height, width):
  images, sigma = batch(2, height, width), np.array([0.3, 1.7], np.float32)
  ours = jax.jit(blurred)(images, sigma)
  for image, one, s in zip(images, ours, sigma):
    radius = max(1, height // 20)
    theirs = ndimage.gaussian_filter(image.astype(np.float64), s, mode='mirror', radius=radius, axes=(0, 1))
    np.testing.assert_allclose(one, theirs, atol=1e-5)


def test_solarize_and_invert_equal_pils():
  image = PHOTO[None] / np.float32(255)
  for ours, theirs in [
    (Solarize(probability=1.0), ImageOps.solarize(Image.fromarray(PHOTO), 128)),
    (Invert(1.0), ImageOps.invert(Image.fromarray(PHOTO))),
  ]:
    np.testing.assert_allclose(compiled(ours)(image, KEY)[0], np.asarray(theirs) / 255, atol=1e-6)


@pytest.mark.parametrize('fields', [{}, {'area': (0.9, 1.0)}], ids=str)
def test_the_erased_box_keeps_its_bounds_in_area_and_ratio_and_reaches_every_place(fields):
  height, width = 60, 80
  erasing = RandomErasing(1.0, value=1.0, **fields)
  erased = np.asarray(compiled(erasing)(np.zeros((400, height, width, 3), np.float32), KEY))[..., 0] == 1
  rows, columns = erased.any(2).sum(1), erased.any(1).sum(1)
  np.testing.assert_array_equal(erased.sum((1, 2)), rows * columns)  # it is a box
  share, half = rows * columns / (height * width), 0.5 * (rows + columns) / (height * width)
  assert (share >= erasing.area[0] - half).all()
  assert (share <= erasing.area[1] + half).all()
  assert ((columns + 0.5) / (rows - 0.5) >= erasing.ratio[0]).all()
  assert ((columns - 0.5) / (rows + 0.5) <= erasing.ratio[1]).all()
  assert erased.any((0, 1)).all()
  assert erased.any((0, 2)).all()
  if not fields:
    assert stats.kstest(share, stats.uniform(0.02, 1 / 3 - 0.02).cdf).pvalue > 0.01


def test_erasing_with_noise_draws_every_value_anew():
  erased = np.asarray(compiled(RandomErasing(1.0, area=(1.0, 1.0)))(np.full((2, 40, 40, 3), 2, np.float32), KEY))
  assert stats.kstest(erased.ravel(), stats.uniform.cdf).pvalue > 0.01
  assert len(np.unique(erased)) > 0.99 * erased.size


@pytest.mark.parametrize(
  'augment',
  [
    Affine(),
    Affine(fill=None),
    Blur(0.0),
    ColorJitter(0.4, 0.4, 0.4, 0.4, probability=0.0),
    Flip(0.0),
    Invert(0.0),
    RandAugment(probability=0.0),
    RandomErasing(0.0),
    Solarize(probability=0.0),
  ],
  ids=show,
)
def test_probability_0_and_neutral_parameters_change_nothing(augment):
  images = as_floats(RNG.integers(0, 256, (16, HEIGHT, WIDTH, 3)).astype(np.uint8), (), KEY)
  np.testing.assert_array_equal(compiled(augment)(images, KEY), images)


@pytest.mark.parametrize('augment', EVERY, ids=show)
def test_each_image_draws_its_own_parameters_and_the_same_for_the_same_key(augment):
  same = np.broadcast_to(batch(1), (16, HEIGHT, WIDTH, 3))
  one, again, other = (np.asarray(compiled(augment)(same, jax.random.key(seed))) for seed in (1, 1, 2))
  np.testing.assert_array_equal(one, again)
  if augment != Solarize(probability=1.0):  # which has nothing to draw
    assert len(np.unique(one.reshape(16, -1), axis=0)) > 1
    assert (one != other).any()


def test_three_augment_does_one_of_three_to_each_image_equally_often():
  images = np.broadcast_to(batch(1), (96, HEIGHT, WIDTH, 3))
  out = np.asarray(compiled(ThreeAugment())(images, KEY))
  gray = np.ptp(out, axis=-1).max((1, 2)) < 1e-6
  negative = np.abs(out - np.where(images >= 0.5, 1 - images, images)).max((1, 2, 3)) < 1e-6
  assert not (gray & negative).any()
  smooth = ~gray & ~negative
  assert np.abs(np.diff(out[smooth], axis=1)).mean() < np.abs(np.diff(images, axis=1)).mean()
  assert min(gray.sum(), negative.sum(), smooth.sum()) > 20


@pytest.mark.parametrize('augment', EVERY, ids=show)
def test_pixels_stay_float32_in_0_to_1_even_at_the_extremes(augment):
  images = np.concatenate([RNG.integers(0, 2, (14, HEIGHT, WIDTH, 3)), np.zeros((1, HEIGHT, WIDTH, 3))])
  images = np.concatenate([images, np.ones((1, HEIGHT, WIDTH, 3))]).astype(np.float32)
  out = compiled(augment)(images, KEY)
  assert out.dtype == jnp.float32
  assert out.shape == images.shape
  assert out.min() >= 0
  assert out.max() <= 1


@pytest.mark.parametrize('augment', EVERY, ids=show)
def test_eight_devices_draw_what_one_draws_and_exchange_nothing(augment):
  images = batch(16)
  mesh = Mesh(np.array(jax.devices()), 'data')
  split = NamedSharding(mesh, PartitionSpec('data'))
  program = jax.jit(augment, in_shardings=(split, None), out_shardings=split).lower(images, KEY).compile()
  out = program(jax.device_put(images, split), jax.device_put(KEY, NamedSharding(mesh, PartitionSpec())))
  np.testing.assert_allclose(out, compiled(augment)(images, KEY), atol=1e-6)
  for collective in ('all-gather', 'all-reduce', 'all-to-all', 'collective-permute'):
    assert collective not in program.as_text()


def test_apply_augments_applies_all_in_order_with_keys_of_their_own():
  images = RNG.integers(0, 256, (8, 6, 6, 3)).astype(np.uint8)
  dark, light = np.minimum(images, 255 - images) / 255, np.maximum(images, 255 - images) / 255
  np.testing.assert_allclose(apply_augments(images, [Invert(1.0), Solarize(0.5, 1.0)], KEY), dark, atol=1e-6)
  np.testing.assert_allclose(apply_augments(images, [Solarize(0.5, 1.0), Invert(1.0)], KEY), light, atol=1e-6)
  twice = apply_augments(images, [Flip(), Flip()], KEY)
  assert (twice != images / np.float32(255)).any()


@pytest.mark.parametrize(
  ('spec', 'message'),
  [
    ({'name': 'flip', 'probability': 1.5}, 'probability: expected a number at least 0 and at most 1, got 1.5'),
    ({'name': 'affine', 'scale': (1.2, 0.8)}, 'scale: expected 0 < low <= high, got'),
    ({'name': 'affine', 'rotation': -10}, 'rotation: expected a number at least 0'),
    ({'name': 'affine', 'fill': 255}, 'fill: expected a number at least 0 and at most 1, got 255'),
    ({'name': 'blur', 'sigma': (0.0, 2.0)}, 'sigma.0: expected a number above 0'),
    ({'name': 'color_jitter', 'hue': 0.6}, 'hue: expected a number at least 0 and at most 0.5, got 0.6'),
    ({'name': 'color_jitter', 'brightness': -1}, 'brightness: expected a number at least 0'),
    ({'name': 'random_erasing', 'area': (0.1, 1.5)}, 'area.1: expected a number above 0 and at most 1'),
    ({'name': 'random_erasing', 'value': 'white'}, 'value'),
    ({'name': 'solarize', 'threshold': 128}, 'threshold: expected a number at least 0 and at most 1, got 128'),
    ({'name': 'rand_augment', 'layers': 0}, 'layers: expected at least 1, got 0'),
    ({'name': 'rand_augment', 'magnitude': -1}, 'magnitude: expected a number at least 0'),
    ({'name': 'rand_augment', 'recipe': 'torchvision'}, "'torchvision' is not one of 'paper'"),
    ({'name': 'rand_augment', 'operations': ('rotate', 'twirl')}, 'operations: unknown twirl; known: auto_contrast'),
    ({'name': 'rand_augment', 'operations': ('rotate', 'rotate')}, 'operations: expected different names'),
  ],
)
def test_a_bad_field_is_one_line_that_says_what_would_be_right(spec, message):
  with pytest.raises(UserError, match='config') as error:
    build(Augment, spec, {Augment: AUGMENTS})
  assert message in str(error.value)


def test_every_augmentation_builds_from_its_name_alone():
  for name in AUGMENTS:
    assert build(Augment, name, {Augment: AUGMENTS}) == AUGMENTS[name]()
  assert build(Augment, {'name': 'random_erasing', 'value': 0}, {Augment: AUGMENTS}) == RandomErasing(value=0.0)


def test_all_frames_of_a_clip_are_changed_as_each_alone_would_be():
  """Of as many clips as frames, whose axes would not differ in size if they were mixed up."""
  clips = RNG.integers(0, 256, (4, 4, 9, 12, 3), np.uint8)
  augments = (Flip(), ColorJitter(0.4, 0.4, 0.4), Affine(rotation=20, translate=0.2))
  changed = as_floats(clips, augments, KEY)
  for frame in range(4):
    np.testing.assert_allclose(changed[:, frame], as_floats(clips[:, frame], augments, KEY), atol=1e-5)
  for clip, flipped in zip(clips / 255, as_floats(clips, (Flip(),), KEY), strict=True):
    assert any(np.allclose(flipped, x, atol=1e-6) for x in (clip, clip[:, :, ::-1]))
