"""Losses whose examples weigh differently are the same in any number of microbatches and on any number of devices."""

import dataclasses
import itertools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fmcv_jax.errors import UserError
from fmcv_jax.models.backbones.vit import vit
from fmcv_jax.models.dense.segmenter import segmenter
from fmcv_jax.objectives.base import Loss, Mean, Objective, mean_loss
from fmcv_jax.objectives.segmentation import IGNORE_INDEX, Segmentation
from fmcv_jax.parallel.mesh import MeshShape, make_mesh
from fmcv_jax.parallel.rules import Placement
from fmcv_jax.train import step as step_lib
from fmcv_jax.train.gradients import gradients
from tests.train.tiny import Trainer, batch_of, classification

BATCH = 32


@dataclasses.dataclass(frozen=True)
class Captioner(Objective):
  """Next tokens of a text of given length, by a table of bigrams."""

  @property
  def example_batch(self):
    return {'tokens': jax.ShapeDtypeStruct((9,), jnp.int32), 'length': jax.ShapeDtypeStruct((), jnp.int32)}

  def init(self, rng):
    return {'table': jax.random.normal(rng, (16, 16))}, {}

  def loss(self, params, batch, rng, extra):
    tokens, after = batch['tokens'][:, :-1], batch['tokens'][:, 1:]
    given = jnp.arange(8) < batch['length'][:, None]
    logits = params['table'][tokens]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, after)
    count, right = given.sum(dtype=jnp.float32), (logits.argmax(-1) == after).sum(where=given, dtype=jnp.float32)
    return Loss(losses.sum(where=given), count, {'accuracy': Mean(right, count)}, {})


@dataclasses.dataclass(frozen=True)
class Detector(Objective):
  """L1 distance of the boxes of an image from those of a linear layer, per box that there is."""

  @property
  def example_batch(self):
    return {
      'features': jax.ShapeDtypeStruct((6,), jnp.float32),
      'boxes': jax.ShapeDtypeStruct((5, 4), jnp.float32),
      'boxes_count': jax.ShapeDtypeStruct((), jnp.int32),
    }

  def init(self, rng):
    return nn.Dense(20).init(rng, jnp.zeros((1, 6)))['params'], {}

  def loss(self, params, batch, rng, extra):
    found = nn.Dense(20).apply({'params': params}, batch['features']).reshape(-1, 5, 4)
    there = jnp.arange(5) < batch['boxes_count'][:, None]
    distance = jnp.abs(found - batch['boxes']).mean(-1).sum(where=there)
    # A metric whose weight is not the loss's: of images that have a box.
    some = there.any(axis=1)
    first = jnp.abs(found - batch['boxes'])[:, 0].mean(-1).sum(where=some)
    return Loss(distance, there.sum(dtype=jnp.float32), {'first': Mean(first, some.sum(dtype=jnp.float32))}, {})


def captions():
  draw = np.random.default_rng(0)
  batch = {'tokens': draw.integers(0, 16, (BATCH, 9)), 'length': draw.integers(0, 9, BATCH)}
  return Captioner(), {name: x.astype(np.int32) for name, x in batch.items()}


def boxes():
  draw = np.random.default_rng(0)
  batch = {'features': draw.normal(size=(BATCH, 6)), 'boxes': draw.uniform(size=(BATCH, 5, 4))}
  batch = {name: x.astype(np.float32) for name, x in batch.items()}
  return Detector(), {
    **batch,
    'boxes_count': (draw.integers(0, 6, BATCH) * (np.arange(BATCH) % 4 != 1)).astype(np.int32),
  }


