"""Linear probe of frozen features without a learning rate: closed-form ridge regression, or logistic by L-BFGS."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from typing_extensions import override

from fmcv_jax.bounds import NonNegativeInt, PositiveFloat, PositiveInt
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.evaluate.bank import check_bank, queries_and_bank
from fmcv_jax.evaluate.base import EvaluatedModel, Evaluator, Metrics, topk_accuracy
from fmcv_jax.parallel.rules import Placement, num_shards


@dataclasses.dataclass(frozen=True)
class LinearProbe(Evaluator):
  """Accuracy on `data` of a linear classifier of the features, fitted to `train_data`.

  method      'ridge': least squares of one-hot labels, in closed form, in float64 on the host. 'logistic': softmax
              regression by L-BFGS (as in CLIP, Radford et al. 2021, A.3), split over the mesh
  strengths   candidate L2 penalties per image, for features of zero mean and unit variance; the best by
              cross-validation within `train_data` is used, the largest in case of ties
  folds       cross-validation folds; ridge holds out each in turn, logistic only the first
  features    the evaluated output; 'pixels' is the baseline
  """

  data: Pipeline
  train_data: Pipeline
  method: Literal['ridge', 'logistic'] = 'ridge'
  strengths: tuple[PositiveFloat, ...] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
  folds: PositiveInt = 5
  features: str = 'features'
  batch_size: PositiveInt = 256
  every: NonNegativeInt = 0

  def __post_init__(self) -> None:
    if self.folds < 2:
      raise ValueError(f'folds: expected at least 2, got {self.folds}')
    if not self.strengths or min(self.strengths) <= 0:
      raise ValueError(f'strengths: expected numbers above 0, got {self.strengths}')

  @override
  def prepare(self, subject: EvaluatedModel) -> None:
    check_bank(subject, self)

  @override
  def __call__(self, subject: EvaluatedModel) -> Metrics:
    queries, labels, bank, bank_labels = queries_and_bank(subject, self)
    classes = int(max(labels.max(), bank_labels.max())) + 1
    mean, deviation = bank.mean(0), bank.std(0) + 1e-6
    bank, queries = (bank - mean) / deviation, (queries - mean) / deviation
    # Folds are stratified by class.
    order = np.lexsort((np.random.default_rng(0).random(len(bank)), bank_labels))
    fold = np.empty(len(bank), int)
    fold[order] = np.arange(len(bank)) % self.folds
    if self.method == 'ridge':
      strength = best_ridge(bank, bank_labels, fold, classes, self.strengths)
      scores = ridge(bank, bank_labels, classes, (strength,))(queries)[0]
    else:
      strength, scores = self._logistic(subject.placement, bank, bank_labels, fold == 0, queries, classes)
    return {'top1': topk_accuracy(scores, labels, 1), 'top5': topk_accuracy(scores, labels, 5), 'strength': strength}

  def _logistic(
    self,
    placement: Placement,
    bank: np.ndarray,
    labels: np.ndarray,
    held_out: np.ndarray,
    queries: np.ndarray,
    classes: int,
  ) -> tuple[float, np.ndarray]:
    right = {}
    for strength in self.strengths:
      weights, bias = logistic(placement, bank[~held_out], labels[~held_out], classes, strength)
      right[strength] = topk_accuracy(bank[held_out] @ weights + bias, labels[held_out], 1)
    strength = max(right, key=lambda s: (right[s], s))
    weights, bias = logistic(placement, bank, labels, classes, strength)
    return strength, queries @ weights + bias


def ridge(
  features: np.ndarray, labels: np.ndarray, classes: int, strengths: Sequence[float]
) -> Callable[[np.ndarray], np.ndarray]:
  """Fits one-hot labels by least squares for each strength; returns queries [M, D] -> scores [strengths, M, classes].

  Minimizes mean |x W + b - y|^2 + strength |W|^2; one eigendecomposition serves all strengths.
  """
  x, y = features.astype(np.float64), np.eye(classes)[labels]
  center, prior = x.mean(0), y.mean(0)
  x = x - center
  spectrum, vectors = np.linalg.eigh(x.T @ x / len(x))
  target = vectors.T @ (x.T @ (y - prior)) / len(x)

  def predict(queries: np.ndarray) -> np.ndarray:
    rotated = (queries - center) @ vectors
    return np.stack([(rotated / (np.maximum(spectrum, 0) + s)) @ target + prior for s in strengths])

  return predict


def best_ridge(
  features: np.ndarray, labels: np.ndarray, fold: np.ndarray, classes: int, strengths: Sequence[float]
) -> float:
  """The strength with the highest cross-validation accuracy; the largest in case of ties."""
  right = np.zeros(len(strengths))
  for part in np.unique(fold):
    inside = fold == part
    scores = ridge(features[~inside], labels[~inside], classes, strengths)(features[inside])
    right += (scores.argmax(-1) == labels[inside]).sum(-1)
  return max(zip(right, strengths, strict=True))[1]


def logistic(
  placement: Placement, features: np.ndarray, labels: np.ndarray, classes: int, strength: float, tolerance: float = 1e-5
) -> tuple[np.ndarray, np.ndarray]:
  """Weights [D, classes] and bias [classes] of softmax regression, float32.

  Minimizes mean cross-entropy + strength / 2 |W|^2 by L-BFGS, until the gradient's norm is below `tolerance` or 1000
  steps are done. Examples are split over the mesh.
  """
  with placement.active():
    short = -len(features) % num_shards('batch')
  rows = {
    'x': np.pad(features.astype(np.float32), ((0, short), (0, 0))),
    'label': np.pad(labels.astype(np.int32), (0, short)),
    'weight': np.pad(np.ones(len(labels), np.float32), (0, short)),
  }
  rows = jax.device_put(rows, placement.batch(rows))
  start = (jnp.zeros((features.shape[1], classes)), jnp.zeros(classes))
  return jax.device_get(_minimize(start, rows, strength, tolerance))


@jax.jit
def _minimize(start: Any, rows: Mapping[str, jax.Array], strength: float, tolerance: float) -> Any:
  solver = optax.lbfgs()

  def objective(params: Any) -> jax.Array:
    weights, bias = params
    logits = jnp.matmul(rows['x'], weights, precision='highest') + bias
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, rows['label'])
    return jnp.sum(losses * rows['weight']) / rows['weight'].sum() + strength / 2 * jnp.sum(weights**2)

  def step(carry: Any) -> Any:
    params, state, count, _ = carry
    value, gradient = optax.value_and_grad_from_state(objective)(params, state=state)
    updates, state = solver.update(gradient, state, params, value=value, grad=gradient, value_fn=objective)
    return optax.apply_updates(params, updates), state, count + 1, optax.tree.norm(gradient)

  def unfinished(carry: Any) -> jax.Array:
    return (carry[2] < 1000) & (carry[3] > tolerance)

  return jax.lax.while_loop(unfinished, step, (start, solver.init(start), 0, jnp.inf))[0]
