"""Place of a token in the cache of keys and values of a causal transformer, whose rows all begin at place 0."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class CacheRead(NamedTuple):
  """Reading of one token per row into a cache.

  place  int32 scalar, place of the token
  mask   bool [1, 1, 1, S], True for the places up to that one, among the S of the cache
  """

  place: jax.Array
  mask: jax.Array

  def rows(self, table: jax.Array) -> jax.Array:
    """The row [1, D] of a table of positions [length, D]; the caller keeps `place` below its length."""
    return jax.lax.dynamic_slice_in_dim(table, self.place, 1)


def cache_read(place: jax.Array | int, size: int) -> CacheRead:
  """The reading of the token at `place` into a cache with `size` places."""
  return CacheRead(jnp.asarray(place, jnp.int32), (jnp.arange(size) <= place)[None, None, None])
