"""Fine-tuning a part: what is frozen stays, what is added merges back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fmcv_jax.decoding.generation import generate
from fmcv_jax.decoding.options import DecodingOptions
from fmcv_jax.errors import UserError
from fmcv_jax.models.backbones.vit import vit
from fmcv_jax.models.multimodal.prefix_lm import paligemma
from fmcv_jax.objectives.adapted import Lora, PartialFineTuning
from fmcv_jax.objectives.language import Language, SpecialIds
from fmcv_jax.objectives.outputs import language_of
from fmcv_jax.parallel.mesh import MeshShape
from fmcv_jax.train.gradients import gradients
from tests.train.tiny import Trainer, batch_of, classification, contrastive

PLAIN = classification(vit('mu/8', image_size=16, num_classes=10, depth=2))
LORA = Lora(rank=3, alpha=6.0, targets=(r'blocks/attention/(query|value)/kernel', 'patch/kernel'))


def test_lora_trains_few_parameters_freezes_the_rest_and_merges_back():
  objective = PartialFineTuning(PLAIN, trainable=('head/.*',), lora=LORA)
  trainer = Trainer(objective, devices=1)
  before = jax.device_get(trainer.state)
  added = 2 * (2 * 3 * (32 + 32)) + 3 * (192 + 32)
  assert sum(x.size for x in jax.tree.leaves(before.params)) == added + 32 * 10 + 10
  assert sum(x.size for x in jax.tree.leaves(before.opt_state)) < 2.1 * (added + 330)
  batch = batch_of(objective)
  np.testing.assert_array_equal(  # `up` is initialized to zero
    objective.outputs()['features'].call(before.params, before.extra, batch),
    PLAIN.outputs()['features'].call(objective.full_params(before.params, before.extra), {}, batch),
  )

  trainer.run([batch] * 3)
  after = jax.device_get(trainer.state)
  jax.tree.map(np.testing.assert_array_equal, after.extra, before.extra)
  merge = objective.full_params(after.params, after.extra)
  kernel, base = (x['blocks']['attention']['query']['kernel'] for x in (merge, before.extra['frozen']))
  low = after.params['lora']['blocks']['attention']['query']['kernel']
  np.testing.assert_allclose(kernel - base, 2 * low['down'] @ low['up'], atol=1e-6)
  assert np.abs(kernel - base).max() > 1e-5
  got = objective.outputs()['logits'].call(after.params, after.extra, batch)
  np.testing.assert_allclose(got, PLAIN.outputs()['logits'].call(merge, {}, batch), atol=1e-6)


def test_gradients_of_low_rank_matrices_follow_from_the_kernels():
  objective = PartialFineTuning(PLAIN, trainable=('head/.*',), lora=LORA)
  params, extra = objective.init(jax.random.key(0))
  draw = np.random.default_rng(0)
  params = jax.tree.map(lambda x: x + 0.3 * draw.normal(size=x.shape).astype(np.float32), params)
  batch, rng = batch_of(objective), jax.random.key(1)
  ours = jax.jit(jax.grad(lambda p: objective.loss(p, batch, rng, extra).value))(params)
  plain = jax.jit(jax.grad(lambda p: PLAIN.loss(p, batch, rng, {}).value))(objective.full_params(params, extra))
  low, gradient = params['lora']['patch']['kernel'], plain['patch']['kernel']
  np.testing.assert_allclose(ours['lora']['patch']['kernel']['down'], 2 * gradient @ low['up'].T, atol=1e-6)
  np.testing.assert_allclose(ours['lora']['patch']['kernel']['up'], 2 * low['down'].T @ gradient, atol=1e-6)
  np.testing.assert_allclose(ours['head']['kernel'], plain['head']['kernel'], atol=1e-6)


def test_texts_of_a_language_model_are_those_of_its_merged_parameters():
  network = paligemma('paligemma_mu', image_size=16, vocab_size=32, length=8)
  plain = Language(network, special=SpecialIds(0, 1, 4))
  objective = PartialFineTuning(plain, trainable=('image_projection/.*',), lora=Lora())
  params, extra = objective.init(jax.random.key(0))
  draw = np.random.default_rng(0)
  params = jax.tree.map(lambda x: x + 0.3 * draw.normal(size=x.shape).astype(np.float32), params)
  images = jnp.asarray(draw.integers(0, 256, (3, 16, 16, 3)), jnp.uint8)
  batch = {'image': images, 'tokens': jnp.tile(jnp.array([2, 7, 4, 0, 0, 0, 0, 0]), (3, 1))}
  options = DecodingOptions(max_tokens=6)
  found = generate(language_of(objective.outputs())(params, extra), batch, options)
  expected = generate(plain.language_model(objective.full_params(params, extra), {}), batch, options)
  np.testing.assert_array_equal(found.tokens, expected.tokens)
  np.testing.assert_allclose(found.log_likelihood, expected.log_likelihood, rtol=1e-5)


def test_patterns_without_a_match_are_named():
  for options, message in [
    ({'trainable': ('heda/.*',)}, r'config.objective.trainable: no parameter matches'),
    ({'lora': Lora(targets=('q',))}, r'config.objective.lora.targets: no parameter matches'),
    ({'lora': Lora(targets=('head/bias',))}, r'head/bias of shape \(10,\) is not a matrix'),
    ({'trainable': ()}, 'no trainable parameters'),
  ]:
    with pytest.raises(UserError, match=message):
      jax.eval_shape(PartialFineTuning(PLAIN, **options).init, jax.random.key(0))


@pytest.mark.slow
def test_a_coupled_objective_stays_exact_in_pieces_and_on_a_mesh():
  objective = PartialFineTuning(contrastive(), trainable=('temperature', '.*/head/kernel'), lora=Lora(rank=2))
  params, extra = objective.init(jax.random.key(0))
  batch, rng = batch_of(objective), jax.random.key(1)
  whole, pieces = (jax.jit(gradients, static_argnums=(0, 5))(objective, params, batch, rng, extra, n) for n in (1, 4))
  np.testing.assert_allclose(whole[0], pieces[0], rtol=1e-5)
  assert float(optax.tree.norm(jax.tree.map(jnp.subtract, whole[3], pieces[3]))) < 1e-4 * optax.tree.norm(whole[3])
  one = Trainer(objective, devices=1).run([batch] * 3)
  eight = Trainer(objective, MeshShape(data=2, fsdp=2, tensor=2), microbatches=2).run([batch] * 3)
  np.testing.assert_allclose(eight, one, rtol=2e-5)
