"""The order of a training run as arithmetic: a global position to a record, with no state to save.

Position g is the g-th example of the whole run, over all hosts. It belongs to epoch g // N and, within it, to a place
of a permutation that seed and epoch determine. So each record comes once per epoch, and a run is resumed, on any number
of hosts and at any batch size, from one integer: the number of examples seen.
"""

import dataclasses
import functools

import numpy as np
from grain.experimental import index_shuffle

_TABLE_LIMIT = 1 << 16  # index_shuffle walks cycles of 2**16 and more: 4 us a call above this, 9 ms at two records


@dataclasses.dataclass(frozen=True)
class Order:
  """`records` of a source, permuted anew in each epoch if `shuffle`."""

  records: int
  seed: int = 0
  shuffle: bool = True

  def __post_init__(self) -> None:
    if self.records < 1 or self.seed < 0:
      raise ValueError(f'expected at least one record and a seed of at least 0, got {self}')

  def __call__(self, position: int, attempt: int = 0) -> int:
    """Record for a position; for `attempt` > 0 the one that stands in, if those before it cannot be read.

    Stand-ins are half an epoch away: next to it they would often be in the same batch, where a contrastive loss takes
    the second copy for a negative.
    """
    epoch, place = divmod(position, self.records)
    if attempt:
      place = (place + self.records // 2 + attempt - 1) % self.records
    if not self.shuffle:
      return place
    if self.records <= _TABLE_LIMIT:
      return int(_table(self.records, self.seed, epoch)[place])
    # grain 0.2.18 is no permutation where max_index is a power of 4: the last record would never come. The next larger
    # domain is one, and what falls outside is permuted again until it falls inside.
    last = self.records - 1
    last += last & (last - 1) == 0
    while True:
      place = index_shuffle(place, max_index=last, seed=_epoch_seed(self.seed, epoch), rounds=4)
      if place < self.records:
        return place

  def rng(self, position: int) -> np.random.Generator:
    """The generator for the example at this position: its crop, its caption."""
    return np.random.default_rng((self.seed, position))


@functools.lru_cache(maxsize=4)  # a batch may straddle two epochs, and threads read ahead
def _table(records: int, seed: int, epoch: int) -> np.ndarray:
  # numpy promises that raw bits never change between versions; it does not promise that of `permutation`.
  bits = np.random.Philox(np.random.SeedSequence((seed, epoch))).random_raw(records)
  return np.argsort(bits, kind='stable')


@functools.lru_cache(maxsize=4)
def _epoch_seed(seed: int, epoch: int) -> int:
  # Mixed, not added: seed 0 in epoch 1 must not be seed 1 in epoch 0.
  return int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])
