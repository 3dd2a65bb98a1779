"""The order of a training run: a pure function from a global position to a record, without state.

Position g is the g-th example of the run, over all hosts. It belongs to epoch g // N and to an element of a permutation
that depends on seed and epoch. Each record appears once per epoch, and a run resumes, on any number of hosts and at any
batch size, from one integer: the number of examples consumed.
"""

import abc
import dataclasses
import fractions
import functools

import numpy as np
from grain.experimental import index_shuffle
from typing_extensions import override

_TABLE_LIMIT = 1 << 16  # index_shuffle walks cycles of 2**16 and more: 4 us a call above this, 9 ms at two records


class RunOrder(abc.ABC):
  """Maps positions of a run to the `records` of a source."""

  records: int
  seed: int

  @abc.abstractmethod
  def __call__(self, position: int, attempt: int = 0) -> int:
    """Record for a position; `attempt` > 0 gives replacements for unreadable ones."""

  def rng(self, position: int) -> np.random.Generator:
    """The random generator of the example at this position (crop, caption)."""
    return np.random.default_rng((self.seed, position))


@dataclasses.dataclass(frozen=True)
class Order(RunOrder):
  """All `records` of a source in each epoch, in a new permutation per epoch if `shuffle`."""

  records: int
  seed: int = 0
  shuffle: bool = True

  def __post_init__(self) -> None:
    if self.records < 1 or self.seed < 0:
      raise ValueError(f'expected at least one record and a seed of at least 0, got {self}')

  @override
  def __call__(self, position: int, attempt: int = 0) -> int:
    epoch, place = _epoch_and_place(position, attempt, self.records)
    if not self.shuffle:
      return place
    if self.records <= _TABLE_LIMIT:
      return int(_table(self.records, self.seed, epoch)[place])
    # index_shuffle of grain 0.2.18 is not a permutation if max_index is a power of 4: the last record would be missing.
    # The next larger domain is, and an index outside is permuted again until it is inside (cycle walking).
    last = self.records - 1
    last += last & (last - 1) == 0
    while True:
      place = index_shuffle(place, max_index=last, seed=_epoch_seed(self.seed, epoch), rounds=4)
      if place < self.records:
        return place


@dataclasses.dataclass(frozen=True, eq=False)
class WindowedOrder(RunOrder):
  """Windowed shuffle, for a source that is read in blocks: record r is in the first block with ends[i] > r.

  In each epoch the blocks are permuted, and the records of every `window` consecutive blocks are permuted together. A
  reader therefore holds `window` blocks at a time, and two records of a batch come from the same block with probability
  1 / window instead of 1 / blocks: with blocks of one class each, a batch has about `window` classes.
  """

  ends: np.ndarray
  window: int
  seed: int = 0
  shuffle: bool = True
  _tables: dict[tuple[int, int], np.ndarray] = dataclasses.field(default_factory=dict, init=False, repr=False)

  def __post_init__(self) -> None:
    if self.window < 1 or self.seed < 0 or not len(self.ends) or self.ends[-1] < 1:
      raise ValueError(f'expected at least one record, a window and a seed of at least 0, got {self}')

  @property
  @override
  def records(self) -> int:  # type: ignore[override]
    return int(self.ends[-1])

  @override
  def __call__(self, position: int, attempt: int = 0) -> int:
    epoch, place = _epoch_and_place(position, attempt, self.records)
    if not self.shuffle:
      return place
    ends = self._remembered(epoch, -1)
    window = int(np.searchsorted(ends, place, 'right'))
    return int(self._remembered(epoch, window)[place - (ends[window - 1] if window else 0)])

  def _remembered(self, epoch: int, window: int) -> np.ndarray:
    key = epoch, window
    table = self._tables.get(key)
    if table is None:
      table = self._window(epoch, window) if window >= 0 else self._window_ends(epoch)
      if len(self._tables) > 8:  # a batch may straddle two epochs and several windows, and threads read ahead
        self._tables.clear()
      self._tables[key] = table
    return table

  def _blocks(self, epoch: int) -> np.ndarray:
    return _permutation(len(self.ends), self.seed, epoch)

  def _window_ends(self, epoch: int) -> np.ndarray:
    sizes = np.diff(self.ends, prepend=0)[self._blocks(epoch)]
    return np.cumsum(np.add.reduceat(sizes, np.arange(0, len(sizes), self.window)))

  def _window(self, epoch: int, number: int) -> np.ndarray:
    blocks = self._blocks(epoch)[number * self.window : (number + 1) * self.window]
    held = np.concatenate([np.arange(self.ends[b - 1] if b else 0, self.ends[b]) for b in blocks])
    return held[_permutation(len(held), self.seed, epoch, number + 1)]


@dataclasses.dataclass(frozen=True)
class MixedOrder(RunOrder):
  """Interleaves several orders evenly, in proportion to `shares`; their records are numbered consecutively.

  Each order has epochs of its own: all of its records appear once before any appears twice. Any n consecutive positions
  contain share_k n of order k, to within the number of orders.
  """

  orders: tuple[RunOrder, ...]
  shares: tuple[float, ...]
  seed: int = 0

  @property
  @override
  def records(self) -> int:  # type: ignore[override]
    return sum(order.records for order in self.orders)

  @override
  def __call__(self, position: int, attempt: int = 0) -> int:
    part, position = self.part(position)
    return self._offsets[part] + self.orders[part](position, attempt)

  def part(self, position: int) -> tuple[int, int]:
    """Index of the order at a position, and the position within that order."""
    for part, (over, under) in enumerate(self._splits):  # splits off one order at a time, in integer arithmetic
      before = position * over // under
      if (position + 1) * over // under > before:
        return part, before
      position -= before
    return len(self.orders) - 1, position

  @functools.cached_property
  def _splits(self) -> list[tuple[int, int]]:
    shares = [fractions.Fraction(share).limit_denominator(1 << 40) for share in self.shares]
    splits = [share / sum(shares[part:]) for part, share in enumerate(shares[:-1])]
    return [(split.numerator, split.denominator) for split in splits]

  @functools.cached_property
  def _offsets(self) -> list[int]:
    return np.cumsum([0] + [order.records for order in self.orders]).tolist()


def _epoch_and_place(position: int, attempt: int, records: int) -> tuple[int, int]:
  """(epoch, index in the epoch). Replacements are half an epoch away: a neighbor would often be in the same batch,
  where a contrastive loss treats the copy as a negative."""
  epoch, place = divmod(position, records)
  return epoch, (place + records // 2 + attempt - 1) % records if attempt else place


@functools.lru_cache(maxsize=4)  # a batch may straddle two epochs, and threads read ahead
def _table(records: int, seed: int, epoch: int) -> np.ndarray:
  return _permutation(records, seed, epoch)


def _permutation(count: int, *entropy: int) -> np.ndarray:
  # numpy guarantees that raw bits are stable between versions, but not `permutation`.
  bits = np.random.Philox(np.random.SeedSequence(entropy)).random_raw(count)
  return np.argsort(bits, kind='stable')


@functools.lru_cache(maxsize=4)
def _epoch_seed(seed: int, epoch: int) -> int:
  # Mixed, not added: seed 0 in epoch 1 must not be seed 1 in epoch 0.
  return int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])
