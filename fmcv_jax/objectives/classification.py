"""Supervised classification: softmax or sigmoid cross-entropy, label smoothing, mixup and cutmix on the device."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from typing_extensions import override

from fmcv_jax.augment.apply import apply_augments
from fmcv_jax.augment.base import Augment
from fmcv_jax.augment.mixing import mix
from fmcv_jax.augment.normalize import Normalize
from fmcv_jax.bounds import Decay, NonNegativeFloat
from fmcv_jax.objectives.base import BATCH_STATS, Loss, Objective, flax_variables, image_field, mean_loss
from fmcv_jax.objectives.distillation import Distillation
from fmcv_jax.objectives.outputs import Batch, ImageEncoder, Output, Params, encoder_outputs


@dataclasses.dataclass(frozen=True)
class Classification(Objective):
  """Learns labels from images; the network's `outputs` is the number of classes.

  loss_name   'softmax' (one class an image) or 'sigmoid' (each class for itself, summed; Beyer et al. 2020)
  mixup       alpha of the Beta distribution of the mixing weight (Zhang et al. 2018), 0 for none
  cutmix      the same for pasted boxes (Yun et al. 2019); where both are set each batch draws one of them
  distillation  a teacher, from whom the distillation head learns (or, without one, the head)
  """

  network: nn.Module
  loss_name: Literal['softmax', 'sigmoid'] = 'softmax'
  label_smoothing: Decay = 0.0
  mixup: NonNegativeFloat = 0.0
  cutmix: NonNegativeFloat = 0.0
  augment: tuple[Augment, ...] = ()
  normalize: Normalize = Normalize()
  distillation: Distillation | None = None

  def __post_init__(self) -> None:
    if not getattr(self.network, 'num_classes', 0):
      raise ValueError('classification needs a network with num_classes=<number of classes>')
    if self.distillation and self.distillation.teacher.num_classes != self.network.num_classes:  # type: ignore[attr-defined]
      raise ValueError(
        f'distillation.teacher: expected its outputs to be the {self.network.num_classes} of the network'
      )
    if not self.distillation and getattr(self.network, 'distilled', False):
      raise ValueError('network.distilled: requires objective.distillation, whose teacher trains the second head')

  @property
  @override
  def frozen_networks(self) -> tuple[str, ...]:
    return () if self.distillation is None else ('teacher',)

  @property
  @override
  def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
    return {
      'image': image_field(self.network),
      'label': jax.ShapeDtypeStruct((), jnp.int32),
    }

  @property
  @override
  def class_counts(self) -> Mapping[str, tuple[int, int | None]]:
    return {'label': (self.network.num_classes, None)}

  @override
  def init(self, rng: jax.Array) -> tuple[Params, Any]:
    images = jnp.zeros((1, *self.network.input_shape))  # type: ignore[attr-defined]
    extra = dict(self.network.init(rng, images))
    params = extra.pop('params')
    if self.distillation is not None:
      extra |= self.distillation.init(jax.random.fold_in(rng, 1), images)
    return params, extra

  @override
  def loss(self, params: Params, batch: Batch, rng: jax.Array, extra: Any) -> Loss:
    augment_rng, mix_rng, dropout_rng = jax.random.split(rng, 3)
    targets = jax.nn.one_hot(batch['label'], self.network.num_classes)
    images = apply_augments(batch['image'], self.augment, augment_rng)
    images, targets = mix(images, targets, mix_rng, mixup=self.mixup, cutmix=self.cutmix)
    smooth = targets * (1 - self.label_smoothing) + self.label_smoothing / self.network.num_classes
    output: Any = self.network.apply(
      flax_variables(params, extra),
      self.normalize(images),
      train=True,
      rngs={'dropout': dropout_rng},
      mutable=[BATCH_STATS],
    )
    features, statistics = output
    logits, second = (x.astype(jnp.float32) for x in features.head_outputs or (features.output, features.output))
    if self.loss_name == 'softmax':
      losses = optax.softmax_cross_entropy(logits, smooth)
    else:
      losses = optax.sigmoid_binary_cross_entropy(logits, smooth).sum(-1)
    metrics = {'accuracy': logits.argmax(-1) == targets.argmax(-1)}
    if self.distillation is not None:
      metrics['distillation'] = self.distillation.loss(second, extra, images)
      losses = (1 - self.distillation.weight) * losses + self.distillation.weight * metrics['distillation']
    return mean_loss(losses, metrics, statistics)

  @override
  def update_extra(self, extra: Any, params: Params, aux: Any, step: jax.Array) -> Any:
    return {**extra, **aux}

  @override
  def outputs(self) -> Mapping[str, Output]:
    return encoder_outputs(self.network, self._encoder)

  def _encoder(self, params: Params, extra: Any) -> ImageEncoder:
    return ImageEncoder(self.network, flax_variables(params, extra), self.normalize)
