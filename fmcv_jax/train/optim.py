"""Optimizers and learning-rate schedules, by name, through optax."""

import abc
import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from typing_extensions import override

from fmcv_jax.bounds import Decay, NonNegativeFloat, Pattern, PositiveFloat, PositiveFraction, PositiveInt
from fmcv_jax.errors import did_you_mean
from fmcv_jax.models.common.layers import Dtype
from fmcv_jax.parallel.rules import num_shards, path_of, with_logical_constraint
from fmcv_jax.train.layer_decay import layerwise_lr_scales, map_by_path
from fmcv_jax.train.schedules import Schedule


class UpdateRule(abc.ABC):
  """An optimizer without its learning-rate schedule."""

  @abc.abstractmethod
  def make(
    self, rate: optax.Schedule, decay: float | optax.Schedule, mask: Callable[[Any], Any]
  ) -> optax.GradientTransformation:
    """The optax transformation, with decoupled weight decay `decay` (times the learning rate) where `mask` is True."""


@dataclasses.dataclass(frozen=True)
class AdamW(UpdateRule):
  """Loshchilov & Hutter 2019. `mu_dtype` bfloat16 halves the first moment."""

  b1: Decay = 0.9
  b2: Decay = 0.999
  eps: PositiveFloat = 1e-8
  mu_dtype: Dtype = 'float32'

  @override
  def make(
    self, rate: optax.Schedule, decay: float | optax.Schedule, mask: Callable[[Any], Any]
  ) -> optax.GradientTransformation:
    return optax.adamw(rate, self.b1, self.b2, self.eps, weight_decay=decay, mask=mask, mu_dtype=self.mu_dtype)


@dataclasses.dataclass(frozen=True)
class Lion(UpdateRule):
  """Chen et al. 2023: the sign of an interpolated momentum; requires a 3 to 10 times lower learning rate than AdamW."""

  b1: Decay = 0.9
  b2: Decay = 0.99
  mu_dtype: Dtype = 'float32'

  @override
  def make(
    self, rate: optax.Schedule, decay: float | optax.Schedule, mask: Callable[[Any], Any]
  ) -> optax.GradientTransformation:
    return optax.lion(rate, self.b1, self.b2, weight_decay=decay, mask=mask, mu_dtype=self.mu_dtype)


@dataclasses.dataclass(frozen=True)
class Adafactor(UpdateRule):
  """Shazeer & Stern 2018 as Zhai et al. 2022 use it: factored second moment, momentum, no parameter scaling."""

  momentum: Decay | None = 0.9
  momentum_dtype: Dtype = 'bfloat16'
  decay_rate: Decay = 0.8
  clip_rms: PositiveFloat = 1.0
  min_factored: PositiveInt = 128

  @override
  def make(
    self, rate: optax.Schedule, decay: float | optax.Schedule, mask: Callable[[Any], Any]
  ) -> optax.GradientTransformation:
    momentum = optax.ema(self.momentum, debias=False, accumulator_dtype=self.momentum_dtype) if self.momentum else None
    parts = (
      optax.scale_by_factored_rms(decay_rate=self.decay_rate, min_dim_size_to_factor=self.min_factored),
      optax.clip_by_block_rms(self.clip_rms),
      momentum,
      optax.add_decayed_weights(decay, mask),
      optax.scale_by_learning_rate(rate),
    )
    return optax.chain(*(part for part in parts if part is not None))


@dataclasses.dataclass(frozen=True)
class Lamb(UpdateRule):
  """You et al. 2020: Adam updates, including weight decay, scaled to the norm of the weights.

  As in the implementations of NVIDIA and timm, only weights with weight decay are scaled. Each layer of a stack has its
  own norm.
  """

  b1: Decay = 0.9
  b2: Decay = 0.999
  eps: PositiveFloat = 1e-6

  @override
  def make(
    self, rate: optax.Schedule, decay: float | optax.Schedule, mask: Callable[[Any], Any]
  ) -> optax.GradientTransformation:
    def rescaled(updates: Any, params: Any) -> Any:
      return jax.tree_util.tree_map_with_path(
        lambda key_path, u, w, decayed: (
          u * _trust_ratio(u, w, 'blocks' in path_of(key_path).split('/')) if decayed else u
        ),
        updates,
        params,
        mask(params),
      )

    return optax.chain(
      optax.scale_by_adam(self.b1, self.b2, self.eps),
      optax.add_decayed_weights(decay, mask),
      optax.stateless(rescaled),
      optax.scale_by_learning_rate(rate),
    )


def _trust_ratio(update: jax.Array, weights: jax.Array, stacked: bool) -> jax.Array:
  """Trust ratio: norm of the weights over norm of the update, per layer; 1 if either is zero."""
  axes = tuple(range(int(stacked), weights.ndim))
  lengths = [jnp.sqrt(jnp.sum(x * x, axes, keepdims=True)) for x in (weights, update)]
  return jnp.where((lengths[0] > 0) & (lengths[1] > 0), lengths[0] / jnp.maximum(lengths[1], 1e-30), 1.0)


