"""Distribution metrics of generated and real images, on features of any network: FID, KID, CMMD, precision, recall."""

from collections.abc import Callable

import numpy as np

from fmcv_jax.evaluate.base import chunks


def fid(made: np.ndarray, real: np.ndarray) -> float:
  """Fréchet distance between Gaussian fits of two sets of features [N, D] (Heusel et al. 2017)."""
  a, b = made.astype(np.float64), real.astype(np.float64)
  one, other = (np.cov(x, rowvar=False) for x in (a, b))
  # The trace of the square root of the product equals that of a symmetric matrix with real, nonnegative eigenvalues.
  root = _root(one)
  cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ other @ root), 0)).sum()
  return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(one) + np.trace(other) - 2 * cross)


def kid(made: np.ndarray, real: np.ndarray) -> float:
  """Unbiased squared MMD of two sets of features [N, D], kernel (x . y / D + 1)^3 (Binkowski et al. 2018)."""
  a, b = made.astype(np.float64), real.astype(np.float64)

  def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3

  def among(x: np.ndarray) -> float:
    itself = ((np.square(x).sum(1) / x.shape[1] + 1) ** 3).sum()
    return (_total(kernel, x, x) - itself) / (len(x) * (len(x) - 1))

  return float(among(a) + among(b) - 2 * _total(kernel, a, b) / (len(a) * len(b)))


def cmmd(made: np.ndarray, real: np.ndarray, sigma: float = 10.0) -> float:
  """1000 times the squared MMD of unit embeddings [N, E], with a Gaussian kernel (Jayasumana et al. 2024)."""
  a, b = made.astype(np.float64), real.astype(np.float64)

  def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    distance = np.square(x).sum(1)[:, None] + np.square(y).sum(1) - 2 * x @ y.T
    return np.exp(-distance / (2 * sigma**2))

  def mean(x: np.ndarray, y: np.ndarray) -> float:
    return _total(kernel, x, y) / (len(x) * len(y))

  return float(1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b)))


def precision_recall(made: np.ndarray, real: np.ndarray, k: int = 3) -> tuple[float, float]:
  """(precision, recall): fraction of generated features [N, D] within the radius of a real one, and vice versa; the
  radius of a feature is the distance to its k-th nearest neighbor in its own set (Kynkaanniemi et al. 2019)."""

  def within(queries: np.ndarray, centers: np.ndarray) -> float:
    reach = [np.partition(_distances(centers[part], centers), k, axis=1)[:, k] for part in chunks(len(centers), 1024)]
    inside = [
      (_distances(queries[part], centers) <= np.concatenate(reach)).any(axis=1) for part in chunks(len(queries), 1024)
    ]
    return float(np.concatenate(inside).mean())

  return within(made, real), within(real, made)


def _total(kernel: Callable[[np.ndarray, np.ndarray], np.ndarray], x: np.ndarray, y: np.ndarray) -> float:
  """Sum of the kernel over all pairs, in blocks of rows."""
  return sum(float(kernel(x[part], y).sum()) for part in chunks(len(x), 1024))


def _root(matrix: np.ndarray) -> np.ndarray:
  values, vectors = np.linalg.eigh(matrix)
  return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def _distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  x, y = x.astype(np.float64), y.astype(np.float64)
  return np.square(x).sum(1)[:, None] + np.square(y).sum(1) - 2 * x @ y.T
