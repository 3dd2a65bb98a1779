import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fmcv_jax.errors import UserError
from fmcv_jax.train.layer_decay import layerwise_lr_scales
from fmcv_jax.train.optim import Adafactor, AdamW, Lamb, Lion, Muon, Optimizer
from fmcv_jax.train.schedules import Cosine, Linear, Rsqrt


@pytest.mark.parametrize('kind', [Cosine, Linear])
def test_schedule_warms_up_from_its_first_step_to_the_peak_and_decays_to_its_end(kind):
  schedule = kind(peak_lr=1.0, warmup_steps=10, end=0.1)(110)
  rates = np.array([float(schedule(step)) for step in range(111)])
  np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10, rtol=1e-6)
  assert rates[10] == pytest.approx(1.0)
  assert rates[110] == pytest.approx(0.1)
  assert rates[60] == pytest.approx(0.55)
  assert (np.diff(rates[10:]) < 0).all()


def test_rsqrt_follows_its_formula_and_cools_down_to_zero():
  schedule = Rsqrt(peak_lr=2.0, warmup_steps=5, timescale=100, cooldown_steps=20)(205)
  assert float(schedule(5 + 100)) == pytest.approx(2 / np.sqrt(2), rel=1e-6)
  assert float(schedule(5 + 190)) == pytest.approx(2 / np.sqrt(2.9) * 0.5, rel=1e-6)
  assert float(schedule(205)) == 0


def test_schedule_without_room_for_its_warm_up_is_refused():
  with pytest.raises(ValueError, match='warmup_steps 10 must be smaller than the number of steps, 10'):
    Cosine(1.0, warmup_steps=10)(10)


PARAMS = {
  'blocks': {'mlp': {'up': {'kernel': jnp.ones((2, 4, 6)), 'bias': jnp.ones((2, 6))}}},
  'norm': {'scale': jnp.ones((4,))},
}


@pytest.mark.parametrize('rule', [AdamW(), Lion(), Adafactor(), Muon()], ids=lambda r: type(r).__name__)
def test_weight_decay_shrinks_kernels_only(rule):
  tx = Optimizer(Linear(peak_lr=0.5, end=0.5), rule, weight_decay=0.2).make(10)
  zero = jax.tree.map(jnp.zeros_like, PARAMS)
  updates, _ = tx.update(zero, tx.init(PARAMS), PARAMS)
  np.testing.assert_allclose(updates['blocks']['mlp']['up']['kernel'], -0.1, atol=1e-6)
  np.testing.assert_array_equal(updates['blocks']['mlp']['up']['bias'], 0)
  np.testing.assert_array_equal(updates['norm']['scale'], 0)


@pytest.mark.parametrize('rule', [AdamW(), Lion(), Adafactor(), Muon()], ids=lambda r: type(r).__name__)
def test_weight_decay_follows_half_a_cosine_to_its_end(rule):
  tx = Optimizer(Linear(peak_lr=1.0, end=1.0), rule, weight_decay=0.04, weight_decay_end=0.4).make(10)
  zero, state, shrunk = jax.tree.map(jnp.zeros_like, PARAMS), tx.init(PARAMS), []
  for _ in range(11):
    updates, state = tx.update(zero, state, PARAMS)
    shrunk.append(-float(updates['blocks']['mlp']['up']['kernel'][0, 0, 0]))
  np.testing.assert_allclose(shrunk[::5], [0.04, 0.22, 0.4], rtol=1e-5)
  assert (np.diff(shrunk) > 0).all()