@dataclasses.dataclass(frozen=True)
class Muon(UpdateRule):
  """Jordan et al. 2024: orthogonalized momentum for the matrices inside blocks, Adam for everything else.

  Updates are scaled to a root mean square of `rms` (Liu et al. 2025, Moonlight), so learning rates are those of AdamW.
  The orthogonalization is sharded over all devices along the longer side of each matrix: with the sharding of the
  parameters, every replica would repeat all of it.
  """

  beta: Decay = 0.95
  ns_steps: PositiveInt = 5
  b1: Decay = 0.9
  b2: Decay = 0.95
  rms: PositiveFloat = 0.2

  @override
  def make(
    self, rate: optax.Schedule, decay: float | optax.Schedule, mask: Callable[[Any], Any]
  ) -> optax.GradientTransformation:
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)

    def is_matrix(path: str) -> bool:
      return 'blocks' in path.split('/') and path.endswith('kernel')

    def dimensions(params: Any) -> Any:
      return map_by_path(lambda path, x: matrix if is_matrix(path) else None, params)

    def split(gradient: Any, params: Any = None) -> Any:
      return map_by_path(lambda path, x: _split_longer_side(x) if is_matrix(path) else x, gradient)

    muon = optax.contrib.muon(
      rate,
      beta=self.beta,
      ns_steps=self.ns_steps,
      adam_b1=self.b1,
      adam_b2=self.b2,
      weight_decay=decay,
      weight_decay_mask=mask,
      consistent_rms=self.rms,
      muon_weight_dimension_numbers=dimensions,
    )
    return optax.chain(optax.stateless(split), muon)


def _split_longer_side(x: jax.Array) -> jax.Array:
  """Shards stacked matrices [L, D, M] over all devices along the longer of D and M, if it is divisible."""
  rows, columns = x.shape[-2:]
  if max(rows, columns) % num_shards('everywhere'):
    return x
  side = ('everywhere', None) if rows > columns else (None, 'everywhere')
  return with_logical_constraint(x, *(None,) * (x.ndim - 2), *side)


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """Clips the global norm, applies the update rule with the learning-rate schedule, and decays weights.

  weight_decay_mask  patterns of the paths with weight decay
  weight_decay_end   final weight decay, reached from `weight_decay` by a half cosine over the run; None for constant
  layer_decay        ratio of the learning rates of a layer and the next one (see layerwise_lr_scales)
  lr_multipliers     pairs of a pattern and the learning-rate factor of matching paths

  A pattern that matches no parameter is an error (`check`): a misspelled one would silently change the run.
  """

  schedule: Schedule
  rule: UpdateRule = AdamW()
  weight_decay: NonNegativeFloat = 0.0
  weight_decay_end: NonNegativeFloat | None = None
  weight_decay_mask: tuple[Pattern, ...] = (r'.*/kernel',)
  clip_norm: PositiveFloat | None = None
  layer_decay: PositiveFraction = 1.0
  lr_multipliers: tuple[tuple[Pattern, NonNegativeFloat], ...] = ()

  def check(self, params: Any) -> None:
    """Raises ValueError for a pattern that matches no path of `params` (arrays or ShapeDtypeStructs)."""
    paths: list[str] = []
    map_by_path(lambda path, x: paths.append(path), params)
    own = self.weight_decay_mask != Optimizer.weight_decay_mask  # the default suits most networks, not all
    decay = self.weight_decay_mask if own and (self.weight_decay or self.weight_decay_end) else ()
    for name, patterns in (
      ('weight_decay_mask', decay),
      ('lr_multipliers', [pattern for pattern, _ in self.lr_multipliers]),
    ):
      for pattern in patterns:
        if not any(re.fullmatch(pattern, path) for path in paths):
          raise ValueError(f'{name}: {pattern!r} matches no parameter; {did_you_mean(pattern, paths)}')

  def make(self, total_steps: int) -> optax.GradientTransformation:
    """The optax transformation for a run of `total_steps` steps."""

    def mask(params: Any) -> Any:
      return map_by_path(lambda path, x: any(re.fullmatch(pattern, path) for pattern in self.weight_decay_mask), params)

    decay: float | optax.Schedule = self.weight_decay
    if self.weight_decay_end is not None:
      start, end = self.weight_decay, self.weight_decay_end
      decay = lambda step: end + (start - end) * (1 + jnp.cos(jnp.pi * step / total_steps)) / 2  # noqa: E731

    def at_own_rates(updates: Any, params: Any) -> Any:
      rates = layerwise_lr_scales(params, self.layer_decay)
      for pattern, factor in self.lr_multipliers:
        rates = map_by_path(lambda path, x: x * (factor if re.fullmatch(pattern, path) else 1), rates)  # noqa: B023
      return jax.tree.map(lambda u, rate: u * rate.astype(u.dtype), updates, rates)

    parts = [self.rule.make(self.schedule(total_steps), decay, mask)]
    if self.clip_norm is not None:
      parts.insert(0, optax.clip_by_global_norm(self.clip_norm))
    if self.layer_decay != 1 or self.lr_multipliers:
      parts.append(optax.stateless(at_own_rates))
    return optax.chain(*parts) if len(parts) > 1 else parts[0]
