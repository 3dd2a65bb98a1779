"""Positional embeddings: fixed sine-cosine tables, resized learned tables, and rotary angles on a 2-D grid."""

import jax
import jax.numpy as jnp
import numpy as np


def sincos_2d(
  height: int,
  width: int,
  dim: int,
  temperature: float = 10_000.0,
  *,
  first: tuple[float, float] = (0.0, 0.0),
  step: float = 1.0,
) -> np.ndarray:
  """Fixed 2-D table, float32 [height * width, dim], row-major (MoCo v3, Chen et al. 2021; MAE, He et al. 2022).

  The four quarters of `dim` are sin and cos of the column, then sin and cos of the row, at `dim / 4` frequencies.
  Coordinates start at `first` and increase by `step`.
  """
  if dim % 4:
    raise ValueError(f'a 2-D sine-cosine table needs a width divisible by 4, got {dim}')
  frequency = temperature ** -(np.arange(dim // 4) / (dim // 4))
  rows, columns = np.array(first).reshape(2, 1, 1) + step * np.mgrid[:height, :width].reshape(2, -1, 1)
  parts = (np.sin(columns * frequency), np.cos(columns * frequency), np.sin(rows * frequency), np.cos(rows * frequency))
  return np.concatenate(parts, axis=1).astype(np.float32)


def resize_grid(table: jax.Array, old: tuple[int, int], new: tuple[int, int], *, antialias: bool = True) -> jax.Array:
  """Resizes a learned table [old rows * old columns, dim] by bicubic interpolation.

  antialias  True filters when downsizing, with Keys' a = -0.5, as timm, Pillow and TensorFlow do. False does not filter
             and uses a = -0.75, as torch.nn.functional.interpolate without `antialias` does (most of transformers).
  """
  if old == new:
    return table
  dim = table.shape[-1]
  grid = table.reshape(*old, dim).astype(jnp.float32)
  if antialias:
    grid = jax.image.resize(grid, (*new, dim), 'cubic', antialias=True)
  else:
    rows, columns = (cubic_matrix(before, after) for before, after in zip(old, new, strict=True))
    grid = jnp.einsum('ir,jc,rcd->ijd', rows, columns, grid, precision='highest')
  return grid.reshape(-1, dim).astype(table.dtype)


def cubic_matrix(old: int, new: int, a: float = -0.75) -> np.ndarray:
  """The matrix [new, old] of cubic interpolation (Keys 1981) between the centers of pixels; the edge is repeated."""
  center = (np.arange(new) + 0.5) * old / new - 0.5
  first = np.floor(center).astype(int)
  weights = np.zeros((new, old))
  for tap in range(-1, 3):
    x = np.abs(center - (first + tap))
    near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
    np.add.at(weights, (np.arange(new), np.clip(first + tap, 0, old - 1)), np.where(x <= 1, near, far))
  return weights.astype(np.float32)


def rope_2d(height: int, width: int, head_dim: int, prefix: int, temperature: float = 100.0) -> np.ndarray:
  """Axial rotary angles (Heo et al. 2024, eq. 13), float32 [prefix + height * width, head_dim / 2].

  Half of the angles depend on the column and half on the row. The `prefix` tokens (class token, registers) have no
  position: their angles are zero.
  """
  if head_dim % 4:
    raise ValueError(f'2-D rotary positions need a head dimension divisible by 4, got {head_dim}')
  frequency = temperature ** -(np.arange(head_dim // 4) / (head_dim // 4))
  rows, columns = np.mgrid[:height, :width].astype(np.float64).reshape(2, -1, 1)
  angles = np.concatenate([columns * frequency, rows * frequency], axis=1)
  return np.concatenate([np.zeros((prefix, head_dim // 2)), angles]).astype(np.float32)


def rope_1d(positions: jax.Array, head_dim: int, base: float = 10_000.0) -> jax.Array:
  """Rotary angles of a sequence (Su et al. 2021, eq. 15), float32 [..., T, head_dim / 2], for `positions` [..., T]."""
  if head_dim % 2:
    raise ValueError(f'rotary positions need an even head dimension, got {head_dim}')
  frequency = base ** -(np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
  return positions[..., None].astype(jnp.float32) * frequency.astype(np.float32)


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
  """Rotates the pairs (x[i], x[i + K/2]) of queries or keys [B, T, H, K] by `angles` [T, K/2] or [B, T, K/2]."""
  cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
