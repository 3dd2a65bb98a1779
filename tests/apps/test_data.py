import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from fmcv_jax.__main__ import main
from fmcv_jax.apps import data_bench, data_show
from fmcv_jax.apps.data_bench import Stage, verdict
from fmcv_jax.errors import UserError
from tests import runs


@pytest.fixture
def config(tmp_path):
  """A classifier of red, green and blue images, which are all turned into their negatives on the device."""
  spec = runs.classification(runs.image_folder(tmp_path / 'images'))
  spec['objective'] |= {'augment': [{'name': 'invert', 'probability': 1.0}], 'mixup': 0.0}
  file = tmp_path / 'config.py'
  file.write_text(f'import json\n\ndef get_config():\n  return json.loads({json.dumps(spec)!r})\n')
  return str(file)


def test_the_sheet_shows_what_the_network_sees_under_the_names_of_the_classes(config, tmp_path, capsys, monkeypatch):
  words = []
  draw = data_show.contact_sheet
  monkeypatch.setattr(data_show, 'contact_sheet', lambda *args: words.extend(args[1]) or draw(*args))
  file = tmp_path / 'sheet.png'
  assert main(['data', '--config', config, '--show', '6', '--output', str(file)]) == 0
  assert '6 examples, images per example: 1 of 16 pixels' in capsys.readouterr().out
  sheet = np.asarray(Image.open(file).convert('RGB')).astype(int)
  side, gap, line = 96, 3, 16
  assert len(words) == 6
  columns = sheet.shape[1] // (side + 2 * gap)
  for index, word in enumerate(words):
    top, left = index // columns * (side + 2 * gap + line) + gap, index % columns * (side + 2 * gap) + gap
    color = sheet[top : top + side, left : left + side].mean((0, 1))
    assert 'abc'[color.argmin()] == word  # red became cyan
    assert (sheet[top + side + gap : top + side + gap + line, left : left + side] < 128).any()  # and its word below


def test_masked_patches_are_gray_and_control_images_are_shown_next_to_the_input():
  images = np.zeros((2, 3, 8, 8, 3))
  hidden = np.zeros((2, 2, 2, 2), bool)
  hidden[1, 0, 0, 1] = True
  shown = data_show._greyed(images, hidden)
  assert shown.shape == images.shape
  gray = np.argwhere(shown[..., 0] > 0.4)
  assert {tuple(place) for place in gray} == {(1, 0, y, x) for y in range(4) for x in range(4, 8)}


def test_the_verdict_names_the_bottleneck_and_what_helps():
  parts = [Stage('read', 'one core', 2000.0), Stage('decode, crop', 'one core', 500.0)]
  ends = [Stage('transfer', '1 devices', 9000.0), Stage('step', '1 devices', 1000.0)]
  lines = verdict([*parts, Stage('loader', '2 threads', 700.0), *ends], 0, 0.31)
  assert lines[0] == 'bottleneck: the loader, most of it in: decode, crop'
  assert '--config.data.workers=3' in lines[1]  # 400 images/s a core
  assert lines[2] == 'training waits for data 31.0% of the time'
  assert verdict([*parts, Stage('loader', '8 workers', 3000.0), *ends], 8, None) == [
    'bottleneck: the step; the input pipeline is 3.0 times as fast'
  ]
  slow = [Stage('transfer', '1 devices', 90.0), ends[1]]
  assert verdict([*parts, Stage('loader', '8 workers', 3000.0), *slow], 8, None) == [
    'bottleneck: the transfer to the devices'
  ]


def test_a_sheet_without_the_extension_of_an_image_says_what_to_give(tmp_path):
  with pytest.raises(UserError, match=r'sheet: cannot be written \(.*\); give an image file, such as data\.png'):
    data_show.contact_sheet([[np.zeros((8, 8, 3), np.uint8)]], [''], tmp_path / 'sheet')


def test_the_bench_measures_every_stage_of_the_input(config, capsys):
  assert main(['data', '--config', config, '--bench', '--no-step', '--seconds', '0.2']) == 0
  out = capsys.readouterr().out
  for name in ('read', 'decode, crop', 'loader', 'transfer', 'bottleneck'):
    assert name in out
  assert main(['data', '--config', config]) == 2
  assert 'give --show N, --bench or both' in capsys.readouterr().err


