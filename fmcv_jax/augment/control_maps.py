"""Control maps computed from images on the device: Canny edges, grayscale, pixelation."""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from typing_extensions import override

from fmcv_jax.augment.color import LUMA, blurred
from fmcv_jax.bounds import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


class Control(abc.ABC):
  """A control map, the condition of a ControlNet."""

  @abc.abstractmethod
  def __call__(self, images: jax.Array) -> jax.Array:
    """images float32 [B, H, W, 3] in [0, 1] -> the same shape and range."""


@dataclasses.dataclass(frozen=True)
class Edges(Control):
  """White edges, one pixel wide, on black (Canny 1986).

  low, high   hysteresis thresholds of the Sobel gradient of images in [0, 1]: a local maximum is an edge above `high`,
              or above `low` if connected to one above `high`; the defaults are 100 and 200 on OpenCV's scale of bytes
  sigma       standard deviation of the preceding Gaussian blur, in pixels
  reach       maximum distance in pixels over which an edge is followed from a strong pixel
  """

  low: NonNegativeFloat = 100 / 255
  high: NonNegativeFloat = 200 / 255
  sigma: PositiveFloat = 1.0
  reach: NonNegativeInt = 16

  def __post_init__(self) -> None:
    if not 0 < self.low <= self.high:
      raise ValueError(f'low: expected 0 < low <= high, got {self.low} and {self.high}')
    if self.sigma <= 0:
      raise ValueError(f'sigma: expected pixels above 0, got {self.sigma}')

  @override
  def __call__(self, images: jax.Array) -> jax.Array:
    gray = blurred((images * jnp.array(LUMA)).sum(-1, keepdims=True), jnp.full(len(images), self.sigma))[..., 0]
    smooth = {axis: 2 * gray + _shifted(gray, axis, 1) + _shifted(gray, axis, -1) for axis in (1, 2)}
    down, right = ((_shifted(smooth[3 - axis], axis, 1) - _shifted(smooth[3 - axis], axis, -1)) for axis in (1, 2))
    # Quantized more coarsely than rounding errors, so that ties are ties in every compiled program.
    size = jnp.round(jnp.hypot(down, right) * 4096) / 4096
    # The neighbors on both sides, in the nearest of four directions.
    slope = np.tan(np.pi / 8)
    across, along = jnp.abs(right) * slope > jnp.abs(down), jnp.abs(down) * slope > jnp.abs(right)
    same = down * right > 0
    steps = [(0, 1), (1, 0), (1, 1), (1, -1)]
    ahead, behind = (
      jnp.select([across, along, same, ~same], [_shifted(_shifted(size, 1, s * y), 2, s * x) for y, x in steps])
      for s in (1, -1)
    )
    # Of two equal neighbors one remains.
    ridge = (size > ahead) & (size >= behind)
    weak = ridge & (size > self.low)
    window = (1, 3, 3)

    def grow(_: Any, edges: jax.Array) -> jax.Array:
      return jax.lax.reduce_window(edges, False, jnp.logical_or, window, (1, 1, 1), 'SAME') & weak

    edges = jax.lax.fori_loop(0, self.reach, grow, ridge & (size > self.high))
    return jnp.broadcast_to(edges[..., None].astype(jnp.float32), images.shape)


@dataclasses.dataclass(frozen=True)
class Gray(Control):
  """Grayscale copy of the image."""

  @override
  def __call__(self, images: jax.Array) -> jax.Array:
    return jnp.broadcast_to((images * jnp.array(LUMA)).sum(-1, keepdims=True), images.shape)


@dataclasses.dataclass(frozen=True)
class Pixelate(Control):
  """Replaces each square of `factor` x `factor` pixels by its mean color."""

  factor: PositiveInt = 8

  def __post_init__(self) -> None:
    if self.factor < 1:
      raise ValueError(f'factor: expected at least 1, got {self.factor}')

  @override
  def __call__(self, images: jax.Array) -> jax.Array:
    batch, height, width, _ = images.shape
    if height % self.factor or width % self.factor:
      raise ValueError(f'control.factor: {height} x {width} pixels are not divisible by {self.factor}')
    squares = images.reshape(batch, height // self.factor, self.factor, width // self.factor, self.factor, 3)
    return jnp.broadcast_to(squares.mean((2, 4), keepdims=True), squares.shape).reshape(images.shape)


def _shifted(x: jax.Array, axis: int, by: int) -> jax.Array:
  """x [B, H, W] shifted by `by` (-1, 0 or 1) pixels along an axis; the border is replicated."""
  if not by:
    return x
  size = x.shape[axis]
  ends = jax.lax.slice_in_dim(x, size - 1, size, axis=axis), jax.lax.slice_in_dim(x, 0, 1, axis=axis)
  if by > 0:
    return jnp.concatenate([jax.lax.slice_in_dim(x, 1, size, axis=axis), ends[0]], axis=axis)
  return jnp.concatenate([ends[1], jax.lax.slice_in_dim(x, 0, size - 1, axis=axis)], axis=axis)
