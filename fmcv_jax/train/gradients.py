"""Loss and gradient of a batch, optionally accumulated over microbatches."""

from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp

from fmcv_jax.errors import UserError
from fmcv_jax.objectives.base import Loss, Mean, Objective


def gradients(
  objective: Objective, params: Any, batch: Any, rng: jax.Array, extra: Any, microbatches: int
) -> tuple[jax.Array, dict[str, jax.Array], Any, Any]:
  """(loss, metrics, aux, gradient) of a batch, accumulated over `microbatches` of equal numbers of examples.

  The loss is the sum of the weighted losses of all microbatches over the sum of their weights, and so is each metric:
  exact for unequal weights, such as texts of different lengths. Coupled objectives take two passes over cached
  embeddings, so that their gradient is that of the whole batch too. `aux` is averaged over microbatches.
  """
  if microbatches == 1:
    (value, loss), gradient = jax.value_and_grad(_value_of(objective.loss), has_aux=True)(params, batch, rng, extra)
    return value, _values(loss.metrics), loss.aux, gradient
  pieces = jax.tree.map(lambda x: split_batch(x, microbatches), batch)
  if objective.coupled:
    return _coupled(objective, params, batch, pieces, rng, extra, microbatches)
  return _accumulated(objective, params, pieces, rng, extra, microbatches)


def split_batch(x: jax.Array, pieces: int) -> jax.Array:
  """[B, ...] -> [pieces, B / pieces, ...]; piece m takes every pieces-th example, starting at m.

  Strided, so that each device splits its own examples and none is moved.
  """
  if x.shape[0] % pieces:
    raise ValueError(f'a batch of {x.shape[0]} is not divisible by {pieces} microbatches')
  return x.reshape(x.shape[0] // pieces, pieces, *x.shape[1:]).swapaxes(0, 1)


def join_batch(x: jax.Array) -> jax.Array:
  """The inverse of split_batch."""
  return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])


def _accumulated(
  objective: Objective, params: Any, pieces: Any, rng: jax.Array, extra: Any, count: int
) -> tuple[jax.Array, dict[str, jax.Array], Any, Any]:
  def total_of(params: Any, piece: Any, key: jax.Array) -> tuple[jax.Array, Loss]:
    loss = _checked(objective.loss(params, piece, key, extra))
    return loss.total, loss

  def of_piece(index: Any, piece: Any) -> Any:
    return jax.grad(total_of, has_aux=True)(params, piece, jax.random.fold_in(rng, index))

  def add(sums: Any, indexed: Any) -> Any:
    return jax.tree.map(jnp.add, sums, of_piece(*indexed)), None

  shapes = jax.eval_shape(of_piece, 0, jax.tree.map(lambda x: x[0], pieces))
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  (gradient, loss), _ = jax.lax.scan(add, zeros, (jnp.arange(count), pieces))
  gradient = jax.tree.map(lambda x: loss._replace(total=x).value, gradient)
  return loss.value, _values(loss.metrics), jax.tree.map(lambda x: x / count, loss.aux), gradient


def _coupled(
  objective: Any, params: Any, batch: Any, pieces: Any, rng: jax.Array, extra: Any, count: int
) -> tuple[jax.Array, dict[str, jax.Array], Any, Any]:
  """GradCache (Gao et al. 2021): embed all, differentiate by the embeddings, then recompute them per microbatch."""
  keys = jax.vmap(lambda index: jax.random.fold_in(rng, index))(jnp.arange(count))
  embeddings, kept = jax.lax.map(lambda args: objective.embed(params, *args, extra), (pieces, keys))

  def couple(params: Any, embeddings: Any) -> Loss:
    return objective.couple(params, jax.tree.map(join_batch, embeddings), batch, extra)

  (value, loss), (direct, cotangents) = jax.value_and_grad(_value_of(couple), argnums=(0, 1), has_aux=True)(
    params, embeddings
  )

  def one(total: Any, args: Any) -> Any:
    piece, key, cotangent = args
    _, pull_back = jax.vjp(lambda p: objective.embed(p, piece, key, extra)[0], params)
    return jax.tree.map(jnp.add, total, pull_back(cotangent)[0]), None

  gradient, _ = jax.lax.scan(one, direct, (pieces, keys, cotangents))
  return value, _values(loss.metrics), {**jax.tree.map(lambda x: x.mean(0), kept), **loss.aux}, gradient


def _value_of(loss_of: Callable[..., Any]) -> Callable[..., tuple[jax.Array, Loss]]:
  """Returns a function that returns the loss to differentiate, and the rest as auxiliary output."""

  def call(*args: Any) -> tuple[jax.Array, Loss]:
    loss = _checked(loss_of(*args))
    return loss.value, loss

  return call


def _values(metrics: Mapping[str, Mean]) -> dict[str, jax.Array]:
  return {name: mean.value for name, mean in metrics.items()}


def _checked(loss: Any) -> Loss:
  """The loss of an objective, from this package or not, whose sums and weights are float32 scalars."""
  if not isinstance(loss, Loss):
    raise UserError(f'objective.loss: expected a Loss (total, weight, metrics, aux), got a {type(loss).__name__}')
  scalars = [loss.total, loss.weight, *jax.tree.leaves(loss.metrics)]
  chex.assert_shape(scalars, (), custom_message='objective.loss: totals and weights are scalars')
  chex.assert_type(scalars, jnp.float32, custom_message='objective.loss: totals and weights are float32')
  return loss
