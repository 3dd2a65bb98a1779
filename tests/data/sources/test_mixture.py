import collections
import dataclasses
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmcv_jax.config import build
from fmcv_jax.data.loader import TrainLoader, evaluation_batches, fingerprint
from fmcv_jax.data.order import MixedOrder, Order
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.data.sources.base import BadRecord, Source
from fmcv_jax.data.sources.mixture import Mixture
from fmcv_jax.errors import UserError
from fmcv_jax.fields import Field
from tests.data.counting import Counting


@dataclasses.dataclass(frozen=True)
class Named(Counting):
  classes: tuple[str, ...] = ()
  first: int = 0

  @property
  def names(self):
    return self.classes

  def __getitem__(self, index):
    return {'label': index % len(self.classes) if self.classes else index, 'image': np.zeros((1, 1, 3), np.uint8)}


@given(
  parts=st.lists(st.tuples(st.integers(1, 30), st.floats(0.01, 100)), min_size=1, max_size=5),
  start=st.integers(0, 10**12),
)
@settings(max_examples=60, deadline=None)
def test_each_source_has_its_fraction_of_every_interval_and_each_record_once_in_its_epochs(parts, start):
  orders = tuple(Order(records, seed) for seed, (records, _) in enumerate(parts))
  weights = np.array([weight for _, weight in parts])
  order = MixedOrder(orders, tuple(weights))
  places = [order.part(position) for position in range(start, start + 300)]
  for part in range(len(parts)):
    own = [place for number, place in places if number == part]
    assert own == list(range(own[0], own[0] + len(own))) if own else True  # none left out, none twice
    assert abs(len(own) - 300 * weights[part] / weights.sum()) <= len(parts)
  first = [order.part(position) for position in range(200)]
  for part in range(len(parts)):  # which count from 0
    assert next((place for number, place in first if number == part), 0) == 0


def test_records_of_each_source_come_once_in_its_epochs_on_any_number_of_processes():
  mixture = Mixture({'a': Counting(6), 'b': Counting(20)}, {'a': 3.0, 'b': 1.0})
  ends = (6, 26)
  whole = [mixture.order(0, True)(position) for position in range(80)]
  assert collections.Counter(record for record in whole if record < ends[0]) == dict.fromkeys(range(6), 10)
  assert sorted(record for record in whole if record >= ends[0]) == list(range(6, 26))
  for processes in (1, 2, 4):
    shares = []
    for index in range(processes):
      loader = TrainLoader(
        Pipeline(mixture), batch=8, seed=0, fields=('label',), process_index=index, process_count=processes, start=16
      )
      shares.append([next(loader)['label'] for _ in range(8)])
      loader.close()
    labels = np.concatenate([np.concatenate(step) for step in zip(*shares)])
    assert labels.tolist() == [record if record < 6 else record - 6 for record in whole[16:]]


def test_without_weights_an_epoch_holds_every_record_once():
  mixture = Mixture({'a': Counting(6), 'b': Counting(20)})
  order = mixture.order(0, True)
  assert sorted(order(position) for position in range(26)) == list(range(26))
  assert [mixture.key_of(index) for index in (0, 6)] == ['a: counting/0', 'b: counting/0']
  assert mixture.texts_of(7) == ('record 1', 'number 1')
  (batch,) = evaluation_batches(Pipeline(mixture), batch=26, fields=('label',))
  assert batch['label'].tolist() == [*range(6), *range(20)]
  with pytest.raises(IndexError):
    mixture[26]


def test_classes_of_equal_names_are_one():
  mixture = Mixture({'a': Named(2, classes=('cat', 'dog')), 'b': Named(3, classes=('bird', 'dog', 'cat'))})
  assert mixture.names == ('cat', 'dog', 'bird')
  assert [mixture[index]['label'] for index in range(5)] == [0, 1, 2, 1, 0]
  with pytest.raises(UserError, match="'b' has no class names for its label"):
    Mixture({'a': Named(2, classes=('cat', 'dog')), 'b': Named(1)})[2]


