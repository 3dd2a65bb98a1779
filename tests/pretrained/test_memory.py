"""Import and export hold about one copy of the weights: a file of 10 GB does not need 20 GB."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from fmcv_jax.pretrained.tensors import write_tensors

WIDTH, DEPTH = 1024, 5

# The peaks of memory of its own (not of mapped files) above what is there before, in bytes.
MEASURE = """
import json, pathlib, sys, threading, time
import jax
from fmcv_jax.__main__ import main
from fmcv_jax.train import checkpoint

checkpoint.TARGET_FILE_BYTES = 2**22  # as small relative to these weights as the default is to weights that fill memory
jax.devices()

def held():
  status = pathlib.Path('/proc/self/status').read_text().splitlines()
  return 1024 * next(int(line.split()[1]) for line in status if line.startswith('RssAnon'))

def peak(*command):
  before, samples, done = held(), [], threading.Event()
  def watch():
    while not done.is_set():
      samples.append(held())
      time.sleep(0.002)
  thread = threading.Thread(target=watch)
  thread.start()
  assert main(list(command)) == 0
  done.set()
  thread.join()
  return max(samples) - before

file, folder = sys.argv[1:]
own = f'{folder}/own'
print(json.dumps({
  'import': peak('import', file, '--as', 'vit', '--to', own),
  'export': peak('export', own, '--format', 'timm', '--to', f'{folder}/back.safetensors'),
}))
"""


@pytest.fixture(scope='module')
def file(tmp_path_factory):
  random = np.random.default_rng(0)
  block = {'attn.qkv': (3 * WIDTH, WIDTH), 'attn.proj': (WIDTH, WIDTH), 'mlp.fc1': (4 * WIDTH, WIDTH)}
  shapes = {'cls_token': (1, 1, WIDTH), 'pos_embed': (1, 5, WIDTH), 'patch_embed.proj.weight': (WIDTH, 3, 16, 16)}
  shapes |= {'patch_embed.proj.bias': (WIDTH,)}
  norms = ['norm', *(f'blocks.{i}.norm{j}' for i in range(DEPTH) for j in (1, 2))]
  shapes |= {f'{name}.{kind}': (WIDTH,) for name in norms for kind in ('weight', 'bias')}
  for i in range(DEPTH):
    for name, shape in {**block, 'mlp.fc2': (WIDTH, 4 * WIDTH)}.items():
      shapes |= {f'blocks.{i}.{name}.weight': shape, f'blocks.{i}.{name}.bias': shape[:1]}
  arrays = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
  path = tmp_path_factory.mktemp('memory') / 'vit.safetensors'
  write_tensors(path, arrays)
  return path, sum(x.nbytes for x in arrays.values())


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='reads what Linux says of a process')
def test_import_and_export_hold_the_weights_once(file, tmp_path):
  path, size = file
  environment = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}  # one device: one copy
  command = [sys.executable, '-c', MEASURE, str(path), str(tmp_path)]
  found = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=300)
  peaks = json.loads(found.stdout.splitlines()[-1])
  assert peaks['import'] < 1.75 * size
  assert peaks['export'] < 2 * size  # arrays that are just being restored are there twice
