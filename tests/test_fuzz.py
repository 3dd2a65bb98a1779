"""Whatever a person types or a file holds, the answer is a result or one clear line, never another exception."""

import io
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fmcv_jax import config as config_lib
from fmcv_jax import experiment
from fmcv_jax.data.images.decode import decode, lazy_image
from fmcv_jax.data.sources.base import BadRecord
from fmcv_jax.errors import UserError
from fmcv_jax.registry import KINDS

FOLDER = pathlib.Path(__file__).parent.parent / 'configs'
CONFIGS = [*sorted(map(str, (FOLDER / 'demo').glob('*.py'))), str(FOLDER / 'cappa.py'), str(FOLDER / 'coca.py')]


def leaves(tree, path=''):
  """The paths of all fields of a config."""
  items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (tuple, list)) else ()
  for key, value in items:
    yield (inner := f'{path}.{key}'.lstrip('.'))
    yield from leaves(value, inner)


TREES = {file: experiment.load_config(file) for file in CONFIGS}
PLACES = [(file, path) for file, tree in TREES.items() for path in leaves(tree)]
VALUES = st.one_of(
  st.none(),
  st.booleans(),
  st.integers(),
  st.floats(),
  st.text(max_size=8),
  st.lists(st.integers(-2, 9), max_size=3),
  st.dictionaries(st.sampled_from(['name', 'size', 'x']), st.integers(-1, 3), max_size=2),
  st.sampled_from(['vit', 'cosine', 'emoji', 'bfloat16', '/no/such/file', '{', '[1,', 'None', '1e400', '-1', '0']),
)


def answers(file, override):
  """Whether a config with an override is built, or refused in one line; anything else is raised."""
  try:
    written = experiment.resolve(config_lib.override(TREES[file], [override]))
    config_lib.build(experiment.Experiment, written, KINDS)
  except UserError as error:
    return '\n' not in str(error)
  return True


@given(place=st.sampled_from(PLACES), value=VALUES)
@settings(max_examples=300, deadline=None)
def test_any_value_of_any_field_builds_or_is_one_line(place, value):
  file, path = place
  assert answers(file, f'{path}={value}')


@given(override=st.text(max_size=30))
@settings(max_examples=200, deadline=None)
def test_any_override_is_taken_or_is_one_line(override):
  assert answers(CONFIGS[0], override)


def encoded(kind):
  pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, kind)
  return file.getvalue()


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP', 'GIF', 'BMP', 'TIFF'])
@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_any_bytes_are_an_image_or_a_bad_record(kind, data):
  image = bytearray(encoded(kind))
  for _ in range(data.draw(st.integers(1, 8))):
    image[data.draw(st.integers(0, len(image) - 1))] = data.draw(st.integers(0, 255))
  image = bytes(image[: data.draw(st.integers(0, len(image)))] if data.draw(st.booleans()) else image)
  try:
    pixels = decode(image, max_pixels=100_000)
    assert pixels.dtype == np.uint8
    assert pixels.shape[2:] == (3,)
    found = lazy_image(image)
    found.region((0.0, 0.0, float(found.width), float(found.height)), (8, 8))
  except BadRecord:
    pass


@given(image=st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_noise_is_a_bad_record(image):
  with pytest.raises(BadRecord):
    decode(image)
