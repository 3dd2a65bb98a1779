"""Masks of objects from attention, without any training on masks (DINO, Caron et al. 2021, section 4.2.2)."""

import dataclasses

import numpy as np
from typing_extensions import override

from fmcv_jax.bounds import Byte, NonNegativeInt, PositiveFraction, PositiveInt
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.errors import UserError
from fmcv_jax.evaluate.base import EvaluatedModel, Evaluator, Metrics
from fmcv_jax.interpret.attention_maps import attention_mass_masks


@dataclasses.dataclass(frozen=True)
class ObjectMasks(Evaluator):
  """Jaccard index of the patches to which the class token pays `mass` of its attention, with the object's pixels.

  The object is what differs from the plain `background`: for drawings such as the emoji's. `jaccard_best_head` takes
  each image's best head, as the paper does; `jaccard_everything` is what calling all of the image the object scores.
  """

  data: Pipeline
  mass: PositiveFraction = 0.6
  background: tuple[Byte, Byte, Byte] = (255, 255, 255)
  batch_size: PositiveInt = 256
  every: NonNegativeInt = 0

  @override
  def prepare(self, subject: EvaluatedModel) -> None:
    subject.check_dataset('attention', self.data, self.batch_size, truth=('image',))

  @override
  def __call__(self, subject: EvaluatedModel) -> Metrics:
    attention, _, fields = subject.map_dataset('attention', self.data, self.batch_size, truth=('image',))
    truth = (np.abs(fields['image'].astype(int) - np.array(self.background)) > 8).any(-1)
    if not truth.any((1, 2)).all():
      raise UserError(f'object_masks: some images have no foreground pixels (all are background {self.background})')
    heads = np.stack(
      [jaccard(attention_mass_masks(attention[:, h], self.mass), truth) for h in range(attention.shape[1])]
    )
    return {
      'jaccard_best_head': float(heads.max(0).mean()),
      'jaccard_mean_head': float(heads.mean()),
      'jaccard_everything': float(truth.mean((1, 2)).mean()),
    }


def jaccard(masks: np.ndarray, truth: np.ndarray) -> np.ndarray:
  """Intersection over union of masks bool [N, rows, columns] with the truth bool [N, H, W], each row of them: [N]."""
  rows, columns = truth.shape[1] // masks.shape[1], truth.shape[2] // masks.shape[2]
  masks = masks.repeat(rows, axis=1).repeat(columns, axis=2)
  return (masks & truth).sum((1, 2)) / np.maximum((masks | truth).sum((1, 2)), 1)
