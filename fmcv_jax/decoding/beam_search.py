"""Beam search with the scores of transformers, in one program."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fmcv_jax.decoding.language_model import LanguageModel, without_end
from fmcv_jax.decoding.options import DecodingOptions

_NEVER = -1.0e9
Search = tuple[jax.Array, ...]  # texts, scores and states of all beams


def beam_search(
  model: LanguageModel, batch: Mapping[str, jax.Array], options: DecodingOptions
) -> tuple[jax.Array, jax.Array]:
  """The texts of the best scores: (tokens int32 [B, max_tokens], log-likelihoods float32 [B]).

  A text's score is its log-probability / length ** length_penalty, with the end counted. Of each step's 2 N best
  continuations of N beams, those among the first N that end are finished, and the N best others are continued. The
  search of an example ends when its best beam cannot exceed its worst finished text at its present length
  (transformers' early_stopping=False), or at max_tokens, where what is unfinished counts as it is.
  """
  beams, length = options.beams, options.max_tokens
  logits, state = model.prefill(batch, length)
  examples, vocabulary = logits.shape
  state = model.select(state, jnp.repeat(jnp.arange(examples), beams))
  alive = jnp.full((examples, beams, length), model.pad_id, jnp.int32)
  # At first all beams are equal: only one of them is continued.
  alive_total = jnp.full((examples, beams), _NEVER).at[:, 0].set(0.0)
  done, done_total = alive, jnp.zeros((examples, beams))
  done_score, is_done = jnp.full((examples, beams), _NEVER), jnp.zeros((examples, beams), bool)
  open_ = jnp.ones((examples, 1), bool)

  def advance(step: jax.Array, logits: jax.Array, *search: jax.Array) -> tuple[jax.Array, jax.Array, Search]:
    """Adds token number `step` to all beams; also returns the rows of the state that the beams continue."""
    alive, alive_total, done, done_total, done_score, is_done, open_ = search
    log_probabilities = jax.nn.log_softmax(logits).reshape(examples, beams, vocabulary)
    log_probabilities = without_end(log_probabilities, model.end_id, step, options.min_tokens)
    totals = (alive_total[..., None] + log_probabilities).reshape(examples, -1)
    totals, best = jax.lax.top_k(totals, 2 * beams)
    parents, tokens = best // vocabulary, (best % vocabulary).astype(jnp.int32)
    texts = _take(alive, parents).at[:, :, step].set(tokens)
    ends = (tokens == model.end_id) | (step + 1 == length)

    finished = ends & (jnp.arange(2 * beams) < beams) & open_
    scores = jnp.where(finished, totals / (step + 1.0) ** options.length_penalty, _NEVER)
    all_scores = jnp.concatenate([done_score, scores], axis=1)
    done_score, order = jax.lax.top_k(all_scores, beams)
    done, done_total, is_done = (
      _take(jnp.concatenate(pair, axis=1), order) for pair in ((done, texts), (done_total, totals), (is_done, finished))
    )
    alive_total, order = jax.lax.top_k(jnp.where(ends, totals + _NEVER, totals), beams)
    alive, parents, tokens = (_take(x, order) for x in (texts, parents, tokens))
    possible = alive_total[:, :1] / (step + 1.0) ** options.length_penalty
    worst = jnp.where(is_done, done_score.min(axis=1, keepdims=True), _NEVER)
    open_ = open_ & (possible > worst).any(axis=1, keepdims=True)
    rows = (parents + beams * jnp.arange(examples)[:, None]).reshape(-1)
    return rows, tokens.reshape(-1), (alive, alive_total, done, done_total, done_score, is_done, open_)

  def step(carry: Any) -> Any:
    step, rows, tokens, search, state = carry
    logits, state = model.extend(tokens, model.select(state, rows), step)
    rows, tokens, search = advance(step + 1, logits, *search)
    return step + 1, rows, tokens, search, state

  def unfinished(carry: Any) -> jax.Array:
    return (carry[0] + 1 < length) & carry[3][-1].any()

  search: tuple[jax.Array, ...] = (alive, alive_total, done, done_total, done_score, is_done, open_)
  rows, tokens, search = advance(jnp.int32(0), jnp.repeat(logits, beams, axis=0), *search)
  carry = jax.lax.while_loop(unfinished, step, (jnp.int32(0), rows, tokens, search, state))
  _, _, done, done_total, *_ = carry[3]
  return done[:, 0], done_total[:, 0]


def _take(x: jax.Array, order: jax.Array) -> jax.Array:
  """x [B, N, ...] in the order int [B, M] -> [B, M, ...]."""
  return jnp.take_along_axis(x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1)
