"""Crops in C on machines with a C compiler, the headers of libjpeg-turbo, and AVX2.

`crop.c` is compiled once per machine, into the cache. Its output is byte-identical to that of the Python packages, so
hosts of a run may differ; it is used only after a check on a test image.
"""

import ctypes
import functools
import hashlib
import io
import logging
import os
import pathlib
import platform
import shutil
import subprocess

import numpy as np
from PIL import Image

from fmcv_jax.data import storage

logger = logging.getLogger(__name__)

FILTERS = {'bilinear': 0, 'bicubic': 1, 'lanczos': 2}
_SOURCE = pathlib.Path(__file__).with_name('crop.c')
# Fused multiply-adds would round weights differently from the packages.
_FLAGS = ('-O3', '-mavx2', '-ffp-contract=off', '-std=gnu11', '-fPIC', '-shared')
_BUILD_S = 120
_Box = ctypes.c_double * 4
_Window = ctypes.c_int * 4


class Unavailable(Exception):
  """The message says what is missing."""


def engine() -> str:
  """The engine that crops images on this machine, for messages: 'C', or 'packages' and the reason."""
  library, missing = _loaded()
  return 'C' if library else f'packages; {missing}'


def resize(
  pixels: np.ndarray, box: tuple[float, float, float, float], size: tuple[int, int], interpolation: str
) -> np.ndarray | None:
  """The box of uint8 [H, W, 3] as uint8 [*size, 3]; None if the packages have to do it."""
  library, _ = _loaded()
  if library is None or interpolation not in FILTERS or pixels.shape[2] != 3 or pixels.strides[1:] != (3, 1):
    return None
  height, width, _ = pixels.shape
  out = np.empty((*size, 3), np.uint8)
  failed = library.fmcv_resize(
    pixels.ctypes.data, pixels.strides[0], width, height, _Box(*box), FILTERS[interpolation], *size, out.ctypes.data
  )
  return None if failed else out


def crop_jpeg(
  data: bytes,
  factor: int,
  window: tuple[int, int, int, int],
  box: tuple[float, float, float, float],
  size: tuple[int, int],
  interpolation: str,
) -> np.ndarray | None:
  """As `resize`, of a JPEG reduced by `factor`: the `box` inside its window (left, top, width, height)."""
  library, _ = _loaded()
  if library is None or interpolation not in FILTERS:
    return None
  out = np.empty((*size, 3), np.uint8)
  failed = library.fmcv_crop_jpeg(
    data, len(data), factor, _Window(*window), _Box(*box), FILTERS[interpolation], *size, out.ctypes.data
  )
  return None if failed else out


@functools.cache
def _loaded() -> tuple[ctypes.CDLL | None, str]:
  """The library, or None and the reason why it is unavailable."""
  try:
    library = ctypes.CDLL(str(_built()))
    number, pointer = ctypes.c_int, ctypes.c_void_p
    library.fmcv_resize.argtypes = [pointer, ctypes.c_ssize_t, number, number, _Box, number, number, number, pointer]
    library.fmcv_crop_jpeg.argtypes = [
      ctypes.c_char_p,
      ctypes.c_size_t,
      number,
      _Window,
      _Box,
      number,
      number,
      number,
      pointer,
    ]
    if not library.fmcv_runs_here():
      raise Unavailable('the processor has no AVX2')
    _check(library)
  except (Unavailable, OSError) as error:
    logger.info('crops use Python packages: %s', error)
    return None, str(error)
  return library, ''


def _built() -> pathlib.Path:
  compiler = shutil.which(os.environ.get('CC') or 'cc')
  if platform.machine() not in ('x86_64', 'AMD64') or compiler is None:
    raise Unavailable('no x86 processor' if compiler else 'no C compiler (cc)')
  system = pathlib.Path('/etc/os-release')
  made_of = (
    _SOURCE.read_bytes()
    + ' '.join(_FLAGS).encode()
    + compiler.encode()
    + (system.read_bytes() if system.exists() else b'')
  )
  target = storage.cache_folder() / 'native' / f'crop-{hashlib.sha256(made_of).hexdigest()[:16]}.so'
  if target.exists():
    return target
  target.parent.mkdir(parents=True, exist_ok=True)
  partial = target.with_suffix(f'.{os.getpid()}.partial')
  command = [compiler, *_FLAGS, str(_SOURCE), '-ljpeg', '-lm', '-o', str(partial)]
  try:
    made = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_S)
  except subprocess.TimeoutExpired as error:
    raise Unavailable(f'{compiler} took more than {_BUILD_S} s') from error
  if made.returncode:
    missing = 'jpeglib.h' in made.stderr or '-ljpeg' in made.stderr
    raise Unavailable('no headers of libjpeg-turbo' if missing else f'{compiler} fails: {made.stderr.strip()[:200]}')
  partial.replace(target)
  return target


def _check(library: ctypes.CDLL) -> None:
  """Raises Unavailable unless a crop by this machine's libjpeg equals that of an image decoded by Pillow."""
  photo = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
  file = io.BytesIO()
  Image.fromarray(photo).resize((80, 80), Image.Resampling.BICUBIC).save(file, 'JPEG', quality=90)
  out = np.empty((32, 32, 3), np.uint8)
  data = file.getvalue()
  window, box = _Window(21, 19, 48, 48), _Box(8, 8, 40, 40)
  failed = library.fmcv_crop_jpeg(data, len(data), 1, window, box, FILTERS['bilinear'], 32, 32, out.ctypes.data)
  if failed or (out != np.asarray(Image.open(file))[27:59, 29:61]).any():
    raise Unavailable("pixels of this machine's libjpeg differ from Pillow's")
