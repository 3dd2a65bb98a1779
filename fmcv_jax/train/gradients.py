"""Loss and gradient of a batch, whole or in pieces that fit the memory."""

from typing import Any

import jax
import jax.numpy as jnp

from fmcv_jax.objectives.base import Objective


def gradients(objective: Objective, params: Any, batch: Any, rng: jax.Array, extra: Any, microbatches: int):
  """(loss, metrics, aux, gradient) of the mean loss over the batch, computed in `microbatches` equal pieces.

  Objectives that treat examples alone are accumulated; coupled ones take two passes over cached embeddings, so that
  their gradient is that of the whole batch too. `aux` and metrics are averaged over the pieces.
  """
  if microbatches == 1:
    (loss, (metrics, aux)), gradient = jax.value_and_grad(objective.loss, has_aux=True)(params, batch, rng, extra)
    return loss, metrics, aux, gradient
  pieces = jax.tree.map(lambda x: split_batch(x, microbatches), batch)
  if objective.coupled:
    return _coupled(objective, params, batch, pieces, rng, extra, microbatches)
  return _accumulated(objective, params, pieces, rng, extra, microbatches)


def split_batch(x: jax.Array, pieces: int) -> jax.Array:
  """[B, ...] -> [pieces, B / pieces, ...]; piece m takes every pieces-th example from m on.

  Strided, so that each device cuts its own examples into pieces and none has to move.
  """
  if x.shape[0] % pieces:
    raise ValueError(f'a batch of {x.shape[0]} does not divide into {pieces} microbatches')
  return x.reshape(x.shape[0] // pieces, pieces, *x.shape[1:]).swapaxes(0, 1)


def join_batch(x: jax.Array) -> jax.Array:
  """The inverse of split_batch."""
  return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])


def _accumulated(objective, params, pieces, rng, extra, count):
  def one(total, indexed):
    index, piece = indexed
    key = jax.random.fold_in(rng, index)
    (loss, (metrics, aux)), gradient = jax.value_and_grad(objective.loss, has_aux=True)(params, piece, key, extra)
    return jax.tree.map(lambda t, x: t + x / count, total, (loss, metrics, aux, gradient)), None

  first = jax.tree.map(lambda x: x[0], pieces)
  shapes = jax.eval_shape(lambda: _flat(jax.value_and_grad(objective.loss, has_aux=True)(params, first, rng, extra)))
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  total, _ = jax.lax.scan(one, zeros, (jnp.arange(count), pieces))
  return total


def _flat(result):
  (loss, (metrics, aux)), gradient = result
  return loss, metrics, aux, gradient


def _coupled(objective, params, batch, pieces, rng, extra, count):
  """GradCache (Gao et al. 2021): embed all, differentiate by the embeddings, then embed again piece by piece."""
  keys = jax.vmap(lambda index: jax.random.fold_in(rng, index))(jnp.arange(count))
  embeddings, kept = jax.lax.map(lambda args: objective.embed(params, *args, extra), (pieces, keys))

  def couple(params, embeddings):
    return objective.couple(params, jax.tree.map(join_batch, embeddings), batch, extra)

  (loss, (metrics, aux)), (direct, cotangents) = jax.value_and_grad(couple, argnums=(0, 1), has_aux=True)(
    params, embeddings
  )

  def one(total, args):
    piece, key, cotangent = args
    _, pull_back = jax.vjp(lambda p: objective.embed(p, piece, key, extra)[0], params)
    return jax.tree.map(jnp.add, total, pull_back(cotangent)[0]), None

  gradient, _ = jax.lax.scan(one, direct, (pieces, keys, cotangents))
  return loss, metrics, {**jax.tree.map(lambda x: x.mean(0), kept), **aux}, gradient
