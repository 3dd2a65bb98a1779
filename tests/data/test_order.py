import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fmcv_jax.data import order as order_file
from fmcv_jax.data.order import Order


@given(records=st.integers(1, 200), seed=st.integers(0, 2**63), epoch=st.integers(0, 1000), shuffle=st.booleans())
@settings(max_examples=50, deadline=None)
def test_each_epoch_holds_every_record_once(records, seed, epoch, shuffle):
  order = Order(records, seed, shuffle)
  assert sorted(order(epoch * records + i) for i in range(records)) == list(range(records))


@pytest.mark.parametrize('records', [70_000, (1 << 16) + 1, (1 << 16) + 2])
def test_each_epoch_of_a_large_source_holds_every_record_once(records):
  order = Order(records, seed=3)
  assert len({order(records + i) for i in range(records)}) == records


def test_a_source_beyond_32_bits_is_shuffled():
  order = Order(1 << 34, seed=1)
  drawn = np.array([order(i) for i in range(2000)])
  assert len(set(drawn.tolist())) == 2000
  assert stats.kstest(drawn / (1 << 34), stats.uniform.cdf).pvalue > 0.01


@pytest.mark.parametrize('records', [8, 70_000])
def test_every_epoch_and_seed_has_its_own_order(records):
  def head(seed, epoch):
    order = Order(records, seed)
    return tuple(order(epoch * records + i) for i in range(8))

  assert len({head(seed, epoch) for seed in range(4) for epoch in range(4)}) == 16


def test_small_shuffles_are_uniform():
  counts = np.zeros((3, 3))
  for seed in range(3000):
    order = Order(3, seed)
    for place in range(3):
      counts[place, order(place)] += 1
  assert stats.chisquare(counts.ravel()).pvalue > 0.01


@pytest.mark.parametrize('records', [8000, 70_000])
def test_classes_that_lie_together_are_spread_over_batches_as_at_random(records):
  order, classes, batch = Order(records, seed=1), 10, 200
  drawn = np.array([order(position) for position in range(records)])
  counts = np.apply_along_axis(np.bincount, 1, (drawn * classes // records).reshape(-1, batch), minlength=classes)
  # Without replacement the statistic of a batch is the random one times (N - batch) / (N - 1).
  statistic = (np.square(counts - batch / classes) / (batch / classes)).sum() * (records - 1) / (records - batch)
  assert 0.001 < stats.chi2.cdf(statistic, (records // batch) * (classes - 1)) < 0.999
  assert np.mean(np.abs(np.diff(drawn)) == 1) < 4 * 2 / records  # neighbors stay together no more often than at random
  assert abs(stats.spearmanr(drawn, np.arange(records)).statistic) < 4 / np.sqrt(records)


def test_unshuffled_order_is_the_source_order():
  assert [Order(3, shuffle=False)(i) for i in range(7)] == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize('records', [1, 2, 9, 10, 70_000])
def test_a_stand_in_is_of_the_same_source_and_far_away(records):
  order = Order(records, seed=1, shuffle=False)
  for position in range(min(records, 10)):
    tries = [order(position, attempt) for attempt in range(min(records, 10))]
    assert all(0 <= record < records for record in tries)
    assert len(set(tries)) >= max(1, len(tries) - 1)
    if records > 1:
      assert min((tries[1] - position) % records, (position - tries[1]) % records) >= records // 2 - 1


def test_order_and_generators_are_the_same_in_another_process():
  code = (
    'from fmcv_jax.data.order import Order\n'
    'for n in (100, 100_000): o = Order(n, 7); print([o(i) for i in range(20)], o.rng(5).integers(1 << 60))'
  )
  outputs = {subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout}
  lines = []
  for n in (100, 100_000):
    order = Order(n, 7)
    lines.append(f'{[order(i) for i in range(20)]} {order.rng(5).integers(1 << 60)}\n')
  assert outputs == {''.join(lines)}


def test_the_order_of_a_seed_never_changes():
  """Checkpoints of older versions continue only if these numbers stay."""
  assert [Order(10, seed=1)(i) for i in range(12)] == [2, 0, 1, 4, 5, 6, 7, 8, 3, 9, 7, 1]
  assert [Order(100_000, seed=1)(i) for i in range(4)] == [66178, 77538, 54926, 26846]


def test_invalid_arguments_are_refused():
  for bad in ({'records': 0}, {'records': 3, 'seed': -1}):
    with pytest.raises(ValueError, match='at least'):
      Order(**bad)


def test_tables_are_kept_for_few_epochs_only():
  order_file._table.cache_clear()
  order = Order(50, seed=2)
  for position in range(50 * 20):
    order(position)
  assert order_file._table.cache_info().currsize <= 4
  assert order_file._table.cache_info().misses == 20
