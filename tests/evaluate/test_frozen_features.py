"""Probes of frozen features against scikit-learn, and by hand."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge

from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.data.sources.base import Source
from fmcv_jax.errors import UserError
from fmcv_jax.evaluate.base import EvaluatedModel, pixels
from fmcv_jax.evaluate.few_shot import FewShot, episode_accuracies
from fmcv_jax.evaluate.knn import Knn
from fmcv_jax.evaluate.linear_probe import LinearProbe, best_ridge, logistic, ridge
from fmcv_jax.evaluate.object_masks import ObjectMasks, jaccard
from fmcv_jax.objectives.outputs import Output
from fmcv_jax.parallel.mesh import MeshShape, make_mesh
from fmcv_jax.parallel.rules import Placement
from tests.evaluate.test_evaluators import OUTPUTS, Colors

PLACEMENT = Placement(make_mesh(MeshShape()))


@pytest.fixture(scope='module')
def clouds():
  """Three overlapping clouds of 203 points; most of the 12 dimensions say nothing."""
  generator = np.random.default_rng(0)
  labels = generator.integers(0, 3, 203)
  features = generator.normal(size=(203, 12))
  features[:, :3] += 1.5 * np.eye(3)[labels]
  return features.astype(np.float32), labels


@pytest.mark.parametrize('strength', [1e-4, 0.3])
def test_ridge_equals_scikit_learn(clouds, strength):
  features, labels = clouds
  reference = Ridge(alpha=strength * 203).fit(features.astype(np.float64), np.eye(3)[labels])
  queries = np.random.default_rng(1).normal(size=(20, 12))
  ours = ridge(features, labels, 3, (7.0, strength))(queries)[1]
  np.testing.assert_allclose(ours, reference.predict(queries), rtol=1e-8, atol=1e-10)


def test_logistic_regression_equals_scikit_learn(clouds):
  features, labels = clouds
  reference = LogisticRegression(C=1 / (0.02 * 203), tol=1e-8, max_iter=1000).fit(features, labels)
  weights, bias = logistic(PLACEMENT, features, labels, 3, 0.02, tolerance=1e-6)
  expected = reference.decision_function(features)
  ours = features @ weights + bias
  np.testing.assert_allclose(ours - ours.mean(1, keepdims=True), expected, atol=2e-3 * np.abs(expected).max())


def test_cross_validation_takes_the_strength_that_does_best_on_folds_left_out():
  """With more dimensions than examples, all of them noisy, a weak penalty fits the noise."""
  generator = np.random.default_rng(0)
  labels = np.arange(60) % 2
  features = generator.normal(size=(60, 80)) + 0.35 * (2 * labels[:, None] - 1)
  fold = np.arange(60) // 12
  strengths = (1e-8, 10.0)
  right = [
    sum(
      (Ridge(alpha=s * 48).fit(features[fold != f], np.eye(2)[labels[fold != f]]).predict(features[fold == f]).argmax(1)
       == labels[fold == f]).sum()
      for f in range(5)
    )
    for s in strengths
  ]  # fmt: skip
  assert right[1] > right[0]
  assert best_ridge(features, labels, fold, 2, strengths) == 10.0


@pytest.mark.parametrize('method', ['ridge', 'logistic'])
def test_linear_probe_of_separable_features_is_right(method):
  subject = EvaluatedModel(OUTPUTS, PLACEMENT, params={}, extra={})
  probe = LinearProbe(Pipeline(Colors()), Pipeline(Colors()), method, strengths=(1e-4, 1e-3), batch_size=8)
  assert probe(subject) == {'top1': 1.0, 'top5': 1.0, 'strength': 1e-3}


def test_few_shot_by_hand():
  generator = np.random.default_rng(0)
  labels = np.repeat([0, 1], 40)
  apart = np.eye(2)[labels] * 10 + generator.normal(size=(80, 2))
  assert episode_accuracies(apart, labels, 2, 1, 15, 50).min() == 1
  noise = generator.normal(size=(80, 8))
  right = episode_accuracies(noise, labels, 2, 5, 15, 400)
  assert abs(right.mean() - 0.5) < 0.05
  with pytest.raises(UserError, match='need 3 classes with more than 1 images each; there are 2'):
    episode_accuracies(noise, labels, 3, 1, 15, 1)


@pytest.mark.parametrize('counted', [True, False])
def test_few_shot_of_too_few_classes_or_images_is_refused_before_a_run(counted):
  class Uncounted(Colors):
    def account(self):
      return dataclasses.replace(super().account(), class_counts=None)

  class Counted(Colors):
    def account(self):
      labels = [self[index]['label'] for index in range(len(self))]
      return dataclasses.replace(super().account(), class_counts=tuple(np.bincount(labels).tolist()))

  source = Counted() if counted else Uncounted()
  labels = [int(source[index]['label']) for index in range(len(source))]
  classes, least = len(set(labels)), min(labels.count(label) for label in labels)
  subject = EvaluatedModel(OUTPUTS, PLACEMENT, params={}, extra={})
  FewShot(Pipeline(source), ways=classes, shots=(1, least - 1)).prepare(subject)
  for ways, shots, found in [(classes + 1, 1, classes), (classes, max(labels.count(label) for label in labels), 0)]:
    with pytest.raises(UserError, match=f'need {ways} classes with more than {shots} images each; there are {found};'):
      FewShot(Pipeline(source), ways=ways, shots=(1, shots)).prepare(subject)


def test_few_shot_over_the_mesh():
  figures = FewShot(Pipeline(Colors()), ways=3, shots=(1, 4), episodes=20, batch_size=8)(
    EvaluatedModel(OUTPUTS, PLACEMENT, params={}, extra={})
  )
  assert figures['3_way_4_shot'] == 1.0
  assert figures['3_way_4_shot_ci95'] == 0.0
  assert set(figures) == {f'3_way_{k}_shot{end}' for k in (1, 4) for end in ('', '_ci95')}


def test_pixels_are_features_of_every_model():
  subject = EvaluatedModel({}, PLACEMENT, params={}, extra={})
  images = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3)).astype(np.uint8)
  blocks = images.reshape(2, 16, 2, 16, 3, 3).mean((2, 4)) / 255
  np.testing.assert_allclose(pixels({}, {}, {'image': images}), blocks.reshape(2, -1), rtol=1e-5)
  same = Pipeline(Colors())
  assert Knn(same, same, ks=(1,), features='pixels', batch_size=8)(subject) == {'k1_top1': 1.0}
  assert LinearProbe(same, same, features='pixels', batch_size=8)(subject)['top1'] == 1.0


def test_jaccard_by_hand():
  truth = np.zeros((1, 4, 4), bool)
  truth[0, :2, :3] = True
  masks = np.array([[[True, False], [False, True]]])
  assert jaccard(masks, truth).tolist() == [4 / 10]


@dataclasses.dataclass(frozen=True)
class Squares(Source):
  """A black square in one quarter of a white image."""

  def __len__(self):
    return 4

  def __getitem__(self, index):
    image = np.full((8, 8, 3), 255, np.uint8)
    image[4 * (index // 2) :, 4 * (index % 2) :][:4, :4] = 0
    return {'image': image}


def test_object_masks_of_attention_to_the_dark_are_the_object():
  def attention(params, extra, batch):
    dark = (batch['image'][:, ::4, ::4, 0] < 128).astype(jnp.float32)[:, None]
    return jnp.concatenate([dark, 1 - dark], axis=1)

  figures = ObjectMasks(Pipeline(Squares()), batch_size=8)(
    EvaluatedModel({'attention': Output(attention, 'map')}, PLACEMENT, params={}, extra={})
  )
  # The second head looks at two of the three other quarters, of which it needs 60 %.
  assert figures == {'jaccard_best_head': 1.0, 'jaccard_mean_head': 0.5, 'jaccard_everything': 0.25}
