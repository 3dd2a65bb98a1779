"""What is decoded in part is what Pillow makes of the whole file."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image

from fmcv_jax.data.images import jpeg
from fmcv_jax.data.images.decode import decode, decode_pil, lazy_image
from fmcv_jax.data.sources.base import BadRecord
from fmcv_jax.data.transforms import RandomResizedCrop, sample_box

RNG = np.random.default_rng(0)


def photo(height=150, width=203):
  """Smooth shapes with some noise on them, as in a photograph."""
  coarse = Image.fromarray(RNG.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((width, height), 3)
  return np.clip(np.asarray(coarse) + RNG.normal(0, 8, (height, width, 1)), 0, 255).astype(np.uint8)


def encoded(image, kind='JPEG', **options):
  file = io.BytesIO()
  (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
  return file.getvalue()


def oriented(orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  return exif


PHOTO = photo()
KINDS = {
  '4:2:0': encoded(PHOTO, quality=90),
  '4:4:4': encoded(PHOTO, subsampling=0),
  '4:2:2': encoded(PHOTO, subsampling=1),
  'gray': encoded(PHOTO[..., 0]),
  'progressive': encoded(PHOTO, progressive=True),
  'restarts': encoded(PHOTO, restart_marker_rows=1),
  'optimized': encoded(PHOTO, optimize=True, comment=b'\xff\xd9' * 9),
  'upright by EXIF': encoded(PHOTO, exif=oriented(1)),
  'broken EXIF': encoded(PHOTO, exif=b'Exif\0\0MM\0*\0\0\0\x08\xff\xff'),
}


@pytest.mark.parametrize('kind', KINDS)
def test_the_pixels_around_any_box_are_those_of_pillow(kind):
  data = KINDS[kind]
  assert jpeg.header(data) is not None
  with warnings.catch_warnings(action='ignore'):
    whole = np.asarray(decode_pil(data))
    np.testing.assert_array_equal(decode(data), whole)
    image = lazy_image(data)
  assert (image.height, image.width) == whole.shape[:2] == PHOTO.shape[:2]
  for bottom in range(3, image.height, 13):
    pixels, (left, top, right, end), turn = image.region((20, 2, 70, bottom), (50, 50))
    assert turn is None
    top_margin, left_margin = int(2 - top), int(20 - left)
    assert (right - left, end - top) == (50, bottom - 2)
    assert left_margin <= 17  # three pixels are looked at beyond it
    height, width, _ = pixels.shape
    assert height >= min(end + 3, image.height - top_margin)
    assert width >= min(right + 3, image.width - left_margin)
    np.testing.assert_array_equal(pixels, whole[top_margin : top_margin + height, left_margin : left_margin + width])


@pytest.mark.parametrize('orientation', [1, 6])
@pytest.mark.parametrize('reduction', [2, 4, 8])
def test_a_reduced_crop_looks_like_one_of_the_whole(reduction, orientation):
  large = encoded(photo(801, 1003), quality=92, exif=oriented(orientation))
  full = decode_pil(large)
  size = int(0.3 * 801 / reduction)
  for seed in range(4):
    crop = RandomResizedCrop(size, scale=(0.5, 1.0))
    out = crop(large, np.random.default_rng(seed)).astype(int)
    left, top, w, h = sample_box(full.height, full.width, crop.scale, crop.ratio, np.random.default_rng(seed))
    expected = np.asarray(full.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + w, top + h)))
    region = lazy_image(large, exact=False).region((left, top, left + w, top + h), (size, size))
    assert region.pixels.shape[1] <= -(-1003 // reduction)
    assert np.abs(out - expected).mean() < 1.5


CMYK = Image.fromarray(np.dstack([PHOTO, PHOTO[..., :1] // 3]), 'CMYK')
OTHERS = {
  'PNG': encoded(PHOTO, 'PNG'),
  'WebP': encoded(PHOTO, 'WEBP', quality=90),
  '16 bits': encoded(PHOTO[..., 0].astype(np.uint16) * 256 + 77, 'PNG'),
  'CMYK': encoded(CMYK, quality=95),
  'gray JPEG': KINDS['gray'],
  'PNG, orientation 8': encoded(PHOTO, 'PNG', exif=oriented(8)),
  **{f'JPEG, orientation {number}': encoded(PHOTO, exif=oriented(number)) for number in range(2, 9)},
  'JPEG, orientation 7 by XMP': encoded(PHOTO, xmp=b'<x:xmpmeta tiff:Orientation="7"/>'),
}


@pytest.mark.parametrize('kind', OTHERS)
@pytest.mark.parametrize('interpolation', ['bicubic', 'bilinear'])
def test_crops_of_any_kind_of_image_are_pillows(kind, interpolation):
  full = decode_pil(OTHERS[kind])
  for seed in range(3):
    crop = RandomResizedCrop((61, 47), interpolation=interpolation)
    out = crop(OTHERS[kind], np.random.default_rng(seed)).astype(int)
    left, top, w, h = sample_box(full.height, full.width, crop.scale, crop.ratio, np.random.default_rng(seed))
    filter = Image.Resampling[interpolation.upper()]
    expected = np.asarray(full.resize((47, 61), filter, (left, top, left + w, top + h)))
    # One and the same filter: only rounding differs, and the order of the axes where a value is clipped in between.
    assert np.abs(out - expected).mean() < 0.3
    assert np.abs(out - expected).max() <= (1 if interpolation == 'bilinear' else 12)


def test_what_pillow_refuses_is_refused_and_what_it_takes_is_taken():
  data = KINDS['4:2:0']
  damaged = [data[:end] for end in range(0, len(data), 97)] + [data + b'trailer', data[:-2]]
  damaged += [data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :] for at in range(0, len(data), 61)]
  verdicts = set()
  for case in damaged:
    try:
      expected = np.asarray(decode_pil(case))
    except BadRecord:
      expected = None
    try:
      out = decode(case)
    except BadRecord:
      out = None
    verdicts.add(expected is None)
    assert (out is None) == (expected is None)
    if expected is not None:
      np.testing.assert_array_equal(out, expected)
  assert verdicts == {True, False}


def test_every_processor_makes_the_same_pixels():
  import cykooz_resizer as resizer

  outs = []
  for extensions in ('none', 'sse4_1', 'avx2', 'neon'):
    engine = resizer.Resizer()
    try:
      engine.cpu_extensions = resizer.CpuExtensions[extensions]
    except ValueError:  # not of this processor
      continue
    source = resizer.ImageData(203, 150, resizer.PixelType.U8x3, PHOTO.tobytes())
    target = resizer.ImageData(61, 61, resizer.PixelType.U8x3)
    crop = resizer.ResizeOptions(resizer.ResizeAlg.convolution(resizer.FilterType.catmull_rom))
    engine.resize(source, target, crop)
    outs.append(target.get_buffer())
  assert len(outs) > 1
  assert len(set(outs)) == 1
