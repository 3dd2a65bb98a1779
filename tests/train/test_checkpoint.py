"""What is kept, what comes back, and what a damaged or foreign checkpoint says."""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmcv_jax.errors import UserError
from fmcv_jax.models.common.layers import HEAD_AXES
from fmcv_jax.parallel.mesh import MeshShape, make_mesh
from fmcv_jax.parallel.rules import Placement
from fmcv_jax.train.checkpoint import Checkpointer, Checkpointing
from fmcv_jax.train.state import TrainState, state_shardings

ROWS = {'a head': HEAD_AXES}


def state_at(step, *, ema=True, extra=None, width=16):
  params = {'head': {'kernel': jnp.arange(8.0 * width).reshape(8, width) + step, 'bias': jnp.zeros(width)}}
  return TrainState(
    step=jnp.int32(step),
    skipped=jnp.int32(1),
    streak=jnp.int32(0),
    rng=jnp.array([1, 2], jnp.uint32),
    params=params,
    opt_state=({'mu': params},),
    extra=extra or {},
    ema=jax.tree.map(lambda x: x / 2, params) if ema else None,
  )


def restore(store, like, step=None, mesh=MeshShape()):
  abstract = jax.eval_shape(lambda: like)
  return store.restore(abstract, state_shardings(abstract, Placement(make_mesh(mesh)), ROWS), step)


@pytest.fixture
def store(tmp_path):
  store = Checkpointer(tmp_path, Checkpointing(keep=2, best='val/top1'))
  for step, metric in ((1, 0.1), (2, 0.9), (3, math.nan), (4, None), (5, 0.2)):
    store.save(state_at(step), {'data': {'examples': 10 * step}})
    if metric is not None:
      store.record(step, {'val/top1': metric})
  store.wait()
  yield store
  store.close()


def test_newest_two_and_the_best_are_kept(store):
  assert [p.name for p in sorted(store.directory.iterdir()) if p.name.isdigit()] == ['2', '4', '5']
  assert (store.latest(), store.best()) == (5, 2)


def test_the_best_is_remembered_by_the_next_process_and_another_evaluator_changes_nothing(store, tmp_path):
  store.record(5, {'other/top1': 2.0})
  again = Checkpointer(tmp_path, Checkpointing(keep=1, best='val/top1'))
  again.save(state_at(6), {})
  again.wait()
  assert (again.best(), again.steps()) == (2, [2, 6])
  again.close()


def test_a_best_metric_that_its_evaluator_does_not_give_names_the_nearest(store):
  with pytest.raises(UserError, match=r"config.checkpoint.best: no metric 'val/top1'; did you mean 'val/top5'"):
    store.record(5, {'val/top5': 0.5})


@pytest.mark.parametrize('extra', [None, {'center': jnp.arange(3.0)}])
@pytest.mark.parametrize('ema', [True, False])
def test_state_comes_back_bitwise_on_another_mesh_with_its_run(tmp_path, ema, extra):
  state = state_at(7, ema=ema, extra=extra)
  with_store = Checkpointer(tmp_path)
  with_store.save(state, {'data': {'examples': 3}})
  with_store.wait()
  restored, run = restore(with_store, state, mesh=MeshShape(data=2, fsdp=4))
  with_store.close()
  assert run == {'data': {'examples': 3}}
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
    np.testing.assert_array_equal(x, y)
  assert restored.params['head']['kernel'].addressable_shards[0].data.shape == (2, 16)


def test_parameters_alone_come_from_the_average(store):
  abstract = jax.eval_shape(lambda: state_at(0))
  shardings = state_shardings(abstract, Placement(make_mesh(MeshShape())), ROWS).params
  target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract.params, shardings)
  params, _ = store.restore_params(target, 4)
  np.testing.assert_array_equal(params['head']['kernel'], state_at(4).ema['head']['kernel'])


def test_a_checkpoint_of_another_network_names_the_parameter(store):
  with pytest.raises(UserError, match=r'params/head/bias is \(16,\) in the checkpoint and \(24,\) in the config'):
    restore(store, state_at(0, width=24))


def test_a_checkpoint_without_an_average_says_so(tmp_path):
  store = Checkpointer(tmp_path)
  store.save(state_at(1, ema=False), {})
  store.wait()
  with pytest.raises(UserError, match="this checkpoint has no 'ema'; was it saved with another config"):
    restore(store, state_at(1))
  store.close()


def test_a_missing_step_lists_those_that_are_there(store):
  with pytest.raises(UserError, match='no checkpoint of step 3; steps there: 2, 4, 5'):
    restore(store, state_at(0), step=3)


def test_workdir_without_checkpoints_says_so(tmp_path):
  with pytest.raises(UserError, match='holds no checkpoints'):
    Checkpointer(tmp_path, create=False)


def damage(folder, kind):
  """Harms one file of parameters of a checkpoint; returns its name."""
  file = max((folder / 'params' / 'ocdbt.process_0' / 'd').iterdir(), key=lambda path: path.stat().st_size)
  data = bytearray(file.read_bytes())
  if kind == 'missing':
    file.unlink()
  elif kind == 'truncated':
    file.write_bytes(data[:-1])
  else:
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
  return file.name


@pytest.mark.parametrize(
  ('kind', 'message'),
  [('missing', 'is missing'), ('truncated', r'has \d+ bytes of'), ('flipped', 'has changed since it was written')],
)
def test_a_damaged_step_is_named_set_aside_and_the_one_before_is_taken(store, kind, message):
  name = damage(pathlib.Path(store.directory / '5'), kind)
  with pytest.raises(UserError, match=rf'checkpoints/5: damaged: params/.*{name} {message}'):
    restore(store, state_at(0), step=5)
  abstract, reports = jax.eval_shape(lambda: state_at(0)), []
  shardings = state_shardings(abstract, Placement(make_mesh(MeshShape())), ROWS)
  state, run = store.restore_newest(abstract, shardings, reports.append)
  assert (int(state.step), run['data']) == (4, {'examples': 40})
  assert len(reports) == 1
  assert name in reports[0]
  assert len(list(pathlib.Path(store.directory.parent / 'damaged').glob('5-*'))) == 1
  store.save(state_at(5), {'data': {}})  # recomputed
  store.wait()
  assert store.restore_newest(abstract, shardings, reports.append)[0].step == 5
  assert len(reports) == 1


def test_a_workdir_with_damaged_steps_only_says_so(tmp_path):
  store = Checkpointer(tmp_path)
  store.save(state_at(1), {'data': {}})
  store.wait()
  damage(pathlib.Path(store.directory / '1'), 'flipped')
  abstract = jax.eval_shape(lambda: state_at(0))
  with pytest.raises(UserError, match='no complete checkpoint is left'):
    store.restore_newest(abstract, state_shardings(abstract, Placement(make_mesh(MeshShape())), ROWS), lambda _: None)
  store.close()
