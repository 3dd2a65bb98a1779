import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fmcv_jax.models.backbones.vit import vit
from fmcv_jax.models.generative.autoencoder import autoencoder
from fmcv_jax.objectives.autoencoder import Autoencoding
from fmcv_jax.parallel.mesh import MeshShape
from tests.train.tiny import Trainer, batch_of


def coder(**changes):
  network = autoencoder(channels=(4, 4), layers=1, latent_channels=2, image_size=8, middle_attention=False)
  options = dict(network=network, discriminator_width=4, discriminator_layers=1)
  return Autoencoding(**{**options, **changes})


def test_training_on_eight_devices_equals_one():
  def objective():
    return coder(adversarial_start=1, perceptual=0.1, features=vit('mu/8', image_size=8))

  batches = [batch_of(objective(), seed) for seed in range(2)]
  trainer = Trainer(objective(), devices=1)
  one = trainer.run(batches)
  eight = Trainer(objective(), MeshShape(data=4, fsdp=2)).run(batches)
  np.testing.assert_allclose(eight, one, rtol=2e-5)
  assert trainer.metrics['adversarial_weight'] > 0


def test_the_discriminator_gradient_has_the_given_weight_and_it_learns_to_tell_real_from_fake():
  """Each network follows its own loss, and the gradient norms at the last layer have the ratio of the weight."""
  objective = coder(adversarial=0.5, kl=0.0)
  params, extra = jax.jit(objective.init)(jax.random.key(0))
  batch = {name: jnp.asarray(x) for name, x in batch_of(objective).items()}

  def gradient(objective):
    return jax.jit(jax.grad(lambda p: objective.loss(p, batch, jax.random.key(1), extra).value))(params)

  both, alone = gradient(objective), gradient(coder(adversarial=1e-12, kl=0.0))
  reconstruction = alone['autoencoder']['conv_out']['kernel']
  adversarial = both['autoencoder']['conv_out']['kernel'] - reconstruction
  assert float(optax.tree.norm(adversarial)) == pytest.approx(0.5 * float(optax.tree.norm(reconstruction)), rel=1e-3)

  def hinge(weights):
    x = objective.normalize(batch['image'].astype(jnp.float32) / 255)
    network = objective.network.bind({'params': params['autoencoder']})
    made = network.decode(network.encode(x).sample(jax.random.split(jax.random.key(1))[1]))
    real, fake = (objective.discriminator.apply({'params': weights}, p) for p in (x, made))
    return 0.5 * (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean())

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
    both['discriminator'],
    jax.jit(jax.grad(hinge))(params['discriminator']),
  )


def test_the_discriminator_waits_for_its_start():
  objective = coder(adversarial_start=5)
  params, extra = jax.jit(objective.init)(jax.random.key(0))
  batch = {name: jnp.asarray(x) for name, x in batch_of(objective).items()}
  loss = jax.jit(lambda steps: objective.loss(params, batch, jax.random.key(1), {**extra, 'steps': steps}))
  early, late = loss(4), loss(5)
  assert float(early.value) == pytest.approx(
    float(early.metrics['reconstruction'].value + 1e-6 * early.metrics['kl'].value), rel=1e-6
  )
  assert float(late.value) != pytest.approx(float(early.value), rel=1e-3)


def test_a_weight_without_features_is_refused():
  with pytest.raises(ValueError, match='perceptual: a weight above 0 requires features'):
    coder(perceptual=1.0)
