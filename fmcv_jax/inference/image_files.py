"""Images read from and written to files, as generation needs them."""

import json
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from fmcv_jax.data import storage
from fmcv_jax.data.images.decode import decode
from fmcv_jax.data.sources.account import other_files
from fmcv_jax.data.sources.base import BadRecord
from fmcv_jax.data.sources.folder_index import EXTENSIONS, is_image
from fmcv_jax.data.transforms import ResizeCrop
from fmcv_jax.errors import UserError

logger = logging.getLogger(__name__)

# Extensions of image formats that `decode` does not open.
_OTHER_IMAGES = (
  *('.heic', '.heif', '.jxl', '.svg', '.psd', '.ico', '.tga', '.eps'),
  *('.dng', '.raw', '.cr2', '.cr3', '.nef', '.arw', '.orf', '.rw2', '.raf'),
)


def find_images(paths: Sequence[str]) -> list[str]:
  """The files among `paths`, and all image files in and below the folders among them, without repeats.

  Image files of a format that is not decoded are counted in a warning.
  """
  files: dict[str, None] = {}
  for path in paths:
    if pathlib.Path(path).is_file():
      files[path] = None
      continue
    found = storage.files_below(path)
    if found is None:
      raise UserError(f'{path}: no such file or folder (relative to {pathlib.Path.cwd()})')
    images = [storage.join(path, name) for name in found if is_image(name)]
    if not images:
      raise UserError(f'{path}: no images in this folder or its subfolders; supported: {" ".join(EXTENSIONS)}')
    files |= dict.fromkeys(images)
    if lost := [name for name in found if name.lower().endswith(_OTHER_IMAGES)]:
      logger.warning('not read: %s; convert them, for example to .jpg', '; '.join(map(str, other_files(lost))))
  return list(files)


def unreadable_line(left_out: int, total: int) -> str:
  """A line that counts the images that were left out; their names and reasons are logged when they are read."""
  return f'{left_out} of {total} images cannot be read and are left out'


def read_image(file: str, size: int) -> np.ndarray:
  """An image file as uint8 [size, size, 3]: the square in its center."""
  try:
    return ResizeCrop(size, crop=1.0)(pathlib.Path(file).read_bytes(), np.random.default_rng(0))
  except BadRecord as error:
    raise UserError(f'{file}: {error}') from error


def read_mask(file: str, image: str, size: int) -> np.ndarray:
  """bool [size, size], true where the file is white, cut as `read_image` cuts the image that it belongs to."""
  path = pathlib.Path(file)
  if not path.is_file():
    raise UserError(f'mask: {file}: no such file')
  try:
    pixels, whole = decode(path.read_bytes()), decode(pathlib.Path(image).read_bytes())
  except BadRecord as error:
    raise UserError(f'mask: {file}: {error}') from error
  if pixels.shape != whole.shape:
    raise UserError(f'mask: {file}: {_sides(pixels)} pixels, but the image has {_sides(whole)}')
  return ResizeCrop(size, crop=1.0)(pixels, np.random.default_rng(0)).mean(-1) > 127


def _sides(pixels: np.ndarray) -> str:
  height, width, _ = pixels.shape
  return f'{width} x {height}'


def pad_for_outpainting(image: np.ndarray, margin: float) -> tuple[np.ndarray, np.ndarray]:
  """uint8 [H, W, 3] shrunk into the middle, with a margin of that fraction on every side, and the margin's mask."""
  if not 0 < margin < 0.5:
    raise UserError(f'margin: {margin} is not between 0 and 0.5')
  size = len(image)
  inner = max(1, round(size * (1 - 2 * margin)))
  start = (size - inner) // 2
  sampler, mask = np.full_like(image, 255), np.ones((size, size), bool)
  small = Image.fromarray(image).resize((inner, inner), Image.Resampling.LANCZOS)
  sampler[start : start + inner, start : start + inner] = np.asarray(small)
  mask[start : start + inner, start : start + inner] = False
  return sampler, mask


def make_grid(images: np.ndarray, columns: int) -> np.ndarray:
  """uint8 [N, H, W, 3] -> one image, row by row on white, a pixel or more between them; a clip of clips."""
  if images.ndim == 5:
    return np.stack([make_grid(images[:, frame], columns) for frame in range(images.shape[1])])
  count, height, width, _ = images.shape
  gap = max(1, width // 32)
  rows = -(-count // columns)
  grid = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
  for index, image in enumerate(images):
    top, left = (
      gap + place * (side + gap) for place, side in zip(divmod(index, columns), (height, width), strict=True)
    )
    grid[top : top + height, left : left + width] = image
  return grid


def save_png(image: np.ndarray, path: pathlib.Path, about: dict[str, Any], *, frames_per_second: float = 8.0) -> None:
  """Writes uint8 [H, W, 3], gray uint8 or uint16 [H, W], or a clip [T, H, W, 3] as an animated PNG that repeats.

  about  kept in the text chunk 'fmcv' of the file, as JSON
  """
  info = PngImagePlugin.PngInfo()
  info.add_itxt('fmcv', json.dumps(about, ensure_ascii=False))
  if image.ndim < 4:
    Image.fromarray(image).save(path, pnginfo=info)
    return
  first, *others = (Image.fromarray(frame) for frame in image)
  duration = 1000 / frames_per_second
  first.save(path, pnginfo=info, save_all=True, append_images=others, duration=duration, loop=0)