@dataclasses.dataclass(frozen=True)
class WithObjects(Named):
  """One object of each class, a map of their pixels with void (255), a class that is absent, and padding (-1)."""

  @property
  def fields(self):
    return {'negatives': Field('array', group='absent', numbered=True), 'crowd': Field('array', group='objects')}

  def __getitem__(self, index):
    numbers = np.arange(len(self.classes), dtype=np.int32) + self.first
    return {
      'classes': numbers,
      'segments': np.append(numbers, 255).astype(np.uint8)[None],
      'negatives': np.array([1, -1], np.int32),
      'crowd': np.zeros(len(numbers), np.int32),
    }


def test_classes_of_objects_and_pixels_are_renumbered_by_name_and_what_stands_for_no_class_stays():
  mixture = Mixture({'a': WithObjects(1, classes=('cat', 'dog')), 'b': WithObjects(1, classes=('bird', 'dog', 'cat'))})
  first, second = mixture[0], mixture[1]
  assert [mixture.names[number] for number in first['classes']] == ['cat', 'dog']
  assert [mixture.names[number] for number in second['classes']] == ['bird', 'dog', 'cat']
  assert second['segments'].tolist() == [[2, 1, 0, 255]]
  assert second['negatives'].tolist() == [1, -1]
  assert second['crowd'].tolist() == [0, 0, 0]
  assert mixture.annotations_of(1)['classes'].tolist() == [2, 1, 0]
  assert (second['segments'].dtype, second['classes'].dtype) == (np.uint8, np.int32)


def test_classes_beyond_the_names_of_a_part_are_bad_records_and_missing_labels_are_never_the_last_class():
  parts = {'a': Named(1, classes=('cat', 'dog')), 'b': WithObjects(1, classes=('bird', 'cat'), first=1)}
  with pytest.raises(BadRecord, match="classes has class 2, but 'b' names 2 classes"):
    Mixture(parts)[1]

  class Unlabeled(Named):
    def __getitem__(self, index):
      return {'label': (-1, None, 'cat')[index]}

  mixture = Mixture({'a': parts['a'], 'b': Unlabeled(3, classes=('bird', 'cat'))})
  for row, message in ((1, 'label is -1, not one of the classes 0 to 1'), (2, 'has no label')):
    with pytest.raises(BadRecord, match=message):
      mixture[row]
  assert mixture[3]['label'] == 0


def test_a_map_has_no_room_for_more_classes_than_its_void_allows():
  many = tuple(map(str, range(255)))
  with pytest.raises(UserError, match='256 classes, but in segments 255 stands for no class'):
    Mixture({'a': Named(1, classes=('first',)), 'b': WithObjects(1, classes=many)})[1]


def test_a_mixture_is_described_by_its_config_and_its_order_by_its_weights():
  kinds = {Source: {'mixture': Mixture, 'counting': Counting}}
  spec = {
    'name': 'mixture',
    'sources': {'a': {'name': 'counting', 'records': 6}, 'counting': {'records': 4}},
    'weights': {'a': 1, 'counting': 0.5},
  }
  mixture = build(Source, spec, kinds, 'config.data.source')
  assert mixture == Mixture({'a': Counting(6), 'counting': Counting(4)}, {'a': 1.0, 'counting': 0.5})
  assert pickle.loads(pickle.dumps(mixture)) == mixture
  other = Mixture(mixture.sources, {'a': 1.0, 'counting': 2.0})
  assert len({fingerprint(Pipeline(m), 0) for m in (mixture, other, Mixture(mixture.sources))}) == 3
  for weights, message in [
    ({'a': 1.0}, "'counting' has no weight; set one for every source"),
    ({'a': 1.0, 'countin': 1.0}, "'countin' is not a source; did you mean 'counting'"),
  ]:
    with pytest.raises(UserError, match=f'^config.data.source: weights: {message}'):
      build(Source, {**spec, 'weights': weights}, kinds, 'config.data.source')
  with pytest.raises(UserError, match=r'weights\.counting: expected a number above 0, got 0'):
    build(Source, {**spec, 'weights': {'a': 1.0, 'counting': 0.0}}, kinds, 'config.data.source')
  with pytest.raises(UserError, match="the source 'none' has no records"):
    len(Mixture({'none': Counting(0)}))
