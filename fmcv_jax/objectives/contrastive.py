"""Image-text contrast: CLIP's softmax (Radford et al. 2021) and SigLIP's sigmoid (Zhai et al. 2023)."""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from fmcv_jax.data.augment import Augment, Normalize, augmented
from fmcv_jax.models.vit import random_keep
from fmcv_jax.objectives.base import CoupledObjective, ImageTower


@dataclasses.dataclass(frozen=True)
class Contrastive(CoupledObjective):
  """Pulls the embeddings of a pair together and pushes those of other pairs in the global batch apart.

  loss_name   'softmax': each image finds its text among all of the batch and each text its image; 'sigmoid': each
              of the B x B pairs is a yes-or-no question
  keep        share of an image's patches that is looked at (FLIP, Li et al. 2023)
  """

  network: nn.Module
  loss_name: Literal['softmax', 'sigmoid'] = 'softmax'
  keep: float = 1.0
  augment: tuple[Augment, ...] = ()
  normalize: Normalize = Normalize()

  def __post_init__(self):
    if not hasattr(self.network, 'encode_text'):
      raise ValueError('contrastive needs a dual encoder: network.name is clip, siglip or dual_encoder')

  @property
  def example_batch(self):
    size, length = self.network.image.image_size, self.network.text.length
    return {
      'image': jax.ShapeDtypeStruct((size, size, 3), jnp.uint8),
      'tokens': jax.ShapeDtypeStruct((length,), jnp.int32),
    }

  def init(self, rng):
    image, tokens = (jnp.zeros((1, *x.shape), x.dtype) for x in self.example_batch.values())
    return self.network.init(rng, image.astype(jnp.float32), tokens)['params'], {}

  def embed(self, params, batch, rng, extra):
    augment_rng, keep_rng, dropout_rng = jax.random.split(rng, 3)
    images = self.normalize(augmented(batch['image'], self.augment, augment_rng))
    patches = (self.network.image.image_size // self.network.image.patch) ** 2
    keep = random_keep(keep_rng, images.shape[0], patches, self.keep) if self.keep < 1 else None
    return self.network.apply(
      {'params': params}, images, batch['tokens'], keep=keep, train=True, rngs={'dropout': dropout_rng}
    )

  def couple(self, params, embeddings, batch, extra):
    image, text = embeddings
    scale, bias = self.network.apply({'params': params}, method='logit_scale_and_bias')
    logits = scale * jnp.einsum('ie,te->it', image, text, preferred_element_type=jnp.float32) + bias
    losses = softmax_pairs(logits) if self.loss_name == 'softmax' else sigmoid_pairs(logits)
    accuracy = jnp.mean(logits.argmax(axis=1) == jnp.arange(len(logits)), dtype=jnp.float32)
    return losses, ({'accuracy': accuracy, 'logit_scale': scale, 'logit_bias': bias}, {})

  def functions(self):
    def encode_image(params, extra, batch):
      images = self.normalize(batch['image'].astype(jnp.float32) / 255)
      return self.network.apply({'params': params}, images, method='encode_image')

    def encode_text(params, extra, batch):
      return self.network.apply({'params': params}, batch['tokens'], method='encode_text')

    return {'embed_image': encode_image, 'embed_text': encode_text, 'features': encode_image}

  def image_tower(self, params, extra):
    return ImageTower(self.network.image, params['image'], self.normalize)


def softmax_pairs(logits: jax.Array) -> jax.Array:
  """InfoNCE both ways from logits [image, text]: the mean of the two cross-entropies with the diagonal as answer."""
  # A masked sum, not a gather: each device has its rows' answers already, where jnp.diagonal would gather the indices.
  diagonal = jnp.sum(logits, axis=1, where=jnp.eye(len(logits), dtype=bool))
  by_image = jax.nn.logsumexp(logits, axis=1) - diagonal
  by_text = jax.nn.logsumexp(logits, axis=0) - diagonal
  return (by_image.mean() + by_text.mean()) / 2


def sigmoid_pairs(logits: jax.Array) -> jax.Array:
  """SigLIP, eq. 1: the sum over all pairs of -log sigmoid(z * logit), z = 1 on the diagonal and -1 off it, over B."""
  signs = 2 * jnp.eye(len(logits)) - 1
  return -jax.nn.log_sigmoid(signs * logits).sum() / len(logits)
