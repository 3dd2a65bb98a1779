"""Losses of self-distillation, and the targets of the teacher: DINO, iBOT, KoLeo.

Letters in shapes: B batch, V crops of the student, G of the teacher, N rows, M masked patches, K prototypes, D width.
"""

import jax
import jax.numpy as jnp

from fmcv_jax.models.common.norms import l2_normalize
from fmcv_jax.shapes import AnyArray, Float, Shaped


def view_loss(
  logits: Float[AnyArray, 'batch views prototypes'], targets: Float[AnyArray, 'batch global_views prototypes']
) -> Float[jax.Array, '']:
  """Mean cross-entropy of the student's logits [B, V, K] with the teacher's targets [B, G, K], over pairs of two crops.

  The first G crops of both are the same; a crop is not compared with itself.
  """
  # Targets sum to 1, so -sum_k p log q = logsumexp - p . logits: one product instead of V x G tables of K.
  agreement = jnp.einsum('bgk,bvk->bgv', targets, logits, precision='highest')
  losses = jax.nn.logsumexp(logits, axis=-1)[:, None] - agreement
  other = ~jnp.eye(targets.shape[1], logits.shape[1], dtype=bool)
  return jnp.mean(losses, where=other[None])


def patch_loss(
  logits: Float[AnyArray, 'crops patches prototypes'],
  targets: Float[AnyArray, 'crops patches prototypes'],
  valid: Shaped[AnyArray, 'crops patches'],
) -> Float[jax.Array, '']:
  """Cross-entropy [N, M, K] of the valid patches, averaged in each of the N crops, then over all N (iBOT, eq. 2)."""
  losses = jax.nn.logsumexp(logits, axis=-1) - jnp.sum(targets * logits, axis=-1)
  return jnp.mean((losses * valid).sum(1) / jnp.maximum(valid.sum(1), 1))


def sinkhorn(
  logits: Float[AnyArray, 'n prototypes'], rounds: int, valid: Shaped[AnyArray, ' n'] | None = None
) -> Float[jax.Array, 'n prototypes']:
  """Probabilities [N, K] near softmax(logits) under which all prototypes are equally frequent (Cuturi 2013).

  Alternately scales columns and rows of exp(logits) to equal sums, in log space. Rows with valid = 0 (of [N]) are
  excluded from the column sums.
  """
  where = None if valid is None else valid[:, None] > 0
  for _ in range(rounds):
    columns = jax.nn.logsumexp(logits, axis=0, keepdims=True, where=where)
    logits = logits - jnp.where(jnp.isfinite(columns), columns, 0)  # -inf where no row is valid
    logits = logits - jax.nn.logsumexp(logits, axis=1, keepdims=True)
  return jnp.exp(logits)


def koleo(features: Float[AnyArray, 'batch width'], eps: float = 1e-8) -> Float[jax.Array, '']:
  """-mean log distance of each feature [B, D], at unit length, to its nearest other one (Sablayrolles et al. 2019).

  The nearest neighbor is searched in the global batch, on any number of devices; DINOv2's code searches per GPU.
  """
  x = l2_normalize(features)
  cosines = jnp.einsum('id,jd->ij', x, x, precision='highest')
  nearest = jnp.max(jnp.where(jnp.eye(len(x), dtype=bool), -2.0, cosines), axis=1)
  # The square root has no gradient at distance 0: pairs of equal images get a zero gradient.
  return -jnp.mean(jnp.log(jnp.sqrt(jnp.maximum(2 - 2 * nearest, 1e-12)) + eps))


def diagnosis(targets: Float[AnyArray, 'n prototypes']) -> dict[str, Float[jax.Array, '']]:
  """Collapse diagnostics: mean entropy of the targets [N, K], and entropy of their mean; both at most log K."""

  def entropy(p: jax.Array) -> jax.Array:
    return -jnp.sum(p * jnp.log(jnp.maximum(p, 1e-12)), axis=-1)

  return {'target_entropy': entropy(targets).mean(), 'prototype_entropy': entropy(targets.mean(0))}
