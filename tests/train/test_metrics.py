import io
import json

import pytest
from etils import epath
from rich.console import Console

from fmcv_jax.train.metrics import Writer, peak_of
from fmcv_jax.train.storage import read_metrics

FIGURES = {'loss': 2.0, 'images_per_second': 100.0, 'data_wait_fraction': 0.1, 'skipped': 0.0}


def writer(tmp_path, start=0, tensorboard=False):
  console = Console(file=io.StringIO(), width=200)
  return Writer(epath.Path(tmp_path), total=10, start=start, tensorboard=tensorboard, console=console)


def test_rows_after_the_resumed_step_are_written_again_not_twice(tmp_path):
  first = writer(tmp_path)
  for step in (1, 2, 3):
    first.train(step, {**FIGURES, 'loss': float(step)})
  first.close()
  again = writer(tmp_path, start=2)
  again.train(3, {**FIGURES, 'loss': 30.0})
  again.close()
  rows = read_metrics(epath.Path(tmp_path) / 'metrics.jsonl')
  assert [(row['step'], row['train/loss']) for row in rows] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_nan_is_written_as_null_and_a_half_written_last_line_is_left_out(tmp_path):
  one = writer(tmp_path)
  one.train(1, {**FIGURES, 'loss': float('nan')})
  one.close()
  path = epath.Path(tmp_path) / 'metrics.jsonl'
  assert json.loads(path.read_text())['train/loss'] is None
  with path.open('a') as file:
    file.write('{"step": 2, "train/lo')
  assert [row['step'] for row in read_metrics(path)] == [1]


def test_the_terminal_line_shows_loss_speed_wait_and_skips(tmp_path):
  one = writer(tmp_path)
  one.train(5, {**FIGURES, 'utilization': 0.5, 'skipped': 3.0})
  one.evaluation(5, {'val/top1': 0.25})
  one.close()
  out = one.console.file.getvalue()
  assert 'step 5  loss 2.0000  100 img/s  mfu 50.0%  wait 10%  skipped 3' in out
  assert 'step 5  val/top1 0.2500' in out


def test_tensorboard_holds_the_same_metrics(tmp_path):
  one = writer(tmp_path, tensorboard=True)
  one.train(1, FIGURES)
  one.close()
  assert list((tmp_path / 'tensorboard').glob('events*'))


@pytest.mark.parametrize(
  ('kind', 'peak'), [('TPU v5 lite', 197e12), ('TPU v5p', 459e12), ('NVIDIA H100 80GB HBM3', 989e12), ('cpu', None)]
)
def test_peaks_are_named_by_device_kind(kind, peak):
  assert peak_of(kind) == peak
