"""Self-distillation: DINO (Caron et al. 2021), with iBOT's masked patches (Zhou et al. 2022) and DINOv2's additions.

The student processes several crops of an image; the teacher, an exponential moving average of the student, processes
the two global crops. The student predicts the teacher's distribution over prototypes from every other crop.

Letters in shapes: B batch, G global crops (2), V all crops, M masked patches at most, K prototypes, D width.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from typing_extensions import override

from fmcv_jax.augment.apply import apply_augments
from fmcv_jax.augment.base import Augment
from fmcv_jax.augment.normalize import Normalize
from fmcv_jax.bounds import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from fmcv_jax.fields import height_width
from fmcv_jax.models.self_supervised.dino import DinoNetwork
from fmcv_jax.objectives.base import Loss, Objective, mean_loss
from fmcv_jax.objectives.block_masks import block_masks, most_hidden
from fmcv_jax.objectives.dino_losses import diagnosis, koleo, patch_loss, sinkhorn, view_loss
from fmcv_jax.objectives.outputs import Batch, ImageEncoder, Output, Params, encoder_outputs

GLOBALS = 2


@dataclasses.dataclass(frozen=True)
class SelfDistillation(Objective):
  """Self-distillation on crops of unlabeled images; the trained model is the teacher.

  momentum                 initial EMA momentum of the teacher; increases to 1 by a half cosine
  momentum_steps           length of that schedule in steps; None for the length of the run
  local_crops_number       number of local crops of local_size x local_size pixels
  centering                collapse prevention: 'centering' subtracts the running mean of the teacher's logits,
                           'sinkhorn_knopp' makes all prototypes equally frequent in the batch (SwAV, Caron et al. 2020)
  teacher_temperature      initial value, and value after temperature_steps
  freeze_last_layer_steps  steps in which the prototypes keep their initialization
  ibot_loss_weight         weight of the iBOT loss: the student predicts the teacher's distributions of masked patches
  mask_ratio_min_max       bounds of the fraction of masked patches of a masked crop
  mask_sample_probability  probability that a global crop is masked
  koleo_weight             weight of the KoLeo regularizer, which spreads features (Sablayrolles et al. 2019)
  global_augments          one sequence for each of the two global crops
  """

  network: nn.Module
  momentum: Fraction = 0.996
  momentum_steps: PositiveInt | None = None
  local_crops_number: NonNegativeInt = 8
  local_size: PositiveInt = 96
  centering: Literal['centering', 'sinkhorn_knopp'] = 'centering'
  centre_momentum: Fraction = 0.9
  sinkhorn_rounds: PositiveInt = 3
  student_temperature: PositiveFloat = 0.1
  teacher_temperature: tuple[PositiveFloat, PositiveFloat] = (0.04, 0.04)
  temperature_steps: NonNegativeInt = 0
  freeze_last_layer_steps: NonNegativeInt = 0
  ibot_loss_weight: NonNegativeFloat = 0.0
  mask_ratio_min_max: tuple[Fraction, Fraction] = (0.1, 0.5)
  mask_sample_probability: Fraction = 0.5
  koleo_weight: NonNegativeFloat = 0.0
  global_augments: tuple[tuple[Augment, ...], tuple[Augment, ...]] = ((), ())
  local_augment: tuple[Augment, ...] = ()
  normalize: Normalize = Normalize()

  def __post_init__(self) -> None:
    if not isinstance(self.network, DinoNetwork):
      raise ValueError('network: self-distillation needs network.name=dino')
    if self.momentum_steps is not None and self.momentum_steps < 1:
      raise ValueError(
        f'momentum_steps: expected at least 1, or None for the steps of the run; got {self.momentum_steps}'
      )
    if self.local_size % self.network.encoder.patch_size:
      raise ValueError(
        f'local_size: {self.local_size} is not divisible by the patch size {self.network.encoder.patch_size}'
      )
    if self.ibot_loss_weight and not self.network.encoder.mask_token:
      raise ValueError('patch_weight: masked patches need network.encoder.mask_token=True')
    if not 0 <= self.mask_ratio_min_max[0] <= self.mask_ratio_min_max[1] < 1:
      raise ValueError(f'mask_ratio_min_max: expected fractions 0 <= low <= high < 1, got {self.mask_ratio_min_max}')

  @property
  def grid(self) -> tuple[int, int]:
    """Rows and columns of patches of a global crop."""
    return self.network.encoder.grid

  @property
  @override
  def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
    channels = self.network.input_shape[-1]
    views = {
      'global_views': (GLOBALS, height_width(self.network.image_size)),
      'local_views': (self.local_crops_number, height_width(self.local_size)),
    }
    return {
      name: jax.ShapeDtypeStruct((count, *size, channels), jnp.uint8) for name, (count, size) in views.items() if count
    }

  @override
  def init(self, rng: jax.Array) -> tuple[Params, Any]:
    picked = jnp.zeros((1, 1), jnp.int32) if self.ibot_loss_weight else None
    params = self.network.init(rng, jnp.zeros((1, *self.network.input_shape)), picked=picked)['params']
    extra = {'teacher': jax.tree.map(jnp.copy, params), 'step': jnp.zeros((), jnp.int32)}
    if self.centering == 'centering':
      names = ('image', 'patches') if self.ibot_loss_weight else ('image',)
      extra['centre'] = {name: jnp.zeros(self.network.head.prototypes) for name in names}
    return params, extra

  @override
  def loss(self, params: Params, batch: Batch, rng: jax.Array, extra: Any) -> Loss:
    global_rng, local_rng, mask_rng, dropout_rng = jax.random.split(rng, 4)
    large, small = self.views(batch, global_rng, local_rng)
    images, temperature = large.shape[0], self.temperature_at(extra['step'])
    params = self.frozen(params, extra['step'])
    masked = picked = valid = None
    if self.ibot_loss_weight:
      masked, picked, valid = self.masks(mask_rng, images)

    def student(views: jax.Array, **masks: Any) -> Any:
      return self.network.apply({'params': params}, views, train=True, rngs={'dropout': dropout_rng}, **masks)

    teacher: Any = self.network.apply({'params': extra['teacher']}, large, picked=picked)
    student_large: Any = student(large, masked=masked, picked=picked)
    scores = [by_example(student_large.image, GLOBALS)]
    if small is not None:
      scores.append(by_example(student(small).image, self.local_crops_number))

    targets = self.targets_of(teacher.image, extra, 'image', temperature)
    image_loss = view_loss(jnp.concatenate(scores, 1) / self.student_temperature, by_example(targets, GLOBALS))
    metrics = {'dino': image_loss, **diagnosis(targets)}
    aux = {'image': teacher.image.mean(0)}
    loss = image_loss
    if valid is not None:
      flat, weight = teacher.patches.reshape(-1, teacher.patches.shape[-1]), valid.reshape(-1)
      patch_targets = self.targets_of(flat, extra, 'patches', temperature, valid=weight).reshape(teacher.patches.shape)
      metrics['ibot'] = patch_loss(student_large.patches / self.student_temperature, patch_targets, valid)
      aux['patches'] = jnp.einsum('n,nk->k', weight, flat, precision='highest') / jnp.maximum(weight.sum(), 1)
      loss = loss + self.ibot_loss_weight * metrics['ibot']
    if self.koleo_weight:
      features = by_example(student_large.features, GLOBALS)
      metrics['koleo'] = koleo(features[:, 0]) + koleo(features[:, 1])
      loss = loss + self.koleo_weight * metrics['koleo']
    return mean_loss(loss, metrics, jax.lax.stop_gradient(aux))

  def views(self, batch: Batch, global_rng: jax.Array, local_rng: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Augmented, normalized crops [B * G, H, W, 3] and [B * L, h, w, 3] (or None); crops of an image are adjacent."""
    large = jnp.stack(
      [
        apply_augments(batch['global_views'][:, view], augments, jax.random.fold_in(global_rng, view))
        for view, augments in enumerate(self.global_augments)
      ],
      axis=1,
    )
    large = self.normalize(large.reshape(-1, *large.shape[2:]))
    if not self.local_crops_number:
      return large, None
    small = batch['local_views'].reshape(-1, *batch['local_views'].shape[2:])
    return large, self.normalize(apply_augments(small, self.local_augment, local_rng))

  def masks(self, rng: jax.Array, images: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(mask bool [B * G, T], indices int32 [B * G, M] of the masked patches, float32 [B * G, M]: 0 for padding)."""
    masked = block_masks(rng, images, self.grid, self.mask_ratio_min_max, self.mask_sample_probability)
    picked = jnp.argsort(~masked, axis=1)[:, : most_hidden(self.grid, self.mask_ratio_min_max)].astype(jnp.int32)
    return masked, picked, jnp.take_along_axis(masked, picked, axis=1).astype(jnp.float32)

  def masked_patches(self, params: Params, extra: Any, batch: Batch) -> jax.Array:
    """bool [B, GLOBALS, rows, columns]: the patches of the global crops that are masked for the student."""
    images = len(batch['global_views'])
    masked, _, _ = self.masks(jax.random.split(batch['rng'], 4)[2], images * GLOBALS)
    return masked.reshape(images, GLOBALS, *self.grid)

  def targets_of(
    self, scores: jax.Array, extra: Any, name: str, temperature: jax.Array, valid: jax.Array | None = None
  ) -> jax.Array:
    """Teacher targets: probabilities [N, K] from its logits [N, K]."""
    if self.centering == 'sinkhorn_knopp':
      return sinkhorn(scores / temperature, self.sinkhorn_rounds, valid)
    return jax.nn.softmax((scores - extra['centre'][name]) / temperature)

  def temperature_at(self, step: jax.Array) -> jax.Array:
    """Temperature of the teacher at a step: linear from the first value to the second, then constant."""
    start, end = self.teacher_temperature
    return start + (end - start) * jnp.minimum(step / max(self.temperature_steps, 1), 1.0)

  def frozen(self, params: Params, step: jax.Array) -> Params:
    """params, with the gradient of the prototypes stopped in the first steps."""

    def hold(name: str, w: jax.Array) -> jax.Array:
      return jnp.where(step < self.freeze_last_layer_steps, jax.lax.stop_gradient(w), w) if name == 'prototypes' else w

    heads = {k: {n: hold(n, w) for n, w in v.items()} for k, v in params.items() if k.endswith('head')}
    return {**params, **heads}

  @override
  def with_total_steps(self, steps: int) -> 'SelfDistillation':
    return self if self.momentum_steps else dataclasses.replace(self, momentum_steps=steps)

  @override
  def update_extra(self, extra: Any, params: Params, aux: Any, step: jax.Array) -> Any:
    if self.momentum_steps is None:
      raise ValueError('momentum_steps is not set; train objective.with_total_steps(steps)')
    rest = jnp.minimum(step / self.momentum_steps, 1.0)
    momentum = 1 - (1 - self.momentum) * (1 + jnp.cos(math.pi * rest)) / 2
    new = {
      'teacher': jax.tree.map(lambda t, p: t * momentum + p * (1 - momentum), extra['teacher'], params),
      'step': step + 1,
    }
    if self.centering == 'centering':
      keep = self.centre_momentum
      new['centre'] = jax.tree.map(lambda old, mean: old * keep + mean * (1 - keep), extra['centre'], aux)
    return new

  @override
  def outputs(self) -> Mapping[str, Output]:
    offered = encoder_outputs(self.network.encoder, self._encoder)
    if self.ibot_loss_weight:
      offered['masked_patches'] = Output(self.masked_patches, 'masks', ('global_views',))
    return offered

  def _encoder(self, params: Params, extra: Any) -> ImageEncoder:
    return ImageEncoder(self.network.encoder, {'params': extra['teacher']['encoder']}, self.normalize)


def by_example(x: jax.Array, views: int) -> jax.Array:
  """[B * views, ...] -> [B, views, ...]."""
  return x.reshape(-1, views, *x.shape[1:])
