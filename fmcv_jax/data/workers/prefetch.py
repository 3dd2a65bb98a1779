"""Reading ahead in threads or processes, and what happens when one of them dies, hangs or is left alone.

Worker processes end
  on `close()`, after the batch that each has in hand;
  when the process that started them dies, of whatever cause, within a second;
  half a minute after a SIGTERM, which batch systems send to a whole job: the trainer needs data up to its last save.
Shared memory has lost its name by then (see `shared.py`), or is removed by Python's resource tracker.
Not covered: a worker that is itself stopped (SIGSTOP) or stuck in the kernel when its parent is killed, and a thread
that is stuck in the kernel: it is noticed after the timeout like a worker, but only ends with the process.
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

from fmcv_jax.data.workers.shared_memory import RandomAccess, SharedMemoryHandle, SharedMemoryReader, SharedMemoryWriter
from fmcv_jax.errors import UserError

_TERM_GRACE_S = 30.0
_CLOSE_S = 30.0
_BUFFERED = 1  # elements of each worker, here and there
_END = object()

_HINTS = {
  '-9': 'killed, most often for want of memory; use fewer workers or a smaller batch',
  '-7': '/dev/shm is full; enlarge it (docker run --shm-size) or use fewer workers',
  '1': 'its own error is printed above',
}


class Prefetcher:
  """Iterates over `source` in order, computing elements ahead in `workers` processes, or in two threads if that is 0.

  A worker that dies, and `timeout` seconds without an element, raise UserError; after any error the iterator is closed.
  Reading starts at once. It goes on until `close`, or until the process ends.
  """

  def __init__(self, source: RandomAccess, workers: int, timeout: float):
    _keep_memory()
    self._timeout, self._others = timeout, set(multiprocessing.active_children())
    threads = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0) if workers else grain.ReadOptions(2, 2)
    # Of a worker's elements one is being taken here, others wait here, in a thread of grain, and in its queue, and one
    # is being made.
    given = SharedMemoryWriter(source, 2 * _BUFFERED + 3) if workers else source
    dataset = grain.MapDataset.source(given).to_iter_dataset(threads)
    if workers:
      if not flags.FLAGS.is_parsed():  # grain reads its flags, also where no absl application has parsed any
        flags.FLAGS.mark_as_parsed()
      options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=_BUFFERED)
      dataset = dataset.mp_prefetch(options, worker_init_fn=_start_worker)
    self._iterator: Any = iter(dataset)
    self._take = SharedMemoryReader()
    self._thread = concurrent.futures.ThreadPoolExecutor(1, 'read-ahead')
    self._pending = self._thread.submit(self._read)
    self._closed = False
    atexit.register(self.close)  # while the modules that grain needs for it are still there

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
    """Ends threads and worker processes; those that do not answer are killed. May be called again."""
    if self._closed:
      return
    self._closed = True
    atexit.unregister(self.close)
    # grain must not be closed while it is read: the reading thread would wait for ever.
    if not concurrent.futures.wait([self._pending], _CLOSE_S).done:
      self._kill_workers()
    closing = threading.Thread(target=self._iterator.close, daemon=True)
    closing.start()
    closing.join(_CLOSE_S)  # one that is stuck in the kernel cannot even be killed; leave it
    self._iterator = None  # its semaphores go with it
    self._take.close()
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
  # Should a transform use JAX, it must not take the accelerator, nor emulate the parent's eight devices.
  os.environ['JAX_PLATFORMS'] = 'cpu'
  os.environ.pop('XLA_FLAGS', None)
  if jax := sys.modules.get('jax'):
    jax.config.update('jax_platforms', 'cpu')


def _keep_memory() -> None:
  """Has glibc reuse blocks of a picture's size; asking the kernel for fresh pages each time costs half a decoding."""
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
  """For a thread of a worker process: ends it when the process that started it does, of whatever cause."""
  parent = multiprocessing.parent_process()
  assert parent is not None
  parent.join()
  os._exit(1)
