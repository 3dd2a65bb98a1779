"""RandAugment and its operations, against PIL's with the published magnitudes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats

from fmcv_jax.augment import randaugment_ops
from fmcv_jax.augment.randaugment import RandAugment
from fmcv_jax.augment.randaugment_ops import OPERATIONS, RECIPES, apply_operations
from tests.augment.photos import KEY, PHOTO, RNG, compiled


@functools.cache
def operations(increasing):
  return jax.jit(functools.partial(apply_operations, names=OPERATIONS, increasing=increasing, fill=128))


def through(name, level, sign=1, image=PHOTO, increasing=False, center=(0.5, 0.5)):
  """One RandAugment operation on one uint8 image."""
  out = operations(increasing)(
    image[None].astype(np.float32),
    np.array([OPERATIONS.index(name)]),
    np.array([level], np.float32),
    np.array([sign], np.float32),
    np.array([center], np.float32),
  )
  assert (out == jnp.round(out)).all()
  return np.asarray(out[0]).astype(np.int32)


def by_pil(name, level, sign, image, increasing):
  """The same by PIL, with the magnitudes of timm's `..._level_to_arg`, written out."""
  pil_image, affine = Image.fromarray(image), Image.Transform.AFFINE
  factor = max(0.1, 1 + sign * level * 0.9) if increasing else level * 1.8 + 0.1
  size, keywords = pil_image.size, {'resample': Image.Resampling.BILINEAR, 'fillcolor': (128, 128, 128)}
  bits, threshold = int(level * 4), int(level * 256)
  if increasing:
    bits, threshold = 4 - bits, 256 - threshold
  amount = sign * level
  result = {
    'identity': lambda: pil_image,
    'auto_contrast': lambda: ImageOps.autocontrast(pil_image),
    'equalize': lambda: ImageOps.equalize(pil_image),
    'invert': lambda: ImageOps.invert(pil_image),
    'posterize': lambda: ImageOps.posterize(pil_image, max(1, bits)),
    'solarize': lambda: ImageOps.solarize(pil_image, threshold),
    'solarize_add': lambda: pil_image.point([min(255, i + int(level * 110)) if i < 128 else i for i in range(256)] * 3),
    'color': lambda: ImageEnhance.Color(pil_image).enhance(factor),
    'contrast': lambda: ImageEnhance.Contrast(pil_image).enhance(factor),
    'brightness': lambda: ImageEnhance.Brightness(pil_image).enhance(factor),
    'sharpness': lambda: ImageEnhance.Sharpness(pil_image).enhance(factor),
    'rotate': lambda: pil_image.rotate(30 * amount, **keywords),
    'shear_x': lambda: pil_image.transform(size, affine, (1, 0.3 * amount, 0, 0, 1, 0), **keywords),
    'shear_y': lambda: pil_image.transform(size, affine, (1, 0, 0, 0.3 * amount, 1, 0), **keywords),
    'translate_x': lambda: pil_image.transform(size, affine, (1, 0, 0.45 * amount * size[0], 0, 1, 0), **keywords),
    'translate_y': lambda: pil_image.transform(size, affine, (1, 0, 0, 0, 1, 0.45 * amount * size[1]), **keywords),
  }[name]()
  return np.asarray(result).astype(np.int32)


@pytest.mark.parametrize('increasing', [False, True], ids=['google', 'increasing'])
@pytest.mark.parametrize('name', sorted(set(OPERATIONS) - {'cutout'}))
def test_every_operation_equals_pil_at_the_published_magnitudes(name, increasing):
  for level in (0.31, 0.83, 1.0):
    for sign in (-1, 1):
      ours, theirs = (f(name, level, sign, PHOTO, increasing) for f in (through, by_pil))
      assert np.abs(ours - theirs).max() <= 1
      if name in {'equalize', 'invert', 'posterize', 'solarize', 'solarize_add', 'identity'}:
        np.testing.assert_array_equal(ours, theirs)
      if name != 'identity' and not (name in {'solarize', 'posterize'} and level == 1.0):
        assert (ours != PHOTO).any()


