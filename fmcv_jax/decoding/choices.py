"""Log-likelihoods of a closed list of texts."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fmcv_jax.decoding.language_model import LanguageModel

_AT_ONCE = 8  # texts whose caches are in memory together


def score(model: LanguageModel, batch: Mapping[str, jax.Array], texts: jax.Array) -> jax.Array:
  """Log-likelihoods float32 [B, N] of `texts` after the prefix of every example; images and prefixes are read once.

  texts  int32 [N, T]: ids, the end, padding. Log-probabilities are summed up to the end, which is included.
  """
  length = texts.shape[1]
  logits, state = model.prefill(batch, length)
  rows = len(logits)

  def score_text(text: jax.Array) -> jax.Array:
    counts = jnp.cumsum(text == model.end_id) - (text == model.end_id) == 0  # up to the first end

    def add(total: jax.Array, logits: jax.Array, step: Any) -> jax.Array:
      own = jax.nn.log_softmax(logits)[:, text[step]]
      return total + jnp.where(counts[step], own, 0.0)

    def step(step: jax.Array, carry: Any) -> Any:
      total, state = carry
      logits, state = model.extend(jnp.full(rows, text[step]), state, step)
      return add(total, logits, step + 1), state

    first = add(jnp.zeros(rows, jnp.float32), logits, 0)
    return jax.lax.fori_loop(0, length - 1, step, (first, state))[0]

  return jax.lax.map(score_text, texts, batch_size=_AT_ONCE).T
