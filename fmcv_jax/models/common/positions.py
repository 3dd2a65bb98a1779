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


def resize_grid(table: jax.Array, old: tuple[int, int], new: tuple[int, int]) -> jax.Array:
  """Resizes a learned table [old rows * old columns, dim] by antialiased bicubic interpolation."""
  if old == new:
    return table
  dim = table.shape[-1]
  grid = jax.image.resize(table.reshape(*old, dim).astype(jnp.float32), (*new, dim), 'cubic', antialias=True)
  return grid.reshape(-1, dim).astype(table.dtype)


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


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
  """Rotates the pairs (x[i], x[i + K/2]) of queries or keys [B, T, H, K] by `angles` [T, K/2] or [B, T, K/2]."""
  cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