def test_each_layer_of_a_stack_has_its_own_learning_rate():
  generator = np.random.default_rng(0)
  shapes = {
    'patch': {'kernel': (4, 3)},
    'class_token': (1, 3),
    'blocks': {'mlp': {'up': {'kernel': (2, 3, 4)}}},
    'head': {'kernel': (3, 2)},
  }
  params = jax.tree.map(lambda s: jnp.asarray(generator.normal(size=s)), shapes, is_leaf=lambda s: isinstance(s, tuple))
  optimizer = Optimizer(
    Linear(0.1, end=0.1), weight_decay=0.3, layer_decay=0.5, lr_multipliers=(('patch/.*', 0.2),), clip_norm=1e9
  )
  ours = optimizer.make(10)

  def cut(tree):  # each with its rate by hand: two layers, so the stem is three steps below the head
    up = tree['blocks']['mlp']['up']['kernel']
    return [tree['patch']['kernel'], tree['class_token'], up[0], up[1], tree['head']['kernel']]

  rates = [0.1 * 0.125 * 0.2, 0.1 * 0.125, 0.1 * 0.25, 0.1 * 0.5, 0.1]
  alone = cut(params)
  rules = [optax.adamw(rate, weight_decay=0 if index == 1 else 0.3) for index, rate in enumerate(rates)]
  state, states = ours.init(params), [rule.init(x) for rule, x in zip(rules, alone, strict=True)]
  for _ in range(3):
    gradient = jax.tree.map(lambda x: jnp.asarray(generator.normal(size=x.shape), x.dtype), params)
    updates, state = ours.update(gradient, state, params)
    params = optax.apply_updates(params, updates)
    for index, g in enumerate(cut(gradient)):
      update, states[index] = rules[index].update(g, states[index], alone[index])
      alone[index] = optax.apply_updates(alone[index], update)
  for a, b in zip(cut(params), alone, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_layers_are_counted_tower_by_tower_and_stage_by_stage():
  x = {'a': np.zeros((2, 3))}
  stages = {'patch': x, 'stage1': {'blocks': x}, 'stage2': {'merge': x, 'blocks': x}, 'norm': x}
  rates = layerwise_lr_scales({'image': stages, 'text': {'tokens': x, 'blocks': x}, 'temperature': np.zeros(())}, 0.5)
  image, text = rates['image'], rates['text']
  assert float(image['patch']['a']) == 0.5**5
  np.testing.assert_array_equal(image['stage1']['blocks']['a'][:, 0], [0.5**4, 0.5**3])
  assert float(image['stage2']['merge']['a']) == 0.5**2
  np.testing.assert_array_equal(image['stage2']['blocks']['a'][:, 0], [0.5**2, 0.5])
  assert float(image['norm']['a']) == float(rates['temperature']) == 1
  assert float(text['tokens']['a']) == 0.5**3
  with pytest.raises(UserError, match='layer_decay: this network has no stack of blocks'):
    layerwise_lr_scales({'conv': x}, 0.5)


def test_lamb_of_stacked_layers_equals_optaxs_of_each_alone():
  generator = np.random.default_rng(0)
  params = {
    'blocks': {'kernel': generator.normal(size=(2, 3, 4)), 'bias': generator.normal(size=(2, 4))},
    'head': {'kernel': generator.normal(size=(4, 5))},
  }
  params = jax.tree.map(jnp.asarray, params)
  ours = Optimizer(Linear(0.1, end=0.1), Lamb(), weight_decay=0.3).make(10)
  lamb, adam = optax.lamb(0.1, weight_decay=0.3), optax.adam(0.1, eps=1e-6)
  alone = [params['blocks']['kernel'][0], params['blocks']['kernel'][1], params['head']['kernel']]
  state, lambs, adams = ours.init(params), lamb.init(alone), adam.init(params['blocks']['bias'])
  for _ in range(3):
    gradient = jax.tree.map(lambda x: jnp.asarray(generator.normal(size=x.shape), x.dtype), params)
    updates, state = ours.update(gradient, state, params)
    pieces = [gradient['blocks']['kernel'][0], gradient['blocks']['kernel'][1], gradient['head']['kernel']]
    expected, lambs = lamb.update(pieces, lambs, alone)
    bias, adams = adam.update(gradient['blocks']['bias'], adams)
    got = [updates['blocks']['kernel'][0], updates['blocks']['kernel'][1], updates['head']['kernel']]
    for a, b in zip([*got, updates['blocks']['bias']], [*expected, bias], strict=True):
      np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7)
    params, alone = optax.apply_updates(params, updates), optax.apply_updates(alone, expected)


def test_adamw_equals_optax_and_lion_takes_signs():
  gradient = jax.tree.map(lambda x: jnp.linspace(-1, 1, x.size).reshape(x.shape), PARAMS)
  tx = Optimizer(Linear(peak_lr=0.1, end=0.1), AdamW(b2=0.95)).make(10)
  reference = optax.adamw(0.1, b2=0.95, weight_decay=0)
  ours, theirs = (t.update(gradient, t.init(PARAMS), PARAMS)[0] for t in (tx, reference))
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)
  tx = Optimizer(Linear(peak_lr=0.1, end=0.1), Lion()).make(10)
  updates, _ = tx.update(gradient, tx.init(PARAMS), PARAMS)
  np.testing.assert_allclose(updates['norm']['scale'], -0.1 * np.sign(gradient['norm']['scale']), rtol=1e-6)


def test_muon_orthogonalizes_each_layers_matrix_at_the_stated_size():
  gradient = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), PARAMS)
  tx = Optimizer(Linear(peak_lr=1.0, end=1.0), Muon(ns_steps=10)).make(10)
  updates, _ = tx.update(gradient, tx.init(PARAMS), PARAMS)
  kernel = np.asarray(updates['blocks']['mlp']['up']['kernel'])
  for layer in kernel:
    singular = np.linalg.svd(layer, compute_uv=False)
    # Newton-Schulz with Muon's coefficients brings every singular value near 1 (within 0.7 to 1.2), times the scale.
    scale = 0.2 * np.sqrt(6)
    assert (singular > 0.65 * scale).all()
    assert (singular < 1.25 * scale).all()
