"""The augmentations that a config may name."""

from fmcv_jax.augment.base import Augment
from fmcv_jax.augment.color import Blur, ColorJitter, Invert, Solarize
from fmcv_jax.augment.erasing import RandomErasing
from fmcv_jax.augment.geometry import Affine, Flip
from fmcv_jax.augment.randaugment import RandAugment
from fmcv_jax.augment.three_augment import ThreeAugment

AUGMENTS: dict[str, type[Augment]] = {
  'affine': Affine,
  'blur': Blur,
  'color_jitter': ColorJitter,
  'flip': Flip,
  'invert': Invert,
  'rand_augment': RandAugment,
  'random_erasing': RandomErasing,
  'solarize': Solarize,
  'three_augment': ThreeAugment,
}
