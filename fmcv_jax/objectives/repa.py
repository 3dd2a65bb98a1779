"""REPA: representation alignment of a denoiser with a pretrained encoder (Yu et al. 2025)."""

import dataclasses

import flax.linen as nn
import jax

from fmcv_jax.augment.normalize import Normalize
from fmcv_jax.models.backbones.vit import ViT
from fmcv_jax.models.common.layers import HEAD_AXES, HIDDEN_AXES, dense


class Projector(nn.Module):
  """Tokens [B, T, D] -> [B, T, outputs], by three layers with SiLU (Yu et al. 2025)."""

  logical_axes = (
    *HIDDEN_AXES,
    *HEAD_AXES,
  )

  width: int
  out_channels: int

  @nn.compact
  def __call__(self, x):
    for name in ('hidden1', 'hidden2'):
      x = jax.nn.silu(dense(self.width, 'float32', name)(x))
    return dense(self.out_channels, 'float32', 'head')(x)


@dataclasses.dataclass(frozen=True)
class Alignment:
  """REPA (Yu et al. 2025, eq. 8): tokens of the denoiser point where those of a pretrained ViT of clean images do.

  teacher   its values come by init_from, at 'extra/teacher'
  layer     of the denoiser, counted from 1
  weight    of the mean negative cosine in the loss
  """

  teacher: nn.Module
  layer: int
  weight: float = 0.5
  hidden: int = 2048
  normalize: Normalize = Normalize()

  def __post_init__(self):
    if not isinstance(self.teacher, ViT):
      raise ValueError('teacher: alignment needs a vision transformer, teacher.name=vit')
