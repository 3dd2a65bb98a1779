"""REPA: representation alignment of a denoiser with a pretrained encoder (Yu et al. 2025)."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fmcv_jax.augment.normalize import Normalize
from fmcv_jax.bounds import NonNegativeFloat, PositiveInt
from fmcv_jax.models.backbones.vit import ViT
from fmcv_jax.models.common.layers import HEAD_AXES, HIDDEN_AXES, dense
from fmcv_jax.models.common.norms import l2_normalize
from fmcv_jax.models.common.patches import patch_features


class Projector(nn.Module):
  """Tokens [B, T, D] -> [B, T, out_channels], by three layers with SiLU (Yu et al. 2025)."""

  logical_axes = (
    *HIDDEN_AXES,
    *HEAD_AXES,
  )

  width: int
  out_channels: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for name in ('hidden1', 'hidden2'):
      x = jax.nn.silu(dense(self.width, 'float32', name)(x))
    return dense(self.out_channels, 'float32', 'head')(x)


@dataclasses.dataclass(frozen=True)
class REPA:
  """Tokens of the denoiser are aligned with the patch features of a pretrained ViT (Yu et al. 2025, eq. 8).

  teacher    frozen, its parameters at 'extra/teacher' (by init_from); it is given the clean images
  layer      of the denoiser whose tokens are aligned, counted from 1
  weight     of the mean negative cosine in the loss
  hidden     width of the projector, at 'params/projector'
  normalize  as the teacher was trained with
  """

  teacher: nn.Module
  layer: PositiveInt
  weight: NonNegativeFloat = 0.5
  hidden: PositiveInt = 2048
  normalize: Normalize = Normalize()

  def __post_init__(self) -> None:
    if not isinstance(self.teacher, ViT):
      raise ValueError('teacher: alignment needs a vision transformer, teacher.name=vit')

  def check(self, network: Any) -> None:
    """ValueError for a network without tokens, or without this layer."""
    if not hasattr(network, 'patch_size'):
      raise ValueError('repa: needs the tokens of a transformer; use network.name=dit')
    if not 1 <= self.layer <= network.depth:
      raise ValueError(f'repa.layer: {self.layer} is not one of the {network.depth} layers')

  def init(self, keys: Iterator[jax.Array], images: jax.Array, network: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(params, extra) of the projector and the teacher."""
    extra = {'teacher': self.teacher.init(next(keys), self._for_teacher(images))['params']}
    tokens = jnp.zeros((1, 1, network.width))
    return {'projector': self._projector.init(next(keys), tokens)['params']}, extra

  def alignment(self, params: Any, extra: Any, network: Any, tokens: Any, images: jax.Array) -> jax.Array:
    """Mean cosine of the projected tokens [B, T, D] and the teacher's patches, which are resized to their grid.

    images [B, H, W, 3] in [0, 1]
    """
    rows, columns = (side // network.patch_size for side in network.input_shape[:2])
    target = patch_features(self.teacher, extra['teacher'], self._for_teacher(images)).astype(jnp.float32)
    if target.shape[1:3] != (rows, columns):
      target = jax.image.resize(target, (target.shape[0], rows, columns, target.shape[-1]), 'bilinear')
    projected: Any = self._projector.apply({'params': params['projector']}, tokens.astype(jnp.float32))
    return jnp.mean(jnp.sum(l2_normalize(projected) * l2_normalize(target.reshape(projected.shape)), axis=-1))

  @property
  def _projector(self) -> Projector:
    teacher: Any = self.teacher
    return Projector(self.hidden, teacher.width)

  def _for_teacher(self, images: jax.Array) -> jax.Array:
    teacher: Any = self.teacher
    shape = (images.shape[0], *teacher.input_shape)
    return self.normalize(images if images.shape == shape else jax.image.resize(images, shape, 'cubic'))
