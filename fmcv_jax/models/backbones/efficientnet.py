"""EfficientNet (Tan & Le 2019): inverted bottlenecks that squeeze and excite, scaled in width, depth and resolution.

Batch norms keep running statistics in the collection 'batch_stats'. In training they take those of the batch they are
given, which is the global one on any mesh; `apply(..., mutable=['batch_stats'])` hands back what they are then.

Letters in shapes: B batch, R rows, C columns, D channels.
"""

import functools
import itertools
import math
import operator
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fmcv_jax.bounds import Decay, NonNegativeInt, PositiveInt
from fmcv_jax.errors import did_you_mean
from fmcv_jax.models.common.depthwise import Depthwise
from fmcv_jax.models.common.layers import (
  HEAD_AXES,
  NORM_AXES,
  Dtype,
  dense,
  stochastic_depth,
)
from fmcv_jax.models.common.outputs import Features, linear_head
from fmcv_jax.models.common.scan import Remat, rematerialize, scan_layers
from fmcv_jax.parallel.rules import with_logical_constraint

EPS = 1e-3  # of every batch norm
FAN_OUT = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


class Row(NamedTuple):
  """A row of the paper's table 1: `repeats` blocks of `features` channels, of which the first has the stride.

  size is that of the kernels, ratio how much wider a block is inside.
  """

  repeats: int
  features: int
  size: int
  stride: int
  ratio: int


# B0's; the others scale repeats and features.
TABLE = (
  Row(1, 16, 3, 1, 1),
  Row(2, 24, 3, 2, 6),
  Row(2, 40, 5, 2, 6),
  Row(3, 80, 3, 2, 6),
  Row(3, 112, 5, 1, 6),
  Row(4, 192, 5, 2, 6),
  Row(1, 320, 3, 1, 6),
)
STEM, TOP = 32, 1280


def batch_norm(dtype: str, name: str, train: bool, momentum: float) -> nn.BatchNorm:
  """Batch norm of TensorFlow's EfficientNets: running statistics unless `train`; parameters and statistics float32."""
  return nn.BatchNorm(
    use_running_average=not train,
    momentum=momentum,
    epsilon=EPS,
    dtype=jnp.dtype(dtype),
    use_fast_variance=False,
    name=name,
  )


