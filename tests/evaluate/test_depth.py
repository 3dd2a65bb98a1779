import jax.numpy as jnp
import numpy as np
import pytest

from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.data.sources.base import Source
from fmcv_jax.errors import UserError
from fmcv_jax.evaluate.base import EvaluatedModel
from fmcv_jax.evaluate.depth import Depth, depth_errors
from fmcv_jax.objectives.outputs import Output
from fmcv_jax.parallel.mesh import MeshShape, make_mesh
from fmcv_jax.parallel.rules import Placement


class Rooms(Source):
  """Ten images of noise and depths from 1 to 9 m, of which the first has none."""

  def __len__(self):
    return 10

  def __getitem__(self, index):
    rng = np.random.default_rng(index)
    depth = rng.uniform(1, 9, (8, 8)).astype(np.float32)
    depth[:2] = 0
    if index == 0:
      depth[:] = 0
    return {'image': rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), 'depth': depth, 'key': str(index)}


def subject(name, answer):
  """A model whose output `name` is answer(the true depth)."""
  placement = Placement(make_mesh(MeshShape(data=4, fsdp=2)))
  output = Output(lambda p, e, batch: answer(batch['depth']), 'map', ('depth',))
  return EvaluatedModel({name: output}, placement, params={}, extra={})


def scores(name, answer, **options):
  evaluator = Depth(Pipeline(Rooms()), batch_size=8, **options)
  model = subject(name, answer)
  evaluator.prepare(model)
  return evaluator(model)


def test_errors_by_hand():
  found, truth = np.array([1.0, 2.0, 4.0, 10.0]), np.array([1.0, 1.0, 5.0, 2.0])
  expected = {
    'abs_rel': (0 + 1 + 0.2 + 4) / 4,
    'rmse': np.sqrt((0 + 1 + 1 + 64) / 4),
    'log10': (0 + np.log10(2) + np.log10(1.25) + np.log10(5)) / 4,
    'delta1': 1 / 4,  # 1.25 itself is not below 1.25
    'delta2': 2 / 4,
    'delta3': 2 / 4,
  }
  assert depth_errors(found, truth) == pytest.approx(expected)


PERFECT = {'abs_rel': 0, 'rmse': 0, 'log10': 0, 'delta1': 1, 'delta2': 1, 'delta3': 1, 'images': 9}


@pytest.mark.parametrize(
  ('name', 'answer', 'alignment'),
  [
    ('depth', lambda depth: depth, 'auto'),
    ('depth', lambda depth: 3 * depth, 'median'),
    ('depth', lambda depth: 3 * depth + 2, 'least_squares'),
    ('inverse_depth', lambda depth: 5 / jnp.maximum(depth, 0.1) + 2, 'auto'),
    ('inverse_depth', lambda depth: 5 / jnp.maximum(depth, 0.1), 'median'),
  ],
)
def test_an_alignment_takes_away_what_is_unknown_and_no_more(name, answer, alignment):
  assert scores(name, answer, alignment=alignment) == pytest.approx(PERFECT, abs=1e-5)


def test_a_scale_is_an_error_without_an_alignment():
  figures = scores('depth', lambda depth: 1.2 * depth)
  assert figures['abs_rel'] == pytest.approx(0.2, rel=1e-5)
  assert figures['log10'] == pytest.approx(np.log10(1.2), rel=1e-4)
  assert figures['delta1'] == 1
  assert scores('depth', lambda depth: 1.3 * depth)['delta1'] == 0


def test_depths_beyond_the_bounds_are_left_out_and_predictions_are_clipped():
  rooms = [Rooms()[index]['depth'] for index in range(1, 10)]
  inside = [depth[(depth >= 2) & (depth <= 5)].astype(np.float64) for depth in rooms]
  expected = np.mean([np.mean(np.abs(5 - depth) / depth) for depth in inside])
  figures = scores('depth', lambda depth: depth * 0 + 100, min_depth=2.0, max_depth=5.0)
  assert figures['abs_rel'] == pytest.approx(expected, rel=1e-6)


def test_what_cannot_be_scored_is_refused():
  with pytest.raises(UserError, match='inverse depth has no unit'):
    scores('inverse_depth', lambda depth: depth, alignment='none')
  with pytest.raises(UserError, match='does not predict depth; its outputs are features'):
    scores('features', lambda depth: depth)
  with pytest.raises(UserError, match='no image has a pixel with a depth from min_depth=20'):
    scores('depth', lambda depth: depth, min_depth=20.0)