@pytest.mark.parametrize('name', ['auto_contrast', 'equalize'])
def test_histogram_operations_equal_pil_on_images_with_few_values(name):
  one = np.full_like(PHOTO, 7)
  two, gaps = one.copy(), (PHOTO // 64 * 64).astype(np.uint8)
  two[0, 0] = 200
  for image in (one, two, gaps, np.zeros_like(PHOTO), np.full_like(PHOTO, 255), PHOTO // 2):
    assert np.abs(through(name, 0.5, image=image) - by_pil(name, 0.5, 1, image, False)).max() <= 1


def test_cutout_is_a_gray_square_cut_off_at_the_border():
  # At 224 pixels and magnitude 10 the square is 80 wide; here 2 * floor(40 / 224 * 21) = 6.
  hidden = (through('cutout', 1.0, center=(0.5, 0.5)) != PHOTO).any(-1)
  assert hidden.nonzero()[0].min() == 10 - 3
  assert hidden.nonzero()[1].max() == 13 + 2
  assert hidden.sum() == 36
  assert (through('cutout', 1.0, center=(0.0, 0.0)) != PHOTO).any(-1).sum() == 9


def test_the_matmul_forms_for_tpu_equal_indexing():
  pixels = RNG.integers(0, 256, (2, 3, 301)).astype(np.int32)
  table = RNG.integers(0, 256, (2, 3, 256)).astype(np.float32)
  counts = [[np.bincount(one, minlength=256) for one in image] for image in pixels]
  np.testing.assert_array_equal(randaugment_ops.histogram_by_matmul(pixels), counts)
  np.testing.assert_array_equal(randaugment_ops.histogram_by_index(pixels), counts)
  entries = np.take_along_axis(table, pixels, -1)
  np.testing.assert_array_equal(randaugment_ops.lookup_by_matmul(pixels, table), entries)
  np.testing.assert_array_equal(randaugment_ops.lookup_by_index(pixels, table), entries)


def test_recipes_list_as_many_operations_as_their_sources():
  assert {name: len(set(names)) for name, names in RECIPES.items()} == {'paper': 14, 'big_vision': 16, 'timm': 15}


def test_randaugment_draws_its_operations_equally_often_and_as_probable_as_asked():
  black = np.zeros((3000, 8, 8, 3), np.float32)
  augment = RandAugment(1, operations=('identity', 'invert', 'translate_x'), fill=1.0, probability=0.6)
  share = np.asarray(compiled(augment)(black, KEY)).mean((1, 2, 3))
  counts = [(share == 0).sum(), (share == 1).sum(), ((share > 0) & (share < 1)).sum()]
  assert stats.chisquare(counts, np.array([0.6, 0.2, 0.2]) * 3000).pvalue > 0.01


@pytest.mark.parametrize('magnitude', [3.1, 14.7])
def test_randaugment_applies_its_magnitude_once_for_each_layer(magnitude):
  once = through('brightness', magnitude / 10)
  twice = through('brightness', magnitude / 10, image=once.astype(np.uint8))
  out = compiled(RandAugment(2, magnitude, operations=('brightness',)))(PHOTO[None] / np.float32(255), KEY)
  np.testing.assert_allclose(out[0] * 255, twice, atol=1e-3)


def test_randaugment_spreads_its_magnitude_between_0_and_10():
  white = np.ones((500, 2, 2, 3), np.float32)
  factor = np.asarray(compiled(RandAugment(1, 2.0, 4.0, operations=('brightness',)))(white, KEY))[:, 0, 0, 0]
  level = (factor[factor < 1] - 0.1) / 1.8  # from level 0.5 on white stays white
  assert level.min() == pytest.approx(0, abs=0.003)
  assert np.mean(factor < 0.1 + 1.8 * 0.2) == pytest.approx(0.5, abs=0.06)
  assert np.mean(factor <= 0.1) == pytest.approx(stats.norm.cdf(-0.5), abs=0.05)
