"""`fmcv depth` with a small untrained model: files, their scales, and what cannot be read."""

import json

import numpy as np
import pytest
from PIL import Image

import fmcv_jax
from fmcv_jax import experiment, trainer
from fmcv_jax.__main__ import main
from fmcv_jax.apps.depth import sixteen_bits

SIZES = [(40, 60), (90, 51)]
WHOLE = {'name': 'resize_to_multiple', 'size': 32, 'multiple': 8}


@pytest.fixture(scope='module', params=[None, 10.0], ids=['relative', 'metric'])
def workdir(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp('depth')
  data, encoder = folder / 'data', {'name': 'vit', 'variant': 'mu/8', 'image_size': 32, 'depth': 4}
  for name in ('rgb', 'maps'):
    (data / name).mkdir(parents=True)
  for number in range(8):
    rng = np.random.default_rng(number)
    Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(data / 'rgb' / f'{number}.png')
    Image.fromarray(rng.integers(1000, 9000, (32, 32), dtype=np.uint16)).save(data / 'maps' / f'{number}.png')
  network = {'name': 'dpt', 'encoder': encoder, 'taps': (1, 2, 3, 4), 'channels': (4, 4, 8, 8), 'width': 8, 'hidden': 4}
  source = {'name': 'depth_folder', 'images': str(data / 'rgb'), 'depths': str(data / 'maps'), 'scale': 0.001}
  config = {
    'objective': {'name': 'depth', 'network': {**network, 'max_depth': request.param}},
    'data': {'source': source, 'image': {'name': 'random_resized_crop', 'size': 32}},
    'train': {'steps': 2, 'batch_size': 8},
    'checkpoint': {'every': 2},
    'optimizer': {'schedule': {'name': 'cosine', 'peak_lr': 1e-3}},
    'evaluators': {'val': {'name': 'depth', 'batch_size': 8, 'data': {'source': source, 'image': WHOLE}}},
  }
  trainer.train(experiment.resolve(config), folder / 'run')
  return folder / 'run'


@pytest.fixture
def files(tmp_path):
  for number, size in enumerate(SIZES):
    noise = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / f'{number}.png')
  (tmp_path / '2.jpg').write_bytes(b'nothing')
  return [str(tmp_path / name) for name in ('0.png', '1.png', '2.jpg')]


@pytest.mark.parametrize('npy', [False, True])
def test_files_times_their_scales_are_the_depth_of_the_model(npy, workdir, files, tmp_path, capsys):
  to = tmp_path / 'out'
  args = ['depth', *files, '--model', str(workdir), '--to', str(to), *(['--npy'] if npy else [])]
  assert main(args) == 0
  captured = capsys.readouterr()
  assert '1 of 3 images cannot be read and are left out' in captured.err
  rows = [json.loads(line) for line in (to / 'depth.jsonl').read_text().splitlines()]
  assert [row['file'] for row in rows] == files
  assert 'error' in rows[2]
  model = fmcv_jax.load(workdir)
  for row, size, depth in zip(rows, SIZES, model.depth(files[:2]), strict=False):
    read = np.load if npy else lambda path: np.asarray(Image.open(path))
    values = read(to / row['depth'])
    assert (values.dtype, values.shape, depth.shape) == (np.float32 if npy else np.uint16, size, size)
    assert (row['height'], row['width']) == size
    assert row['output'] == next(name for name in model.outputs if name.endswith('depth'))
    np.testing.assert_allclose(
      values * row['scale'], np.maximum(depth, 0) if not npy else depth, atol=row['scale'] * 0.51, rtol=1e-5
    )
    assert Image.open(to / row['color']).size == size[::-1]
  assert main(args) == 2
  assert 'depth.jsonl exists there' in capsys.readouterr().err
  assert main(['depth', files[2], '--model', str(workdir), '--to', str(tmp_path / 'none')]) == 2
  assert 'none of the 1 images can be read' in capsys.readouterr().err


def test_millimeters_are_kept_up_to_sixty_five_meters():
  values, scale = sixteen_bits(np.array([[0.5, 65.5]], np.float32), 'depth')
  assert (values.tolist(), scale) == ([[500, 65500]], 0.001)
  values, scale = sixteen_bits(np.array([[0.0, 131.07]], np.float32), 'depth')
  assert values.tolist() == [[0, 65535]]
  assert scale == pytest.approx(0.002)
  values, scale = sixteen_bits(np.array([[-0.1, 2.0]], np.float32), 'inverse_depth')
  assert values.tolist() == [[0, 65535]]
  assert scale == pytest.approx(2 / 65535)
