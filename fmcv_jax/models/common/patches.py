"""Conversion between images and sequences of patches."""

from typing import Any

import jax
import jax.numpy as jnp

from fmcv_jax.shapes import AnyArray, Float, Int, Shaped

# Logical axes of the patch embedding `patch`, for the `logical_axes` of networks.
PATCH_AXES = (
  (r'(.*/)?patch/kernel', (None, 'embed')),
  (r'(.*/)?patch/bias', (None,)),
)


def patchify(
  images: Shaped[AnyArray, 'batch height width channels'], patch: int
) -> tuple[Shaped[AnyArray, 'batch patches pixels'], tuple[int, int]]:
  """Cuts images [B, H, W, C] into patches [B, rows * columns, patch * patch * C]; also returns (rows, columns)."""
  batch, height, width, channels = images.shape
  if height % patch or width % patch:
    raise ValueError(f'images of {height} x {width} pixels are not divisible by the patch size {patch}')
  rows, columns = height // patch, width // patch
  x = images.reshape(batch, rows, patch, columns, patch, channels).swapaxes(2, 3)
  return x.reshape(batch, rows * columns, -1), (rows, columns)


def patch_features(
  network: Any, params: Any, images: Float[AnyArray, 'batch height width channels']
) -> Float[jax.Array, 'batch rows columns features']:
  """Last patch tokens of normalized images [B, H, W, 3] on their grid: float32 [B, rows, columns, D].

  For any network whose `tokens` are `prefix` special tokens followed by the patches of `patch_size` x `patch_size`.
  """
  features: Any = network.apply({'params': params}, images)
  tokens = features.tokens[:, network.prefix :]
  batch, height, width, _ = images.shape
  return tokens.astype(jnp.float32).reshape(batch, height // network.patch_size, width // network.patch_size, -1)


def random_keep(rng: jax.Array, batch: int, patches: int, share: float) -> Int[jax.Array, '{batch} kept']:
  """Indices int32 [B, N] of a random subset of patches per image, without repeats; N = round(share * patches)."""
  noise = jax.random.uniform(rng, (batch, patches))
  return jnp.argsort(noise, axis=1)[:, : max(1, round(share * patches))]


def unpatchify(
  patches: Shaped[AnyArray, 'batch patches pixels'], grid: tuple[int, int], patch: int
) -> Shaped[AnyArray, 'batch height width channels']:
  """The inverse of patchify: [B, rows * columns, patch * patch * C] -> [B, H, W, C]."""
  (rows, columns), batch = grid, patches.shape[0]
  x = patches.reshape(batch, rows, columns, patch, patch, -1).swapaxes(2, 3)
  return x.reshape(batch, rows * patch, columns * patch, -1)
