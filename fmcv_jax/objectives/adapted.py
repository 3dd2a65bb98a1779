"""Partial fine-tuning: training a subset of the parameters, and LoRA (Hu et al. 2022).

The parameters of an objective are split by path: one part is trained, the rest is kept in `extra['frozen']`, without
gradients and optimizer moments. Networks are unaware of the split and receive the full parameter tree.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
from typing_extensions import override

from fmcv_jax.bounds import PositiveFloat, PositiveInt
from fmcv_jax.data.tokenizers import Tokenizer
from fmcv_jax.errors import UserError
from fmcv_jax.objectives.base import Loss, Objective
from fmcv_jax.objectives.outputs import Batch, Output, Params
from fmcv_jax.parallel.parameter_axes import Row

FROZEN, LORA = 'frozen', 'lora'


@dataclasses.dataclass(frozen=True)
class Lora:
  """Adds the low-rank matrix scale * down @ up to the kernels whose paths match `targets`; `up` is zero-initialized.

  alpha: scale = alpha / rank; None for a scale of 1. Kernels of stacked layers have stacked matrices.
  """

  rank: PositiveInt = 8
  alpha: PositiveFloat | None = None
  targets: tuple[str, ...] = (r'(.*/)?attention/(query|value)/kernel',)

  def __post_init__(self) -> None:
    if self.rank < 1:
      raise ValueError(f'rank: expected at least 1, got {self.rank}')

  def init(self, rng: jax.Array, flat: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """New matrices [..., in, rank] and [..., rank, out] for kernels [..., in, out], by path."""
    chosen = {path: x for path, x in flat.items() if matches(path, self.targets)}
    if not chosen:
      raise UserError(f'config.objective.lora.targets: no parameter matches {self.targets}')
    initial: dict[str, jax.Array] = {}
    for index, (path, kernel) in enumerate(sorted(chosen.items())):
      if kernel.ndim != 2 + ('blocks' in path.split('/')):
        raise UserError(f'config.objective.lora.targets: {path} of shape {kernel.shape} is not a matrix')
      *stack, rows, columns = kernel.shape
      draw = jax.random.normal(jax.random.fold_in(rng, index), (*stack, rows, self.rank))
      initial |= {f'{path}/down': draw * rows**-0.5, f'{path}/up': jnp.zeros((*stack, self.rank, columns))}
    return initial

  def merge(self, flat: Mapping[str, jax.Array], added: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The parameters with the learned low-rank matrices added."""
    scale = 1.0 if self.alpha is None else self.alpha / self.rank
    changed = {
      path: flat[path] + scale * jnp.matmul(added[f'{path}/down'], added[f'{path}/up'], precision='highest')
      for path in (name.removesuffix('/down') for name in added if name.endswith('/down'))
    }
    return {**flat, **changed}


