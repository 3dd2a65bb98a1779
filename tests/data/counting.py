"""A source whose every example tells which record it is, for tests of the loader. It does not need a test's module."""

import dataclasses
import os
import signal
import time

import numpy as np

from fmcv_jax.data.sources.base import BadRecord, Source


@dataclasses.dataclass(frozen=True)
class Counting(Source):
  """Record i: label i, text 'record i', an image uint8 [2, 2, 3] full of i; `bad` ones cannot be read."""

  records: int
  bad: tuple[int, ...] = ()

  def __len__(self):
    return self.records

  def __getitem__(self, index):
    if index in self.bad:
      raise BadRecord('is bad')
    texts = (f'record {index}', f'number {index}')
    return {'image': np.full((2, 2, 3), index % 256, np.uint8), 'label': index, 'texts': texts, 'text': texts[0]}

  def key_of(self, index):
    return f'counting/{index}'


@dataclasses.dataclass(frozen=True)
class Textured(Counting):
  """Images of noise, so that every crop is another one."""

  def __getitem__(self, index):
    noise = np.random.default_rng(index).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return {**super().__getitem__(index), 'image': noise}


@dataclasses.dataclass(frozen=True)
class Suicidal(Counting):
  """The process that reads record `last` is sent a signal."""

  last: int = 0
  signal: int = signal.SIGKILL

  def __getitem__(self, index):
    if index == self.last:
      os.kill(os.getpid(), self.signal)
      time.sleep(0.1)
    return super().__getitem__(index)


@dataclasses.dataclass(frozen=True)
class Introspective(Counting):
  """Labels tell what the reading process may do: odd ones are 1 if JAX has started, even ones 2 if only on one CPU."""

  def __getitem__(self, index):
    import jax
    from jax._src import xla_bridge

    started = xla_bridge.backends_are_initialized()
    label = int(started) if index % 2 else 2 * int(jax.config.jax_platforms == 'cpu' and 'XLA_FLAGS' not in os.environ)
    return {**super().__getitem__(index), 'label': label}
