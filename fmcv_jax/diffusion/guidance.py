"""Classifier-free guidance (Ho & Salimans 2022)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fmcv_jax.diffusion.samplers import Denoise
from fmcv_jax.shapes import AnyArray, Float


def guided(
  denoise: Callable[[jax.Array, jax.Array, Any], jax.Array],
  condition: Any,
  without: Any,
  scale: Float[AnyArray, ' #batch'] | Float[AnyArray, ''] | float,
  *,
  interval: tuple[float, float] | None = None,
  rescale: float = 0.0,
) -> Denoise:
  """Classifier-free guidance (Ho & Salimans 2022): what `condition` adds to `without`, times `scale`.

  denoise    (x, time, condition) -> output; both conditions (trees of [B, ...]) are run as one batch of 2 B
  without    the empty condition, or that of a negative prompt
  scale      1 disables guidance; a number, or one for each example [B]
  interval   times (low, high) outside of which there is none (Kynkaanniemi et al. 2024)
  rescale    fraction by which the result is brought back to the standard deviation of the conditioned output (Lin et
             al. 2024, eq. 15 and 16)
  """

  def run(x: Float[AnyArray, ' batch *shape'], time: Float[AnyArray, ' batch']) -> Float[jax.Array, 'batch ...']:
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), condition, without)
    output = denoise(jnp.concatenate([x, x]), jnp.concatenate([time, time]), both)
    with_it, without_it = jnp.split(output, 2)
    strength = jnp.broadcast_to(jnp.asarray(scale, jnp.float32), x.shape[:1])
    if interval is not None:
      strength = jnp.where((time >= interval[0]) & (time <= interval[1]), strength, 1.0)
    strength = strength.reshape(-1, *(1,) * (x.ndim - 1))
    result = without_it + strength * (with_it - without_it)
    if rescale:
      axes = tuple(range(1, x.ndim))
      deviation = with_it.std(axes, keepdims=True) / jnp.maximum(result.std(axes, keepdims=True), 1e-8)
      result = result * (rescale * deviation + 1 - rescale)
    return result

  return run