@dataclasses.dataclass(frozen=True)
class PartialFineTuning(Objective):
  """Wraps another objective: trains only the parameters whose paths match `trainable`, and the matrices of `lora`.

  `config.init_from` initializes the frozen part: {'extra/frozen': {'workdir': ...}} takes all parameters of another
  run, and {'params': {'workdir': ..., 'skip': ['lora/.*', ...]}} initializes the trainable ones, if there are any.
  """

  objective: Objective
  trainable: tuple[str, ...] = (r'(.*/)?head/.*',)
  lora: Lora | None = None

  def __post_init__(self) -> None:
    if isinstance(self.objective, PartialFineTuning):
      raise ValueError('objective: partial fine-tuning cannot be nested')

  @property
  @override
  def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
    return self.objective.example_batch

  @property
  @override
  def coupled(self) -> bool:
    return self.objective.coupled

  @property
  @override
  def frozen_networks(self) -> tuple[str, ...]:
    return (FROZEN, *self.objective.frozen_networks)

  @property
  @override
  def logical_axes(self) -> tuple[Row, ...]:
    return (
      (r'lora/.*/down', ('embed', None)),
      (r'lora/.*/up', (None, None)),
      *self.objective.logical_axes,
    )

  @override
  def init(self, rng: jax.Array) -> tuple[Params, Any]:
    whole, extra = self.objective.init(rng)
    flat = _flat(whole)
    kept = {path: x for path, x in flat.items() if matches(path, self.trainable)}
    if self.trainable and not kept:
      raise UserError(f'config.objective.trainable: no parameter matches {self.trainable}')
    params = _tree(kept)
    if self.lora is not None:
      params[LORA] = _tree(self.lora.init(jax.random.fold_in(rng, 1), flat))
    if not params:
      raise UserError('config.objective: no trainable parameters; set `trainable` or `lora`')
    return params, {**extra, FROZEN: _tree({path: x for path, x in flat.items() if path not in kept})}

  @override
  def full_params(self, params: Params, extra: Any) -> Params:
    params = dict(params)
    added = _flat(params.pop(LORA, {}))
    flat = {**_flat(extra[FROZEN]), **_flat(params)}
    return self.objective.full_params(_tree(self.lora.merge(flat, added) if self.lora else flat), _rest(extra))

  @override
  def loss(self, params: Params, batch: Batch, rng: jax.Array, extra: Any) -> Loss:
    return self.objective.loss(self.full_params(params, extra), batch, rng, _rest(extra))

  def embed(self, params: Params, batch: Batch, rng: jax.Array, extra: Any) -> tuple[Any, dict[str, Any]]:
    """`CoupledObjective.embed` of the inner objective, with the full parameters."""
    inner: Any = self.objective
    return inner.embed(self.full_params(params, extra), batch, rng, _rest(extra))

  def couple(self, params: Params, embeddings: Any, batch: Batch, extra: Any) -> Loss:
    """`CoupledObjective.couple` of the inner objective, with the full parameters."""
    inner: Any = self.objective
    return inner.couple(self.full_params(params, extra), embeddings, batch, _rest(extra))

  @override
  def update_extra(self, extra: Any, params: Params, aux: Any, step: jax.Array) -> Any:
    new = self.objective.update_extra(_rest(extra), self.full_params(params, extra), aux, step)
    return {**new, FROZEN: extra[FROZEN]}

  @property
  @override
  def class_counts(self) -> Mapping[str, tuple[int, int | None]]:
    return self.objective.class_counts

  @override
  def with_total_steps(self, steps: int) -> 'PartialFineTuning':
    return dataclasses.replace(self, objective=self.objective.with_total_steps(steps))

  @override
  def with_tokenizer(self, tokenizer: Tokenizer) -> 'PartialFineTuning':
    return dataclasses.replace(self, objective=self.objective.with_tokenizer(tokenizer))

  @override
  def outputs(self) -> Mapping[str, Output]:
    def with_full_params(function: Any) -> Any:
      if function is None:
        return None
      return lambda params, extra, *batch: function(self.full_params(params, extra), _rest(extra), *batch)

    return {
      name: dataclasses.replace(
        output,
        call=with_full_params(output.call),
        encoder=with_full_params(output.encoder),
        generator=with_full_params(output.generator),
        language=with_full_params(output.language),
      )
      for name, output in self.objective.outputs().items()
    }


def matches(path: str, patterns: tuple[str, ...]) -> bool:
  """True if one of the regular expressions matches the full path."""
  return any(re.fullmatch(pattern, path) for pattern in patterns)


def _flat(tree: Params) -> dict[str, jax.Array]:
  return flax.traverse_util.flatten_dict(tree, sep='/')


def _tree(flat: Mapping[str, Any]) -> dict[str, Any]:
  return flax.traverse_util.unflatten_dict(flat, sep='/')


def _rest(extra: Mapping[str, Any]) -> dict[str, Any]:
  return {name: tree for name, tree in extra.items() if name != FROZEN}
