"""Texts from a language model as one program: greedy, sampled, or by beam search."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fmcv_jax.decoding.beam_search import beam_search
from fmcv_jax.decoding.language_model import LanguageModel, without_end
from fmcv_jax.decoding.options import DecodingOptions


class Texts(NamedTuple):
  """Generated texts.

  tokens          int32 [B, max_tokens]: ids, the end if it was reached, padding
  log_likelihood  float32 [B]: sum of the log-probabilities of the tokens, without temperature and restrictions
  """

  tokens: jax.Array
  log_likelihood: jax.Array


def generate(model: LanguageModel, batch: Mapping[str, jax.Array], options: DecodingOptions) -> Texts:
  """Continues the prefix of every example in the batch; jittable, and ends once all texts have ended.

  Samples of an example depend on the seed and on batch['index'] int32 [B], its number (by default its row). A model
  with a limit generates at most as many tokens.
  """
  if model.limit is not None and model.limit < options.max_tokens:
    options = dataclasses.replace(options, max_tokens=model.limit)
  if options.beams > 1:
    return Texts(*beam_search(model, batch, options))
  logits, state = model.prefill(batch, options.max_tokens)
  rows = len(logits)
  index = batch.get('index', jnp.arange(rows))
  keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(options.seed), i))(index)
  tokens = jnp.full((rows, options.max_tokens), model.pad_id, jnp.int32)
  ended = jnp.zeros(rows, bool)

  def write(
    step: jax.Array, logits: jax.Array, tokens: jax.Array, ended: jax.Array, total: jax.Array
  ) -> tuple[jax.Array, ...]:
    log_probabilities = jax.nn.log_softmax(logits)
    allowed = without_end(logits, model.end_id, step, options.min_tokens)
    token = _next(allowed, jax.vmap(lambda key: jax.random.fold_in(key, step))(keys), options)
    own = jnp.take_along_axis(log_probabilities, token[:, None], axis=1)[:, 0]
    total = total + jnp.where(ended, 0.0, own)
    token = jnp.where(ended, model.pad_id, token)
    return token, tokens.at[:, step].set(token), ended | (token == model.end_id), total

  def step(carry: Any) -> Any:
    step, token, tokens, ended, total, state = carry
    logits, state = model.extend(token, state, step)
    token, tokens, ended, total = write(step + 1, logits, tokens, ended, total)
    return step + 1, token, tokens, ended, total, state

  def unfinished(carry: Any) -> jax.Array:
    return (carry[0] + 1 < options.max_tokens) & ~carry[3].all()

  token, tokens, ended, total = write(jnp.int32(0), logits, tokens, ended, jnp.zeros(rows, jnp.float32))
  carry = jax.lax.while_loop(unfinished, step, (jnp.int32(0), token, tokens, ended, total, state))
  return Texts(carry[2], carry[4])


def _next(logits: jax.Array, keys: jax.Array, options: DecodingOptions) -> jax.Array:
  """The next token of each row, int32 [B], from logits [B, V] and one key per row."""
  if options.temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = restricted(logits / options.temperature, options.top_k, options.top_p)
  return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def restricted(logits: jax.Array, top_k: int | None, top_p: float | None) -> jax.Array:
  """Logits [B, V] with -inf for the tokens outside of the K most likely ones, then of the nucleus of probability P."""
  if top_k is not None and top_k < logits.shape[-1]:
    least = jax.lax.top_k(logits, top_k)[0][:, -1:]
    logits = jnp.where(logits < least, -jnp.inf, logits)
  if top_p is not None and top_p < 1:
    ordered = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    # A token belongs to the nucleus if the more likely ones do not reach P without it; the first always does.
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
    logits = jnp.where(logits < least, -jnp.inf, logits)
  return logits
