"""What a denoiser is told beside the noisy picture: the time, and what the picture shows."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fmcv_jax.models.layers import dense


class Condition(NamedTuple):
  """What a picture is to show; what a network is not built for stays None.

  label    int32 [B]; the number of classes itself stands for 'no class'
  text     the words as a text tower sees them, [B, L, E]
  mask     bool [B, L], which of them are words; None for all
  pooled   the whole text, [B, P]
  beside   what stands in further channels next to x, [B, H, W, K], such as a hole's mask and the picture around it
  control  a picture [B, rows, columns, 3] in [0, 1] that steers by a ControlNet, and how much [B], None for 1
  """

  label: jax.Array | None = None
  text: jax.Array | None = None
  mask: jax.Array | None = None
  pooled: jax.Array | None = None
  beside: jax.Array | None = None
  control: jax.Array | None = None
  control_scale: jax.Array | None = None


NOTHING = Condition()


def sinusoids(time: jax.Array, dim: int, *, closed: bool = False) -> jax.Array:
  """time [B] -> float32 [B, dim]: cosines, then sines, at frequencies from 1 to 1 / 10,000 (Vaswani et al. 2017).

  closed: the last frequency is 1 / 10,000 itself, as in Ho et al. 2020, not the one that precedes it.
  """
  half = dim // 2
  # In float64: an error of a frequency is multiplied by the time, up to 1000.
  frequency = 10_000.0 ** -(np.arange(half) / (half - closed))
  angles = time.astype(jnp.float32)[:, None] * frequency.astype(np.float32)
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Perceptron(nn.Module):
  """[B, D] -> [B, width], through one hidden layer with SiLU."""

  width: int
  dtype: str

  @nn.compact
  def __call__(self, x):
    init = nn.initializers.normal(0.02)
    x = dense(self.width, self.dtype, 'hidden1', init=init)(x)
    return dense(self.width, self.dtype, 'hidden2', init=init)(jax.nn.silu(x))


class ClassEmbedding(nn.Module):
  """int32 [B] -> [B, width]; row `classes` stands for 'no class'."""

  classes: int
  width: int

  @nn.compact
  def __call__(self, label):
    table = self.param('embedding', nn.initializers.normal(0.02), (self.classes + 1, self.width))
    return jnp.take(table, label, axis=0)
