"""Optimizers and learning-rate schedules, by name, through optax."""

import abc
import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fmcv_jax.errors import UserError
from fmcv_jax.models.layers import Dtype
from fmcv_jax.parallel.rules import constrain, path_of, ways


class Schedule(abc.ABC):
  """A learning rate by step: linear warm-up from 0 to `peak` over `warmup_steps`, then a decay."""

  peak: float
  warmup_steps: int

  def __call__(self, total_steps: int) -> optax.Schedule:
    """The schedule of a run of `total_steps`; the last step's rate is the decay's end."""
    if self.warmup_steps >= total_steps:
      raise ValueError(f'warmup_steps {self.warmup_steps} leaves nothing of a run of {total_steps} steps')
    if not self.warmup_steps:
      return self.decay(total_steps)
    # The first step has rate peak / warmup_steps, not 0: a step that changes nothing is a step wasted.
    warmup = optax.linear_schedule(self.peak / self.warmup_steps, self.peak, self.warmup_steps - 1 or 1)
    return optax.join_schedules([warmup, self.decay(total_steps - self.warmup_steps)], [self.warmup_steps])

  @abc.abstractmethod
  def decay(self, steps: int) -> optax.Schedule:
    """The rate over the `steps` after warm-up."""


@dataclasses.dataclass(frozen=True)
class Cosine(Schedule):
  """Half a cosine from `peak` to `end` (Loshchilov & Hutter 2017)."""

  peak: float
  warmup_steps: int = 0
  end: float = 0.0

  def decay(self, steps):
    return optax.cosine_decay_schedule(self.peak, steps, alpha=self.end / self.peak)


@dataclasses.dataclass(frozen=True)
class Linear(Schedule):
  """A straight line from `peak` to `end`."""

  peak: float
  warmup_steps: int = 0
  end: float = 0.0

  def decay(self, steps):
    return optax.linear_schedule(self.peak, self.end, steps)


@dataclasses.dataclass(frozen=True)
class Rsqrt(Schedule):
  """peak / sqrt(1 + t / timescale), then linearly to 0 over the last `cooldown_steps` (Zhai et al. 2022)."""

  peak: float
  warmup_steps: int = 0
  timescale: int = 10_000
  cooldown_steps: int = 0

  def decay(self, steps):
    if self.cooldown_steps > steps:
      raise ValueError(f'cooldown_steps {self.cooldown_steps} is longer than the {steps} steps after warm-up')

    def rate(step):
      cooldown = jnp.clip((steps - step) / max(self.cooldown_steps, 1), 0, 1) if self.cooldown_steps else 1.0
      return self.peak * jax.lax.rsqrt(1 + step / self.timescale) * cooldown

    return rate


class Rule(abc.ABC):
  """How gradients become updates."""

  @abc.abstractmethod
  def make(
    self, rate: optax.Schedule, decay: float | optax.Schedule, mask: Callable[[Any], Any]
  ) -> optax.GradientTransformation:
    """The optax transformation, with decoupled weight decay `decay` (times the rate) where `mask` is true."""


@dataclasses.dataclass(frozen=True)
class AdamW(Rule):
  """Loshchilov & Hutter 2019. `mu_dtype` bfloat16 halves the first moment."""

  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  mu_dtype: Dtype = 'float32'

  def make(self, rate, decay, mask):
    return optax.adamw(rate, self.b1, self.b2, self.eps, weight_decay=decay, mask=mask, mu_dtype=self.mu_dtype)


@dataclasses.dataclass(frozen=True)
class Lion(Rule):
  """Chen et al. 2023: the sign of an interpolated momentum; wants a 3 to 10 times lower rate than AdamW."""

  b1: float = 0.9
  b2: float = 0.99
  mu_dtype: Dtype = 'float32'

  def make(self, rate, decay, mask):
    return optax.lion(rate, self.b1, self.b2, weight_decay=decay, mask=mask, mu_dtype=self.mu_dtype)


