import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from fmcv_jax.data.images.decode import decode
from fmcv_jax.data.sources.base import BadRecord

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)


def encoded(image: Image.Image | np.ndarray, kind: str = 'PNG', **options) -> bytes:
  file = io.BytesIO()
  (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
  return file.getvalue()


@pytest.mark.parametrize('kind', ['PNG', 'BMP', 'TIFF', 'PPM'])
def test_lossless_rgb_comes_out_as_it_went_in(kind):
  out = decode(encoded(PIXELS, kind))
  assert out.dtype == np.uint8
  np.testing.assert_array_equal(out, PIXELS)


@pytest.mark.parametrize('kind', ['JPEG', 'WEBP'])
def test_lossy_rgb_comes_out_close(kind):
  smooth = np.asarray(Image.fromarray(PIXELS).resize((64, 48)))
  assert np.abs(decode(encoded(smooth, kind, quality=95)).astype(int) - smooth).mean() < 4


def test_gray_is_repeated():
  np.testing.assert_array_equal(decode(encoded(PIXELS[..., 0])), np.repeat(PIXELS[..., :1], 3, -1))


def test_one_bit_is_black_and_white():
  bits = PIXELS[..., 0] > 127
  np.testing.assert_array_equal(decode(encoded(bits))[..., 1], np.where(bits, 255, 0))


def test_16_bit_gray_is_scaled_not_clipped():
  gray = RNG.integers(0, 65536, (6, 9), dtype=np.uint16)
  for kind in ('PNG', 'TIFF'):
    np.testing.assert_array_equal(decode(encoded(gray, kind))[..., 2], gray >> 8)


def test_16_bit_color_keeps_its_high_bytes():
  wide = RNG.integers(0, 65536, (2, 3, 3), dtype=np.uint16)
  rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in wide)
  np.testing.assert_array_equal(decode(png(3, 2, bits=16, color=2, rows=rows)), wide >> 8)


def test_cmyk_becomes_rgb():
  ink = np.zeros((8, 8, 4), np.uint8)
  ink[..., 0] = 255  # all cyan: no red
  out = decode(encoded(Image.fromarray(ink, 'CMYK'), 'JPEG', quality=100))
  assert np.abs(out.astype(int) - (0, 255, 255)).max() <= 3


def test_transparent_pixels_lie_on_white():
  rgba = np.dstack([PIXELS, RNG.integers(0, 256, (6, 9), dtype=np.uint8)])
  alpha = rgba[..., 3:] / 255
  np.testing.assert_allclose(decode(encoded(rgba)), PIXELS * alpha + 255 * (1 - alpha), atol=1)


def test_gray_with_alpha_lies_on_white():
  la = np.array([[[10, 255], [10, 0], [10, 51]]], np.uint8)
  np.testing.assert_allclose(decode(encoded(Image.fromarray(la, 'LA')))[0, :, 0], [10, 255, 206], atol=1)


def test_palette_with_a_transparent_entry_lies_on_white():
  image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), 'P')
  image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
  assert decode(encoded(image)).tolist() == [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]]
  assert decode(encoded(image, transparency=1)).tolist() == [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]]
  half = bytes([255, 128, 0])
  np.testing.assert_allclose(decode(encoded(image, transparency=half))[0, 1], [127, 255, 127], atol=1)


def test_animation_gives_its_first_frame():
  frames = [Image.new('RGB', (4, 4), c) for c in ('red', 'blue')]
  assert decode(encoded(frames[0], 'GIF', save_all=True, append_images=frames[1:]))[0, 0].tolist() == [255, 0, 0]


UPRIGHT = {
  1: lambda x: x,
  2: lambda x: x[:, ::-1],
  3: lambda x: x[::-1, ::-1],
  4: lambda x: x[::-1],
  5: lambda x: x.transpose(1, 0, 2),
  6: lambda x: np.rot90(x, -1),
  7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
  8: lambda x: np.rot90(x),
}


@pytest.mark.parametrize('orientation', UPRIGHT)
@pytest.mark.parametrize('kind', ['PNG', 'TIFF'])  # Pillow turns TIFF by itself: it must not be turned twice
def test_image_is_upright_by_its_exif_orientation(orientation, kind):
  exif = Image.Exif()
  exif[0x0112] = orientation
  np.testing.assert_array_equal(decode(encoded(PIXELS, kind, exif=exif)), UPRIGHT[orientation](PIXELS))


def test_an_intact_image_with_damaged_metadata_is_decoded():
  for exif in (b'Exif\0\0garbage', b'Exif\0\0MM\0*\0\0\0\x08\xff\xff'):
    with warnings.catch_warnings(action='ignore'):
      np.testing.assert_array_equal(decode(encoded(PIXELS, exif=exif)), PIXELS)


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP', 'GIF', 'TIFF'])
def test_truncated_data_is_refused_wherever_it_ends(kind):
  data = encoded(np.asarray(Image.fromarray(PIXELS).resize((40, 30))), kind)
  whole = decode(data)
  reasons = []
  for end in range(0, len(data), 7):
    with warnings.catch_warnings(action='ignore'):
      try:
        np.testing.assert_array_equal(decode(data[:end]), whole)  # only trailing metadata was lost
      except BadRecord as error:
        reasons.append(str(error))
  assert len(reasons) > 0.9 * len(data) / 7
  assert not any('\n' in reason for reason in reasons)


def test_decompression_bomb_is_refused_by_its_header():
  with warnings.catch_warnings(action='ignore'), pytest.raises(BadRecord, match='pixels'):
    decode(png(12_000, 12_000, bits=8, color=2, rows=b''))
  with pytest.raises(BadRecord, match='9 x 6 pixels are more than the 53 allowed'):
    decode(encoded(PIXELS), max_pixels=53)
  assert decode(encoded(PIXELS), max_pixels=54).shape == (6, 9, 3)


def test_data_that_is_not_an_image_is_refused():
  postscript = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n'
  for data in (b'', b'hello', b'<html></html>', postscript):
    with pytest.raises(BadRecord, match='no image'):
      decode(data)


def test_floating_point_pixels_are_refused():
  with pytest.raises(BadRecord, match='floating-point'):
    decode(encoded(Image.fromarray(np.zeros((2, 2), np.float32)), 'TIFF'))


def png(width: int, height: int, *, bits: int, color: int, rows: bytes) -> bytes:
  def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))

  header = struct.pack('>IIBBBBB', width, height, bits, color, 0, 0, 0)
  return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')
