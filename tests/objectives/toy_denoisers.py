"""Denoisers from outside of the package, as a config names them: 'tests.objectives.toy_denoisers:clip_denoiser'."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from fmcv_jax.models.common.layers import HEAD_AXES


class ClipDenoiser(nn.Module):
  """One linear layer over the channels of clips x [B, T, H, W, 3], zero at first."""

  logical_axes = HEAD_AXES
  input_shape: ClassVar[tuple[int, ...]] = (3, 4, 6, 3)
  condition_keys: ClassVar[tuple[str, ...]] = ()

  @nn.compact
  def __call__(self, x, time, condition, *, train=False):
    return nn.Dense(3, kernel_init=nn.initializers.zeros, name='head')(x)


def clip_denoiser() -> ClipDenoiser:
  return ClipDenoiser()


class WorldModel(nn.Module):
  """The output is the action, at every place of x, plus a parameter that is zero at first."""

  input_shape: ClassVar[tuple[int, ...]] = (2, 2, 3)
  condition_keys: ClassVar[tuple[str, ...]] = ('action', 'second_time')
  condition_shapes: ClassVar = {
    'action': jax.ShapeDtypeStruct((3,), jnp.float32),
    'second_time': jax.ShapeDtypeStruct((), jnp.float32),
  }

  @nn.compact
  def __call__(self, x, time, condition, *, train=False):
    assert set(condition) == set(self.condition_keys)
    bias = self.param('bias', nn.initializers.zeros, (3,))
    return jnp.broadcast_to(condition['action'][:, None, None] + bias, x.shape)


class Unprovided(WorldModel):
  """Reads what neither a part of the objective nor a batch field provides."""

  condition_keys: ClassVar[tuple[str, ...]] = ('camera',)


class ActionModel(WorldModel):
  """Has no task without its action."""

  never_dropped: ClassVar[tuple[str, ...]] = ('action',)


class Mistaken(WorldModel):
  """Never drops what it does not read."""

  never_dropped: ClassVar[tuple[str, ...]] = ('camera',)
