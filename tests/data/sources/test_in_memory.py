"""One image has one set of pixels, however it is given: as a path, bytes, a Pillow image or an array."""

import io
import pathlib

import numpy as np
import pytest
from PIL import Image

from fmcv_jax.data.images.decode import decode
from fmcv_jax.data.sources.base import BadRecord
from fmcv_jax.data.sources.in_memory import InMemoryImages
from fmcv_jax.data.transforms import Resize, ResizeCrop
from fmcv_jax.errors import UserError

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (12, 17, 3), dtype=np.uint8)
GRAY, ALPHA = RGB[..., 0], RNG.integers(0, 256, (12, 17, 1), dtype=np.uint8)
WIDE = RNG.integers(0, 65536, (12, 17), dtype=np.uint16)
PALETTE = Image.fromarray(GRAY % 3, 'P')
PALETTE.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
BIG = Image.fromarray(RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8)).resize((1200, 800), Image.Resampling.BICUBIC)


def turned(orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  return exif


def encoded(image, kind='PNG', **options):
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


def white(rgb, alpha):
  """The colors over white, by hand."""
  a = alpha / 255
  return rgb * a + 255 * (1 - a)


FILES = {
  'RGB': (encoded(Image.fromarray(RGB)), RGB),
  'gray': (encoded(Image.fromarray(GRAY)), np.repeat(GRAY[..., None], 3, -1)),
  '16 bits': (encoded(Image.fromarray(WIDE)), np.repeat(WIDE[..., None] >> 8, 3, -1)),
  '16 bits, TIFF': (encoded(Image.fromarray(WIDE), 'TIFF'), np.repeat(WIDE[..., None] >> 8, 3, -1)),
  'RGBA': (encoded(Image.fromarray(np.dstack([RGB, ALPHA]))), white(RGB, ALPHA)),
  'LA': (
    encoded(Image.fromarray(np.dstack([GRAY[..., None], ALPHA]), 'LA')),
    np.repeat(white(GRAY[..., None], ALPHA), 3, -1),
  ),
  'palette': (encoded(PALETTE), np.eye(3)[GRAY % 3] * 255),
  'transparent palette': (
    encoded(PALETTE, transparency=1),
    np.where((GRAY % 3 == 1)[..., None], 255, np.eye(3)[GRAY % 3] * 255),
  ),
  'one bit': (encoded(Image.fromarray(GRAY > 127)), np.repeat((GRAY[..., None] > 127) * 255, 3, -1)),
  'CMYK': (encoded(Image.fromarray(np.dstack([RGB, ALPHA]), 'CMYK'), 'TIFF'), None),
  'turned PNG': (encoded(Image.fromarray(RGB), exif=turned(6)), np.rot90(RGB, -1)),
  'turned TIFF': (encoded(Image.fromarray(RGB), 'TIFF', exif=turned(6)), np.rot90(RGB, -1)),
  **{f'JPEG {n}': (encoded(BIG, 'JPEG', quality=95, exif=turned(n)), None) for n in range(1, 9)},
  'WebP': (encoded(BIG, 'WEBP'), None),
}


@pytest.mark.parametrize(('data', 'expected'), FILES.values(), ids=FILES)
def test_an_image_has_the_same_pixels_as_path_bytes_and_pillow_image(tmp_path, data, expected):
  path = tmp_path / 'image'
  path.write_bytes(data)
  given = [data, path, str(path), Image.open(path), Image.open(io.BytesIO(data)).copy()]
  source = InMemoryImages(given)
  images = [source[index]['image'] for index in range(len(given))]
  pixels = [decode(image) if isinstance(image, bytes) else image for image in images]
  if expected is not None:
    np.testing.assert_allclose(pixels[0], expected, atol=1)  # of 255, where alpha is rounded
  for other in pixels[1:]:
    np.testing.assert_array_equal(other, pixels[0])
  for transform in (ResizeCrop(8), Resize(8)):
    crops = [transform(image, RNG) for image in images]
    for other in crops[1:]:
      np.testing.assert_array_equal(other, crops[0])


@pytest.mark.parametrize(
  ('array', 'expected'),
  [
    (RGB, RGB),
    (GRAY, np.repeat(GRAY[..., None], 3, -1)),
    (GRAY[..., None], np.repeat(GRAY[..., None], 3, -1)),
    (WIDE, np.repeat(WIDE[..., None] >> 8, 3, -1)),
    (np.dstack([RGB, ALPHA]), white(RGB, ALPHA)),
    (np.dstack([GRAY[..., None], ALPHA]), np.repeat(white(GRAY[..., None], ALPHA), 3, -1)),
  ],
  ids=['RGB', 'gray', 'one channel', '16 bits', 'RGBA', 'LA'],
)
def test_an_array_is_treated_as_the_file_that_holds_it(array, expected):
  np.testing.assert_allclose(InMemoryImages([array])[0]['image'], expected, atol=1)


def test_pixels_whose_range_is_not_known_are_refused_in_every_way(tmp_path):
  floats = Image.fromarray(np.ones((2, 2), np.float32))
  path = tmp_path / 'x.tiff'
  path.write_bytes(encoded(floats, 'TIFF'))
  for given in (floats, Image.open(path)):
    with pytest.raises(BadRecord, match='floating-point pixels have no known range'):
      InMemoryImages([given])[0]
  for data in (path.read_bytes(), InMemoryImages([path])[0]['image']):
    with pytest.raises(BadRecord, match='floating-point pixels have no known range'):
      Resize(2)(data, RNG)
  for array in (RGB / 255, RGB.astype(np.int32), RGB[None], RGB[:0], RGB.transpose(2, 0, 1)):
    with pytest.raises(BadRecord, match=r'is not an image; expected uint8 \[H, W, 3\]'):
      InMemoryImages([array])[0]


def test_a_damaged_file_that_pillow_has_opened_is_a_bad_record(tmp_path):
  path = tmp_path / 'x.png'
  path.write_bytes(encoded(BIG)[:2000])
  with pytest.raises(BadRecord, match='OSError: image file is truncated'):
    InMemoryImages([Image.open(path)])[0]


@pytest.mark.parametrize(
  'given', ['x.jpg', b'bytes', pathlib.Path('x.jpg'), Image.fromarray(RGB)], ids=lambda x: type(x).__name__
)
def test_one_image_that_is_not_in_a_list_is_said(given):
  with pytest.raises(UserError, match='images: expected a list of images, got one'):
    InMemoryImages(given)


def test_what_is_no_image_is_named(tmp_path):
  with pytest.raises(BadRecord, match='int is not an image; give an array'):
    InMemoryImages([3])[0]
  source = InMemoryImages([tmp_path / 'gone.png'])
  assert source.key_of(0) == f'{tmp_path}/gone.png'
  with pytest.raises(OSError, match='gone'):
    source[0]
