"""Losses against closed forms and against the definitions written another way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmcv_jax.augment.mixing import mix
from fmcv_jax.models.backbones.vit import vit
from fmcv_jax.objectives.classification import Classification
from fmcv_jax.objectives.contrastive import Contrastive
from tests.train.tiny import batch_of, classification, contrastive


def test_sigmoid_starts_near_the_papers_value():
  """With t = 10 and b = -10 and random embeddings nearly every negative is free and each positive costs about 10."""
  objective = contrastive('sigmoid')
  params, extra = objective.init(jax.random.key(0))
  loss = objective.loss(params, batch_of(objective), jax.random.key(1), extra)
  assert 5 < float(loss.value) < 15
  assert float(loss.metrics['logit_scale'].value) == pytest.approx(10, rel=1e-6)
  assert float(loss.metrics['logit_bias'].value) == -10


def test_temperature_is_learned_and_clipped_at_one_hundred():
  objective = contrastive()
  params, extra = objective.init(jax.random.key(0))
  gradient = jax.grad(lambda p: objective.loss(p, batch_of(objective), jax.random.key(1), extra).value)(params)
  assert abs(float(gradient['temperature'])) > 1e-4
  params['temperature'] = jnp.float32(50.0)
  loss = objective.loss(params, batch_of(objective), jax.random.key(1), extra)
  assert float(loss.metrics['logit_scale'].value) == pytest.approx(100, rel=1e-5)


def test_patch_dropping_uses_fewer_tokens_in_training_only():
  whole, half = contrastive(), contrastive(patch_keep_ratio=0.5)
  params, extra = whole.init(jax.random.key(0))
  batch = batch_of(whole)
  losses = [float(o.loss(params, batch, jax.random.key(1), extra).value) for o in (whole, half)]
  assert losses[0] != losses[1]
  embeddings = [o.outputs()['embed_image'].call(params, extra, batch) for o in (whole, half)]
  np.testing.assert_array_equal(*embeddings)


def test_classifier_with_a_zero_head_starts_at_log_classes():
  objective = classification(label_smoothing=0.1)
  params, extra = objective.init(jax.random.key(0))
  loss = objective.loss(params, batch_of(objective), jax.random.key(1), extra)
  assert float(loss.value) == pytest.approx(np.log(10), rel=1e-6)
  sigmoid = classification(loss_name='sigmoid')
  assert float(sigmoid.loss(params, batch_of(objective), jax.random.key(1), extra).value) == pytest.approx(
    10 * np.log(2)
  )


@pytest.mark.parametrize(('mixup', 'cutmix'), [(0.4, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixed_labels_have_the_fraction_of_the_pixels(mixup, cutmix):
  """Image i is filled with i: what is left of it, in pixels, is the weight of its label."""
  count = 6
  images = jnp.broadcast_to(jnp.arange(count, dtype=jnp.float32)[:, None, None, None], (count, 16, 16, 3))
  targets = jnp.eye(count)
  shares = set()
  for seed in range(12):
    mixed, labels = mix(images, targets, jax.random.key(seed), mixup=mixup, cutmix=cutmix)
    np.testing.assert_allclose(labels.sum(1), 1, rtol=1e-6)
    expected = labels @ jnp.arange(count, dtype=jnp.float32)
    np.testing.assert_allclose(np.asarray(mixed, np.float64).mean((1, 2, 3)), expected, atol=2e-6)
    if not mixup:  # a pasted box copies pixels whole
      own = (mixed == images) | (mixed == images[::-1])
      assert bool(own.all())
    shares.add(round(float(labels[0, 0]), 4))
  assert len(shares) > 4


def test_no_mixing_is_the_identity():
  images, targets = jnp.ones((2, 4, 4, 3)), jnp.eye(2)
  assert mix(images, targets, jax.random.key(0), mixup=0, cutmix=0) == (images, targets)


def test_unfit_networks_are_refused():
  with pytest.raises(ValueError, match='num_classes=<number of classes>'):
    Classification(vit('mu/8', image_size=16))
  with pytest.raises(ValueError, match='needs a dual encoder'):
    Contrastive(vit('mu/8', image_size=16))
