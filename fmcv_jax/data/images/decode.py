"""Strict decoding of encoded images to RGB: returns the correct image or raises `BadRecord` with the reason."""

import abc
import io
import math
from typing import NamedTuple

import numpy as np
from PIL import Image
from typing_extensions import override

from fmcv_jax.data.images import jpeg, native_crop
from fmcv_jax.data.images.resize import RADII, Box, Interpolation, resize
from fmcv_jax.errors import BadRecord
from fmcv_jax.fields import ImageSize, height_width

MAX_PIXELS = 89_478_485  # 256 MiB of RGB, Pillow's own limit for a warning

# An explicit list, since Pillow also opens documents (EPS runs Ghostscript) and formats that are not fuzzed.
Image.init()
_WANTED = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP', 'TIFF', 'PPM', 'JPEG2000', 'AVIF')
FORMATS = tuple(name for name in _WANTED if name in Image.OPEN)

_UPRIGHT = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}

_TURNED = (5, 6, 7, 8)  # orientations that swap height and width
_SWAPPED = tuple(_UPRIGHT[orientation] for orientation in _TURNED)

_FACTORS = (1, 2, 4, 8)  # DCT-domain reductions of libjpeg
_GAP = 1.5  # an image is reduced only while each side of the box keeps at least this multiple of the output size


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
  """Decodes bytes to uint8 [H, W, 3], read-only, with the EXIF orientation applied; the first frame of an animation.

  Grayscale, palette, CMYK and 16-bit images are converted to RGB; transparent pixels are composited on white. Color
  profiles are not applied. Raises BadRecord for bytes that are not an image or are truncated, and for a header with
  more than `max_pixels`.
  """
  head = jpeg.header(data)
  if head and head.orientation == 1 and head.height * head.width <= max_pixels:
    pixels = jpeg.decode_rows(data, head, head.height, 1)
    if pixels is not None:
      pixels.flags.writeable = False
      return pixels
  return np.asarray(decode_pil(data, max_pixels))


class Region(NamedTuple):
  """`pixels` uint8 [h, w, 3], a `box` in them, and the transpose to apply after resizing (EXIF orientation)."""

  pixels: np.ndarray
  box: Box
  turn: Image.Transpose | None = None


class LazyImage(abc.ABC):
  """An image of known size whose pixels are decoded on demand, so that a crop need not decode the whole image."""

  height: int
  width: int

  @abc.abstractmethod
  def region(self, box: Box, size: tuple[int, int], radius: int = 3) -> Region:
    """The pixels that a resize of `box` to `size` (height, width) with a filter of this radius (in pixels) reads.

    The region is the image as stored: `box` and pixels before the transpose `turn`.

    Raises BadRecord if they cannot be decoded.
    """

  def crop(self, box: Box, size: ImageSize, interpolation: Interpolation) -> np.ndarray:
    """The box, which lies in the image, as uint8 [height, width, C]; raises BadRecord if it cannot be decoded."""
    size = height_width(size)
    region = self.region(box, size, RADII[interpolation])
    stored = size[::-1] if region.turn in _SWAPPED else size
    return _turned(resize(region.pixels, region.box, stored, interpolation), region.turn)

  def pixels(self) -> np.ndarray:
    """All pixels, uint8 [height, width, C]."""
    region = self.region((0, 0, self.width, self.height), (self.height, self.width))
    return _turned(region.pixels, region.turn)


def lazy_image(image: bytes | np.ndarray, exact: bool = True, channels: int = 3) -> LazyImage:
  """A LazyImage of encoded bytes, which become RGB, or of uint8 [H, W, channels]; raises BadRecord for anything else.

  exact   crops equal crops of the decoded array; otherwise a large JPEG may be decoded at 1/2, 1/4 or 1/8 of its size
          (in the DCT domain), which is faster and differs by half a level on average, and is resized before its
          orientation is applied
  """
  if isinstance(image, np.ndarray):
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != channels or 0 in image.shape:
      raise BadRecord(f'expected an image uint8 [H, W, {channels}], got {image.dtype} {list(image.shape)}')
    return _Pixels(image)
  if channels != 3:
    raise BadRecord(f'encoded images become RGB, but {channels} channels are expected')
  head = jpeg.header(image)
  if head and head.height * head.width <= MAX_PIXELS and (head.orientation == 1 or not exact):
    return _Jpeg(image, head, exact)
  return _Pixels(np.asarray(decode_pil(image)))


class _Pixels(LazyImage):
  def __init__(self, pixels: np.ndarray):
    self._pixels = pixels
    self.height, self.width = pixels.shape[:2]

  @override
  def region(self, box: Box, size: tuple[int, int], radius: int = 3) -> Region:
    return _cut(self._pixels, box, size, radius)

  @override
  def pixels(self) -> np.ndarray:
    return self._pixels


