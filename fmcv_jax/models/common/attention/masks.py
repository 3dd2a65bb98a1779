"""Masks that differ from query to query, in a form that kernels read: a vector instead of a matrix."""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class PrefixMask:
  """Mask of a prefix language model (Raffel et al. 2020): full attention within the prefix, causal attention after it.

  prefix   bool [B, T], True for tokens that all others attend to; they come before all others
  """

  prefix: jax.Array

  def dense(self) -> jax.Array:
    """The mask as bool [B, 1, T, T], True where attention is allowed."""
    places = jnp.arange(self.prefix.shape[1])
    return (self.prefix[:, None, :] | (places[None, :] <= places[:, None]))[:, None]
