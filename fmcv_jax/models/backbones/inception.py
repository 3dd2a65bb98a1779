"""Inception v3 (Szegedy et al. 2016) as in TensorFlow's graph of 2015, whose features define FID.

Differences from later versions: 1008 classes, average pools that do not count the border, and a maximum instead of an
average pool in the last block. Letters in shapes: B batch, R rows, C columns, D channels.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fmcv_jax.models.common.layers import HEAD_AXES, dense
from fmcv_jax.models.common.outputs import Features
from fmcv_jax.parallel.rules import with_logical_constraint

SIZE = 299
EPS = 1e-3


@dataclasses.dataclass(frozen=True)
class Conv:
  """Convolution and batch norm; `inside` selects 'VALID' padding, otherwise 'SAME'."""

  name: str
  features: int
  size: tuple[int, int]
  stride: int = 1
  inside: bool = False


# A step of a branch is a convolution, several in parallel, or a pool: 'mean' and 'max' of 3 x 3 pixels, or 'half', a
# 3 x 3 max pool of stride 2 without padding.
Step = Conv | tuple[Conv, ...] | str
Branch = tuple[Step, ...]


def _line(prefix: str, *steps: tuple[int, int, int], half: bool = False) -> Branch:
  """Convolutions 'prefix_1', 'prefix_2', ... of (features, rows, columns); with `half` the last one has stride 2."""
  last = len(steps)
  return tuple(
    Conv(f'{prefix}_{i}' if last > 1 else prefix, f, (r, c), *((2, True) if half and i == last else ()))
    for i, (f, r, c) in enumerate(steps, 1)
  )


def _a(pooled: int) -> tuple[Branch, ...]:
  return (
    _line('branch1x1', (64, 1, 1)),
    _line('branch5x5', (48, 1, 1), (64, 5, 5)),
    _line('branch3x3dbl', (64, 1, 1), (96, 3, 3), (96, 3, 3)),
    ('mean', Conv('branch_pool', pooled, (1, 1))),
  )


def _c(width: int) -> tuple[Branch, ...]:
  down, across, last = (width, 7, 1), (width, 1, 7), (192, 1, 7)
  return (
    _line('branch1x1', (192, 1, 1)),
    _line('branch7x7', (width, 1, 1), across, (192, 7, 1)),
    _line('branch7x7dbl', (width, 1, 1), down, across, down, last),
    ('mean', Conv('branch_pool', 192, (1, 1))),
  )


def _e(pool: str) -> tuple[Branch, ...]:
  def fork(prefix: str) -> Any:
    return Conv(f'{prefix}a', 384, (1, 3)), Conv(f'{prefix}b', 384, (3, 1))

  return (
    _line('branch1x1', (320, 1, 1)),
    (Conv('branch3x3_1', 384, (1, 1)), fork('branch3x3_2')),
    (Conv('branch3x3dbl_1', 448, (1, 1)), Conv('branch3x3dbl_2', 384, (3, 3)), fork('branch3x3dbl_3')),
    (pool, Conv('branch_pool', 192, (1, 1))),
  )


STEM: Branch = (
  Conv('conv2d_1a_3x3', 32, (3, 3), 2, True),
  Conv('conv2d_2a_3x3', 32, (3, 3), 1, True),
  Conv('conv2d_2b_3x3', 64, (3, 3)),
  'half',
  Conv('conv2d_3b_1x1', 80, (1, 1)),
  Conv('conv2d_4a_3x3', 192, (3, 3), 1, True),
  'half',
)
BLOCKS: dict[str, tuple[Branch, ...]] = {
  'mixed_5b': _a(32),
  'mixed_5c': _a(64),
  'mixed_5d': _a(64),
  'mixed_6a': (
    _line('branch3x3', (384, 3, 3), half=True),
    _line('branch3x3dbl', (64, 1, 1), (96, 3, 3), (96, 3, 3), half=True),
    ('half',),
  ),
  'mixed_6b': _c(128),
  'mixed_6c': _c(160),
  'mixed_6d': _c(160),
  'mixed_6e': _c(192),
  'mixed_7a': (
    _line('branch3x3', (192, 1, 1), (320, 3, 3), half=True),
    _line('branch7x7x3', (192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3), half=True),
    ('half',),
  ),
  'mixed_7b': _e('mean'),
  'mixed_7c': _e('max'),
}


class FrozenNorm(nn.Module):
  """Batch norm in inference mode, with its statistics as parameters."""

  logical_axes = ((r'(.*/)?norm/(scale|bias|mean|variance)', (None,)),)

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (x.shape[-1],)
    scale, variance = (self.param(name, nn.initializers.ones, shape) for name in ('scale', 'variance'))
    bias, mean = (self.param(name, nn.initializers.zeros, shape) for name in ('bias', 'mean'))
    return (x - mean) * (scale * jax.lax.rsqrt(variance + EPS)) + bias


class Unit(nn.Module):
  """Convolution without bias, frozen batch norm and ReLU: [B, H, W, C] -> [B, H', W', conv.features]."""

  logical_axes = ((r'(.*/)?conv/kernel', (None, None, None, 'embed')),)

  conv: Conv

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = self.conv
    padding = 'VALID' if c.inside else 'SAME'
    x = nn.Conv(c.features, c.size, (c.stride, c.stride), padding=padding, use_bias=False, name='conv')(x)
    return jax.nn.relu(FrozenNorm(name='norm')(x))


def _walk(x: jax.Array, branch: Branch) -> jax.Array:
  """Applies a branch; to be called in the compact method that owns the scope."""
  for step in branch:
    if isinstance(step, Conv):
      x = Unit(step, name=step.name)(x)
    elif isinstance(step, tuple):
      x = jnp.concatenate([Unit(conv, name=conv.name)(x) for conv in step], axis=-1)
    elif step == 'mean':
      x = nn.avg_pool(x, (3, 3), (1, 1), 'SAME', count_include_pad=False)
    else:
      x = nn.max_pool(x, (3, 3), *(((2, 2), 'VALID') if step == 'half' else ((1, 1), 'SAME')))
  return x


class Mixed(nn.Module):
  """Inception block: branches of the same input, concatenated along channels."""

  branches: tuple[Branch, ...]

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = jnp.concatenate([_walk(x, branch) for branch in self.branches], axis=-1)
    return with_logical_constraint(x, 'batch', None, None, None)


class Inception(nn.Module):
  """Images [B, R, C, 3] of any size, from -1 to 127 / 128 -> Features: 1008 logits, 2048 pooled, tokens [B, 64, 2048].

  Images are resized to 299 x 299 as in that graph: bilinear without antialiasing.
  """

  logical_axes = (*HEAD_AXES,)

  image_size: int = SIZE
  any_size: bool = True
  num_classes: int = 1008

  @property
  def input_shape(self) -> tuple[int, int, int]:
    """(height, width, channels) of the images that the network is made for."""
    return self.image_size, self.image_size, 3

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool = False) -> Features:
    x = _walk(resized(with_logical_constraint(images, 'batch', None, None, None)), STEM)
    for name, branches in BLOCKS.items():
      x = Mixed(branches, name=name)(x)
    pooled = x.mean((1, 2))
    return Features(dense(self.num_classes, 'float32', 'head')(pooled), pooled, x.reshape(len(x), -1, x.shape[-1]))


def resized(images: jax.Array) -> jax.Array:
  """Resizes to 299 x 299 by TensorFlow 1's bilinear interpolation, which aligns the first pixels of both images."""

  def matrix(size: int) -> np.ndarray:
    place = np.arange(SIZE, dtype=np.float32) * np.float32(size / SIZE)
    low = np.floor(place).astype(int)
    share = place - low
    rows = np.zeros((SIZE, size), np.float32)
    np.add.at(rows, (np.arange(SIZE), low), 1 - share)
    np.add.at(rows, (np.arange(SIZE), np.minimum(low + 1, size - 1)), share)
    return rows

  images = jnp.einsum('ir,brcd->bicd', matrix(images.shape[1]), images, precision='highest')
  return jnp.einsum('jc,bicd->bijd', matrix(images.shape[2]), images, precision='highest')


def inception() -> Inception:
  """The network whose pooled features published FID, KID, precision and recall are based on."""
  return Inception()
