"""Image captioning: a ViT encoder and a causal text decoder (Show and Tell's task, Vinyals et al. 2015)."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from fmcv_jax.augment.normalize import Normalize
from fmcv_jax.models.backbones.text import Embedding
from fmcv_jax.models.common.layers import NORM_AXES, BlockConfig, dense, layer_norm
from fmcv_jax.objectives.base import Loss, Mean, Objective
from fmcv_jax.objectives.outputs import ImageEncoder, Output, encoder_outputs
from tests.systems.layers import DecoderBlock


class CaptionNetwork(nn.Module):
  """Normalized images and token ids int32 [B, T <= length] -> logits of the next tokens, float32 [B, T, vocab_size]."""

  logical_axes = (
    (r'(.*/)?tokens/embedding', ('vocab', 'embed')),
    (r'(.*/)?position', (None, 'embed')),
    (r'(.*/)?lm_head/kernel', ('embed', 'vocab')),
    (r'(.*/)?lm_head/bias', ('vocab',)),
    NORM_AXES,
  )

  encoder: nn.Module
  vocab_size: int
  length: int
  width: int

  def setup(self):
    config = BlockConfig(num_heads=2, mlp_dim=2 * self.width, causal=True)
    self.tokens = Embedding(self.vocab_size, self.width)
    self.position = self.param('position', nn.initializers.normal(0.02), (self.length, self.width))
    self.block = DecoderBlock(config)
    self.norm = layer_norm(config.eps, config.dtype, None)
    self.lm_head = dense(self.vocab_size, config.dtype, None, init=nn.initializers.zeros)

  def encode(self, images):
    return self.encoder(images).tokens

  def decode(self, memory, tokens):
    x = self.tokens(tokens) + self.position[: tokens.shape[1]]
    return self.lm_head(self.norm(self.block(x, memory))).astype(jnp.float32)

  def __call__(self, images, tokens):
    return self.decode(self.encode(images), tokens)


def caption_network(encoder: nn.Module, vocab_size: int, length: int, width: int = 32) -> CaptionNetwork:
  return CaptionNetwork(encoder, vocab_size, length, width)


@dataclasses.dataclass(frozen=True)
class Captioner(Objective):
  """Mean cross-entropy of the next token over the real tokens of the batch, the end included.

  `special` are the ids of padding, start and end: those of the run's tokenizer.
  """

  network: nn.Module
  normalize: Normalize = Normalize()
  special: tuple[int, int, int] | None = None

  def with_tokenizer(self, tokenizer):
    network: Any = self.network
    if (tokenizer.vocab_size, tokenizer.length) != (network.vocab_size, network.length):
      raise ValueError(f'network: the tokenizer has {tokenizer.vocab_size} ids in rows of {tokenizer.length}')
    return dataclasses.replace(self, special=(tokenizer.pad_id, tokenizer.start_id, tokenizer.end_id))

  @property
  def example_batch(self):
    network: Any = self.network
    size = network.encoder.image_size
    return {
      'image': jax.ShapeDtypeStruct((size, size, 3), jnp.uint8),
      'tokens': jax.ShapeDtypeStruct((network.length,), jnp.int32),
    }

  def init(self, rng):
    shapes = self.example_batch
    images, tokens = jnp.zeros((1, *shapes['image'].shape)), jnp.zeros((1, *shapes['tokens'].shape), jnp.int32)
    return self.network.init(rng, images, tokens)['params'], {}

  def loss(self, params, batch, rng, extra):
    losses, real, logits = self._losses(params, batch)
    count = real.sum(dtype=jnp.float32)
    right = jnp.sum(logits.argmax(-1) == batch['tokens'][:, 1:], where=real, dtype=jnp.float32)
    return Loss(jnp.sum(losses, where=real), count, {'accuracy': Mean(right, count)}, {})

  def outputs(self):
    network: Any = self.network
    return {
      **encoder_outputs(network.encoder, self._encoder),
      'caption': Output(self.greedy, 'tokens'),
      'log_likelihood': Output(self.log_likelihood, reads=('image', 'tokens')),
    }

  def greedy(self, params, extra, batch):
    """The most likely token after each, int32 [B, length], padded after the end."""
    network: Any = self.network
    pad, start, end = self._special
    memory = network.apply({'params': params}, self._images(batch), method='encode')
    tokens = jnp.full((len(memory), network.length), pad, jnp.int32).at[:, 0].set(start)

    def extend(place, tokens):
      logits: Any = network.apply({'params': params}, memory, tokens, method='decode')
      logits = jax.lax.dynamic_index_in_dim(logits, place - 1, 1, keepdims=False)
      ended = (tokens == end).any(axis=1)
      best = logits.at[:, jnp.array([pad, start])].set(-jnp.inf).argmax(-1).astype(jnp.int32)
      return tokens.at[:, place].set(jnp.where(ended, pad, best))

    return jax.lax.fori_loop(1, network.length, extend, tokens)

  def log_likelihood(self, params, extra, batch):
    """Of each caption, float32 [B]."""
    losses, real, _ = self._losses(params, batch)
    return -jnp.sum(losses, axis=1, where=real)

  def _losses(self, params, batch):
    """The loss of each next token [B, length - 1], which of them are real, and the logits."""
    tokens, after = batch['tokens'][:, :-1], batch['tokens'][:, 1:]
    logits: Any = self.network.apply({'params': params}, self._images(batch), tokens)
    return optax.softmax_cross_entropy_with_integer_labels(logits, after), after != self._special[0], logits

  @property
  def _special(self):
    if self.special is None:
      raise ValueError('a captioner needs a tokenizer; set config.tokenizer')
    return self.special

  def _images(self, batch):
    return self.normalize(batch['image'].astype(jnp.float32) / 255)

  def _encoder(self, params, extra):
    network: Any = self.network
    return ImageEncoder(network.encoder, {'params': params['encoder']}, self.normalize)