def test_the_bench_counts_records_that_cannot_be_read(config, tmp_path, capsys):
  (tmp_path / 'images' / 'a' / '0.png').write_bytes(b'')
  more = ('--config.data.max_bad=0.2', '--bench', '--no-step', '--seconds', '0.2')
  assert main(['data', '--config', config, *more]) == 0
  out = capsys.readouterr().out
  assert '1 of the tried records cannot be read, the first a/0.png: no image: 0 bytes' in out
  assert 'decode, crop' in out
  # Beyond what a run takes it is the run's own line.
  assert main(['data', '--config', config, '--bench', '--no-step', '--seconds', '0.2']) == 2
  assert 'cannot be read, more than max_bad=0.01' in capsys.readouterr().err
  for file in (tmp_path / 'images').glob('*/*.png'):
    file.write_bytes(b'')
  assert main(['data', '--config', config, *more]) == 2
  assert '24 consecutive records could not be read' in capsys.readouterr().err


def test_the_bench_of_a_table_with_rows_without_images_ends_in_one_line(config, tmp_path):
  pyarrow, parquet = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
  files = sorted((tmp_path / 'images').glob('*/*.png'))
  images = [None if index in (5, 40) else files[index % len(files)].read_bytes() for index in range(64)]
  table = pyarrow.table({'image': pyarrow.array(images, pyarrow.binary()), 'label': [0, 1] * 32})
  parquet.write_table(table, tmp_path / 'x.parquet', row_group_size=16)
  source = repr({'name': 'parquet', 'path': str(tmp_path / 'x.parquet'), 'label': 'label'})
  command = [sys.executable, '-m', 'fmcv_jax', 'data', '--config', config, f'--config.data.source={source}', '--bench']
  for share, code, said in [
    ('0.01', 2, 'cannot be read, more than max_bad=0.01'),
    ('0.1', 0, "has no bytes in 'image'"),
  ]:
    more = ['--no-step', '--seconds', '0.2', f'--config.data.max_bad={share}']
    done = subprocess.run([*command, *more], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr
    assert 'Traceback' not in done.stderr


@pytest.mark.slow
def test_the_bench_sees_a_loader_that_is_too_slow(config, monkeypatch):
  import time

  from fmcv_jax.data.sources.image_folder import ImageFolder

  read = ImageFolder.__getitem__
  monkeypatch.setattr(ImageFolder, '__getitem__', lambda self, index: time.sleep(0.05) or read(self, index))
  stages = {stage.name: stage.rate for stage in data_bench.run(config, seconds=1)}
  assert 15 < stages['read'] < 20
  assert 25 < stages['loader'] < 40  # two threads
  assert stages['step'] > 2 * stages['loader']


def test_small_images_share_rows_with_large_ones(tmp_path):
  tile = [np.full((96, 96, 3), 200, np.uint8), *(np.full((40, 40, 3), 10 * index, np.uint8) for index in range(1, 6))]
  data_show.contact_sheet([tile], ['word'], tmp_path / 'sheet.png')
  sheet = np.asarray(Image.open(tmp_path / 'sheet.png'))[..., 0]
  assert sheet.shape == (3 + 96 + 3 + 16, 3 + 99 + 3 * 43)
  np.testing.assert_array_equal(sheet[3:99, 3:99], 200)
  for index in range(5):
    top, left = 3 + index // 3 * 43, 102 + index % 3 * 43
    np.testing.assert_array_equal(sheet[top : top + 40, left : left + 40], 10 * (index + 1))


def test_data_of_a_config_for_a_pod_are_looked_at_on_this_machine(tmp_path):
  spec = runs.classification(runs.image_folder(tmp_path / 'images')) | {'mesh': {'data': -1, 'fsdp': 1024}}
  file = tmp_path / 'pod.py'
  file.write_text(f'import json\n\ndef get_config():\n  return json.loads({json.dumps(spec)!r})\n')
  assert main(['data', '--config', str(file), '--show', '2', '--output', str(tmp_path / 'sheet.png')]) == 0
  assert data_bench.run(str(file), seconds=0.1, step=False)
