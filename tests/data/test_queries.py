"""Texts of classes for each image: those of its objects always, others drawn, and classes that number the texts."""

import dataclasses

import numpy as np
import pytest

from fmcv_jax.data.geometry import original_boxes
from fmcv_jax.data.loader import TrainLoader, evaluation_batches
from fmcv_jax.data.pipeline import ClassQueries, Pipeline
from fmcv_jax.data.sources.base import Source
from fmcv_jax.data.transforms import ResizePad
from fmcv_jax.errors import UserError
from tests.systems.sources import Words

NAMES = tuple('abcdefgh')
WORDS = Words(('photo', *NAMES), 5)
CLASSES = ((0, 3, 3), (), (7,), (1, 2, 5, 6))


@dataclasses.dataclass(frozen=True)
class Objects(Source):
  """Four images of 20 x 40 pixels with objects of CLASSES; in the second, class 4 is known to be absent."""

  names: tuple[str, ...] = NAMES

  def __len__(self):
    return 4

  def __getitem__(self, index):
    classes = np.array(CLASSES[index], np.int32)
    boxes = np.tile(np.float32([4, 2, 30, 18]), (len(classes), 1))
    example = {'image': np.zeros((20, 40, 3), np.uint8), 'boxes': boxes, 'classes': classes}
    return example | ({'negatives': np.array([4])} if index == 1 else {})


def pipeline(count, names=NAMES, **fields):
  queries = ClassQueries(count, ('{}', 'photo {}')) if count else None
  whole = Pipeline(Objects(names), ResizePad((10, 10)), queries=queries, shuffle=False, **fields)
  return whole.padded_as({'boxes': np.zeros((4, 4)), 'classes': np.zeros(4)})


def text_of(row):
  """The name in a row of tokens, '' for a row of zeros."""
  return WORDS.decode(row[None])[0].split()[-1] if row.any() else ''


def test_classes_number_the_texts_of_their_image():
  loader = TrainLoader(pipeline(5), batch=4, seed=0, fields=('image', 'boxes', 'classes', 'queries'), tokenizer=WORDS)
  batches = [next(loader) for _ in range(8)]
  loader.close()
  drawn, prefixed = set(), set()
  for batch in batches:
    assert batch['queries'].shape == (4, 5, 5)
    for row in range(4):
      texts = [text_of(query) for query in batch['queries'][row]]
      assert len(set(texts)) == 5
      found = batch['classes'][row][batch['classes'][row] >= 0]
      assert [texts[number] for number in found] == [NAMES[number] for number in CLASSES[row]]
      drawn |= set(texts)
    prefixed |= {int(number) for number in batch['queries'][..., 1].ravel()}
    assert text_of(batch['queries'][1, 0]) == 'e'  # what is known to be absent comes first
  assert drawn == set(NAMES)
  assert WORDS(['photo'])[0, 1] in prefixed


def test_evaluation_takes_the_first_template_and_classes_and_fills_up_with_zeros():
  fields = ('image', 'classes', 'queries', 'boxes', 'geometry')
  (batch,) = evaluation_batches(pipeline(10), batch=4, fields=fields, tokenizer=WORDS)
  assert [text_of(row) for row in batch['queries'][0]] == [*'adbcefgh', '', '']
  np.testing.assert_array_equal(batch['classes'][0], [0, 1, 1, -1])
  np.testing.assert_allclose(batch['boxes'][0, 0], [1, 0.5, 7.5, 4.5])
  original = original_boxes(batch['boxes'], batch['geometry'], (10, 10))
  np.testing.assert_allclose(original[0, 0], [4, 2, 30, 18], atol=1e-5)
  outside = original_boxes(np.float32([[[-3, -3, 10, 10]]]), batch['geometry'][:1], (10, 10))
  np.testing.assert_allclose(outside[0, 0], [0, 0, 40, 20])


def test_what_is_missing_or_does_not_fit_is_said():
  fields = ('image', 'boxes', 'classes', 'queries')
  with pytest.raises(UserError, match=r'set data.queries, such as dict\(count=50\)'):
    next(iter(evaluation_batches(pipeline(0), batch=4, fields=fields, tokenizer=WORDS)))
  with pytest.raises(UserError, match='a source of objects that has names'):
    next(iter(evaluation_batches(pipeline(5, names=()), batch=4, fields=fields, tokenizer=WORDS)))
  with pytest.raises(UserError, match=r'config.tokenizer is not set'):
    next(iter(evaluation_batches(pipeline(5), batch=4, fields=fields)))
  with pytest.raises(UserError, match=r'has objects of 4 classes, more than the 3 of data.queries.count'):
    next(iter(evaluation_batches(pipeline(3, max_bad=0.0), batch=4, fields=fields, tokenizer=WORDS)))
  for names in (NAMES[:7], NAMES[:5]):  # the class 7 is the first or a later one without a name
    with pytest.raises(UserError, match='has an object of class 7, but the source names'):
      next(iter(evaluation_batches(pipeline(8, names, max_bad=0.0), batch=4, fields=fields, tokenizer=WORDS)))
  with pytest.raises(ValueError, match=r"templates: each needs one '{}'"):
    ClassQueries(5, ('photo',))


def test_a_class_without_a_name_is_refused_and_never_taken_for_no_text():
  names = ('a', ' ', *NAMES[2:])
  with pytest.raises(UserError, match='class 1 has no name to look for'):
    list(
      evaluation_batches(pipeline(8, names), batch=4, fields=('image', 'boxes', 'classes', 'queries'), tokenizer=WORDS)
    )
