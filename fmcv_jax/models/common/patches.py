"""Conversion between images and sequences of patches."""

from typing import Any

import jax
import jax.numpy as jnp

from fmcv_jax.bounds import PositiveInt

# Logical axes of the patch embedding `patch`, for the `logical_axes` of networks.
PATCH_AXES = (
  (r'(.*/)?patch/kernel', (None, 'embed')),
  (r'(.*/)?patch/bias', (None,)),
)
ImageSize = PositiveInt | tuple[PositiveInt, PositiveInt]


def height_width(size: ImageSize) -> tuple[int, int]:
  """(height, width) of an image size; a single number is a square."""
  return (size, size) if isinstance(size, int) else (size[0], size[1])


def patchify(images: jax.Array, patch: int) -> tuple[jax.Array, tuple[int, int]]:
  """Cuts images [B, H, W, C] into patches [B, rows * columns, patch * patch * C]; also returns (rows, columns)."""
  batch, height, width, channels = images.shape
  if height % patch or width % patch:
    raise ValueError(f'images of {height} x {width} pixels are not divisible by the patch size {patch}')
  rows, columns = height // patch, width // patch
  x = images.reshape(batch, rows, patch, columns, patch, channels).swapaxes(2, 3)
  return x.reshape(batch, rows * columns, -1), (rows, columns)


def patch_features(network: Any, params, images: jax.Array) -> jax.Array:
  """Last patch tokens of normalized images [B, H, W, 3] on their grid: float32 [B, rows, columns, D].

  For any network whose `tokens` are `prefix` special tokens followed by the patches of `patch_size` x `patch_size`.
  """
  features: Any = network.apply({'params': params}, images)
  tokens = features.tokens[:, network.prefix :]
  batch, height, width, _ = images.shape
  return tokens.astype(jnp.float32).reshape(batch, height // network.patch_size, width // network.patch_size, -1)


def random_keep(rng: jax.Array, batch: int, patches: int, share: float) -> jax.Array:
  """Indices int32 [B, N] of a random subset of patches per image, without repeats; N = round(share * patches)."""
  noise = jax.random.uniform(rng, (batch, patches))
  return jnp.argsort(noise, axis=1)[:, : max(1, round(share * patches))]


def unpatchify(patches: jax.Array, grid: tuple[int, int], patch: int) -> jax.Array:
  """The inverse of patchify: [B, rows * columns, patch * patch * C] -> [B, H, W, C]."""
  (rows, columns), batch = grid, patches.shape[0]
  x = patches.reshape(batch, rows, columns, patch, patch, -1).swapaxes(2, 3)
  return x.reshape(batch, rows * patch, columns * patch, -1)
