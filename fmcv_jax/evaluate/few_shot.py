"""Few-shot classification of frozen features: episodes of n classes with k examples each (Vinyals et al. 2016)."""

import collections
import dataclasses

import numpy as np
from typing_extensions import override

from fmcv_jax.bounds import NonNegativeInt, PositiveInt
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.data.sources.base import UNREADABLE, Source
from fmcv_jax.data.sources.values import Classes
from fmcv_jax.errors import UserError
from fmcv_jax.evaluate.base import EvaluatedModel, Evaluator, Metrics


@dataclasses.dataclass(frozen=True)
class FewShot(Evaluator):
  """Accuracy of nearest-prototype classification; a prototype is the mean of a class's examples (Snell et al. 2017).

  Each episode draws `ways` classes, and from each k of `shots` examples and at most `queries` others. Features are
  centered by their mean over `data` and scaled to unit length (SimpleShot, Wang et al. 2019). Also reports the
  half-width of the 95 % confidence interval over episodes. features: the evaluated output; 'pixels' is the baseline.
  UserError before the first step for data with fewer than `ways` classes of more than max(shots) images.
  """

  data: Pipeline
  ways: PositiveInt = 5
  shots: tuple[PositiveInt, ...] = (1, 5)
  queries: PositiveInt = 15
  episodes: PositiveInt = 600
  features: str = 'features'
  batch_size: PositiveInt = 256
  every: NonNegativeInt = 0

  def __post_init__(self) -> None:
    for name, least in (('ways', 2), ('queries', 1), ('episodes', 2)):
      if getattr(self, name) < least:
        raise ValueError(f'{name}: expected at least {least}, got {getattr(self, name)}')

  @override
  def prepare(self, subject: EvaluatedModel) -> None:
    subject.check_dataset(self.features, self.data, self.batch_size, truth=('label',))
    source, shots = self.data.source, max(self.shots)
    counts = source.account().class_counts
    if counts is None:
      enough = _classes_with(source, shots, self.ways)
    else:
      enough = sum(count > shots for count in counts)
    _check_classes(enough, self.ways, shots)

  @override
  def __call__(self, subject: EvaluatedModel) -> Metrics:
    features, _, truth = subject.map_dataset(self.features, self.data, self.batch_size, truth=('label',))
    figures = {}
    for shots in self.shots:
      right = episode_accuracies(features, truth['label'], self.ways, shots, self.queries, self.episodes)
      figures[f'{self.ways}_way_{shots}_shot'] = float(right.mean())
      figures[f'{self.ways}_way_{shots}_shot_ci95'] = float(1.96 * right.std(ddof=1) / len(right) ** 0.5)
    return figures


def _check_classes(enough: int, ways: int, shots: int) -> None:
  if enough < ways:
    raise UserError(
      f'config.evaluators: few_shot: {ways} ways of {shots} shots need {ways} classes with more than {shots} images '
      f'each; there are {enough}; set fewer ways or shots'
    )


def _classes_with(source: Source, shots: int, ways: int) -> int:
  """The number of classes with more than `shots` records, counted up to `ways` by reading labels until then."""
  classes, counts = Classes(source.names), collections.Counter[int]()
  for index in range(len(source)):
    try:
      label = classes.number(source[index].get('label'), 'label')
    except UNREADABLE:
      continue
    counts[label] += 1
    if counts[label] > shots and sum(count > shots for count in counts.values()) == ways:
      return ways
  return sum(count > shots for count in counts.values())


def episode_accuracies(
  features: np.ndarray, labels: np.ndarray, ways: int, shots: int, queries: int, episodes: int
) -> np.ndarray:
  """Features [N, D] with labels [N] -> accuracy of each episode."""
  features = features - features.mean(0)
  features = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
  members = [np.flatnonzero(labels == label) for label in np.unique(labels[labels >= 0])]
  members = [rows for rows in members if len(rows) > shots]
  _check_classes(len(members), ways, shots)
  rng, right = np.random.default_rng(0), np.empty(episodes)
  for episode in range(episodes):
    chosen = [rng.permutation(members[c]) for c in rng.choice(len(members), ways, replace=False)]
    prototypes = np.stack([features[rows[:shots]].mean(0) for rows in chosen])
    prototypes /= np.maximum(np.linalg.norm(prototypes, axis=1, keepdims=True), 1e-12)
    asked = [rows[shots : shots + queries] for rows in chosen]
    answers = (features[np.concatenate(asked)] @ prototypes.T).argmax(1)
    right[episode] = (answers == np.repeat(np.arange(ways), [len(rows) for rows in asked])).mean()
  return right
