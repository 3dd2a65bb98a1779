import pickle
import sys

import numpy as np
import pytest

from fmcv_jax.data.sources import digits
from fmcv_jax.data.sources.digits import Digits
from fmcv_jax.errors import UserError


def test_both_splits_hold_every_digit_once():
  train, test = Digits('train'), Digits('test')
  assert (len(train), len(test)) == (1437, 360)
  assert len(set(train._rows.tolist()) | set(test._rows.tolist())) == 1797


def test_an_example_is_an_enlarged_drawing_with_its_name():
  example = Digits()[0]
  assert example['image'].shape == (32, 32, 3)
  assert example['image'].dtype == np.uint8
  assert (example['image'][..., 0] == example['image'][..., 2]).all()
  assert example['image'].max() > 200
  assert Digits().names[example['label']] == example['text'] == 'one'


def test_classes_are_balanced_and_far_apart():
  source = Digits()
  images = np.stack([source[i]['image'][..., 0].ravel() / 255 for i in range(len(source))])
  labels = np.array([source[i]['label'] for i in range(len(source))])
  assert np.bincount(labels).min() > 120
  means = np.stack([images[labels == c].mean(0) for c in range(10)])
  nearest = ((images[:, None] - means) ** 2).sum(-1).argmin(1)
  assert (nearest == labels).mean() > 0.85


def test_the_pickle_carries_no_images():
  source = Digits()
  source[0]
  assert len(pickle.dumps(source)) < 20_000
  np.testing.assert_array_equal(pickle.loads(pickle.dumps(source))[7]['image'], source[7]['image'])


def test_wrong_splits_and_indices_are_refused():
  with pytest.raises(ValueError, match="split: 'validation'"):
    Digits('validation')
  with pytest.raises(IndexError):
    Digits('test')[360]


def test_a_missing_package_is_one_clear_line(monkeypatch):
  digits._digits.cache_clear()
  monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
  with pytest.raises(UserError, match=r'scikit-learn: pip install fmcv-jax\[demo\]'):
    len(Digits())
