"""Workdirs and config files written by version 0.1.0, before fields were renamed, open as they did.

`fixtures/runs_0.1.0.tar.xz` holds two workdirs that 0.1.0 wrote (a classifier and a text-conditional latent
diffusion), each with the SHA-256 (first 16 digits) of every array as 0.1.0 restored it.
"""

import hashlib
import json
import logging
import pathlib
import tarfile

import jax
import numpy as np
import pytest

from fmcv_jax.config import override
from fmcv_jax.errors import UserError
from fmcv_jax.experiment import load_config, resolve
from fmcv_jax.run import Run

RUNS = pathlib.Path(__file__).with_name('fixtures') / 'runs_0.1.0.tar.xz'
FILES = sorted(pathlib.Path(__file__).parents[1].glob('configs/**/*.py'))
CONFIGS = [path for path in FILES if 'def complete(' not in path.read_text()]  # whose fields follow from data


@pytest.fixture(scope='module')
def workdirs(tmp_path_factory):
  folder = tmp_path_factory.mktemp('earlier')
  with tarfile.open(RUNS) as archive:
    archive.extractall(folder, filter='data')
  return folder


@pytest.mark.parametrize('name', ['classification', 'diffusion'])
def test_a_workdir_of_0_1_0_reopens_bitwise_and_names_the_new_fields(workdirs, name, caplog):
  expected = json.loads((workdirs / name / 'expected.json').read_text())
  with caplog.at_level(logging.WARNING):
    model, step = Run.reopen(workdirs / name).restored_model()
  found = {
    jax.tree_util.keystr(path, simple=True, separator='/'): hashlib.sha256(np.asarray(x).tobytes()).hexdigest()[:16]
    for path, x in jax.tree_util.tree_leaves_with_path({'params': model.params, 'extra': model.extra})
  }
  assert (step, found) == (expected['step'], expected['sha256'])
  assert 'config.train.batch is now called batch_size' in caplog.text
  assert 'config.optimizer.schedule.peak is now called peak_lr' in caplog.text


def test_old_and_new_name_of_one_field_are_an_error():
  config = load_config('configs/demo/mae.py')
  with pytest.raises(UserError, match=r'config\.train: batch is the earlier name of batch_size, and both are given'):
    resolve(override(config, ['train.batch=8']))


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_configs_use_present_names(path, caplog):
  with caplog.at_level(logging.WARNING, 'fmcv_jax.config'):
    load_config(str(path))
  assert 'is now called' not in caplog.text
