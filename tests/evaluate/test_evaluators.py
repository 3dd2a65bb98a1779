"""Evaluators over the mesh: padding, order, labels and names come out right."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.data.sources.base import BadRecord, Source
from fmcv_jax.data.sources.parquet import Parquet
from fmcv_jax.data.sources.webdataset import WebDataset
from fmcv_jax.data.tokenizers import Tokenizer
from fmcv_jax.data.transforms import Resize
from fmcv_jax.errors import UserError
from fmcv_jax.evaluate.accuracy import Accuracy
from fmcv_jax.evaluate.base import EvaluatedModel
from fmcv_jax.evaluate.few_shot import FewShot
from fmcv_jax.evaluate.knn import Knn
from fmcv_jax.evaluate.labels import align_labels
from fmcv_jax.evaluate.linear_probe import LinearProbe
from fmcv_jax.evaluate.retrieval import Retrieval
from fmcv_jax.evaluate.zero_shot import ZeroShot
from fmcv_jax.objectives.outputs import Output
from fmcv_jax.parallel.mesh import MeshShape, make_mesh
from fmcv_jax.parallel.rules import Placement
from tests.data import shards

NAMES = ('red', 'green', 'blue')


@dataclasses.dataclass(frozen=True)
class Colors(Source):
  """29 images of one color each; record `broken` cannot be read."""

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
    return np.array([[NAMES.index((text.split() or NAMES)[-1]), 3] for text in texts], np.int32)

  def decode(self, tokens):
    return [NAMES[row[0]] for row in tokens]


def color_of(params, extra, batch):
  image = batch['image'].astype(jnp.float32).mean((1, 2))
  return image / jnp.linalg.norm(image, axis=1, keepdims=True)


OUTPUTS = {
  'logits': Output(color_of, 'logits'),
  'features': Output(color_of, 'embedding'),
  'embed_image': Output(color_of, 'embedding'),
  'embed_text': Output(lambda params, extra, batch: jax.nn.one_hot(batch['tokens'][:, 0], 3), 'embedding', ('tokens',)),
}


@pytest.fixture
def subject():
  return EvaluatedModel(OUTPUTS, Placement(make_mesh(MeshShape())), Words(), params={}, extra={})


def test_outputs_come_in_order_without_padding(subject):
  values, index, truth = subject.map_dataset('logits', Pipeline(Colors()), 8, truth=('label',))
  np.testing.assert_array_equal(index, np.arange(29))
  np.testing.assert_array_equal(truth['label'], np.arange(29) % 3)
  np.testing.assert_array_equal(values.argmax(1), np.arange(29) % 3)


@pytest.mark.parametrize('evaluator', [Accuracy, ZeroShot])
def test_perfect_model_scores_one_and_unreadable_images_do_not_count(subject, evaluator):
  data = Pipeline(Colors(broken=5), max_bad=0.1)
  assert evaluator(data, batch_size=8)(subject) == {'top1': 1.0, 'top5': 1.0}
  assert len(subject.map_dataset('logits', data, 8).indices) == 28


@pytest.mark.parametrize('templates', [('{c}',), ('{} {}',), ('100% {',), ('a {}', 'none'), ()])
def test_zero_shot_templates_need_one_place_for_the_name(templates):
  with pytest.raises(ValueError, match=r"templates: each needs one '\{\}' for the name"):
    ZeroShot(Pipeline(Colors()), templates=templates)


def test_other_braces_of_a_template_are_text(subject):
  figures = ZeroShot(Pipeline(Colors()), templates=('{c} 100% { {}',), batch_size=8)(subject)
  assert figures['top1'] == 1.0


def test_zero_shot_without_class_names_is_refused_before_the_first_step(subject):
  class Unnamed(Colors):
    names = ()

  ZeroShot(Pipeline(Colors())).prepare(subject)
  with pytest.raises(UserError, match='needs a source with class names'):
    ZeroShot(Pipeline(Unnamed())).prepare(subject)


@pytest.mark.parametrize('evaluator', [Accuracy, ZeroShot, Retrieval, FewShot])
def test_an_evaluator_that_its_model_or_data_does_not_suit_is_refused_before_the_first_step(subject, evaluator):
  class Images(Colors):
    def __getitem__(self, index):
      return {'image': super().__getitem__(index)['image']}

    def texts_of(self, index):
      return ()

  options = {'ways': 2} if evaluator is FewShot else {}
  evaluator(Pipeline(Colors()), batch_size=8, **options).prepare(subject)
  with pytest.raises(UserError, match='no captions' if evaluator is Retrieval else 'label'):
    evaluator(Pipeline(Images()), batch_size=8, **options).prepare(subject)
  subject.outputs = {}
  with pytest.raises(UserError, match='is not an output of this model'):
    evaluator(Pipeline(Colors()), batch_size=8, **options).prepare(subject)


@pytest.mark.parametrize('evaluator', [Knn, LinearProbe])
def test_a_bank_without_labels_or_features_is_refused_before_the_first_step(subject, evaluator):
  class Images(Colors):
    def __getitem__(self, index):
      return {'image': super().__getitem__(index)['image']}

  evaluator(Pipeline(Colors()), Pipeline(Colors()), batch_size=8).prepare(subject)
  with pytest.raises(UserError, match='label'):
    evaluator(Pipeline(Colors()), Pipeline(Images()), batch_size=8).prepare(subject)
  with pytest.raises(UserError, match=r"'featurez' is not an output of this model .*did you mean 'features'"):
    evaluator(Pipeline(Colors()), Pipeline(Colors()), features='featurez', batch_size=8).prepare(subject)


def test_zero_shot_averages_templates(subject):
  assert ZeroShot(Pipeline(Colors()), templates=('a {}', 'the {}'), batch_size=8)(subject)['top1'] == 1.0


def test_retrieval_counts_any_image_of_a_shared_caption_as_right(subject):
  figures = Retrieval(Pipeline(Colors(broken=5), max_bad=0.1), batch_size=8)(subject)
  assert set(figures.values()) == {1.0}
  assert len(figures) == 6


def test_knn_uses_its_bank(subject):
  assert Knn(Pipeline(Colors()), Pipeline(Colors()), ks=(1, 3), batch_size=8)(subject) == {
    'k1_top1': 1.0,
    'k3_top1': 1.0,
  }


def test_model_without_the_function_is_one_clear_line(subject):
  lacking = EvaluatedModel({'logits': OUTPUTS['logits']}, subject.placement, params={}, extra={})
  with pytest.raises(UserError, match=r"'features' is not an output of this model \(logits\)"):
    lacking.map_dataset('features', Pipeline(Colors()), 8)


@pytest.mark.parametrize('write', ['tars', 'parquet'])
def test_labels_of_data_without_class_names_count(subject, tmp_path, write):
  if write == 'tars':
    shards.write_tars(tmp_path / 'set', 21)
    source = WebDataset(str(tmp_path / 'set'))
  else:
    source = unnamed_parquet(tmp_path / 'set', 21)
  assert source.names == ()
  data = Pipeline(source, Resize(4))
  # The model knows each record by its index, and predicts the class in the file.
  right = Output(lambda params, extra, batch: jax.nn.one_hot(batch['index'] % 7, 7), 'logits')
  model = dataclasses.replace(subject, outputs={'logits': right, 'features': right})
  assert Accuracy(data, batch_size=8)(model) == {'top1': 1.0, 'top5': 1.0}
  assert Knn(data, data, ks=(3,), batch_size=8)(model) == {'k3_top1': 1.0}
  few = dataclasses.replace(model, outputs={'logits': Output(lambda *args: right.call(*args)[:, :5], 'logits')})
  with pytest.raises(UserError, match='label 5 of the evaluation data is not one of the 5 classes'):
    Accuracy(data, batch_size=8)(few)


def unnamed_parquet(folder, samples):
  parquet = pytest.importorskip('pyarrow.parquet')
  from pyarrow import table

  folder.mkdir()
  images = [{'bytes': shards.encoded_image(index)[0], 'path': None} for index in range(samples)]
  columns = {'image': images, 'label': [index % 7 for index in range(samples)]}
  parquet.write_table(table(columns), folder / 'train.parquet')
  return Parquet(str(folder), label='label')


@dataclasses.dataclass(frozen=True)
class Renumbered(Colors):
  """The same colors with classes in another order, or fewer of them."""

  order: tuple[str, ...] = NAMES

  def __getitem__(self, index):
    return {**super().__getitem__(index), 'label': self.order.index(NAMES[index % 3])}

  @property
  def names(self):
    return self.order


def test_classes_are_matched_by_name_with_those_of_training(subject):
  model = dataclasses.replace(subject, class_names=lambda: NAMES)
  for order in (('blue', 'green', 'red'), ('blue', 'cyan', 'green', 'red')):
    data = Pipeline(Renumbered(order=order))
    assert Accuracy(data, batch_size=8)(model)['top1'] == 1.0
    assert Knn(data, Pipeline(Colors()), ks=(1,), batch_size=8)(subject) == {'k1_top1': 1.0}
    assert LinearProbe(data, Pipeline(Colors()), batch_size=8)(subject)['top1'] == 1.0
  unknown = dataclasses.replace(subject, class_names=lambda: ('red', 'green', 'violet'))
  with pytest.raises(UserError, match=r"class 'blue' of the evaluation data is not a class of the training data"):
    Accuracy(Pipeline(Colors()), batch_size=8)(unknown)


def test_a_duplicate_class_name_is_refused_unless_both_lists_are_equal():
  labels = np.array([0, 1])
  np.testing.assert_array_equal(align_labels(labels, ('crane', 'crane'), ('crane', 'crane'), 'train_data'), labels)
  with pytest.raises(UserError, match="class 'crane' of the evaluation data occurs twice"):
    align_labels(labels, ('crane', 'dog'), ('dog', 'crane', 'crane'), 'train_data')


def test_an_output_is_fed_what_it_reads_and_keeps_its_tree_and_dtypes(subject):
  def call(params, extra, batch):
    assert set(batch) == {'tokens', 'label', 'index', 'rng'}
    drawn = jax.random.uniform(batch['rng'], (len(batch['index']),))
    return {'ids': batch['tokens'] + 49_405, 'half': batch['label'].astype(jnp.bfloat16), 'drawn': drawn}

  model = dataclasses.replace(subject, outputs={'words': Output(call, 'tokens', ('tokens', 'label'))})
  found = model.map_dataset('words', Pipeline(Colors(broken=5), max_bad=0.1), 8, truth=('label', 'image'))
  kept = np.delete(np.arange(29), 5)
  np.testing.assert_array_equal(found.indices, kept)
  np.testing.assert_array_equal(found.values['ids'], np.stack([kept % 3 + 49_405, np.full(28, 49_408)], axis=1))
  assert (found.values['ids'].dtype, found.values['half'].dtype) == (np.int32, jnp.bfloat16)
  np.testing.assert_array_equal(found.truth['image'], [Colors()[index]['image'] for index in kept])
  assert (found.truth['image'].dtype, found.truth['label'].tolist()) == (np.uint8, (kept % 3).tolist())
  again = model.map_dataset('words', Pipeline(Colors(broken=5), max_bad=0.1), 8)
  np.testing.assert_array_equal(again.values['drawn'], found.values['drawn'])
  assert len(set(found.values['drawn'].tolist())) == 28


def test_a_field_that_the_data_lacks_is_named(subject):
  model = dataclasses.replace(
    subject, outputs={'boxes': Output(lambda p, e, batch: batch['boxes'], 'boxes', ('boxes',))}
  )
  with pytest.raises(UserError, match='boxes'):
    model.map_dataset('boxes', Pipeline(Colors()), 8)


def test_wordnet_ids_of_imagenet_are_the_numbers_of_its_names():
  """Folders of ILSVRC 2012 and TFDS have ids, which published classifiers do not know."""
  ids = ('n01440764', *(f'n{2_000_000 + number:08d}' for number in range(998)), 'n15075141')
  names = ('tench, Tinca tinca', *(f'class {number}' for number in range(998)), 'toilet tissue, toilet paper')
  labels = np.array([0, 999, 5])
  np.testing.assert_array_equal(align_labels(labels, ids, names, 'the training data'), labels)
  np.testing.assert_array_equal(align_labels(labels, names, ids, 'the training data'), labels)
  for wrong in (ids[:1] + ids[2:], (ids[1], ids[0], *ids[2:])):
    with pytest.raises(UserError, match='is not a class of the training data'):
      align_labels(labels[:1], wrong, names, 'the training data')
