"""The loss of a learned variance (Nichol & Dhariwal 2021)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fmcv_jax.diffusion.process import Process, alphas_cumprod
from fmcv_jax.shapes import AnyArray, Float, Shaped


def variance_bits(
  process: Process,
  output: Float[AnyArray, ' batch *places doubled'],
  x: Float[AnyArray, ' batch *places channels'],
  x0: Float[AnyArray, ' batch *places channels'],
  time: Shaped[AnyArray, ' batch'],
) -> Float[jax.Array, '']:
  """Mean divergence of the step's true posterior from the network's, in bits per value, as a function of its variance.

  Nichol & Dhariwal 2021, eq. 16 with lambda = 1 / STEPS; the predicted mean receives no gradient. The last step, at
  time 0, is left out: it draws nothing.

  output  [B, ..., 2 C]: the prediction, then the position of the log variance between its bounds (eq. 15)
  x, x0   [B, ..., C] at `time` [B], and without noise
  """
  table = alphas_cumprod(process.schedule)
  before = np.append(1.0, table[:-1])
  beta = 1 - table / before
  small = beta * (1 - before) / (1 - table)
  small[0] = small[1]
  index = time.astype(jnp.int32)

  def at(values: Any) -> jax.Array:
    return jnp.asarray(values, jnp.float32)[index].reshape(-1, *(1,) * (x.ndim - 1))

  predicted, between = jnp.split(output.astype(jnp.float32), 2, axis=-1)
  image = jax.lax.stop_gradient(process.image(predicted, x, time))
  off = at(np.sqrt(before) * beta / (1 - table)) * (image - x0)
  ratio = at(np.log(beta) - np.log(small)) * (between + 1) / 2  # log of the network's variance over the smallest
  divergence = 0.5 * (ratio - 1 + jnp.exp(-ratio) * (1 + jnp.square(off) / at(small)))
  bits = divergence.mean(tuple(range(1, x.ndim))) / np.log(2)
  return jnp.mean(jnp.where(time > 0, bits, 0))
