"""Crops in C are byte-identical to those of the Python packages; machines without a compiler only lose speed."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmcv_jax.data.images import native_crop
from fmcv_jax.data.images import resize as resizing
from fmcv_jax.data.images.decode import lazy_image
from fmcv_jax.data.images.resize import by_package
from tests.data.images.test_jpeg import KINDS, OTHERS, encoded, oriented, photo

RNG = np.random.default_rng(0)
FILTERS = tuple(native_crop.FILTERS)

here = pytest.mark.skipif(native_crop.engine() != 'C', reason=native_crop.engine())


def by_packages(monkeypatch, call):
  with monkeypatch.context() as patch:
    patch.setattr(native_crop, '_loaded', lambda: (None, 'switched off'))
    return call()


@here
@given(
  height=st.integers(1, 200),
  width=st.integers(1, 200),
  size=st.tuples(st.integers(1, 120), st.integers(1, 120)),
  edges=st.tuples(*[st.floats(0, 1)] * 4),
  whole=st.booleans(),
  hard=st.booleans(),
  interpolation=st.sampled_from(FILTERS),
)
@settings(max_examples=150, deadline=None)
def test_a_resize_in_c_is_that_of_the_package_bit_for_bit(height, width, size, edges, whole, hard, interpolation):
  pixels = RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
  if hard:  # cubic and sinc filters overshoot there, and both must clip alike
    pixels = np.where(pixels > 127, np.uint8(255), np.uint8(0))
  (left, right), (top, bottom) = sorted(edges[:2]), sorted(edges[2:])
  box = (left * width, top * height, right * width, bottom * height)
  if whole:
    box = (np.floor(box[0]), np.floor(box[1]), np.ceil(box[2]), np.ceil(box[3]))
  if box[2] - box[0] < 0.5 or box[3] - box[1] < 0.5:
    box = (0.0, 0.0, float(width), float(height))
  strided = np.pad(pixels, ((2, 2), (3, 3), (0, 0)))[2:-2, 3:-3]  # rows that are not contiguous
  out = native_crop.resize(strided, box, size, interpolation)
  np.testing.assert_array_equal(out, by_package(pixels, box, size, interpolation))


@here
@pytest.mark.parametrize('kind', [*KINDS, *(name for name in OTHERS if 'JPEG' in name), 'reduced', 'reduced, turned'])
@pytest.mark.parametrize('interpolation', FILTERS)
def test_a_crop_of_a_jpeg_in_c_is_that_of_the_packages_bit_for_bit(kind, interpolation, monkeypatch):
  if kind.startswith('reduced'):
    data = encoded(photo(433, 607), quality=92, exif=oriented(6 if 'turned' in kind else 1))
  else:
    data = KINDS.get(kind) or OTHERS[kind]
  image = lazy_image(data, exact=False)
  made = []
  crop_jpeg = native_crop.crop_jpeg
  monkeypatch.setattr(native_crop, 'crop_jpeg', lambda *args: made.append(crop_jpeg(*args)) or made[-1])
  draws = np.random.default_rng(1)
  for _ in range(12):
    left, right = np.sort(draws.choice(image.width + 1, 2, replace=False))
    top, bottom = np.sort(draws.choice(image.height + 1, 2, replace=False))
    box, size = (float(left), float(top), float(right), float(bottom)), tuple(draws.integers(5, 70, 2).tolist())
    out = image.crop(box, size, interpolation)
    assert made[-1] is not None
    expected = by_packages(monkeypatch, lambda: image.crop(box, size, interpolation))  # noqa: B023
    np.testing.assert_array_equal(out, expected)


@here
def test_damaged_jpegs_give_the_same_bytes_or_the_same_refusal(monkeypatch):
  def tried(data):
    try:
      image = lazy_image(data, exact=False)
      return image.crop((0.0, 0.0, float(image.width), float(image.height)), 40, 'bicubic').tobytes()
    except Exception as error:
      return f'{type(error).__name__}: {error}'

  data, verdicts = KINDS['4:2:0'], set()
  for at in range(2, len(data), 53):
    for case in (data[:at], data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]):
      out = tried(case)
      assert out == by_packages(monkeypatch, lambda: tried(case))  # noqa: B023
      verdicts.add(type(out))
  assert verdicts == {bytes, str}


ASKED = """
import sys
import numpy as np
from fmcv_jax.data.images import native_crop
from fmcv_jax.data.transforms import RandomResizedCrop
print(native_crop.engine(), flush=True)
sys.stdout.buffer.write(RandomResizedCrop(24)(open(sys.argv[1], 'rb').read(), np.random.default_rng(3)).tobytes())
"""


def asked(tmp_path, **environment):
  (tmp_path / 'photo.jpg').write_bytes(KINDS['4:2:0'])
  command = [sys.executable, '-c', ASKED, str(tmp_path / 'photo.jpg')]
  made = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, check=True)
  return made.stdout.partition(b'\n')[::2]


def test_a_machine_without_a_compiler_or_with_a_broken_one_makes_the_same_crops(tmp_path):
  cache = tmp_path / 'cache'
  nothing, crop = asked(tmp_path, CC='nowhere', FMCV_CACHE=str(cache))
  broken, again = asked(tmp_path, CC='false', FMCV_CACHE=str(cache))
  assert nothing == b'packages; no C compiler (cc)'
  assert broken.startswith(b'packages; ')
  assert not list(cache.rglob('*.so'))
  engine, fast = asked(tmp_path, FMCV_CACHE=str(cache))
  assert engine == native_crop.engine().encode()
  assert crop == again == fast
  assert len(fast) == 24 * 24 * 3


@here
def test_it_is_built_once_and_a_damaged_build_is_not_used(tmp_path):
  cache = tmp_path / 'cache'
  first = asked(tmp_path, FMCV_CACHE=str(cache))
  (built,) = pathlib.Path(cache, 'native').iterdir()
  stamp = built.stat().st_mtime_ns
  assert asked(tmp_path, FMCV_CACHE=str(cache)) == first
  assert built.stat().st_mtime_ns == stamp
  built.write_bytes(b'no library')
  engine, crop = asked(tmp_path, FMCV_CACHE=str(cache))
  assert engine.startswith(b'packages; ')
  assert crop == first[1]


@here
def test_a_library_that_makes_other_pixels_is_not_used(monkeypatch):
  library, _ = native_crop._loaded()

  class Other:
    def fmcv_crop_jpeg(self, *args):
      failed = library.fmcv_crop_jpeg(*args)
      np.ctypeslib.as_array((native_crop.ctypes.c_ubyte * 9).from_address(args[-1]))[4] ^= 1
      return failed

  native_crop._check(library)
  with pytest.raises(native_crop.Unavailable, match='differ from Pillow'):
    native_crop._check(Other())


@here
def test_images_that_the_c_code_does_not_support_are_left_to_packages():
  pixels = RNG.integers(0, 256, (9, 9, 3), dtype=np.uint8)
  assert native_crop.resize(pixels[:, ::-1], (0.0, 0.0, 9.0, 9.0), (5, 5), 'bilinear') is None
  assert native_crop.resize(pixels, (0.0, 0.0, 9.0, 9.0), (5, 5), 'nearest') is None
  mirrored = resizing.resize(pixels[:, ::-1], (0.0, 0.0, 9.0, 9.0), (5, 5), 'bilinear')
  np.testing.assert_array_equal(
    mirrored, resizing.resize(pixels[:, ::-1].copy(), (0.0, 0.0, 9.0, 9.0), (5, 5), 'bilinear')
  )
