"""A network that was trained elsewhere: what it offers, and nothing to learn."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from fmcv_jax.augment.normalize import Normalize
from fmcv_jax.errors import UserError
from fmcv_jax.objectives.base import BATCH_STATS, ImageEncoder, Objective, encoder_functions, flax_variables


@dataclasses.dataclass(frozen=True)
class PretrainedEncoder(Objective):
  """An image network as it was imported: evaluated, looked into, and where other runs begin (config.init_from)."""

  network: nn.Module
  normalize: Normalize = Normalize()

  @property
  def example_batch(self):
    size = self.network.image_size
    return {'image': jax.ShapeDtypeStruct((size, size, 3), jnp.uint8)}

  @property
  def input_size(self):
    return None if getattr(self.network, 'any_size', False) else self.network.image_size

  def init(self, rng):
    size = self.network.image_size
    extra = dict(self.network.init(rng, jnp.zeros((1, size, size, 3))))
    return extra.pop('params'), extra

  def loss(self, params, batch, rng, extra):
    raise UserError(
      "config.objective: 'encoder' is a network as it was imported, which is not trained; choose another objective, "
      'and begin with its weights by --config.init_from.params.workdir=...'
    )

  def functions(self):
    def reads(name):
      def call(params, extra, batch):
        images = self.normalize(batch['image'].astype(jnp.float32) / 255)
        features = self.network.apply(flax_variables(params, extra), images, mutable=[BATCH_STATS])[0]
        return getattr(features, name).astype(jnp.float32)

      return call

    offered = {**encoder_functions(self, self.network), 'features': reads('pooled')}
    return offered | ({'logits': reads('output')} if getattr(self.network, 'num_classes', 0) else {})

  def image_encoder(self, params, extra):
    return ImageEncoder(self.network, params, self.normalize)