def segments():
  draw = np.random.default_rng(0)
  batch = {'image': draw.integers(0, 256, (BATCH, 8, 8, 3)), 'segments': draw.integers(0, 3, (BATCH, 8, 8))}
  batch = {name: x.astype(np.uint8) for name, x in batch.items()}
  for image in range(BATCH):
    batch['segments'][image, : image % 4 * 2 + image // 16] = IGNORE_INDEX
  return Segmentation(segmenter(vit('mu/8', image_size=8, depth=1), 3)), batch


@pytest.mark.parametrize('problem', [captions, boxes, segments])
def test_loss_metrics_and_gradient_are_those_of_the_whole_batch(problem):
  objective, batch = problem()
  params, extra = jax.jit(objective.init)(jax.random.key(0))
  params = jax.tree.map(lambda x: x + 0.1 * np.random.default_rng(x.size).normal(size=x.shape).astype(x.dtype), params)

  def run(devices, microbatches):
    placement = Placement(make_mesh(MeshShape(), jax.devices()[:devices]))

    def call(params, batch):
      with placement.active():
        return gradients(objective, params, batch, jax.random.key(1), extra, microbatches)

    placed = jax.device_put(batch, placement.batch(batch))
    loss, metrics, _, gradient = jax.jit(call)(jax.device_put(params, placement.replicated()), placed)
    return jax.device_get({'loss': loss, 'metrics': metrics, 'gradient': gradient})

  whole = run(1, 1)
  assert max(abs(x).max() for x in jax.tree.leaves(whole['gradient'])) > 1e-2
  for devices, microbatches in ((1, 2), (1, 4), (8, 1), (8, 2), (8, 4)):
    chex.assert_trees_all_close(run(devices, microbatches), whole, rtol=1e-5, atol=1e-6)


def test_the_captioners_loss_is_the_mean_over_its_tokens():
  objective, batch = captions()
  params, _ = objective.init(jax.random.key(0))
  table = np.asarray(params['table'], np.float64)
  losses = []
  for text, length in zip(batch['tokens'], batch['length'], strict=True):
    losses += [np.log(np.exp(table[a]).sum()) - table[a, b] for a, b in itertools.pairwise(text[: length + 1])]
  for microbatches in (1, 4):
    loss = jax.jit(lambda n=microbatches: gradients(objective, params, batch, jax.random.key(1), {}, n)[0])()
    assert float(loss) == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize('microbatches', [1, 2])
def test_a_batch_of_zero_weights_has_zero_loss_and_gradient(microbatches):
  objective, batch = captions()
  params, _ = objective.init(jax.random.key(0))
  batch['length'][:] = 0
  loss, metrics, _, gradient = jax.jit(
    lambda: gradients(objective, params, batch, jax.random.key(1), {}, microbatches)
  )()
  assert (float(loss), float(metrics['accuracy']), float(jnp.abs(gradient['table']).max())) == (0, 0, 0)


def test_a_mean_over_examples_is_bitwise_that_of_numpys_namesake():
  """Of 49 values, whose sum times 1/49 would differ; so is its gradient."""
  x = jnp.asarray(np.random.default_rng(0).normal(size=49), jnp.float32)
  ours = jax.jit(jax.value_and_grad(lambda x: mean_loss(jnp.sin(x)).value))(x)
  chex.assert_trees_all_equal(ours, jax.jit(jax.value_and_grad(lambda x: jnp.sin(x).mean()))(x))
  loss = mean_loss(x, {'positive': x > 0, 'first': x[0]})
  assert float(loss.metrics['positive'].value) == pytest.approx((np.asarray(x) > 0).mean())
  assert float(loss.metrics['first'].value) == float(x[0])
  assert (float(loss.weight), float(loss.metrics['first'].weight)) == (49, 1)


@pytest.mark.parametrize(
  ('returned', 'error', 'message'),
  [
    ((jnp.float32(1), ({}, {})), UserError, r'objective.loss: expected a Loss .* got a tuple'),
    (Loss(jnp.ones(3), jnp.float32(3), {}, {}), AssertionError, 'totals and weights are scalars'),
    (Loss(jnp.float32(1), jnp.int32(3), {}, {}), AssertionError, 'totals and weights are float32'),
  ],
)
def test_what_is_not_a_loss_is_refused(monkeypatch, returned, error, message):
  objective, batch = captions()
  monkeypatch.setattr(Captioner, 'loss', lambda *args: returned)
  for microbatches in (1, 2):
    with pytest.raises(error, match=message):
      gradients(objective, objective.init(jax.random.key(0))[0], batch, jax.random.key(1), {}, microbatches)


def test_a_step_is_traced_once_and_a_second_trace_would_be_counted(monkeypatch):
  objective = classification(vit('mu/8', image_size=16, num_classes=10, depth=1))
  chex.clear_trace_counter()
  monkeypatch.setattr(step_lib, 'gradients', chex.assert_max_traces(step_lib.gradients, n=1))
  trainer = Trainer(objective, ema=0.9, microbatches=2)
  trainer.run([batch_of(objective, seed) for seed in range(4)])
  half = {name: x[:8] for name, x in batch_of(objective).items()}
  with pytest.raises(AssertionError, match='traced > 1 times'):
    Trainer.run(trainer, [half, half])


@dataclasses.dataclass(frozen=True)
class Growing(Captioner):
  """Its count is an int32 at first and a float32 after a step."""

  def init(self, rng):
    return super().init(rng)[0], {'count': jnp.int32(0)}

  def update_extra(self, extra, params, aux, step):
    return {'count': extra['count'] + 0.5}


def test_a_state_that_changes_its_structure_is_refused():
  placement = Placement(make_mesh(MeshShape(), jax.devices()[:1]))
  objective, batch = captions()
  objective, tx = Growing(), optax.sgd(0.1)
  state = step_lib.TrainState(
    *(jnp.int32(0),) * 3, jax.random.key_data(jax.random.key(0)), *_trained(objective, tx), None
  )
  shardings = jax.tree.map(lambda _: placement.replicated(), state)
  step = step_lib.make_train_step(
    objective, tx, optax.constant_schedule(0.1), placement, shardings, placement.batch(batch)
  )
  with pytest.raises(AssertionError, match='count'):
    step.trace(state, batch)


def _trained(objective, tx):
  params, extra = objective.init(jax.random.key(0))
  return params, tx.init(params), extra
