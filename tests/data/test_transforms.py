import io
import pickle

import numpy as np
import pytest
from PIL import Image, ImageOps
from scipy import stats

from fmcv_jax.config import build
from fmcv_jax.data.sources.base import BadRecord
from fmcv_jax.data.transforms import IMAGE_TRANSFORMS, ImageTransform, RandomResizedCrop, Resize, ResizeCrop, sample_box
from fmcv_jax.errors import UserError

RNG = np.random.default_rng(0)
PHOTO = np.asarray(Image.fromarray(RNG.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((83, 61)))


def rng(seed=0):
  return np.random.default_rng(seed)


def test_random_crops_are_uniform_in_area_and_in_the_logarithm_of_their_ratio():
  height, width, draws = 4000, 4000, rng()
  boxes = np.array([sample_box(height, width, (0.08, 0.5), (3 / 4, 4 / 3), draws) for _ in range(5000)])
  left, top, w, h = boxes.T
  area, ratio = w * h / (height * width), np.log(w / h)
  assert stats.kstest(area, stats.uniform(0.08, 0.42).cdf).pvalue > 0.01
  assert stats.kstest(ratio, stats.uniform(np.log(3 / 4), np.log(16 / 9)).cdf).pvalue > 0.01
  assert stats.kstest(left / (width - w), stats.uniform.cdf).pvalue > 0.01
  assert stats.kstest(top / (height - h), stats.uniform.cdf).pvalue > 0.01
  assert abs(stats.spearmanr(area, ratio).statistic) < 0.05


def test_random_crops_lie_inside_images_of_any_shape():
  draws = rng()
  for height, width in [(1, 1), (1, 50), (50, 1), (7, 5), (300, 20)]:
    for _ in range(200):
      left, top, w, h = sample_box(height, width, (0.08, 1.0), (3 / 4, 4 / 3), draws)
      assert w >= 1
      assert h >= 1
      assert 0 <= left <= left + w <= width
      assert 0 <= top <= top + h <= height


def test_a_long_strip_is_cropped_in_its_center_within_the_ratio():
  assert sample_box(30, 1000, (0.9, 1.0), (3 / 4, 4 / 3), rng()) == (480, 0, 40, 30)


def test_random_crop_depends_on_the_generator_alone():
  crop = RandomResizedCrop(16)
  np.testing.assert_array_equal(crop(PHOTO, rng(1)), crop(PHOTO, rng(1)))
  assert (crop(PHOTO, rng(1)) != crop(PHOTO, rng(2))).any()


def test_random_crop_of_everything_is_a_resize():
  whole = RandomResizedCrop(24, scale=(1.0, 1.0), ratio=(1.0, 1.0))(PHOTO[:, :61], rng())
  np.testing.assert_array_equal(whole, Resize(24)(PHOTO[:, :61], rng()))


@pytest.mark.parametrize('interpolation', ['bicubic', 'bilinear', 'lanczos'])
@pytest.mark.parametrize('shape', [(61, 83), (83, 61), (61, 61), (20, 300), (5, 7)])
def test_resize_crop_equals_resizing_everything_and_cropping_its_center(interpolation, shape):
  image = np.asarray(Image.fromarray(PHOTO).resize(shape[::-1]))
  size, short = 28, 32
  width, height = (int(short * side / min(shape)) for side in shape[::-1])
  whole = Image.fromarray(image).resize((width, height), Image.Resampling[interpolation.upper()])
  left, top = round((width - size) / 2), round((height - size) / 2)
  expected = np.asarray(whole)[top : top + size, left : left + size]
  out = ResizeCrop(size, crop=0.875, interpolation=interpolation)(image, rng())
  assert out.shape == (size, size, 3)
  assert np.abs(out.astype(int) - expected).max() <= 2  # Pillow rounds between its two passes, which go the other way


CROPS = [
  (224, 0.9),
  (224, 0.875),
  (224, 0.95),
  (224, 0.96),
  (288, 0.95),
  (256, 0.9),
  (384, 1.0),
  (96, 0.875),
  (240, 0.882),
]


@pytest.mark.parametrize(('size', 'crop'), CROPS)
def test_the_center_crop_is_that_of_timm(size, crop):
  timm, torch = pytest.importorskip('timm.data'), pytest.importorskip('torch')
  image = Image.fromarray(PHOTO).resize((500, 375), Image.Resampling.BICUBIC)
  theirs = timm.create_transform(input_size=size, crop_pct=crop, interpolation='bicubic', mean=(0,) * 3, std=(1,) * 3)
  expected = torch.round(theirs(image) * 255).permute(1, 2, 0).numpy()
  out = ResizeCrop(size, crop=crop)(np.asarray(image), rng()).astype(int)
  # The two passes of the filter go the other way, and each rounds; a pixel aside would be 3 levels in the mean.
  assert np.abs(out - expected).mean() < 0.3
  assert np.abs(out - expected).max() <= 3


@pytest.mark.parametrize(
  'transform', [Resize(224), ResizeCrop(224), ResizeCrop(224, crop=1.0, interpolation='lanczos')]
)
@pytest.mark.parametrize('orientation', [1, 6])
def test_a_large_jpeg_is_evaluated_by_all_its_pixels(transform, orientation):
  noise = rng().integers(0, 256, (214, 320, 3), dtype=np.uint8)
  exif = Image.Exif()
  exif[0x0112] = orientation
  file = io.BytesIO()
  Image.fromarray(noise).resize((2560, 1708), Image.Resampling.LANCZOS).save(file, 'JPEG', quality=92, exif=exif)
  whole = ImageOps.exif_transpose(Image.open(file)).convert('RGB')
  out = transform(file.getvalue(), rng())
  np.testing.assert_array_equal(out, transform(np.asarray(whole), rng()))
  if isinstance(transform, Resize):
    expected = np.asarray(whole.resize((224, 224), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(out - expected).mean() < 0.15  # 1.07 where the JPEG is decoded at a quarter


def test_large_reductions_are_antialiased():
  stripes = np.tile(np.array([0, 255], np.uint8)[None, :, None], (256, 128, 3))
  for interpolation in ('bicubic', 'bilinear'):
    assert np.abs(Resize(16, interpolation)(stripes, rng()).astype(int) - 127).max() <= 8


def test_arrays_that_need_no_change_are_returned_as_they_are():
  square = PHOTO[:32, :32].copy()
  assert ResizeCrop(32, crop=1.0)(square, rng()) is square
  assert Resize(32)(square, rng()) is square
  assert ResizeCrop(32)(square, rng()) is not square


@pytest.mark.parametrize('transform', [RandomResizedCrop(20), ResizeCrop(20), Resize(20)])
def test_encoded_and_decoded_images_give_the_same_pixels(transform):
  file = io.BytesIO()
  Image.fromarray(PHOTO).save(file, 'PNG')
  out = transform(file.getvalue(), rng(3))
  assert out.shape == (20, 20, 3)
  assert out.dtype == np.uint8
  np.testing.assert_array_equal(out, pickle.loads(pickle.dumps(transform))(PHOTO, rng(3)))


@pytest.mark.parametrize('transform', [RandomResizedCrop(20), ResizeCrop(20), Resize(20)])
def test_data_that_is_not_an_rgb_image_is_a_bad_record(transform):
  for image in (b'no image', PHOTO[..., 0], PHOTO.astype(np.float32), np.dstack([PHOTO, PHOTO[..., :1]]), PHOTO[:0]):
    with pytest.raises(BadRecord):
      transform(image, rng())


@pytest.mark.parametrize(
  ('spec', 'message'),
  [
    ({'name': 'resize', 'size': 0}, 'config.size: expected a number at least 1, got 0'),
    ({'name': 'resize_crop', 'size': 8, 'crop': 1.5}, 'config.crop: expected a number above 0 and at most 1, got 1.5'),
    ({'name': 'random_resized_crop', 'size': 8, 'scale': (0.5, 0.1)}, 'config: scale: expected'),
    ({'name': 'random_resized_crop', 'size': 8, 'ratio': (0, 1)}, 'config.ratio.0: expected a number above 0'),
    ({'name': 'resize', 'size': 8, 'interpolation': 'cubic'}, 'config.interpolation: .cubic. is not one of'),
  ],
)
def test_a_wrong_field_is_one_line_with_its_path(spec, message):
  with pytest.raises(UserError, match=message):
    build(ImageTransform, spec, {ImageTransform: IMAGE_TRANSFORMS})
