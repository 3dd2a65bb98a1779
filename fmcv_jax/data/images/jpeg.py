"""Partial decoding of JPEGs: no rows below a crop, at a reduced scale in the DCT domain.

Pixels are identical to those that Pillow's libjpeg-turbo decodes from the whole file. Unusual files (CMYK, 12 bits,
arithmetic coding, no end marker, a damaged header) are left to Pillow: `header` or `decode_rows` returns None.
"""

import dataclasses
import io
import struct

import numpy as np
import simplejpeg
from PIL import Image

_BASELINE_TO_PROGRESSIVE = (0xC0, 0xC1, 0xC2)  # Huffman-coded SOF markers
_STANDALONE = (0x01, *range(0xD0, 0xD9))  # markers without a length: TEM, RST0 to RST7, SOI
_SOS, _EOI, _APP1 = 0xDA, b'\xff\xd9', 0xE1
_MCU = 16  # rows per block of a 4:2:0 image
_ORIENTATION = 0x0112


@dataclasses.dataclass(frozen=True)
class Header:
  """Stored height and width; `orientation` by EXIF or XMP, 1 for upright; `frame` is the offset of the SOF marker."""

  height: int
  width: int
  orientation: int
  frame: int


def header(data: bytes) -> Header | None:
  """The parsed header, or None if the bytes are not a complete 8-bit baseline or progressive JPEG."""
  if data[:2] != b'\xff\xd8':
    return None
  at, frame, tagged = 2, None, False
  while at + 4 <= len(data) and data[at] == 0xFF:
    marker = data[at + 1]
    if marker == 0xFF or marker in _STANDALONE:  # a fill byte, or a marker without a segment
      at += 1 if marker == 0xFF else 2
      continue
    if marker == _SOS:
      if frame is None or data.rfind(_EOI, at) < 0:  # truncated; Pillow reports where
        return None
      height, width = struct.unpack_from('>HH', data, frame + 5)
      return Header(height, width, _orientation(data) if tagged else 1, frame) if height and width else None
    if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
      frame = at
      # Bits per sample, and number of components: grayscale or color.
      if (
        marker not in _BASELINE_TO_PROGRESSIVE or at + 10 > len(data) or data[at + 4] != 8 or data[at + 9] not in (1, 3)
      ):
        return None
    tagged |= marker == _APP1
    at += 2 + struct.unpack_from('>H', data, at + 2)[0]
  return None


def decode_rows(data: bytes, head: Header, rows: int, factor: int) -> np.ndarray | None:
  """At least the first `rows` rows of the stored image, reduced by `factor` (1, 2, 4, 8): uint8 [h, w, 3].

  Pixel (y, x) covers rows y * factor to (y + 1) * factor, and columns likewise. None if libjpeg rejects the data.
  """
  # The last row depends on the chroma below it, so one more MCU is decoded.
  stored = min(head.height, -(-(rows + 1) // _MCU) * _MCU)
  if stored < head.height:
    cut = bytearray(data)
    struct.pack_into('>H', cut, head.frame + 5, stored)  # the decoder stops there and ignores the rest
    data = bytes(cut)
  try:
    if factor == 1:
      return simplejpeg.decode_jpeg(data, strict=False)
    return simplejpeg.decode_jpeg(
      data, strict=False, min_height=-(-stored // factor), min_width=-(-head.width // factor), min_factor=factor
    )
  except ValueError:
    return None


def _orientation(data: bytes) -> int:
  """The orientation tag of EXIF or XMP, read by Pillow."""
  try:
    return exif_orientation(Image.open(io.BytesIO(data), formats=('JPEG',)))
  except Exception:  # a header that Pillow does not open
    return 1


def exif_orientation(image: Image.Image) -> int:
  """The orientation tag of an opened image, 1 to 8; 1 (upright) without one, or with damaged metadata."""
  try:
    orientation = image.getexif().get(_ORIENTATION, 1)
  except Exception:  # damaged metadata of a valid image
    return 1
  return orientation if orientation in range(1, 9) else 1
