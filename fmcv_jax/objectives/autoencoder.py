"""Training of a KL-regularized autoencoder with a PatchGAN discriminator (Esser et al. 2021; Rombach et al. 2022)."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from typing_extensions import override

from fmcv_jax.augment.apply import apply_augments
from fmcv_jax.augment.base import Augment
from fmcv_jax.augment.normalize import Normalize
from fmcv_jax.bounds import NonNegativeFloat, NonNegativeInt, PositiveInt
from fmcv_jax.models.backbones.vit import ViT
from fmcv_jax.models.common.norms import l2_normalize
from fmcv_jax.models.common.patches import patch_features
from fmcv_jax.models.generative.autoencoder import Autoencoder
from fmcv_jax.models.generative.discriminator import PatchDiscriminator
from fmcv_jax.objectives.base import Loss, Objective, mean_loss
from fmcv_jax.objectives.outputs import Batch, Output, Params


@dataclasses.dataclass(frozen=True)
class Autoencoding(Objective):
  """Sum of the L1 error, a perceptual loss, the KL divergence from the standard normal, and an adversarial loss.

  kl                   weight of the KL divergence, which is summed over the latent and divided by the number of values
                       of the image
  adversarial          adversarial loss weight, relative to the gradient of the other losses at the last layer (Esser et
                       al. 2021, eq. 7); 0 for none
  adversarial_start    step at which the adversarial loss starts
  perceptual           weight of the feature distance (LPIPS of Zhang et al. 2018 without learned weights)
  features             vision transformer of the perceptual loss; init_from loads its parameters to 'extra/features'
  features_normalize   normalization that it was trained with
  """

  network: nn.Module
  kl: NonNegativeFloat = 1e-6
  adversarial: NonNegativeFloat = 0.5
  adversarial_start: NonNegativeInt = 0
  discriminator_width: PositiveInt = 64
  discriminator_layers: PositiveInt = 3
  perceptual: NonNegativeFloat = 0.0
  features: nn.Module | None = None
  features_normalize: Normalize = Normalize()
  augment: tuple[Augment, ...] = ()
  normalize: Normalize = Normalize()

  def __post_init__(self) -> None:
    if not isinstance(self.network, Autoencoder):
      raise ValueError('network: autoencoding needs network.name=autoencoder')
    if bool(self.perceptual) != (self.features is not None):
      raise ValueError(
        'perceptual: a weight above 0 requires features, such as features.name=vit, and features require a weight'
      )
    if self.features is not None and not isinstance(self.features, ViT):
      raise ValueError('features: needs a vision transformer, features.name=vit')

  @property
  def discriminator(self) -> PatchDiscriminator:
    """The discriminator, in the dtype of the autoencoder."""
    network: Any = self.network
    return PatchDiscriminator(self.discriminator_width, self.discriminator_layers, network.dtype)

  @property
  @override
  def training_only(self) -> tuple[str, ...]:
    return ('discriminator',) if self.adversarial else ()

  @property
  @override
  def frozen_networks(self) -> tuple[str, ...]:
    return () if self.features is None else ('features',)

  @property
  @override
  def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
    network: Any = self.network
    return {'image': jax.ShapeDtypeStruct(network.input_shape, jnp.uint8)}

  @override
  def init(self, rng: jax.Array) -> tuple[Params, Any]:
    keys = jax.random.split(rng, 3)
    network: Any = self.network
    images = jnp.zeros((1, *network.input_shape))
    params = {'autoencoder': self.network.init(keys[0], images)['params']}
    extra: dict[str, Any] = {'steps': jnp.zeros((), jnp.int32)}
    if self.adversarial:
      params['discriminator'] = self.discriminator.init(keys[1], images)['params']
    if self.features is not None:
      extra['features'] = self.features.init(keys[2], self._for_features(images))['params']
    return params, extra

  @override
  def loss(self, params: Params, batch: Batch, rng: jax.Array, extra: Any) -> Loss:
    augment_rng, latent_rng = jax.random.split(rng)
    x = self.normalize(apply_augments(batch['image'], self.augment, augment_rng))
    network: Any = self.network.bind({'params': params['autoencoder']})
    latent = network.encode(x)
    before = network.features(latent.sample(latent_rng))
    last = params['autoencoder']['conv_out']

    def decoded(last: Any) -> Any:
      return self.network.apply({'params': {**params['autoencoder'], 'conv_out': last}}, before, method='to_rgb')

    def error(image: jax.Array) -> jax.Array:
      value = jnp.abs(x - image).mean()
      return value + self.perceptual * self._distance(extra, x, image) if self.perceptual else value

    fake = decoded(last)
    reconstruction = error(fake)
    divergence = latent.kl().mean() / (x.size / x.shape[0])
    loss = reconstruction + self.kl * divergence
    metrics = {'reconstruction': reconstruction, 'kl': divergence}
    if self.adversarial:
      adversarial, more = self._adversarial(params, extra, x, decoded, fake, error)
      loss += adversarial
      metrics.update(more)
    return mean_loss(loss, metrics)

  def _adversarial(
    self,
    params: Params,
    extra: Any,
    x: jax.Array,
    decoded: Callable[[Any], jax.Array],
    fake: jax.Array,
    error: Callable[[jax.Array], jax.Array],
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(weighted generator loss + discriminator loss, metrics)."""

    def logits(images: jax.Array, weights: Params) -> Any:
      return self.discriminator.apply({'params': weights}, images)

    frozen = jax.lax.stop_gradient(params['discriminator'])

    def generator_loss(image: jax.Array) -> jax.Array:
      return -logits(image, frozen).mean()

    # Gradient norms of both losses at the last layer.
    last = jax.lax.stop_gradient(params['autoencoder']['conv_out'])
    error_norm, generator_norm = (
      optax.tree.norm(jax.grad(lambda last, of=of: of(decoded(last)))(last)['kernel']) for of in (error, generator_loss)
    )
    balance = jax.lax.stop_gradient(jnp.clip(error_norm / (generator_norm + 1e-4), 0, 1e4))
    started = jnp.where(extra['steps'] >= self.adversarial_start, 1.0, 0.0)
    generator = generator_loss(fake)
    on_real, on_fake = (logits(images, params['discriminator']) for images in (x, jax.lax.stop_gradient(fake)))
    discriminator = 0.5 * (jax.nn.relu(1 - on_real).mean() + jax.nn.relu(1 + on_fake).mean())
    metrics = {
      'generator_loss': generator,
      'discriminator_loss': discriminator,
      'adversarial_weight': started * self.adversarial * balance,
    }
    return started * (self.adversarial * balance * generator + discriminator), metrics

  @override
  def update_extra(self, extra: Any, params: Params, aux: Any, step: jax.Array) -> Any:
    return {**extra, 'steps': extra['steps'] + 1}

  def outputs(self) -> Mapping[str, Output]:
    """'latent' [B, h, w, z], the mean of the Gaussian; 'reconstruction' [B, H, W, 3] in [0, 1], decoded from it."""

    def latent(params: Params, extra: Any, batch: Batch) -> jax.Array:
      x = self.normalize(batch['image'].astype(jnp.float32) / 255)
      gaussian: Any = self.network.apply({'params': params['autoencoder']}, x, method='encode')
      return gaussian.mean

    def reconstruction(params: Params, extra: Any, batch: Batch) -> jax.Array:
      z = latent(params, extra, batch)
      image: Any = self.network.apply({'params': params['autoencoder']}, z, method='decode')
      return jnp.clip(self.normalize.undo(image), 0, 1)

    return {'latent': Output(latent, 'map'), 'reconstruction': Output(reconstruction, 'image')}

  def _for_features(self, x: jax.Array) -> jax.Array:
    features: Any = self.features
    shape = (x.shape[0], *features.input_shape)
    images = self.normalize.undo(x)
    return self.features_normalize(images if images.shape == shape else jax.image.resize(images, shape, 'cubic'))

  def _distance(self, extra: Any, x: jax.Array, reconstruction: jax.Array) -> jax.Array:
    """Mean squared distance between the unit-length patch features of both images."""
    one, other = (
      l2_normalize(patch_features(self.features, extra['features'], self._for_features(images)))  # type: ignore[arg-type]
      for images in (x, reconstruction)
    )
    return jnp.square(one - other).sum(-1).mean()
