"""Ring contrastive loss of all images and texts of a global batch: no device holds all the logits.

Each device keeps its images, and texts rotate over the devices. Logits are computed for one block of texts at a time,
so memory does not depend on the number of devices; the backward pass is a second rotation that recomputes the logits.

Letters in shapes: B global batch, b examples of this device, c texts of one block, E embedding.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from fmcv_jax.parallel.ring import ring_scan
from fmcv_jax.parallel.rules import mesh_axes, shard_mapped
from fmcv_jax.shapes import AnyArray, Float

LossName = Literal['softmax', 'sigmoid']

# Maximum number of texts per block: [b, c] logits, exponentials and their gradients are the largest buffers.
BLOCK = 1024

PAIRS = ('batch', None)  # the axes of embeddings


def pair_loss(
  image: Float[AnyArray, 'batch width'],
  text: Float[AnyArray, 'batch width'],
  scale: Float[AnyArray, ''] | float,
  bias: Float[AnyArray, ''] | float,
  loss_name: LossName,
  label_smoothing: float = 0.0,
) -> tuple[Float[jax.Array, ''], Float[jax.Array, '']]:
  """(loss, accuracy), float32 scalars, of unit-length embeddings [B, E]; logits are scale * image . text + bias.

  'softmax' is the mean of the two cross-entropies of InfoNCE (Radford et al. 2021), whose targets label_smoothing mixes
  with the uniform distribution (Jia et al. 2021). 'sigmoid' is SigLIP's eq. 1 (Zhai et al. 2023): the sum over all
  pairs of -log sigmoid(z * logit) over B, z = 1 for the pairs that belong together and -1 for all others. accuracy is
  the fraction of images whose own text has the highest logit. Examples are split over the mesh axes of `batch`.
  """
  return _pair_loss(loss_name, label_smoothing, image, text, jnp.float32(scale), jnp.float32(bias))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _pair_loss(
  loss_name: LossName, smoothing: float, image: jax.Array, text: jax.Array, scale: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array]:
  return _forward(loss_name, smoothing, image, text, scale, bias)[0]


def _forward(
  loss_name: LossName, smoothing: float, image: jax.Array, text: jax.Array, scale: jax.Array, bias: jax.Array
) -> Any:
  """First rotation: sums over all pairs, and log-sum-exp of each row (image) and column (text) of the logits."""

  def local(image: jax.Array, text: jax.Array, scale: jax.Array, bias: jax.Array) -> Any:
    rows = len(image)

    def body(carry: Any, texts: Any, by_text: Any) -> Any:
      best, by_image, own_logit, total = carry
      start, block = texts
      logits, own = _logits(image, block, scale, bias, start)
      best = jnp.maximum(best, logits.max(axis=1))
      own_logit += jnp.sum(logits, axis=1, where=own)
      if loss_name == 'sigmoid':
        return (best, by_image, own_logit, total + jax.nn.softplus(jnp.where(own, -logits, logits)).sum()), by_text
      by_image = jnp.logaddexp(by_image, jax.nn.logsumexp(logits, axis=1))
      by_text = jnp.logaddexp(by_text, jax.nn.logsumexp(logits, axis=0))
      return (best, by_image, own_logit, total + logits.sum()), by_text

    lowest = jnp.full(rows, -jnp.inf)
    carry = (lowest, lowest, jnp.zeros(rows), jnp.zeros(()))
    carry, by_text = ring_scan(body, carry, text, lowest, jnp.logaddexp, axis='batch', block=BLOCK)
    best, by_image, own_logit, total = carry
    # Sums over the devices: the terms of pairs, and the terms of images.
    sums = jnp.stack([total, own_logit.sum(), by_image.sum(), by_text.sum(), jnp.sum(own_logit >= best)])
    return _over_devices(sums), by_image, by_text

  sums, by_image, by_text = shard_mapped(
    local, inputs=(PAIRS, PAIRS, (), ()), outputs=((None,), ('batch',), ('batch',))
  )(image, text, scale, bias)
  count = len(image)
  total, own, rows, columns, right = sums
  if loss_name == 'sigmoid':
    loss = total / count
  else:
    loss = (rows + columns) / (2 * count) - (1 - smoothing) * own / count - smoothing * total / count**2
  return (loss, right / count), (image, text, scale, bias, by_image, by_text)


def _backward(loss_name: LossName, smoothing: float, saved: Any, cotangents: Any) -> Any:
  """Second rotation: recomputes each logit once for the gradients of its image, its text, the scale and the bias."""
  count = len(saved[0])

  def local(
    image: jax.Array,
    text: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    by_image: jax.Array,
    by_text: jax.Array,
    cotangent: jax.Array,
  ) -> Any:
    def body(carry: Any, texts: Any, by_column: Any) -> Any:
      by_row, by_bias = carry
      start, (block, by_text) = texts
      logits, own = _logits(image, block, scale, bias, start)
      if loss_name == 'sigmoid':
        gradient = jax.nn.sigmoid(logits) - own
      else:
        gradient = (jnp.exp(logits - by_image[:, None]) + jnp.exp(logits - by_text)) / 2
        gradient += -(1 - smoothing) * own - smoothing / count
      gradient *= cotangent / count
      by_row += jnp.einsum('it,te->ie', gradient, block, preferred_element_type=jnp.float32)
      by_column += jnp.einsum('it,ie->te', gradient, image, preferred_element_type=jnp.float32)
      return (by_row, by_bias + gradient.sum()), by_column

    carry = (jnp.zeros(image.shape), jnp.zeros(()))
    by_column = jnp.zeros(text.shape)
    (by_row, by_bias), by_column = ring_scan(
      body, carry, (text, by_text), by_column, jnp.add, axis='batch', block=BLOCK
    )
    scalars = _over_devices(jnp.stack([jnp.sum(image * by_row), by_bias]))
    return scale * by_row, scale * by_column, scalars

  by_image, by_text, (by_scale, by_bias) = shard_mapped(
    local,
    inputs=(PAIRS, PAIRS, (), (), ('batch',), ('batch',), ()),
    outputs=(PAIRS, PAIRS, (None,)),
  )(*saved, cotangents[0])
  image, text = saved[:2]
  return by_image.astype(image.dtype), by_text.astype(text.dtype), by_scale, by_bias


_pair_loss.defvjp(_forward, _backward)


def _logits(
  image: jax.Array, block: jax.Array, scale: jax.Array, bias: jax.Array, start: Any
) -> tuple[jax.Array, jax.Array]:
  """Logits [b, c] of a block of texts, the first of which belongs to image `start`, and a mask of positive pairs."""
  logits = scale * jnp.einsum('ie,te->it', image, block, preferred_element_type=jnp.float32) + bias
  return logits, jnp.arange(len(image))[:, None] == start + jnp.arange(len(block))


def _over_devices(sums: jax.Array) -> jax.Array:
  names = mesh_axes('batch')
  return jax.lax.psum(sums, names) if names else sums
