"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) of a batch."""

import jax
import jax.numpy as jnp

from fmcv_jax.shapes import AnyArray, Float


def mix(
  images: Float[AnyArray, 'batch height width channels'],
  targets: Float[AnyArray, 'batch classes'],
  rng: jax.Array,
  *,
  mixup: float,
  cutmix: float,
) -> tuple[Float[AnyArray, 'batch height width channels'], Float[AnyArray, 'batch classes']]:
  """Mixes each example with its mirror in the batch: images [B, H, W, C], targets [B, classes].

  One weight per batch, as in the authors' code. For cutmix the weight of a label is the fraction of pixels it kept.
  """
  if not mixup and not cutmix:
    return images, targets
  choice_rng, weight_rng, box_rng = jax.random.split(rng, 3)
  height, width = images.shape[1:3]
  use_cutmix = jax.random.bernoulli(choice_rng) if mixup and cutmix else jnp.asarray(bool(cutmix))
  alpha = jnp.where(use_cutmix, cutmix or 1.0, mixup or 1.0)
  weight = jax.random.beta(weight_rng, alpha, alpha)

  # A box of area fraction 1 - weight around a uniform center, clipped at the border.
  center = jax.random.uniform(box_rng, (2,)) * jnp.array([height, width])
  half = jnp.sqrt(1 - weight) * jnp.array([height, width]) / 2
  low, high = jnp.round(center - half), jnp.round(center + half)
  rows, columns = jnp.arange(height), jnp.arange(width)
  inside = ((rows >= low[0]) & (rows < high[0]))[:, None] & ((columns >= low[1]) & (columns < high[1]))[None]

  keep = jnp.where(use_cutmix, 1.0 - inside, weight)[None, :, :, None].astype(images.dtype)
  share = jnp.where(use_cutmix, 1 - inside.mean(), weight)
  return images * keep + images[::-1] * (1 - keep), targets * share + targets[::-1] * (1 - share)
