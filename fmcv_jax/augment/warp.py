"""Affine warps with bilinear sampling: by gathers, and on TPUs by a Pallas kernel.

A TPU gathers pixels one by one, eight cycles each: four gathers per pixel of 64 images of 224 x 224 would take 70 ms on
a v5e, more than a ViT-B step. The kernel holds an image in vector memory. An output tile of 8 x 128 pixels reads a
small box of the image; for each row of that box, a lane shuffle moves every pixel to the outputs that sample it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fmcv_jax.parallel.rules import platform, shard_mapped
from fmcv_jax.shapes import AnyArray, Float, Shaped

ROWS, LANES = 8, 128  # of a vector register
IMAGE_BYTES = 24 * 2**20  # of vector memory, where an image lies twice: the next is fetched while this one is warped
VMEM_BYTES = 64 * 2**20


class Neighbourhood(NamedTuple):
  """Sampling points in the input: the four surrounding pixels and the interpolation weights between them."""

  left: jax.Array
  right: jax.Array
  top: jax.Array
  bottom: jax.Array
  across: jax.Array
  down: jax.Array
  inside: jax.Array


def warp(
  images: Float[AnyArray, 'batch height width channels'], matrix: Float[AnyArray, 'batch 2 3'], fill: float | None
) -> Float[jax.Array, 'batch height width channels']:
  """Affine warp of images float32 [B, H, W, C] with bilinear sampling, as PIL's Image.transform.

  matrix [B, 2, 3] maps output coordinates (x, y) to input coordinates, in pixels from the corner: the center of the
  first pixel is (0.5, 0.5). Points outside the image have the value `fill`, or that of the nearest edge if None.
  """
  if platform() == 'tpu' and _bytes(images) <= IMAGE_BYTES:
    each = ('batch', None, None, None)
    by_each = shard_mapped(functools.partial(by_kernel, fill=fill), (each, ('batch', None, None)), each)
    return by_each(images, matrix)
  return by_gathers(images, matrix, fill)


def nearest_warp(
  maps: Shaped[AnyArray, ' batch height width *values'], matrix: Float[AnyArray, 'batch 2 3'], fill: float | None
) -> Shaped[jax.Array, ' batch height width *values']:
  """As `warp`, but of maps [B, H, W, ...] of any dtype: the value of the pixel in which each point lies."""
  batch, height, width = maps.shape[:3]
  y, x = jnp.meshgrid(jnp.arange(height) + 0.5, jnp.arange(width) + 0.5, indexing='ij')
  column, row = (
    jnp.floor(m[:, 0, None, None] * x + m[:, 1, None, None] * y + m[:, 2, None, None]).astype(jnp.int32)
    for m in (matrix[:, 0], matrix[:, 1])
  )
  inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
  index = (jnp.clip(row, 0, height - 1) * width + jnp.clip(column, 0, width - 1)).reshape(batch, -1, 1)
  values = jnp.take_along_axis(maps.reshape(batch, height * width, -1), index, axis=1, mode='clip').reshape(maps.shape)
  if fill is None:
    return values
  return jnp.where(inside.reshape(*inside.shape, *(1,) * (maps.ndim - 3)), values, jnp.asarray(fill, maps.dtype))


def by_gathers(images: jax.Array, matrix: jax.Array, fill: float | None) -> jax.Array:
  """Implementation of `warp` by gathers, for any platform."""
  batch, height, width, _ = images.shape
  y, x = jnp.meshgrid(jnp.arange(height) + 0.5, jnp.arange(width) + 0.5, indexing='ij')
  points = _neighbourhood(
    [matrix[:, axis, part, None, None] for axis in (0, 1) for part in range(3)], x, y, height, width
  )

  def at(row: Any, column: Any) -> jax.Array:
    index = (row * width + column).reshape(batch, -1, 1)
    pixels = jnp.take_along_axis(images.reshape(batch, height * width, -1), index, axis=1, mode='clip')
    return pixels.reshape(images.shape)

  around = [at(row, column) for row in (points.top, points.bottom) for column in (points.left, points.right)]
  return _mixed(around, jax.tree.map(lambda part: part[..., None], points), fill)


def by_kernel(images: jax.Array, matrix: jax.Array, fill: float | None, *, interpret: bool = False) -> jax.Array:
  """Implementation of `warp` by a Pallas kernel for TPUs; on other platforms pass interpret=True, which is slow."""
  # Imported here: Pallas takes a second to load, and few runs need it.
  from jax.experimental import pallas
  from jax.experimental.pallas import tpu

  batch, height, width, channels = images.shape
  rows, tiles = -(-height // ROWS), -(-width // LANES)
  planes = jnp.pad(jnp.moveaxis(images, -1, 1), ((0, 0), (0, 0), (0, -height % ROWS), (0, -width % LANES)))
  columns = planes.reshape(batch, channels, rows * ROWS, tiles, LANES).swapaxes(2, 3)
  warped = pallas.pallas_call(
    functools.partial(_kernel, height=height, width=width, fill=fill),
    grid=(batch, rows, tiles),
    in_specs=[
      pallas.BlockSpec((1, 1, 6), lambda image, row, tile: (image, 0, 0), memory_space=tpu.SMEM),
      pallas.BlockSpec((1, *columns.shape[1:]), lambda image, row, tile: (image, 0, 0, 0, 0)),
    ],
    out_specs=pallas.BlockSpec((1, channels, ROWS, LANES), lambda image, row, tile: (image, 0, row, tile)),
    out_shape=jax.ShapeDtypeStruct(planes.shape, planes.dtype),
    interpret=interpret,
    name='warp',
    compiler_params=tpu.CompilerParams(dimension_semantics=('parallel',) * 3, vmem_limit_bytes=VMEM_BYTES),
  )(matrix.reshape(batch, 1, 6), columns)
  return jnp.moveaxis(warped[:, :, :height, :width], 1, -1)


def _kernel(matrix_ref: Any, image_ref: Any, out_ref: Any, *, height: int, width: int, fill: float | None) -> None:
  """Computes one tile: matrix_ref [1, 1, 6], image_ref [1, C, column tiles, H, LANES], out_ref [1, C, ROWS, LANES]."""
  from jax.experimental import pallas

  row, tile = pallas.program_id(1), pallas.program_id(2)
  channels = range(image_ref.shape[1])
  matrix = [matrix_ref[0, 0, part] for part in range(6)]
  still = functools.reduce(jnp.logical_and, [part == one for part, one in zip(matrix, (1, 0, 0, 0, 1, 0), strict=True)])

  @pallas.when(still)
  def _() -> None:
    for channel in channels:
      out_ref[0, channel] = image_ref[0, channel, tile, pallas.ds(pallas.multiple_of(row * ROWS, ROWS), ROWS)]

  @pallas.when(jnp.logical_not(still))
  def _() -> None:
    y, x = (
      (start + jax.lax.broadcasted_iota(jnp.int32, (ROWS, LANES), axis)).astype(jnp.float32) + 0.5
      for axis, start in enumerate((row * ROWS, tile * LANES))
    )
    points = _neighbourhood(matrix, x, y, height, width)
    # Tile index and lane of each column: `//` and `%` by 128.
    sides = [(column >> 7, column & (LANES - 1)) for column in (points.left, points.right)]

    def of_tile(number: Any, around: list[jax.Array]) -> list[jax.Array]:
      def of_row(source: Any, around: list[jax.Array]) -> list[jax.Array]:
        taken = [(level == source) & (its == number) for level in (points.top, points.bottom) for its, _ in sides]
        found: list[jax.Array] = []
        for channel in channels:
          pixels = jnp.broadcast_to(image_ref[0, channel, number, pallas.ds(source, 1)], (ROWS, LANES))
          shuffled = [jnp.take_along_axis(pixels, lane, axis=1, mode='promise_in_bounds') for _, lane in sides]
          found += map(jnp.where, taken, 2 * shuffled, around[4 * channel : 4 * channel + 4])
        return found

      return jax.lax.fori_loop(jnp.min(points.top), jnp.max(points.bottom) + 1, of_row, around)

    nothing = [jnp.zeros((ROWS, LANES), jnp.float32)] * (4 * len(channels))
    around = jax.lax.fori_loop(jnp.min(sides[0][0]), jnp.max(sides[1][0]) + 1, of_tile, nothing)
    for channel in channels:
      out_ref[0, channel] = _mixed(around[4 * channel : 4 * channel + 4], points, fill)


def _neighbourhood(matrix: list[Any], x: jax.Array, y: jax.Array, height: int, width: int) -> Neighbourhood:
  """matrix: six coefficients in row-major order; x and y: centers of the output pixels."""
  x, y = (a * x + b * y + c for a, b, c in (matrix[:3], matrix[3:]))
  column, row = jnp.clip(x - 0.5, 0, width - 1), jnp.clip(y - 0.5, 0, height - 1)
  left, top = jnp.floor(column), jnp.floor(row)
  across, down = column - left, row - top
  left, top = left.astype(jnp.int32), top.astype(jnp.int32)
  right, bottom = jnp.minimum(left + 1, width - 1), jnp.minimum(top + 1, height - 1)
  inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
  return Neighbourhood(left, right, top, bottom, across, down, inside)


def _mixed(around: list[jax.Array], points: Neighbourhood, fill: float | None) -> jax.Array:
  """Bilinear interpolation; around: the pixels top left, top right, bottom left and bottom right."""

  def between(low: jax.Array, high: jax.Array, weight: jax.Array) -> jax.Array:
    return low + (high - low) * weight

  above, below = (between(left, right, points.across) for left, right in (around[:2], around[2:]))
  mixed = between(above, below, points.down)
  return mixed if fill is None else jnp.where(points.inside, mixed, fill)


def _bytes(images: jax.Array) -> int:
  """Bytes of one image in vector memory: double-buffered and padded to whole registers."""
  _, height, width, channels = images.shape
  return 8 * channels * -(-height // ROWS) * ROWS * -(-width // LANES) * LANES
