"""Knowledge distillation: hard (DeiT, Touvron et al. 2021) and soft (Hinton et al. 2015).

Letters in shapes: B batch, K classes.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from fmcv_jax.augment.normalize import Normalize
from fmcv_jax.bounds import Fraction, PositiveFloat
from fmcv_jax.objectives.base import flax_variables
from fmcv_jax.shapes import AnyArray, Float


@dataclasses.dataclass(frozen=True)
class Distillation:
  """Distillation from a frozen teacher: the total loss is (1 - weight) * loss + weight * distillation loss.

  teacher      network with the same classes as the student, applied to the same augmented and mixed images;
               config.init_from loads its parameters to `extra/teacher`
  kind         'hard': cross-entropy with the teacher's top-1 class; 'soft': KL divergence of the two distributions
  temperature  temperature of the soft distillation loss
  normalize    normalization of the teacher's input images
  """

  teacher: nn.Module
  kind: Literal['hard', 'soft'] = 'hard'
  weight: Fraction = 0.5
  temperature: PositiveFloat = 1.0
  normalize: Normalize = Normalize()

  def __post_init__(self) -> None:
    if not getattr(self.teacher, 'num_classes', 0):
      raise ValueError('teacher: set num_classes=<number of classes>')
    if not 0 <= self.weight <= 1:
      raise ValueError(f'weight: expected a fraction between 0 and 1, got {self.weight}')

  def init(self, rng: jax.Array, images: jax.Array) -> dict[str, Any]:
    """Initial entries of `extra` for the teacher, which init_from replaces."""
    initial = dict(self.teacher.init(rng, images))
    return {'teacher': initial.pop('params'), **{f'teacher_{name}': tree for name, tree in initial.items()}}

  def loss(self, logits: jax.Array, extra: Mapping[str, Any], images: jax.Array) -> jax.Array:
    """Distillation loss [B] of the student's logits [B, K]; the teacher is applied to images [B, H, W, 3] in [0, 1]."""
    features: Any = self.teacher.apply(flax_variables(extra['teacher'], extra, 'teacher_'), self.normalize(images))
    return disagreement(logits, jax.lax.stop_gradient(features.output), self.kind, self.temperature)


def disagreement(
  logits: Float[AnyArray, 'batch classes'],
  teacher: Float[AnyArray, 'batch classes'],
  kind: Literal['hard', 'soft'],
  temperature: float = 1.0,
) -> Float[jax.Array, ' batch']:
  """[B], cross-entropy of logits [B, K] with the teacher's top-1 class (eq. 3), or the KL divergence at a temperature.

  The soft loss is T^2 KL(teacher || student) / K, as in DeiT's code; eq. 2 lacks the division by K.
  """
  logits, teacher = logits.astype(jnp.float32), teacher.astype(jnp.float32)
  if kind == 'hard':
    return optax.softmax_cross_entropy_with_integer_labels(logits, teacher.argmax(-1))
  student, target = (jax.nn.log_softmax(x / temperature) for x in (logits, teacher))
  return temperature**2 * jnp.mean(jnp.exp(target) * (target - student), axis=-1)
