"""Prefetching in threads or processes, and failure handling: worker death, hang, orphaning.

Worker processes end
  on `close()`, after their current batch;
  within a second after the death of the process that started them, whatever its cause;
  half a minute after a SIGTERM, which batch systems send to a whole job: the trainer needs data until its last save.
Shared memory is unlinked by then (see `shared_memory.py`), or removed by Python's resource tracker.
Not covered: a worker that is stopped (SIGSTOP) or stuck in the kernel when its parent is killed, and a thread that is
stuck in the kernel, which is detected after the timeout like a worker but only ends with the process.
"""

import atexit
import concurrent.futures
import ctypes
import multiprocessing
import os
import re
import signal
import sys
import threading
from typing import Any

import grain
from absl import flags

from fmcv_jax.data.workers.shared_memory import (
  RandomAccess,
  SharedMemoryHandle,
  SharedMemoryReader,
  SharedMemoryWriter,
  unlink_unread,
)
from fmcv_jax.errors import UserError

_TERM_GRACE_S = 30.0
_CLOSE_S = 30.0
_BUFFERED = 1  # elements per worker, in this process and in the worker
_END = object()

_HINTS = {
  '-9': 'killed, usually out of memory; use fewer workers or a smaller batch',
  '-7': '/dev/shm is full; enlarge it (docker run --shm-size) or use fewer workers',
  '1': 'its own error is printed above',
}


class Prefetcher:
  """Iterates over `source` in order, prefetching in `workers` processes, or in two threads if `workers` is 0.

  Raises UserError if a worker dies, or after `timeout` seconds without an element; after any error the iterator is
  closed. Reading starts at once, and ends with `close` or with the process.
  """

  def __init__(self, source: RandomAccess, workers: int, timeout: float):
    _keep_memory()
    self._timeout, self._others = timeout, set(multiprocessing.active_children())
    threads = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0) if workers else grain.ReadOptions(2, 2)
    # Elements in flight per worker: one being consumed, those buffered in this process, in a thread of grain and in the
    # worker's queue, and one being computed.
    given = SharedMemoryWriter(source, 2 * _BUFFERED + 3) if workers else source
    self._blocks = given.prefix if isinstance(given, SharedMemoryWriter) else None
    dataset = grain.MapDataset.source(given).to_iter_dataset(threads)
    if workers:
      if (
        not flags.FLAGS.is_parsed()
      ):  # grain reads absl flags, which must be marked as parsed outside an absl application
        flags.FLAGS.mark_as_parsed()
      options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=_BUFFERED)
      dataset = dataset.mp_prefetch(options, worker_init_fn=_start_worker)
    self._iterator: Any = iter(dataset)
    self._take = SharedMemoryReader()
    self._thread = concurrent.futures.ThreadPoolExecutor(1, 'read-ahead')
    self._pending = self._thread.submit(self._read)
    self._closed = False
    atexit.register(self.close)  # before the modules that grain needs are torn down

  def __iter__(self) -> 'Prefetcher':
    return self

  def __next__(self) -> Any:
    if self._closed:
      raise StopIteration
    try:
      element = self._pending.result(self._timeout)
    except TimeoutError as error:
      self._kill_workers()
      self.close()
      raise UserError(
        f'data: nothing was read for {self._timeout:g} s; is the storage reachable, or a worker stuck?'
      ) from error
    except Exception as error:
      self.close()
      if code := re.match(r'Worker process was terminated unexpectedly with exit code (-?\d+)', str(error)):
        hint = _HINTS.get(code[1], 'see the messages above')
        raise UserError(f'data: a worker process died with exit code {code[1]}: {hint}') from error
      raise
    if element is _END:
      self.close()
      raise StopIteration
    self._pending = self._thread.submit(self._read)
    return element

  def _read(self) -> Any:
    element = next(self._iterator, _END)
    return self._take(element) if isinstance(element, SharedMemoryHandle) else element

  def close(self) -> None:
    """Stops threads and worker processes, and kills unresponsive ones. Idempotent."""
    if self._closed:
      return
    self._closed = True
    atexit.unregister(self.close)
    # Closing grain during a read would deadlock the reading thread.
    if not concurrent.futures.wait([self._pending], _CLOSE_S).done:
      self._kill_workers()
    closing = threading.Thread(target=self._iterator.close, daemon=True)
    closing.start()
    closing.join(_CLOSE_S)  # a thread stuck in the kernel cannot be stopped
    self._iterator = None  # frees its semaphores
    self._take.close()
    if self._blocks:
      unlink_unread(self._blocks)
    self._thread.shutdown(wait=False)

  def _kill_workers(self) -> None:
    for process in set(multiprocessing.active_children()) - self._others:
      if process.name.startswith('grain-process-prefetch'):
        process.kill()


def _start_worker(index: int, count: int) -> None:
  """Runs first in every worker process."""
  _keep_memory()
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
  signal.signal(signal.SIGTERM, lambda *_: _exit_after(_TERM_GRACE_S))
  threading.Thread(target=end_with_parent, daemon=True).start()
  # A transform that uses JAX must not claim the accelerator or emulate the parent's devices.
  os.environ['JAX_PLATFORMS'] = 'cpu'
  os.environ.pop('XLA_FLAGS', None)
  if jax := sys.modules.get('jax'):
    jax.config.update('jax_platforms', 'cpu')


def _keep_memory() -> None:
  """Makes glibc reuse image-sized blocks; fresh pages from the kernel cost half as much as decoding."""
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError):  # another C library
    return
  mmap_threshold, trim_threshold = -3, -1
  mallopt(mmap_threshold, 64 << 20)
  mallopt(trim_threshold, 512 << 20)


def _exit_after(seconds: float) -> None:
  timer = threading.Timer(seconds, os._exit, (143,))
  timer.daemon = True
  timer.start()


def end_with_parent() -> None:
  """Ends this worker process when its parent process ends; runs in a thread."""
  parent = multiprocessing.parent_process()
  assert parent is not None
  parent.join()
  os._exit(1)
