"""Interface between a network that predicts the next token and the search for a text."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

State = Any


class LanguageModel(NamedTuple):
  """A model that continues prefixes token by token.

  prefill   (batch, capacity) -> (logits float32 [B, V] of the first token, state with places for `capacity` tokens);
            the batch holds the fields that the model reads
  extend    (tokens int32 [B], state, step) -> (logits float32 [B, V] of the next token, state), after the tokens number
            `step` (int32 scalar, from 0)
  select    (state, rows int32 [N]) -> the state of these rows
  pad_id    id after the end of a text
  end_id    id that ends a text
  limit     largest number of tokens after a prefix; None for any number
  """

  prefill: Callable[[Mapping[str, jax.Array], int], tuple[jax.Array, State]]
  extend: Callable[[jax.Array, State, jax.Array], tuple[jax.Array, State]]
  select: Callable[[State, jax.Array], State]
  pad_id: int
  end_id: int
  limit: int | None = None


def without_end(logits: jax.Array, end_id: int, step: jax.Array, min_tokens: int) -> jax.Array:
  """Logits [..., V] that exclude the end before `min_tokens` tokens."""
  if not min_tokens:
    return logits
  return jnp.where((jnp.arange(logits.shape[-1]) == end_id) & (step < min_tokens), -jnp.inf, logits)
