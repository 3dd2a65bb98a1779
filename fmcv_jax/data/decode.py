"""Encoded images to RGB, strictly: what comes out is the right picture, or `BadRecord` says why there is none."""

import io

import numpy as np
from PIL import Image

from fmcv_jax.data.source import BadRecord

MAX_PIXELS = 89_478_485  # 256 MiB of RGB, Pillow's own limit for a warning

# Named one by one, since Pillow also opens documents (EPS runs Ghostscript) and formats that nobody has fuzzed.
Image.init()
_WANTED = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP', 'TIFF', 'PPM', 'JPEG2000', 'AVIF')
FORMATS = tuple(name for name in _WANTED if name in Image.OPEN)

_ORIENTATION = 0x0112  # the EXIF tag; the camera says how it was held, not all software turns the pixels
_UPRIGHT = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
  """Encoded bytes -> uint8 [H, W, 3], read-only, upright by its EXIF orientation; the first frame of an animation.

  Grey, palette, CMYK and 16-bit images become RGB; what is transparent lies on white. Colour profiles are not applied.
  Raises BadRecord for what is no image, is truncated, or says in its header that it has more than `max_pixels`.
  """
  return np.asarray(decode_pil(data, max_pixels))


def decode_pil(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
  """As `decode`, but a PIL image of mode RGB."""
  try:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > max_pixels:
      raise BadRecord(f'{image.width} x {image.height} pixels are more than the {max_pixels} allowed')
    image.load()
    return _rgb(_upright(image))
  except BadRecord:
    raise
  except Exception as error:  # Pillow's plugins raise what they like on damaged files: SyntaxError, IndexError, ...
    raise BadRecord(_one_line(error, data)) from error


def _upright(image: Image.Image) -> Image.Image:
  try:  # after load(): formats that are turned by their own plugin (TIFF, AVIF) have dropped the tag by now
    orientation = image.getexif().get(_ORIENTATION)
  except Exception:  # damaged metadata of a sound picture
    return image
  return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _rgb(image: Image.Image) -> Image.Image:
  if image.mode == 'RGB' and 'transparency' not in image.info:
    return image
  if image.mode.startswith('I'):  # Pillow's own conversion clips 16 bits at 255 instead of scaling
    grey = np.asarray(image).astype(np.int64)
    if grey.min() < 0 or grey.max() > 0xFFFF:
      raise BadRecord(f'pixels of mode {image.mode} from {grey.min()} to {grey.max()} are not 16-bit')
    return Image.fromarray((grey >> 8).astype(np.uint8)).convert('RGB')
  if image.mode == 'F':
    raise BadRecord('floating-point pixels have no known range')
  if image.has_transparency_data:
    image = image.convert('RGBA')
    white = Image.new('RGB', image.size, 'white')
    white.paste(image, mask=image.getchannel('A'))
    return white
  return image.convert('RGB')


def _one_line(error: Exception, data: bytes) -> str:
  if isinstance(error, Image.UnidentifiedImageError):
    return f'no image: {len(data)} bytes that start with {bytes(data[:8])!r}'
  return ' '.join(f'{type(error).__name__}: {error}'.split())
