"""Evaluators' arithmetic against second methods."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from fmcv_jax.evaluate.base import topk_accuracy
from fmcv_jax.evaluate.knn import knn_accuracy
from fmcv_jax.evaluate.retrieval import recalls


def unit(x):
  return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_topk_accuracy_by_hand():
  scores = np.array([[0.1, 0.9, 0.5], [0.3, 0.2, 0.1], [0.0, 0.1, 0.2]])
  assert topk_accuracy(scores, np.array([1, 1, 0]), 1) == pytest.approx(1 / 3)
  assert topk_accuracy(scores, np.array([2, 1, 0]), 2) == pytest.approx(2 / 3)
  assert topk_accuracy(scores, np.array([1, 1, 0]), 5) == 1.0


@pytest.mark.parametrize('k', [1, 7, 20])
def test_knn_equals_scikit_learn_with_the_same_weights(k):
  generator = np.random.default_rng(0)
  bank, labels = generator.normal(size=(300, 8)), generator.integers(0, 5, 300)
  queries = bank[:100] + generator.normal(size=(100, 8))
  truth = labels[:100]

  def weights(distances):  # of unit vectors: cosine = 1 - distance^2 / 2
    return np.exp((1 - distances**2 / 2) / 0.07)

  reference = KNeighborsClassifier(k, weights=weights, algorithm='brute').fit(unit(bank), labels)
  expected = (reference.predict(unit(queries)) == truth).mean()
  assert knn_accuracy(queries, truth, bank, labels, k, 0.07) == pytest.approx(expected)
  assert 0.3 < expected < 1


def test_recalls_by_hand_with_several_captions_and_a_shared_one():
  texts = np.eye(4)
  # Image 0 owns captions 0 and 1 and lies nearest to 1; image 1 owns 2 but lies nearest to 3; image 2 owns 3.
  images = unit(np.array([[0.5, 1.0, 0, 0], [0, 0, 0.9, 1.0], [0, 0, 0, 1.0]]))
  figures = recalls(images, texts, [(0, 1), (2,), (3,)], ks=(1, 2))
  assert figures['image_to_text_r1'] == pytest.approx(2 / 3)
  assert figures['image_to_text_r2'] == 1.0
  # Caption 3's nearest image is 2, right; captions 0, 1 find image 0, caption 2 finds image 1.
  assert figures['text_to_image_r1'] == 1.0


def test_recalls_of_random_embeddings_equal_a_plain_ranking():
  generator = np.random.default_rng(1)
  images, texts = unit(generator.normal(size=(40, 6))), unit(generator.normal(size=(40, 6)))
  texts = unit(texts + images)
  figures = recalls(images, texts, [(i,) for i in range(40)])
  similarity = images @ texts.T
  for k in (1, 5, 10):
    ranks = (similarity > np.diag(similarity)[:, None]).sum(1)
    assert figures[f'image_to_text_r{k}'] == pytest.approx((ranks < k).mean())
    ranks = (similarity > np.diag(similarity)[None]).sum(0)
    assert figures[f'text_to_image_r{k}'] == pytest.approx((ranks < k).mean())
