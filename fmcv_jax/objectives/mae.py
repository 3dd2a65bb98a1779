"""Masked autoencoding (He et al. 2022): predicts the pixels of masked patches from the visible ones."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from typing_extensions import override

from fmcv_jax.augment.apply import apply_augments
from fmcv_jax.augment.base import Augment
from fmcv_jax.augment.normalize import Normalize
from fmcv_jax.bounds import OpenFraction
from fmcv_jax.models.common.patches import patchify, unpatchify
from fmcv_jax.models.self_supervised.mae import MaskedAutoencoder
from fmcv_jax.objectives.base import Loss, Objective, image_field, mean_loss
from fmcv_jax.objectives.outputs import Batch, ImageEncoder, Output, Params, encoder_outputs


@dataclasses.dataclass(frozen=True)
class MaskedAutoencoding(Objective):
  """Mean squared error on the masked patches; masks are drawn per image at each step.

  mask_ratio     fraction of masked patches
  norm_pix_loss  normalize each target patch by its mean and standard deviation
  """

  network: nn.Module
  mask_ratio: OpenFraction = 0.75
  norm_pix_loss: bool = True
  augment: tuple[Augment, ...] = ()
  normalize: Normalize = Normalize()

  def __post_init__(self) -> None:
    if not isinstance(self.network, MaskedAutoencoder):
      raise ValueError('network: masked autoencoding needs network.name=mae')
    if not 0 < self.visible < self.patches:
      raise ValueError(
        f'mask_ratio: {self.mask_ratio} of {self.patches} patches leaves no visible or no masked patches'
      )

  @property
  def patches(self) -> int:
    """Number of patches of an image."""
    return math.prod(self.network.encoder.grid)

  @property
  def visible(self) -> int:
    """Number of patches that the encoder processes."""
    return int(self.patches * (1 - self.mask_ratio))

  @property
  @override
  def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
    return {'image': image_field(self.network)}

  @override
  def init(self, rng: jax.Array) -> tuple[Params, Any]:
    images, order = jnp.zeros((1, *self.network.input_shape)), jnp.arange(self.patches)[None]
    return self.network.init(rng, images, order, visible=self.visible)['params'], {}

  @override
  def loss(self, params: Params, batch: Batch, rng: jax.Array, extra: Any) -> Loss:
    augment_rng, _, dropout_rng = jax.random.split(rng, 3)
    images = self.normalize(apply_augments(batch['image'], self.augment, augment_rng))
    order = self.order(rng, images.shape[0])
    predicted: Any = self.network.apply(
      {'params': params}, images, order, visible=self.visible, train=True, rngs={'dropout': dropout_rng}
    )
    target, _ = patchify(images, self.network.encoder.patch_size)
    target = normalize_patches(target)[0] if self.norm_pix_loss else target
    return mean_loss(masked_mse(predicted.pixels, target, order, self.visible))

  def order(self, rng: jax.Array, images: int) -> jax.Array:
    """int32 [B, T]: a random order of the patches of each image; the first ones are visible."""
    return random_order(jax.random.split(rng, 3)[1], images, self.patches)

  def masked_patches(self, params: Params, extra: Any, batch: Batch) -> jax.Array:
    """bool [B, 1, rows, columns]: True for masked patches."""
    images = len(batch['image'])
    masked = jnp.argsort(self.order(batch['rng'], images), axis=1) >= self.visible
    return masked.reshape(images, 1, *self.network.encoder.grid)

  @override
  def outputs(self) -> Mapping[str, Output]:
    return {
      **encoder_outputs(self.network.encoder, self._encoder),
      'reconstruct': Output(self.reconstruct, 'image', encoder=self._encoder),
      'masked_patches': Output(self.masked_patches, 'masks'),
    }

  def reconstruct(self, params: Params, extra: Any, batch: Batch) -> jax.Array:
    """[B, 2, H, W, 3] in [0, 1]: the masked input, and the input with the masked patches replaced by predictions.

    The mask is the same in every call. With norm_pix_loss the network does not predict the mean and standard deviation
    of a patch: those of the true patch are used.
    """
    images = batch['image'].astype(jnp.float32) / 255
    order = random_order(jax.random.key(0), images.shape[0], self.patches)
    predicted: Any = self.network.apply({'params': params}, self.normalize(images), order, visible=self.visible)
    pixels = predicted.pixels.astype(jnp.float32)
    patch = self.network.encoder.patch_size
    true, grid = patchify(self.normalize(images), patch)
    if self.norm_pix_loss:
      _, mean, deviation = normalize_patches(true)
      pixels = pixels * deviation + mean
    visible = (jnp.argsort(order, axis=1) < self.visible)[..., None]
    filled = unpatchify(jnp.where(visible, true, pixels), grid, patch)
    masked = jnp.where(unpatchify(jnp.broadcast_to(visible, true.shape), grid, patch), images, 0.5)
    return jnp.stack([masked, jnp.clip(self.normalize.undo(filled), 0, 1)], axis=1)

  def _encoder(self, params: Params, extra: Any) -> ImageEncoder:
    return ImageEncoder(self.network.encoder, {'params': params['encoder']}, self.normalize)


def random_order(rng: jax.Array, batch: int, patches: int) -> jax.Array:
  """int32 [B, T]: a random permutation for each image."""
  return jnp.argsort(jax.random.uniform(rng, (batch, patches)), axis=1).astype(jnp.int32)


def normalize_patches(patches: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Patches [B, T, P] normalized to mean 0 and (unbiased) variance 1; also mean and standard deviation, [B, T, 1]."""
  mean = patches.mean(-1, keepdims=True)
  deviation = jnp.sqrt(patches.var(-1, keepdims=True, ddof=1) + 1e-6)
  return (patches - mean) / deviation, mean, deviation


def masked_mse(predicted: jax.Array, target: jax.Array, order: jax.Array, visible: int) -> jax.Array:
  """Mean over the patches order[:, visible:] of the mean squared error, from patches [B, T, P] in row order."""
  errors = jnp.square(predicted.astype(jnp.float32) - target).mean(-1)
  # Every image has the same number of masked patches, so their mean is one sum; masking instead of gathering moves
  # nothing between devices.
  masked = jnp.argsort(order, axis=1) >= visible
  return jnp.sum(errors, where=masked) / (order.shape[0] * (order.shape[1] - visible))
