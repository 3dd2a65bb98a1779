"""Evaluators over the mesh: padding, order, labels and names come out right."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmcv_jax.data.loader import Pipeline
from fmcv_jax.data.sources.base import BadRecord, Source
from fmcv_jax.data.tokenizers import Tokenizer
from fmcv_jax.errors import UserError
from fmcv_jax.evaluate.accuracy import Accuracy
from fmcv_jax.evaluate.base import EvaluatedModel
from fmcv_jax.evaluate.knn import Knn
from fmcv_jax.evaluate.retrieval import Retrieval
from fmcv_jax.evaluate.zero_shot import ZeroShot
from fmcv_jax.parallel.mesh import MeshShape, make_mesh
from fmcv_jax.parallel.rules import Placement

NAMES = ('red', 'green', 'blue')


@dataclasses.dataclass(frozen=True)
class Colours(Source):
  """29 images of one colour each; record `broken` cannot be read."""

  broken: int = -1

  def __len__(self):
    return 29

  def __getitem__(self, index):
    if index == self.broken:
      raise BadRecord('broken')
    image = np.full((4, 4, 3), index, np.uint8)
    image[..., index % 3] = 255
    return {'image': image, 'label': index % 3, 'text': NAMES[index % 3]}

  @property
  def names(self):
    return NAMES

  def texts_of(self, index):
    return (NAMES[index % 3],)


@dataclasses.dataclass(frozen=True)
class Words(Tokenizer):
  """The last word's place in NAMES."""

  length: int = 2
  vocab_size: int = 4
  pad_id: ClassVar = 0
  start_id: ClassVar = None
  end_id: ClassVar = 3

  def __call__(self, texts):
    return np.array([[NAMES.index(text.split()[-1]), 3] for text in texts], np.int32)

  def decode(self, tokens):
    return [NAMES[row[0]] for row in tokens]


def colour_of(params, extra, batch):
  image = batch['image'].astype(jnp.float32).mean((1, 2))
  return image / jnp.linalg.norm(image, axis=1, keepdims=True)


FUNCTIONS = {
  'logits': colour_of,
  'features': colour_of,
  'embed_image': colour_of,
  'embed_text': lambda params, extra, batch: jax.nn.one_hot(batch['tokens'][:, 0], 3),
}


@pytest.fixture
def subject():
  return EvaluatedModel(FUNCTIONS, Placement(make_mesh(MeshShape())), Words(), params={}, extra={})


def test_outputs_come_in_order_without_padding(subject):
  values, index, labels = subject.map_dataset('logits', Pipeline(Colours()), 8)
  np.testing.assert_array_equal(index, np.arange(29))
  np.testing.assert_array_equal(labels, np.arange(29) % 3)
  np.testing.assert_array_equal(values.argmax(1), np.arange(29) % 3)


@pytest.mark.parametrize('evaluator', [Accuracy, ZeroShot])
def test_perfect_model_scores_one_and_unreadable_images_do_not_count(subject, evaluator):
  data = Pipeline(Colours(broken=5), max_bad=0.1)
  assert evaluator(data, batch=8)(subject) == {'top1': 1.0, 'top5': 1.0}
  assert len(subject.map_dataset('logits', data, 8).records) == 28


def test_zero_shot_averages_templates(subject):
  assert ZeroShot(Pipeline(Colours()), templates=('a {}', 'the {}'), batch=8)(subject)['top1'] == 1.0


def test_retrieval_counts_any_image_of_a_shared_caption_as_right(subject):
  figures = Retrieval(Pipeline(Colours(broken=5), max_bad=0.1), batch=8)(subject)
  assert set(figures.values()) == {1.0}
  assert len(figures) == 6


def test_knn_uses_its_bank(subject):
  assert Knn(Pipeline(Colours()), Pipeline(Colours()), ks=(1, 3), batch=8)(subject) == {'k1_top1': 1.0, 'k3_top1': 1.0}


def test_model_without_the_function_is_one_clear_line(subject):
  lacking = EvaluatedModel({'logits': colour_of}, subject.placement, params={}, extra={})
  with pytest.raises(UserError, match="needs 'features', which this objective does not offer; it has: logits"):
    lacking.map_dataset('features', Pipeline(Colours()), 8)
