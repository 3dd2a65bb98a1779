"""Stored values mean the same in every format: a caption, a class, nothing, or a reason why not."""

import decimal

import numpy as np
import pytest

from fmcv_jax.data.sources.base import BadRecord
from fmcv_jax.data.sources.values import Classes, at, names_among, texts


@pytest.mark.parametrize(
  ('value', 'expected'),
  [
    ('a cat', ('a cat',)),
    (b'a c\xc3\xa4t', ('a cät',)),
    (b'\xef\xbb\xbfa cat', ('a cat',)),
    (['a', None, 'b', ' ', ''], ('a', 'b')),
    (('a', b'b'), ('a', 'b')),
    ([['a'], ['b', 'c']], ('a', 'b', 'c')),
    (np.array(['a', 'b'], object), ('a', 'b')),
    (None, ()),
    (float('nan'), ()),
    ('  \n', ()),
    ([], ()),
    ([None], ()),
  ],
)
def test_a_caption_is_text_and_null_or_blank_is_none(value, expected):
  assert texts(value, 'caption') == expected


@pytest.mark.parametrize(
  ('value', 'reason'),
  [
    (7, r'caption is 7 \(int\), not a text'),
    (0.5, r'caption is 0.5 \(float\), not a text'),
    (True, r'caption is True \(bool\), not a text'),
    ({'en': 'a cat', 'fr': None}, "caption is an object of 'en', 'fr', not a text; name the field, such as caption/en"),
    ([{'raw': 'a cat'}], "caption is an object of 'raw', not a text"),
    (['a', 3], r'caption is 3 \(int\)'),
    (b'\xff\xfe', 'caption is not UTF-8 text'),
  ],
)
def test_what_is_not_text_is_never_trained_as_its_print(value, reason):
  with pytest.raises(BadRecord, match=reason):
    texts(value, 'caption')


def test_a_field_is_found_inside_objects_and_lists_of_them():
  stored = {'sentences': [{'raw': 'a'}, {'raw': None}, None], 'by': {'en': 'b'}}
  assert at(stored, ['by', 'en'], 'json') == 'b'
  assert at(stored, ['sentences', 'raw'], 'json') == ['a', None, None]
  assert at({'by': None}, ['by', 'en'], 'json') is None
  with pytest.raises(BadRecord, match="json has no field 'by/ne'; known: en"):
    at(stored, ['by', 'ne'], 'json')
  with pytest.raises(BadRecord, match=r"json is 'b' \(str\), which has no field 'x'"):
    at(stored, ['by', 'en', 'x'], 'json')


@pytest.mark.parametrize(
  ('value', 'expected'),
  [
    (2, 2),
    (np.int8(2), 2),
    (np.array(2), 2),
    (2.0, 2),
    (np.float32(2), 2),
    (decimal.Decimal('2.00'), 2),
    (True, 1),
    (np.bool_(False), 0),
    ('dog', 1),
    (' dog\n', 1),
    (b'dog', 1),
    ('2', 0),  # a class may be called 2: names go before numbers
    ('1', 1),
    ('1.0', 1),
  ],
)
def test_a_class_is_its_name_or_a_whole_number(value, expected):
  assert Classes(['2', 'dog', 'emu']).number(value, 'label') == expected


@pytest.mark.parametrize(
  ('value', 'reason'),
  [
    (0.7, 'label is 0.7, which is not a whole number'),
    ('0.7', 'label is 0.7, which is not a whole number'),
    (float('inf'), 'not a whole number'),
    (None, 'has no label'),
    (float('nan'), 'has no label'),
    ('', 'has no label'),
    ([1], 'label is a list of 1; expected one class number or name'),
    (np.array([1, 2]), 'label is a list of 2'),
    ({'id': 1}, "label is an object of 'id'"),
    ('dgo', "label is 'dgo', not one of the 3 class names; did you mean 'dog'"),
    (3, 'label is 3, not one of the classes 0 to 2'),
    (-1, 'label is -1, not one of the classes 0 to 2'),
  ],
)
def test_what_is_not_a_class_is_said_and_never_rounded(value, reason):
  with pytest.raises(BadRecord, match=reason):
    Classes(['cat', 'dog', 'emu']).number(value, 'label')


def test_without_names_a_number_stands_for_itself_and_a_name_is_refused():
  assert Classes([]).number('41', 'cls') == 41
  with pytest.raises(BadRecord, match="cls is 'cat', a name where there are no class names; set class_names"):
    Classes([]).number('cat', 'cls')
  with pytest.raises(BadRecord, match="cls is 'crane', which several classes are called"):
    Classes(['crane', 'dog', 'crane']).number('crane', 'cls')
  assert Classes(['crane', 'dog', 'crane']).number(2, 'cls') == 2
  with pytest.raises(BadRecord, match='cls is -1, which stands for no class'):
    Classes([]).number(-1, 'cls')


def test_a_column_of_labels_has_names_where_one_is_not_a_number():
  assert names_among(['2', '10', None, '1.0']) == ()
  assert names_among(['dog', b'cat', None, '10', 'dog ']) == ('10', 'cat', 'dog')
  assert names_among(['nan', '1_0', 'inf']) == ('1_0', 'inf', 'nan')
