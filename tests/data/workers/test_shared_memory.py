"""What workers hand over arrives as it was, through blocks that are used again and leave no name behind."""

import os
import pickle

import numpy as np
import pytest

from fmcv_jax.data.workers.shared_memory import SharedMemoryReader, SharedMemoryWriter


class Elements:
  """Element t: arrays of several types, whose size grows where `grows`."""

  def __init__(self, grows=False):
    self.grows = grows

  def __len__(self):
    return 100

  def __getitem__(self, t):
    rng = np.random.default_rng(t)
    image = rng.integers(0, 256, (2 + t * self.grows, 5, 7, 3), dtype=np.uint8)
    arrays = {'image': image, 'half': rng.random((3, 2)).astype(np.float16), 'none': np.zeros((0, 4), np.int32)}
    return arrays, rng.random(9) > 0.5, {'key': f'reason {t}'}


def assert_same(element, expected):
  assert element[2] == expected[2]
  for ours, theirs in [(element[1], expected[1]), *((element[0][name], expected[0][name]) for name in expected[0])]:
    assert type(ours) is np.ndarray
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(ours, theirs)


def names():
  return {name for name in os.listdir('/dev/shm') if name.startswith('psm_')}


@pytest.mark.parametrize('grows', [False, True])
def test_elements_arrive_as_they_were_while_later_ones_are_made(grows):
  source, take, before = Elements(grows), SharedMemoryReader(), names()
  give = pickle.loads(pickle.dumps(SharedMemoryWriter(source, blocks=3)))
  waiting = [give[0], give[1]]
  arrived = []
  for t in range(2, 12):
    waiting.append(give[t])
    arrived.append(take(waiting.pop(0)))
  for t, element in enumerate(arrived):  # they are owned: what came later has not changed them
    assert_same(element, source[t])
  if not grows:
    assert len(take._blocks) == 3
    assert not names() - before
  for handed in waiting:
    take(handed)
  take.close()
  assert not names() - before


def test_an_element_that_was_overwritten_is_an_error_not_another_batch():
  give, take = SharedMemoryWriter(Elements(), blocks=2), SharedMemoryReader()
  first = give[0]
  give[1]
  take(first)
  give[2]  # where the first was
  with pytest.raises(RuntimeError, match='overwritten'):
    take(first)
  for index in (3, 4):
    take(give[index])
  take.close()
