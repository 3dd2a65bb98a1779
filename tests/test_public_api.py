"""The names of `fmcv_jax.__all__`, which are imported when they are first used."""

import subprocess
import sys

import pytest

import fmcv_jax


def test_every_public_name_is_the_object_of_its_module():
  from fmcv_jax.diffusion.options import SamplingOptions
  from fmcv_jax.errors import UserError
  from fmcv_jax.inference.generator import ImageGenerator
  from fmcv_jax.inference.model import Model

  assert fmcv_jax.SamplingOptions is SamplingOptions
  assert fmcv_jax.UserError is UserError
  assert fmcv_jax.ImageGenerator is ImageGenerator
  assert fmcv_jax.Model is Model
  assert all(hasattr(fmcv_jax, name) and name in dir(fmcv_jax) for name in fmcv_jax.__all__)


def test_an_unknown_name_is_an_attribute_error():
  with pytest.raises(AttributeError, match="module 'fmcv_jax' has no attribute 'Sampler'"):
    fmcv_jax.Sampler  # noqa: B018


def test_importing_the_package_imports_no_other_library():
  code = """
import sys
import fmcv_jax
assert not {'jax', 'flax', 'numpy', 'PIL'} & set(sys.modules)
from fmcv_jax import *
assert load and SamplingOptions
"""
  subprocess.run([sys.executable, '-c', code], check=True)
