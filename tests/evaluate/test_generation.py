"""Made pictures beside real ones: a model without a network, whose pictures are known, and a judge of colours."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from fmcv_jax import experiment, trainer
from fmcv_jax.data.loader import Pipeline
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
from tests.evaluate.test_evaluators import NAMES, Colours


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


def colours(labels):
  return jax.nn.one_hot(labels, 3)[:, None, None] * jnp.ones((1, 4, 4, 1))


def makes(params, extra):
  """Paints the colour that it is told, moved on by params['shift']; guidance brings it back from no colour."""

  def denoise(x, time, condition):
    told = colours((condition['label'] + params['shift']) % 3)
    picture = jnp.where((condition['label'] < 3)[:, None, None, None], told, 0.3)
    return (x - picture) * 1000 / time.reshape(-1, 1, 1, 1)

  def condition(batch, conditional=True):
    label = batch['tokens'][:, 0]
    return make_condition(label=label if conditional else jnp.full_like(label, 3))

  same = lambda x: x  # noqa: E731
  return Generator(PROCESS, (4, 4, 3), (4, 4, 3), denoise, condition, ('tokens',), same, lambda x: jnp.clip(x, 0, 1))


def colour_of(params, extra, batch):
  image = batch['image'].astype(jnp.float32).mean((1, 2))
  return image / jnp.linalg.norm(image, axis=1, keepdims=True)


def read(params, extra, batch):
  return jax.nn.one_hot(batch['tokens'][:, 0], 3)


def subject(offered):
  placement = Placement(make_mesh(MeshShape()))
  judge = EvaluatedModel(
    {name: Output(*each) for name, each in offered.items()}, placement, Words(), params={}, extra={}, image_size=4
  )
  params = {'shift': jnp.int32(0)}
  samples = Output(lambda *_: pytest.fail('generation samples by itself'), 'image', ('tokens',), generator=makes)
  return EvaluatedModel({'samples': samples}, placement, Words(), params, {}, reopen=lambda workdir: judge)


def evaluator(**options):
  return Generation(
    data=Pipeline(Colours(broken=5), max_bad=0.1), feature_extractor='runs/clip', batch_size=16, steps=3, **options
  )


def test_a_model_that_paints_what_it_is_told_is_as_good_as_real():
  model = subject({'embed_image': (colour_of,), 'embed_text': (read, 'embedding', ('tokens',))})
  figures = evaluator()(model)
  assert set(figures) == {'fid', 'kid', 'precision', 'recall', 'cmmd', 'clip_score'}
  # Real images are of one colour but for a little of grey.
  assert figures['fid'] < 0.02
  assert figures['clip_score'] == pytest.approx(100, abs=0.1)
  model.params = {'shift': jnp.int32(1)}
  assert evaluator()(model)['clip_score'] == pytest.approx(0, abs=0.1)
  model.params = {'shift': jnp.int32(0)}
  assert evaluator(guidance=2.0)(model)['clip_score'] == pytest.approx(100, abs=0.1)


def test_a_judge_that_knows_no_texts_compares_features_and_one_without_is_refused():
  assert set(evaluator(count=9)(subject({'features': (colour_of,)}))) == {'fid', 'kid', 'precision', 'recall'}
  with pytest.raises(UserError, match='runs/clip has no features; its outputs are logits'):
    evaluator().prepare(subject({'logits': (colour_of,)}))
  with pytest.raises(UserError, match='does not generate images; its outputs are features'):
    evaluator()(dataclasses.replace(subject({}), outputs={'features': Output(colour_of)}))
  with pytest.raises(ValueError, match='count: expected at least 4, got 1'):
    evaluator(count=1)


def test_a_judge_is_opened_once_and_resizes_what_does_not_fit():
  model, opened = subject({'features': (colour_of,)}), []
  reopen = model.reopen
  model.reopen = lambda workdir: opened.append(workdir) or reopen(workdir)
  for size in (4, 8):
    pictures = np.full((3, size, size, 3), [255, 0, 0], np.uint8)
    np.testing.assert_allclose(FeatureExtractor(model, 'runs/a', 8)(pictures), [[1, 0, 0]] * 3, atol=1e-6)
  assert opened == ['runs/a']


def test_spaced_records_come_from_all_of_a_sorted_source():
  spaced = evenly_spaced(Colours(), 10)
  assert [spaced[i]['image'].min() for i in range(10)] == [i * 29 // 10 for i in range(10)]
  assert len(evenly_spaced(Colours(), 99)) == 29
  assert spaced.names == Colours().names


@pytest.mark.slow
def test_a_run_tells_the_distances_of_its_pictures_and_a_judge_that_is_not_there_stops_it_at_once(tmp_path):
  folder = runs.image_folder(tmp_path / 'images')
  (tmp_path / 'judge').mkdir()
  judge = runs.untrained(runs.contrastive(folder), tmp_path / 'judge')
  config = runs.class_painter(folder, train__steps=1, optimizer__schedule__warmup_steps=0)
  real = {'source': config['data']['source'], 'image': {'name': 'resize', 'size': 16}}
  spec = {
    'name': 'generation',
    'feature_extractor': str(judge),
    'count': 20,
    'steps': 2,
    'batch_size': 8,
    'guidance': 2.0,
    'data': real,
  }
  trainer.train(experiment.resolve({**config, 'evaluators': {'made': spec}}), tmp_path / 'run')
  rows = read_metrics(epath.Path(tmp_path / 'run' / 'metrics.jsonl'))
  told = {name: value for row in rows for name, value in row.items() if name.startswith('made/')}
  assert {name.removeprefix('made/') for name in told} == {'fid', 'kid', 'precision', 'recall', 'cmmd'}
  assert np.isfinite(list(told.values())).all()

  spec['feature_extractor'] = str(tmp_path / 'nowhere')
  with pytest.raises(UserError, match='nowhere: no run here'):
    trainer.train(experiment.resolve({**config, 'evaluators': {'made': spec}}), tmp_path / 'other')
  assert not read_metrics(epath.Path(tmp_path / 'other' / 'metrics.jsonl'))