@dataclasses.dataclass(frozen=True)
class Adafactor(Rule):
  """Shazeer & Stern 2018 as Zhai et al. 2022 use it: factored second moment, momentum, no parameter scaling."""

  momentum: float | None = 0.9
  momentum_dtype: Dtype = 'bfloat16'
  decay_rate: float = 0.8
  clip_rms: float = 1.0
  min_factored: int = 128

  def make(self, rate, decay, mask):
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
class Lamb(Rule):
  """You et al. 2020: Adam's updates, decay included, at the length of the weights that they change.

  As in NVIDIA's implementation and timm's only the weights that are decayed are treated so. Each layer of a stack has a
  length of its own.
  """

  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-6

  def make(self, rate, decay, mask):
    def rescaled(updates, params):
      return jax.tree_util.tree_map_with_path(
        lambda key_path, u, w, decayed: u * _trust(u, w, 'blocks' in path_of(key_path).split('/')) if decayed else u,
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


def _trust(update: jax.Array, weights: jax.Array, stacked: bool) -> jax.Array:
  """Length of the weights over that of their update, layer by layer; 1 where either has none."""
  axes = tuple(range(int(stacked), weights.ndim))
  lengths = [jnp.sqrt(jnp.sum(x * x, axes, keepdims=True)) for x in (weights, update)]
  return jnp.where((lengths[0] > 0) & (lengths[1] > 0), lengths[0] / jnp.maximum(lengths[1], 1e-30), 1.0)


@dataclasses.dataclass(frozen=True)
class Muon(Rule):
  """Jordan et al. 2024: orthogonalized momentum for the matrices inside blocks, Adam for everything else.

  Updates are scaled to a root mean square of `rms` (Liu et al. 2025, Moonlight), so rates are those of AdamW. The
  orthogonalization is split over all devices by the longer side of each matrix: left to the parameters' sharding,
  every replica would compute all of it again.
  """

  beta: float = 0.95
  ns_steps: int = 5
  b1: float = 0.9
  b2: float = 0.95
  rms: float = 0.2

  def make(self, rate, decay, mask):
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)

    def is_matrix(path):
      return 'blocks' in path.split('/') and path.endswith('kernel')

    def dimensions(params):
      return map_by_path(lambda path, x: matrix if is_matrix(path) else None, params)

    def split(gradient, params=None):
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
  """Cuts stacked matrices [L, D, M] over all devices, where the longer of D and M divides."""
  rows, columns = x.shape[-2:]
  if max(rows, columns) % ways('everywhere'):
    return x
  side = ('everywhere', None) if rows > columns else (None, 'everywhere')
  return constrain(x, *(None,) * (x.ndim - 2), *side)


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """Clip the global norm, apply the rule at the schedule's rate, decay the weights whose paths match `decayed`.

  weight_decay_end  where given, the decay goes there from `weight_decay` by half a cosine over the run
  layer_decay       the rate of a layer is this times that of the next one (see layer_rates)
  multipliers       pairs of a pattern and what the rate of paths that match it is multiplied by
  """

  schedule: Schedule
  rule: Rule = AdamW()
  weight_decay: float = 0.0
  weight_decay_end: float | None = None
  decayed: tuple[str, ...] = (r'.*/kernel',)
  clip_norm: float | None = None
  layer_decay: float = 1.0
  multipliers: tuple[tuple[str, float], ...] = ()

  def make(self, total_steps: int) -> optax.GradientTransformation:
    def mask(params):
      return map_by_path(lambda path, x: any(re.fullmatch(pattern, path) for pattern in self.decayed), params)

    decay: float | optax.Schedule = self.weight_decay
    if self.weight_decay_end is not None:
      start, end = self.weight_decay, self.weight_decay_end
      decay = lambda step: end + (start - end) * (1 + jnp.cos(jnp.pi * step / total_steps)) / 2  # noqa: E731

    def at_own_rates(updates, params):
      rates = layer_rates(params, self.layer_decay)
      for pattern, factor in self.multipliers:
        rates = map_by_path(lambda path, x: x * (factor if re.fullmatch(pattern, path) else 1), rates)  # noqa: B023
      return jax.tree.map(lambda u, rate: u * rate.astype(u.dtype), updates, rates)

    parts = [self.rule.make(self.schedule(total_steps), decay, mask)]
    if self.clip_norm is not None:
      parts.insert(0, optax.clip_by_global_norm(self.clip_norm))
    if self.layer_decay != 1 or self.multipliers:
      parts.append(optax.stateless(at_own_rates))
    return optax.chain(*parts) if len(parts) > 1 else parts[0]


# What a tower does before its first block.
STEM = re.compile(r'(patch|patch_norm|pre_norm|tokens|position|registers|\w+_token)(/.*)?')


def layer_rates(params: Any, decay: float) -> Any:
  """decay^(L + 1 - l) for each parameter of layer l of L, shaped to multiply it (BEiT, Bao et al. 2022, appendix).

  A layer is one entry of what is stacked below `blocks`, counted from 1 (a pair of blocks of a Swin, whose stages
  follow one another); what stands before the blocks (patches, tokens, positions) is layer 0, what stands behind them
  (last norm, pooling, heads) and what belongs to no tower L + 1, at the full rate.
  """
  flat = {path_of(key_path): x for key_path, x in jax.tree_util.tree_flatten_with_path(params)[0]}
  stacks: dict[str, dict[int, int]] = {}  # tower -> stage -> its layers
  for path, x in flat.items():
    place = _BLOCKS.fullmatch(path)
    if place:
      stacks.setdefault(place['tower'], {})[int(place['stage'] or 0)] = x.shape[0]
  if decay != 1 and not stacks:
    raise UserError('config.optimizer.layer_decay: this network has no stack of blocks whose layers could be counted')

  def rate(path, x):
    towers = [tower for tower in stacks if path.startswith(tower)]
    if not towers:
      return np.ones(())
    tower = max(towers, key=len)
    stages, rest = stacks[tower], path[len(tower) :]
    total = sum(stages.values())
    stage = int(match[1]) if (match := re.match(r'stage(\d+)/', rest)) else 0
    before = sum(layers for index, layers in stages.items() if index < stage)
    if _BLOCKS.fullmatch(path):
      layer = np.arange(before + 1, before + 1 + x.shape[0]).reshape(-1, *(1,) * (x.ndim - 1))
    elif stage:  # the merge before a stage's blocks
      layer = np.array(before + 1)
    else:
      layer = np.array(0 if STEM.fullmatch(rest) else total + 1)
    return np.asarray(decay ** (total + 1.0 - layer), np.float32)

  return map_by_path(rate, params)


_BLOCKS = re.compile(r'(?P<tower>(.*?/)??)(stage(?P<stage>\d+)/)?blocks/.*')


def map_by_path(fn: Callable[[str, Any], Any], tree: Any) -> Any:
  """Maps fn('a/b/c', leaf) over a tree."""
  return jax.tree_util.tree_map_with_path(lambda key_path, x: fn(path_of(key_path), x), tree)
