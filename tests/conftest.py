"""Every test runs on a mesh of 8 emulated CPU devices, set before jax looks for devices."""

import ctypes
import gc
import importlib.util
import os
import pathlib
import tempfile

import pytest

# Small programs gain nothing from the compiler's optimizations, which take most of a test's time. Tests compile the
# same ones again and again, in several workers: they share what one has compiled.
os.environ['XLA_FLAGS'] = '--xla_backend_optimization_level=0'
os.environ['JAX_COMPILATION_CACHE_DIR'] = os.path.join(tempfile.gettempdir(), f'fmcv_jax_tests_{os.getuid()}')
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.3'
os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'

import jaxtyping

from tests import shape_checker  # noqa: F401 (the hook finds it by name)

# Shapes and dtypes in annotations are checked at each call, when a program is traced.
SHAPE_CHECKED = (
  'fmcv_jax.augment.apply',
  'fmcv_jax.augment.color',
  'fmcv_jax.augment.mixing',
  'fmcv_jax.augment.warp',
  'fmcv_jax.diffusion.guidance',
  'fmcv_jax.diffusion.learned_variance',
  'fmcv_jax.diffusion.process',
  'fmcv_jax.diffusion.samplers',
  'fmcv_jax.models.common.attention.dispatch',
  'fmcv_jax.models.common.patches',
  'fmcv_jax.objectives.dino_losses',
  'fmcv_jax.objectives.distillation',
  'fmcv_jax.objectives.ring_contrastive',
)
jaxtyping.install_import_hook(SHAPE_CHECKED, 'tests.shape_checker.checked')

from fmcv_jax.parallel.distributed import emulate  # noqa: E402

emulate(8)


def importable_torchvision():
  """transformers, timm and OpenCLIP import torchvision, whose wheels from PyPI bring two operators in a form that a
  torch without CUDA cannot load, and fail on the names. None is used here."""
  import torch

  library = torch.library.Library('torchvision', 'FRAGMENT')
  try:
    import torchvision  # noqa: F401
  except RuntimeError:
    for name in ('nms', 'qnms'):
      library.define(f'{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
  return library


if importlib.util.find_spec('torchvision') is not None:
  _operators = importable_torchvision()  # they are gone when it is


MOST_BYTES = 2 * 2**30  # of a worker, from which it forgets its programs


@pytest.fixture(scope='module', autouse=True)
def _forgotten_programs():
  """Compiled programs are kept for as long as a process lives, gigabytes of them after some hundred tests: between two
  modules, which rarely share any, they are forgotten."""
  yield
  statistics = pathlib.Path('/proc/self/statm')  # of Linux
  if statistics.exists() and int(statistics.read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE') > MOST_BYTES:
    import jax

    jax.clear_caches()
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), 'malloc_trim', None):
      trim(0)


@pytest.fixture(scope='session')
def random_variables():
  """random_variables(network, *inputs, **named): variables away from zero, so that each counts; nothing is compiled."""
  import jax
  import numpy as np

  from fmcv_jax.parallel.rules import path_of

  def make(network, *inputs, seed=1, **named):
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
      center = int('scale' in path_of(path))  # of norms and of LayerScale
      return (center + 0.2 * rng.normal(size=shape.shape)).astype(shape.dtype)

    shapes = jax.eval_shape(network.init, jax.random.key(0), *inputs, **named)
    return jax.tree_util.tree_map_with_path(leaf, shapes)

  return make
