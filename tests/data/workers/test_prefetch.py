"""Real processes, really killed. Starting one takes seconds, so each test makes several claims."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from fmcv_jax.data.loader import TrainLoader
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.data.tokenizers import ClipBpe
from fmcv_jax.data.transforms import RandomResizedCrop
from fmcv_jax.errors import UserError
from tests.data.counting import Counting, Introspective, Suicidal, Textured

FIELDS = ('image', 'label', 'tokens')


def children(pid: int) -> set[int]:
  """Worker processes of a process (not Python's resource tracker)."""
  listed = pathlib.Path(f'/proc/{pid}/task').glob('*/children')
  found = {int(child) for task in listed for child in task.read_text().split()}
  return {child for child in found if b'spawn_main' in pathlib.Path(f'/proc/{child}/cmdline').read_bytes()}


def alive(pids) -> set[int]:
  return {pid for pid in pids if os.path.exists(f'/proc/{pid}')}


def wait_until(condition, seconds: float) -> bool:
  end = time.monotonic() + seconds
  while time.monotonic() < end:
    if condition():
      return True
    time.sleep(0.05)
  return False


def drain(loader):
  for _ in range(9):
    next(loader)


def shared_memory() -> set[str]:
  return {name for name in os.listdir('/dev/shm') if name.startswith('psm_')}


def test_batches_are_the_same_with_0_1_and_2_workers_which_end_on_close():
  runs = []
  for workers in (0, 1, 2):
    pipeline = Pipeline(Textured(33), image=RandomResizedCrop(8), caption_templates=('a {}', 'the {}'), workers=workers)
    loader = TrainLoader(pipeline, batch=20, seed=3, fields=FIELDS, tokenizer=ClipBpe(9), start=17)
    runs.append([next(loader) for _ in range(5)])
    started = children(os.getpid())
    assert len(started) == workers
    loader.close()
    assert not alive(started)
    with pytest.raises(StopIteration):
      next(loader)
  for run in runs[1:]:
    for batch, expected in zip(run, runs[0]):
      for field in FIELDS:
        assert type(batch[field]) is np.ndarray
        np.testing.assert_array_equal(batch[field], expected[field])


def test_a_worker_starts_no_jax_backend_and_reports_what_it_skips():
  loader = TrainLoader(
    Pipeline(Introspective(20, bad=(6,)), workers=1, shuffle=False, max_bad=0.5), batch=6, seed=0, fields=('label',)
  )
  batches = [next(loader)['label'].tolist() for _ in range(2)]
  loader.close()
  assert batches[0] == [2, 0, 2, 0, 2, 0]
  assert loader.skipped == {'counting/6': 'is bad'}


def test_a_dead_worker_is_a_user_error_not_a_hang():
  pipeline = Pipeline(Suicidal(99, last=40), workers=1, shuffle=False)
  loader = TrainLoader(pipeline, batch=8, seed=0, fields=('label',))
  with pytest.raises(UserError, match='a worker process died with exit code -9: killed, usually out of memory'):
    drain(loader)
  assert not children(os.getpid())


def test_a_hung_worker_is_a_user_error_after_the_timeout_and_is_killed():
  pipeline = Pipeline(Suicidal(99, last=40, signal=signal.SIGSTOP), workers=1, shuffle=False)
  loader = TrainLoader(pipeline, batch=8, seed=0, fields=('label',))
  next(loader)
  assert len(children(os.getpid())) == 1
  loader._ahead._timeout = 2.0  # short now that the worker has started
  with pytest.raises(UserError, match='nothing was read for 2 s'):
    drain(loader)
  assert not children(os.getpid())


TRAINER = """
import sys, time
sys.path.insert(0, '.')
from fmcv_jax.data.loader import TrainLoader
from fmcv_jax.data.pipeline import Pipeline
from tests.data.counting import Counting

if __name__ == '__main__':
  loader = TrainLoader(Pipeline(Counting(50), workers=1), batch=8, seed=0, fields=('image',))
  how = sys.argv[1]
  for _ in range(1 if how == 'close' else 5):
    next(loader)
  print('reading', flush=True)
  if how == 'sleep':
    time.sleep(60)
  elif how == 'raise':
    raise ValueError('a bug')
  elif how == 'close':
    loader.close()
"""


@pytest.fixture
def trainer(tmp_path):
  (tmp_path / 'trainer.py').write_text(TRAINER)

  def start(how):
    command = [sys.executable, str(tmp_path / 'trainer.py'), how]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == 'reading\n', process.stderr.read()
    return process

  return start


def test_workers_end_with_a_killed_parent_and_leave_no_shared_memory(trainer):
  before, process = shared_memory(), trainer('sleep')
  workers, blocks = children(process.pid), shared_memory() - before
  assert len(workers) == 1
  # A batch system's SIGTERM to every process of the job comes first; the data must outlive it for the last save.
  for pid in workers:
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGINT)
  time.sleep(0.5)
  assert alive(workers) == workers
  process.kill()
  process.wait()
  assert wait_until(lambda: not alive(workers), 5)
  assert wait_until(lambda: not shared_memory() & blocks, 20)  # some may belong to tests that run at the same time
  process.stderr.close()


def test_a_run_that_ends_without_closing_ends_cleanly(trainer):
  process = trainer('raise')
  _, errors = process.communicate(timeout=30)
  assert process.returncode == 1
  assert errors.rstrip().endswith('ValueError: a bug')
  assert 'Exception ignored' not in errors


def test_batches_that_were_read_ahead_and_never_used_leave_no_shared_memory_and_no_warning(trainer):
  before = shared_memory()
  process = trainer('close')
  _, errors = process.communicate(timeout=60)
  assert process.returncode == 0
  assert not errors  # Python's resource tracker warns of leaked objects
  assert not shared_memory() - before


def test_threads_need_no_processes_and_closing_twice_does_no_harm():
  loader = TrainLoader(Pipeline(Counting(50)), batch=8, seed=0, fields=('label',))
  next(loader)
  assert not children(os.getpid())
  loader.close()
  loader.close()


def test_a_slow_reader_is_given_every_batch_as_it_was():
  def slowly(workers, seconds):
    pipeline = Pipeline(Textured(33), image=RandomResizedCrop(8), workers=workers)
    loader = TrainLoader(pipeline, batch=16, seed=3, fields=('image',))
    try:
      for _ in range(12):  # the worker goes round its blocks more than twice
        yield next(loader)['image']
        time.sleep(seconds)
    finally:
      loader.close()

  for batch, expected in zip(slowly(1, 0.1), slowly(0, 0), strict=True):
    np.testing.assert_array_equal(batch, expected)