class Bottleneck(nn.Module):
  """MBConv: expand, depthwise convolution, squeeze-and-excite, project: [B, R, C, D] -> [B, R', C', features].

  In the form of a scan. drop_path: share of examples that skip the block; needs the rng 'dropout'.
  """

  # What is wide inside is split as an MLP's hidden units are.
  logical_axes = (
    (r'(.*/)?expand/kernel', ('embed', 'mlp')),
    (r'(.*/)?depthwise/kernel', (None, None, None, 'mlp')),
    (r'(.*/)?squeeze/kernel', ('mlp', None)),
    (r'(.*/)?squeeze/bias', (None,)),
    (r'(.*/)?excite/kernel', (None, 'mlp')),
    (r'(.*/)?excite/bias', ('mlp',)),
    (r'(.*/)?project/kernel', ('mlp', 'embed')),
    NORM_AXES,
  )

  features: int
  size: int
  stride: int
  ratio: int
  dtype: Dtype
  train: bool
  momentum: float

  @nn.compact
  def __call__(self, x: jax.Array, drop_path: jax.Array | None = None) -> tuple[jax.Array, None]:
    channels, dtype = x.shape[-1], self.dtype
    norm = functools.partial(batch_norm, dtype, train=self.train, momentum=self.momentum)
    hidden = channels * self.ratio
    y = x
    if self.ratio != 1:
      y = dense(hidden, dtype, 'expand', bias=False, init=FAN_OUT)(y)
      y = jax.nn.silu(norm('expand_norm')(y))
    y = with_logical_constraint(y, 'batch', None, None, 'mlp')
    y = Depthwise(self.size, self.stride, dtype, channels='mlp', name='depthwise')(y)
    y = jax.nn.silu(norm('depthwise_norm')(y))

    whole = jnp.mean(y, axis=(1, 2), dtype=jnp.float32).astype(y.dtype)
    squeezed = jax.nn.silu(dense(max(1, channels // 4), dtype, 'squeeze', init=FAN_OUT)(whole))
    y = y * jax.nn.sigmoid(dense(hidden, dtype, 'excite', init=FAN_OUT)(squeezed))[:, None, None]

    y = norm('project_norm')(dense(self.features, dtype, 'project', bias=False, init=FAN_OUT)(y))
    if self.stride == 1 and channels == self.features:
      y = x + (y if drop_path is None else stochastic_depth(y, drop_path, self.make_rng('dropout')))
    return with_logical_constraint(y, 'batch', None, None, None), None


class Stage(nn.Module):
  """The blocks of one row, [B, R, C, D] -> [B, R', C', features]: the first, and a scan over the others."""

  row: Row
  dtype: Dtype
  remat: Remat
  train: bool
  momentum: float

  @nn.compact
  def __call__(self, x: jax.Array, drop_path: np.ndarray | None = None) -> jax.Array:
    """drop_path: float [repeats], or None; needs the rng 'dropout'."""
    repeats, features, size, stride, ratio = self.row
    shared = (self.dtype, self.train, self.momentum)
    block = rematerialize(Bottleneck, self.remat)
    first = block(features, size, stride, ratio, *shared, name='first')
    x = first(x, None if drop_path is None else drop_path[0])[0]
    if repeats == 1:
      return x
    stack = scan_layers(Bottleneck, repeats - 1, nn.broadcast if drop_path is None else 0, remat=self.remat)
    rest = stack(features, size, 1, ratio, *shared, name='blocks')
    return rest(x, None if drop_path is None else drop_path[1:])[0]


class EfficientNet(nn.Module):
  """Images [B, height, width, 3], normalized, of any size -> Features, whose tokens are the last map, row by row.

  stem      channels of the first convolution
  top       channels of the last, of one pixel; 0 for none (ALIGN, Jia et al. 2021, section 4.1)
  outputs   units of a linear head on the mean of the last map, of which a share `dropout` is zero in training; 0 leaves
            the mean as it is
  momentum  what running statistics keep of themselves at each step
  """

  logical_axes = (
    (r'(.*/)?conv/kernel', (None, None, None, 'embed')),
    (r'(.*/)?top/kernel', ('embed', None)),
    *HEAD_AXES,
    NORM_AXES,
  )

  stages: tuple[Row, ...]
  stem: int
  top: int
  image_size: int = 224
  num_classes: int = 0
  dropout: float = 0.0
  drop_path: float = 0.0
  momentum: float = 0.99
  remat: Remat = 'none'
  dtype: Dtype = 'float32'

  average_pooled = True
  size_multiple = 1  # divisor of the sides of images

  @property
  def input_shape(self) -> tuple[int, int, int]:
    """(height, width, channels) of the images that the network is made for."""
    return self.image_size, self.image_size, 3

  @property
  def patch_size(self) -> int:
    """Pixels along the side of what becomes one of the last tokens."""
    return 2 * math.prod(stage.stride for stage in self.stages)

  @property
  def width(self) -> int:
    """Channels of the pooled features."""
    return self.top or self.stages[-1].features

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool = False) -> Features:
    stem = nn.Conv(
      self.stem, (3, 3), 2, 'SAME', use_bias=False, dtype=jnp.dtype(self.dtype), kernel_init=FAN_OUT, name='conv'
    )
    norm = functools.partial(batch_norm, self.dtype, train=train, momentum=self.momentum)
    x = jax.nn.silu(norm('norm')(stem(images)))
    x = with_logical_constraint(x, 'batch', None, None, None)
    total = sum(stage.repeats for stage in self.stages)
    rates = np.arange(total, dtype=np.float32) * (self.drop_path / total) if train and self.drop_path else None
    done = 0
    for number, row in enumerate(self.stages, 1):
      drop = None if rates is None else rates[done : done + row.repeats]
      x = Stage(row, self.dtype, self.remat, train, self.momentum, name=f'stage{number}')(x, drop)
      done += row.repeats
    if self.top:
      x = dense(self.top, self.dtype, 'top', bias=False, init=FAN_OUT)(x)
      x = jax.nn.silu(norm('top_norm')(x))
    pooled = jnp.mean(x, axis=(1, 2), dtype=jnp.float32).astype(x.dtype)
    tokens = x.reshape(x.shape[0], -1, x.shape[-1])
    if not self.num_classes:
      return Features(pooled, pooled, tokens)
    kept = nn.Dropout(self.dropout, deterministic=not train)(pooled)
    return Features(linear_head(self.num_classes, True, self.dtype)(kept), pooled, tokens)


# Factors of width and depth, side of the images, dropout (Tan & Le 2019 and the authors' code; L2: Xie et al. 2020);
# mu is for demos and tests.
SIZES: dict[str, tuple[float, float, int, float]] = {
  'mu': (0.5, 0.5, 32, 0.0),
  'B0': (1.0, 1.0, 224, 0.2),
  'B1': (1.0, 1.1, 240, 0.2),
  'B2': (1.1, 1.2, 260, 0.3),
  'B3': (1.2, 1.4, 300, 0.3),
  'B4': (1.4, 1.8, 380, 0.4),
  'B5': (1.6, 2.2, 456, 0.4),
  'B6': (1.8, 2.6, 528, 0.5),
  'B7': (2.0, 3.1, 600, 0.5),
  'L2': (4.3, 5.3, 800, 0.5),
}


def channels(base: int, factor: float) -> int:
  """A scaled number of channels: the nearest multiple of 8 that is not more than a tenth too small."""
  cast_param = max(8, int(base * factor + 4) // 8 * 8)
  return cast_param + 8 * (cast_param < 0.9 * base * factor)


def efficientnet(
  variant: str = 'B0',
  *,
  image_size: PositiveInt | None = None,
  num_classes: NonNegativeInt = 0,
  top: bool = True,
  dropout: Decay | None = None,
  drop_path: Decay = 0.2,
  momentum: Decay = 0.99,
  output_stride: PositiveInt = 32,
  remat: Remat = 'none',
  dtype: Dtype = 'float32',
) -> EfficientNet:
  """A named EfficientNet; image_size and dropout of None are the variant's.

  output_stride is the side in pixels of what becomes one of the last tokens, a power of two from 2 on: the rows that
  would go beyond it keep the size of their maps (undilated), as small images want.
  """
  if variant not in SIZES:
    raise ValueError(f'unknown EfficientNet variant {variant!r}; {did_you_mean(variant, SIZES)}')
  width, depth, size, share = SIZES[variant]
  if output_stride not in (2, 4, 8, 16, 32):
    raise ValueError(f'output_stride {output_stride} is none of 2, 4, 8, 16, 32')
  strides = itertools.accumulate((row.stride for row in TABLE), operator.mul, initial=2)
  stages = tuple(
    Row(
      math.ceil(depth * row.repeats),
      channels(row.features, width),
      row.size,
      row.stride if side * row.stride <= output_stride else 1,
      row.ratio,
    )
    for row, side in zip(TABLE, strides)
  )
  return EfficientNet(
    stages=stages,
    stem=channels(STEM, width),
    top=channels(TOP, width) if top else 0,
    image_size=image_size or size,
    num_classes=num_classes,
    dropout=share if dropout is None else dropout,
    drop_path=drop_path,
    momentum=momentum,
    remat=remat,
    dtype=dtype,
  )
