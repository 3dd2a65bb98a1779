"""What is learnt: the contract between a loss and the one train step.

`params` is whatever the gradient trains, `extra` whatever is carried along without a gradient (EMA teachers, centres,
queues). Everything is a pure function of its arguments, so one step, one loop and one checkpoint serve all objectives.
"""

import abc
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fmcv_jax.data.tokenizers import Tokenizer
from fmcv_jax.objectives.outputs import Batch, Output, Params
from fmcv_jax.parallel.parameter_axes import Row

# Flax's name for what batch norms keep from step to step. A loss applies its network with mutable=[BATCH_STATS] and
# hands what came back to update_extra; of a network without batch norms that is nothing.
BATCH_STATS = 'batch_stats'


class Mean(NamedTuple):
  """A weighted mean that has not been divided yet, so that the means of unequal parts add up to that of the whole.

  total   float32 scalar, sum of the weighted values
  weight  float32 scalar, sum of the weights: a number of examples, tokens, pixels or boxes, at least 0
  """

  total: jax.Array
  weight: jax.Array

  @property
  def value(self) -> jax.Array:
    """total / weight, and 0 where nothing has a weight."""
    return weighted_mean(self.total, self.weight)


class Loss(NamedTuple):
  """The loss of a batch, or of a part of it. The train step adds parts and divides once, over all microbatches and
  devices, so that a token counts as much as any other however the texts are distributed.

  total    float32 scalar, sum of the weighted losses
  weight   float32 scalar, sum of the weights, at least 0; no gradient flows through it
  metrics  by name, each with a weight of its own
  aux      tree of float arrays for update_extra, averaged over microbatches
  """

  total: jax.Array
  weight: jax.Array
  metrics: Mapping[str, Mean]
  aux: Any

  @property
  def value(self) -> jax.Array:
    """total / weight, and 0 where nothing has a weight: what the step logs and differentiates."""
    return weighted_mean(self.total, self.weight)


def weighted_mean(total: jax.Array, weight: jax.Array) -> jax.Array:
  """total / weight, and 0 where the weight is 0; differentiable by the total only."""
  return total / jax.lax.stop_gradient(jnp.where(weight == 0, 1.0, weight))


def mean_loss(losses: jax.Array, metrics: Mapping[str, jax.Array] = {}, aux: Any = None) -> Loss:
  """The Loss whose value is the mean of `losses`, bit for bit jnp.mean's.

  losses   float [B], one per example; or a scalar, the loss of a batch that is not a sum over examples (microbatches
           have equal numbers of examples, so each counts the same)
  metrics  by name, float or bool [B] or scalar, averaged likewise
  aux      see Loss; {} by default
  """
  means = {name: _mean(values) for name, values in metrics.items()}
  return Loss(*_mean(losses), means, {} if aux is None else aux)


def _mean(values: jax.Array) -> Mean:
  values = jnp.asarray(values)
  return Mean(jnp.sum(values, dtype=jnp.float32), jnp.float32(values.size))


class Objective(abc.ABC):
  """A loss family as a frozen dataclass whose fields are networks and numbers."""

  @property
  def coupled(self) -> bool:
    """Whether the loss couples the examples of a batch, and offers `embed` and `couple` (see CoupledObjective)."""
    return False

  @property
  def frozen_networks(self) -> tuple[str, ...]:
    """Subtrees of `extra` that are parameters of a network, such as a teacher, and placed on the mesh as such."""
    return ()

  @property
  def logical_axes(self) -> tuple[Row, ...]:
    """Rows for parameters that no module makes (see parallel/parameter_axes.py); those of modules stand with them."""
    return ()

  @property
  @abc.abstractmethod
  def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of one example, field by field, without the batch axis."""

  @property
  def input_size(self) -> int | None:
    """Side of the images (or frames) that `outputs` take; None for any, and for a model that takes none."""
    image = self.example_batch.get('image')
    return None if image is None else image.shape[-3]

  @property
  def class_counts(self) -> Mapping[str, tuple[int, int | None]]:
    """Batch fields that hold classes: field -> (number of classes, the number for 'not labeled' or None)."""
    return {}

  @abc.abstractmethod
  def init(self, rng: jax.Array) -> tuple[Params, Any]:
    """(params, extra), float32; traced under eval_shape and jit, so that arrays are born sharded."""

  @abc.abstractmethod
  def loss(self, params: Params, batch: Batch, rng: jax.Array, extra: Any) -> Loss:
    """The loss of a batch as a sum and its weight (`mean_loss` for a mean over examples); traced, so pure."""

  def update_extra(self, extra: Any, params: Params, aux: Any, step: jax.Array) -> Any:
    """The next `extra`, from the already updated `params`."""
    return extra

  def full_params(self, params: Params, extra: Any) -> Params:
    """All parameters of the network, as an objective that trains all of them has them in `params`."""
    return params

  def with_total_steps(self, steps: int) -> 'Objective':
    """This objective in a run of so many steps, for schedules of its own that last as long as the run."""
    return self

  def with_tokenizer(self, tokenizer: Tokenizer) -> 'Objective':
    """This objective in a run with this tokenizer, for the ids of padding, start and end."""
    return self

  def outputs(self) -> Mapping[str, Output]:
    """The functions of a trained model, by name.

    Names that several objectives share:
      logits          [B, classes]
      features        [B, D]
      embed_image     and embed_text [B, E], of unit length, in one space
      patch_features  [B, rows, columns, D]
      attention       [B, heads, rows, columns]
      masked_patches  bool [B, views, rows, columns]: the patches that are hidden from the network in the first of the
                      views that it is given, drawn from batch['rng'] as the loss draws them
      samples         images [B, H, W, 3]
    """
    return {}


def flax_variables(params: Params, extra: Mapping[str, Any], owner: str = '') -> dict[str, Any]:
  """The variables that flax's `apply` takes: the parameters and, for a network with batch norms, their statistics.

  Those are carried in extra['batch_stats']; a frozen network's, such as a teacher's, in extra['teacher_batch_stats'].
  """
  statistics = extra.get(f'{owner}{BATCH_STATS}')
  return {'params': params} if statistics is None else {'params': params, BATCH_STATS: statistics}


class CoupledObjective(Objective):
  """A loss that couples the examples of a batch, such as a contrastive one.

  Split in two so that gradient accumulation is exact: `embed` treats examples alone and can run in small pieces,
  `couple` sees the embeddings of the whole batch (GradCache, Gao et al. 2021).
  """

  @property
  def coupled(self):
    return True

  @abc.abstractmethod
  def embed(self, params: Params, batch: Batch, rng: jax.Array, extra: Any) -> tuple[Any, dict[str, Any]]:
    """(a tree of float arrays [B, ...], aux); aux goes to update_extra, averaged over the pieces of a batch."""

  @abc.abstractmethod
  def couple(self, params: Params, embeddings: Any, batch: Batch, extra: Any) -> Loss:
    """The loss of the whole batch from its embeddings; `params` for scalars such as the temperature."""

  def loss(self, params, batch, rng, extra):
    embeddings, aux = self.embed(params, batch, rng, extra)
    loss = self.couple(params, embeddings, batch, extra)
    return loss._replace(aux={**aux, **loss.aux})
