"""Depthwise convolution: each channel by itself."""

import functools
import operator

import flax.linen as nn
import jax
import jax.numpy as jnp

from fmcv_jax.models.common.layers import Dtype
from fmcv_jax.parallel.rules import shard_mapped

# A depthwise kernel [k, k, 1, D] has one output for each input.
INIT = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal', in_axis=-1, out_axis=-2)


class Depthwise(nn.Module):
  """A convolution of each channel by itself, [B, R, C, D] -> [B, R / stride, C / stride, D], rounded up.

  channels  logical axis of D, which the row of the kernel in the network's `logical_axes` has too; None: not split
  """

  size: int
  stride: int
  dtype: Dtype
  channels: str | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = self.param('kernel', INIT, (self.size, self.size, 1, x.shape[-1]))
    # On a CPU a training step is five times as fast with sums of shifted maps as with XLA's convolution of single
    # channels. On a TPU, which would write those maps to memory, it is three times as slow.
    return jax.lax.platform_dependent(x, kernel.astype(self.dtype), cpu=self.sum_of_shifts, default=self.convolution)

  def convolution(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [B, R, C, D] with kernel [size, size, 1, D] by XLA's grouped convolution, in 'SAME' padding.

    Each device convolves its own examples and channels. XLA's partitioner would multiply the gradient of the kernel by
    the number of devices on every mesh axis that does not split the batch (findings/xla_depthwise_gradient.sh).
    """

    def local(x: jax.Array, kernel: jax.Array) -> jax.Array:
      strides, layout, groups = (self.stride, self.stride), ('NHWC', 'HWIO', 'NHWC'), x.shape[-1]
      return jax.lax.conv_general_dilated(
        x, kernel, strides, 'SAME', dimension_numbers=layout, feature_group_count=groups
      )

    each, own = ('batch', None, None, self.channels), (None, None, None, self.channels)
    return shard_mapped(local, inputs=(each, own), outputs=each)(x, kernel)

  def sum_of_shifts(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """As `convolution`, as a sum of size x size shifted and scaled maps."""
    size, stride = self.size, self.stride
    x = jnp.pad(x, [(0, 0), *jax.lax.padtype_to_pads(x.shape[1:3], (size, size), (stride, stride), 'SAME'), (0, 0)])
    rows, columns = ((side - size) // stride + 1 for side in x.shape[1:3])
    shifted = (
      x[:, i : i + rows * stride : stride, j : j + columns * stride : stride] * kernel[i, j, 0]
      for i in range(size)
      for j in range(size)
    )
    return functools.reduce(operator.add, shifted)
