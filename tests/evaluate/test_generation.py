"""Generated images against real ones: a model without a network, whose images are known, and features of colors."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from fmcv_jax import experiment, trainer
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.data.sources.subset import evenly_spaced
from fmcv_jax.data.tokenizers import Tokenizer
from fmcv_jax.diffusion.condition import make_condition
from fmcv_jax.diffusion.generator import Generator
from fmcv_jax.diffusion.process import Process
from fmcv_jax.errors import UserError
from fmcv_jax.evaluate.base import EvaluatedModel
from fmcv_jax.evaluate.feature_extractor import FeatureExtractor
from fmcv_jax.evaluate.generation import Generation
from fmcv_jax.objectives.outputs import Output
from fmcv_jax.parallel.mesh import MeshShape, make_mesh
from fmcv_jax.parallel.rules import Placement
from fmcv_jax.train.storage import read_metrics
from tests import runs
from tests.evaluate.test_evaluators import NAMES, Colors


@dataclasses.dataclass(frozen=True)
class Words(Tokenizer):
  """The text's place in NAMES, and after them that of anything else."""

  length: int = 2
  vocab_size: int = 4
  pad_id: ClassVar = 0
  start_id: ClassVar = None
  end_id: ClassVar = 3

  def __call__(self, texts):
    return np.array([[(*NAMES, text).index(text), 3] for text in texts], np.int32)

  def decode(self, tokens):
    return [NAMES[row[0]] for row in tokens]


PROCESS = Process('flow', 'flow')


def colors(labels):
  return jax.nn.one_hot(labels, 3)[:, None, None] * jnp.ones((1, 4, 4, 1))


def makes(params, extra):
  """Generates the color of its condition, shifted by params['shift']; unconditional output is gray."""

  def denoise(x, time, condition):
    color = colors((condition['label'] + params['shift']) % 3)
    image = jnp.where((condition['label'] < 3)[:, None, None, None], color, 0.3)
    return (x - image) * 1000 / time.reshape(-1, 1, 1, 1)

  def condition(batch, conditional=True):
    label = batch['tokens'][:, 0]
    return make_condition(label=label if conditional else jnp.full_like(label, 3))

  same = lambda x: x  # noqa: E731
  return Generator(PROCESS, (4, 4, 3), (4, 4, 3), denoise, condition, ('tokens',), same, lambda x: jnp.clip(x, 0, 1))


def color_of(params, extra, batch):
  image = batch['image'].astype(jnp.float32).mean((1, 2))
  return image / jnp.linalg.norm(image, axis=1, keepdims=True)


def read(params, extra, batch):
  return jax.nn.one_hot(batch['tokens'][:, 0], 3)


def subject(offered):
  placement = Placement(make_mesh(MeshShape()))
  feature_extractor = EvaluatedModel(
    {name: Output(*each) for name, each in offered.items()}, placement, Words(), params={}, extra={}, image_size=4
  )
  params = {'shift': jnp.int32(0)}
  samples = Output(lambda *_: pytest.fail('generation samples by itself'), 'image', ('tokens',), generator=makes)
  return EvaluatedModel({'samples': samples}, placement, Words(), params, {}, reopen=lambda workdir: feature_extractor)


def evaluator(**options):
  return Generation(
    data=Pipeline(Colors(broken=5), max_bad=0.1), feature_extractor='runs/clip', batch_size=16, steps=3, **options
  )


def test_a_model_that_follows_its_condition_scores_like_real_images():
  model = subject({'embed_image': (color_of,), 'embed_text': (read, 'embedding', ('tokens',))})
  figures = evaluator()(model)
  assert set(figures) == {'fid', 'kid', 'precision', 'recall', 'cmmd', 'clip_score'}
  # Real images have one color each, apart from a little gray.
  assert figures['fid'] < 0.02
  assert figures['clip_score'] == pytest.approx(100, abs=0.1)
  model.params = {'shift': jnp.int32(1)}
  assert evaluator()(model)['clip_score'] == pytest.approx(0, abs=0.1)
  model.params = {'shift': jnp.int32(0)}
  assert evaluator(guidance=2.0)(model)['clip_score'] == pytest.approx(100, abs=0.1)


def test_an_extractor_without_text_compares_features_and_one_without_features_is_refused():
  assert set(evaluator(count=9)(subject({'features': (color_of,)}))) == {'fid', 'kid', 'precision', 'recall'}
  with pytest.raises(UserError, match='runs/clip has no features; its outputs are logits'):
    evaluator().prepare(subject({'logits': (color_of,)}))
  with pytest.raises(UserError, match='does not generate images; its outputs are features'):
    evaluator()(dataclasses.replace(subject({}), outputs={'features': Output(color_of)}))
  with pytest.raises(ValueError, match='count: expected at least 4, got 1'):
    evaluator(count=1)


def test_the_feature_extractor_is_opened_once_and_resizes_other_sizes():
  model, opened = subject({'features': (color_of,)}), []
  reopen = model.reopen
  model.reopen = lambda workdir: opened.append(workdir) or reopen(workdir)
  for size in (4, 8):
    images = np.full((3, size, size, 3), [255, 0, 0], np.uint8)
    np.testing.assert_allclose(FeatureExtractor(model, 'runs/a', 8)(images), [[1, 0, 0]] * 3, atol=1e-6)
  assert opened == ['runs/a']


def test_spaced_records_come_from_all_of_a_sorted_source():
  spaced = evenly_spaced(Colors(), 10)
  assert [spaced[i]['image'].min() for i in range(10)] == [i * 29 // 10 for i in range(10)]
  assert len(evenly_spaced(Colors(), 99)) == 29
  assert spaced.names == Colors().names


@pytest.mark.slow
def test_a_run_reports_distances_and_a_missing_feature_extractor_stops_it_at_once(tmp_path):
  folder = runs.image_folder(tmp_path / 'images')
  (tmp_path / 'feature_extractor').mkdir()
  feature_extractor = runs.untrained(runs.contrastive(folder), tmp_path / 'feature_extractor')
  config = runs.class_to_image(folder, train__steps=1, optimizer__schedule__warmup_steps=0)
  real = {'source': config['data']['source'], 'image': {'name': 'resize', 'size': 16}}
  spec = {
    'name': 'generation',
    'feature_extractor': str(feature_extractor),
    'count': 20,
    'steps': 2,
    'batch_size': 8,
    'guidance': 2.0,
    'data': real,
  }
  trainer.train(experiment.resolve({**config, 'evaluators': {'made': spec}}), tmp_path / 'run')
  rows = read_metrics(epath.Path(tmp_path / 'run' / 'metrics.jsonl'))
  metrics = {name: value for row in rows for name, value in row.items() if name.startswith('made/')}
  assert {name.removeprefix('made/') for name in metrics} == {'fid', 'kid', 'precision', 'recall', 'cmmd'}
  assert np.isfinite(list(metrics.values())).all()

  spec['feature_extractor'] = str(tmp_path / 'nowhere')
  with pytest.raises(UserError, match='nowhere: no run here'):
    trainer.train(experiment.resolve({**config, 'evaluators': {'made': spec}}), tmp_path / 'other')
  assert not read_metrics(epath.Path(tmp_path / 'other' / 'metrics.jsonl'))
