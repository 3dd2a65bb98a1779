import numpy as np
import pytest

from fmcv_jax.data.sources.digits import Digits
from fmcv_jax.data.sources.scattered_digits import INK, Scattered


def test_scenes_are_the_same_every_time_and_no_two_are_alike():
  source = Scattered(copies=2)
  assert len(source) == 2 * 1437
  first, again, copy = source[5], Scattered(copies=2)[5], source[5 + 1437]
  np.testing.assert_array_equal(first['image'], again['image'])
  assert first['label'] == copy['label'] == Digits()[5]['label']
  assert not np.array_equal(first['image'], copy['image'])
  assert not np.array_equal(first['image'], Scattered('test')[5]['image'])


def test_segments_are_the_ink_of_the_digit_and_nothing_else():
  for index in range(50):
    scene, alone = Scattered()[index], Scattered(clutter=0)[index]
    inside = scene['segments'] > 0
    assert set(np.unique(scene['segments'])) == {0, 1 + scene['label']}
    assert (scene['image'][inside] >= INK).all()
    np.testing.assert_array_equal(alone['segments'] > 0, alone['image'][..., 0] >= INK)
    rows, columns = np.nonzero(inside)
    assert np.ptp(rows) < 20
    assert np.ptp(columns) < 20


def test_wrong_fields_and_indices_are_refused():
  for fields, message in (({'split': 'val'}, "split: 'val'"), ({'copies': 0}, 'copies'), ({'size': 7}, 'size')):
    with pytest.raises(ValueError, match=message):
      Scattered(**fields)
  with pytest.raises(IndexError):
    Scattered()[16 * 1437]