class _Jpeg(LazyImage):
  def __init__(self, data: bytes, head: jpeg.Header, exact: bool):
    self._data, self._head, self._exact = data, head, exact
    self._turn = _UPRIGHT.get(head.orientation)
    self.height, self.width = self._as_stored_size((head.height, head.width))

  @override
  def crop(self, box: Box, size: ImageSize, interpolation: Interpolation) -> np.ndarray:
    size = height_width(size)
    # The C code also skips columns outside the crop, and resizes pixels while they are in the processor's cache.
    factor = self._factor(box, size)
    reduced, stored = _reduced(self._as_stored(box), factor), self._as_stored_size(size)
    height, width = -(-self._head.height // factor), -(-self._head.width // factor)
    left, top, right, bottom = _window(height, width, reduced, stored, RADII[interpolation])
    window = left, top, right - left, bottom - top
    pixels = native_crop.crop_jpeg(self._data, factor, window, _within(reduced, left, top), stored, interpolation)
    return super().crop(box, size, interpolation) if pixels is None else _turned(pixels, self._turn)

  @override
  def region(self, box: Box, size: tuple[int, int], radius: int = 3) -> Region:
    factor, stored, stored_size = self._factor(box, size), self._as_stored(box), self._as_stored_size(size)
    beyond = factor * _reach((stored[3] - stored[1]) / factor, stored_size[0], radius)
    last = min(self._head.height, math.ceil(stored[3]) + beyond)
    pixels = jpeg.decode_rows(self._data, self._head, last, factor)
    if pixels is None:
      return _cut(np.asarray(decode_pil(self._data)), box, size, radius)  # raises with the reason, or succeeds
    return _cut(pixels, _reduced(stored, factor), stored_size, radius)._replace(turn=self._turn)

  def _factor(self, box: Box, size: tuple[int, int]) -> int:
    if self._exact:
      return 1
    width, height = box[2] - box[0], box[3] - box[1]
    return max(f for f in _FACTORS if f == 1 or (width >= f * _GAP * size[1] and height >= f * _GAP * size[0]))

  def _as_stored_size(self, size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) with the sides swapped if the orientation swaps them, in either direction."""
    return size[::-1] if self._head.orientation in _TURNED else size

  def _as_stored(self, box: Box) -> Box:
    """The box in the coordinates of the stored image, before its orientation is applied."""
    orientation, (left, top, right, bottom) = self._head.orientation, box
    if orientation in _TURNED:
      left, top, right, bottom = top, left, bottom, right
    if orientation in (2, 3, 7, 8):
      left, right = self._head.width - right, self._head.width - left
    if orientation in (3, 4, 6, 7):
      top, bottom = self._head.height - bottom, self._head.height - top
    return left, top, right, bottom


def _cut(pixels: np.ndarray, box: Box, size: tuple[int, int], radius: int) -> Region:
  left, top, right, bottom = _window(pixels.shape[0], pixels.shape[1], box, size, radius)
  return Region(pixels[top:bottom, left:right], _within(box, left, top))


def _window(height: int, width: int, box: Box, size: tuple[int, int], radius: int) -> tuple[int, int, int, int]:
  """The window of pixels that a resize of the box reads: (left, top, right, bottom), right and bottom excluded."""
  x, y = _reach(box[2] - box[0], size[1], radius), _reach(box[3] - box[1], size[0], radius)
  left, top = max(0, math.floor(box[0]) - x), max(0, math.floor(box[1]) - y)
  return left, top, min(width, math.ceil(box[2]) + x), min(height, math.ceil(box[3]) + y)


def _reduced(box: Box, factor: int) -> Box:
  return box[0] / factor, box[1] / factor, box[2] / factor, box[3] / factor


def _within(box: Box, left: int, top: int) -> Box:
  return box[0] - left, box[1] - top, box[2] - left, box[3] - top


def _reach(side: float, size: int, radius: int) -> int:
  """The margin in pixels that a filter of `radius` pixels reads outside a box, at the scale of the box."""
  return math.ceil(radius * max(1.0, side / size)) + 1


def _turned(pixels: np.ndarray, turn: Image.Transpose | None) -> np.ndarray:
  return pixels if turn is None else np.asarray(Image.fromarray(pixels).transpose(turn))


def decode_pil(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
  """As `decode`, but a PIL image of mode RGB."""
  try:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > max_pixels:
      raise BadRecord(f'{image.width} x {image.height} pixels are more than the {max_pixels} allowed')
    return rgb(image)
  except BadRecord:
    raise
  except Exception as error:  # as in rgb
    raise BadRecord(_one_line(error, data)) from error


def rgb(image: Image.Image) -> Image.Image:
  """Converts a Pillow image as `decode` does: mode RGB, orientation applied, on white, 16 bits by the high byte.

  Raises BadRecord for a damaged file, and for floating-point pixels, whose range is unknown.
  """
  try:
    image.load()
    return _rgb(_upright(image))
  except BadRecord:
    raise
  except Exception as error:  # Pillow's plugins raise many types on damaged files: SyntaxError, IndexError, ...
    raise BadRecord(' '.join(f'{type(error).__name__}: {error}'.split())) from error


def _upright(image: Image.Image) -> Image.Image:
  orientation = jpeg.exif_orientation(image)  # after load(): plugins that apply it (TIFF, AVIF) have dropped the tag
  return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _rgb(image: Image.Image) -> Image.Image:
  if image.mode == 'RGB' and 'transparency' not in image.info:
    return image
  if image.mode.startswith('I'):  # Pillow's own conversion clips 16 bits at 255 instead of scaling
    gray = np.asarray(image).astype(np.int64)
    if gray.min() < 0 or gray.max() > 0xFFFF:
      raise BadRecord(f'pixels of mode {image.mode} from {gray.min()} to {gray.max()} are not 16-bit')
    return Image.fromarray((gray >> 8).astype(np.uint8)).convert('RGB')
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
