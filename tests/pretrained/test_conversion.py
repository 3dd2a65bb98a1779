"""Import and export without the reference libraries: kinds of files, what is refused, and use."""

import json
import re

import jax
import numpy as np
import pytest

import fmcv_jax
from fmcv_jax.__main__ import main
from fmcv_jax.models.vit import vit
from fmcv_jax.parallel.rules import path_of
from fmcv_jax.pretrained import vit as names
from fmcv_jax.pretrained.layout import write
from fmcv_jax.pretrained.tensors import open_tensors, write_tensors


@pytest.fixture(scope='module')
def published():
  """A small classifier with registers, as timm has it."""
  network = vit('mu/8', image_size=16, outputs=5, registers=2, layer_scale=0.5, width=64, depth=2, heads=1, mlp_dim=96)
  params = jax.jit(network.init)(jax.random.key(0), np.zeros((1, 16, 16, 3)))['params']
  noise = np.random.default_rng(0)
  flat = {
    path_of(path): np.asarray(x + 0.1 * noise.normal(size=x.shape), np.float32)
    for path, x in jax.tree_util.tree_flatten_with_path(params)[0]
  }
  return write(names.timm(), flat, network)


def run(*arguments):
  return main([str(x) for x in arguments])


def one_line(capsys):
  errors = capsys.readouterr().err
  lines = [line for line in errors.splitlines() if line.startswith('fmcv ')]
  assert len(lines) == 1
  assert 'Traceback' not in errors
  return lines[0]


def in_shards(folder, tensors):
  folder.mkdir()
  halves = sorted(tensors)[::2], sorted(tensors)[1::2]
  for number, half in enumerate(halves):
    write_tensors(folder / f'model-{number}.safetensors', {name: tensors[name] for name in half})
  index = {name: f'model-{number}.safetensors' for number, half in enumerate(halves) for name in half}
  (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': index}))
  return folder


def test_a_file_a_folder_of_shards_and_an_npz_come_back_bitwise(published, tmp_path):
  write_tensors(tmp_path / 'one.safetensors', published)
  np.savez(tmp_path / 'one.npz', **published)
  for given in (tmp_path / 'one.safetensors', in_shards(tmp_path / 'shards', published), tmp_path / 'one.npz'):
    to = tmp_path / f'{given.name}.run'
    assert run('import', given, '--as', 'dinov2', '--to', to) == 0
    assert run('export', to, '--format', 'timm', '--to', tmp_path / 'back.safetensors') == 0
    back = open_tensors(tmp_path / 'back.safetensors')
    assert set(back.shapes) == set(published)
    for name, x in published.items():
      np.testing.assert_array_equal(back[name], x, err_msg=name)


def test_an_imported_model_is_used_in_four_lines(published, tmp_path):
  write_tensors(tmp_path / 'one.safetensors', published)
  assert run('import', tmp_path / 'one.safetensors', '--to', tmp_path / 'run') == 0
  images = [np.full((20, 30, 3), 40 * i, np.uint8) for i in range(3)]
  model = fmcv_jax.load(tmp_path / 'run', batch=8)
  chances = model.classify(images)
  assert chances.shape == (3, 5)
  np.testing.assert_allclose(chances.sum(axis=1), 1, rtol=1e-5)
  assert model.encode_image(images).shape == (3, 64)
  half = fmcv_jax.load(tmp_path / 'run', batch=8, dtype='bfloat16').classify(images)
  np.testing.assert_allclose(half, chances, atol=0.05)
  assert np.abs(half - chances).max() > 0
  with pytest.raises(fmcv_jax.errors.UserError, match='knows no texts'):
    model.encode_text(['a cat'])


def without(tensors, name):
  return {key: x for key, x in tensors.items() if key != name}


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda t: without(t, 'blocks.1.norm2.bias'), 'blocks.1.norm2.bias is missing'),
    (lambda t: t | {'blocks.0.attn.relative': np.ones(3)}, 'no layout of any family knows blocks.0.attn.relative'),
    (lambda t: t | {'norm.weight': np.full(64, np.nan, np.float32)}, 'norm.weight holds numbers that are not finite'),
    (lambda t: t | {'norm.weight': np.ones(63, np.float32)}, r'norm.weight is \(63,\), but the network needs \(64,\)'),
    (lambda t: {}, 'is empty|knows an empty file|holds nothing'),
  ],
)
def test_a_checkpoint_that_is_not_whole_is_one_line_and_writes_nothing(published, tmp_path, capsys, change, message):
  np.savez(tmp_path / 'x.npz', **change(published))
  assert run('import', tmp_path / 'x.npz', '--to', tmp_path / 'run') == 2
  assert re.search(message, one_line(capsys))
  assert not (tmp_path / 'run').exists()


def test_files_that_are_no_checkpoints_are_one_line(published, tmp_path, capsys):
  write_tensors(tmp_path / 'x.safetensors', published)
  whole = (tmp_path / 'x.safetensors').read_bytes()
  (tmp_path / 'cut.safetensors').write_bytes(whole[: len(whole) // 2])
  (tmp_path / 'noise.safetensors').write_bytes(b'\x00' * 64)
  (tmp_path / 'noise.npz').write_bytes(b'PK\x03\x04nonsense')
  np.savez(tmp_path / 'objects.npz', bomb=np.array([object()], dtype=object))
  (tmp_path / 'x.txt').write_text('x')
  for name, message in {
    'cut.safetensors': 'no whole safetensors file',
    'noise.safetensors': 'no whole safetensors file',
    'noise.npz': 'no whole npz file',
    'objects.npz': 'objects',
    'x.txt': 'unknown kind of file',
    'missing.npz': 'no such file',
  }.items():
    assert run('import', tmp_path / name, '--to', tmp_path / 'run') == 2
    assert message in one_line(capsys)
  assert run('import', tmp_path / 'x.safetensors', '--as', 'clip', '--to', tmp_path / 'run') == 2
  assert "no layout of family 'clip' knows" in one_line(capsys)
  assert run('import', tmp_path / 'x.safetensors', '--as', 'dinov3', '--to', tmp_path / 'run') == 2
  assert "did you mean 'dinov2'" in one_line(capsys)
  assert not (tmp_path / 'run').exists()
