import numpy as np
import pytest
from scipy import linalg

from fmcv_jax.evaluate.distances import cmmd, fid, kid, precision_recall


def sets(n=300, m=200, d=8):
  generator = np.random.default_rng(0)
  mix = generator.normal(size=(d, d))
  return generator.normal(size=(n, d)), generator.normal(size=(m, d)) @ mix + 0.5


def test_fid_equals_the_root_of_the_product_of_covariances():
  a, b = sets()
  root = linalg.sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False)).real
  want = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
  assert fid(a, b) == pytest.approx(want, rel=1e-6)
  assert fid(a, a) == pytest.approx(0, abs=1e-8)


def test_kid_equals_the_sum_over_pairs():
  a, b = sets(12, 9)
  kernel = lambda x, y: (x @ y / 8 + 1) ** 3  # noqa: E731
  same = [np.mean([kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j]) for x in (a, b)]
  cross = np.mean([kernel(x, y) for x in a for y in b])
  assert kid(a, b) == pytest.approx(sum(same) - 2 * cross)


def test_cmmd_of_two_points_is_known():
  """Opposite unit vectors are 2 apart: 1000 * (2 - 2 exp(-4 / 200))."""
  x = np.array([[1.0, 0.0]])
  assert cmmd(x, -x) == pytest.approx(2000 * (1 - np.exp(-0.02)))
  assert cmmd(x, x) == 0


def test_precision_falls_with_unrealistic_images_and_recall_with_missing_ones():
  generator = np.random.default_rng(0)
  left, right = generator.normal(size=(200, 4)) - 20, generator.normal(size=(200, 4)) + 20
  real = np.concatenate([left, right])
  precision, recall = precision_recall(generator.normal(size=(200, 4)) - 20, real)
  assert precision > 0.9
  assert recall == pytest.approx(0.5, abs=0.05)
  precision, recall = precision_recall(np.concatenate([real, real + 1000]), real)
  assert precision == pytest.approx(0.5, abs=0.05)
