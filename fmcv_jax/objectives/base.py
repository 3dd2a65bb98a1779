"""The Objective interface between losses and the train step.

`params` are trained by the gradient; `extra` is state without a gradient (EMA teachers, centers, queues). Everything is
a pure function of its arguments, so one train step, loop and checkpoint format serve all objectives.
"""

import abc
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from typing_extensions import override

from fmcv_jax.data.tokenizers import Tokenizer
from fmcv_jax.fields import ImageSize
from fmcv_jax.objectives.outputs import Batch, Output, Params
from fmcv_jax.parallel.parameter_axes import Row

# Flax's name of the collection with batch norm statistics. A loss applies its network with mutable=[BATCH_STATS] and
# passes the updated collection to update_extra; it is empty for a network without batch norms.
BATCH_STATS = 'batch_stats'


class Mean(NamedTuple):
  """A weighted mean as sum and weight, so that means of parts of different sizes add up to the mean of the whole.

  total   float32 scalar, sum of the weighted values
  weight  float32 scalar, sum of the weights: a number of examples, tokens, pixels or boxes, at least 0
  """

  total: jax.Array
  weight: jax.Array

  @property
  def value(self) -> jax.Array:
    """total / weight, and 0 if the weight is 0."""
    return weighted_mean(self.total, self.weight)


class Loss(NamedTuple):
  """The loss of a batch, or of a part of it. The train step sums over all microbatches and devices and divides once, so
  that every token has the same weight however the texts are distributed.

  total    float32 scalar, sum of the weighted losses
  weight   float32 scalar, sum of the weights, at least 0; no gradient flows through it
  metrics  metrics by name, each with its own weight
  aux      tree of float arrays for update_extra, averaged over microbatches
  """

  total: jax.Array
  weight: jax.Array
  metrics: Mapping[str, Mean]
  aux: Any

  @property
  def value(self) -> jax.Array:
    """total / weight, and 0 if the weight is 0: the value that the train step logs and differentiates."""
    return weighted_mean(self.total, self.weight)


def weighted_mean(total: jax.Array, weight: jax.Array) -> jax.Array:
  """total / weight, and 0 if the weight is 0; differentiable with respect to the total only."""
  return total / jax.lax.stop_gradient(jnp.where(weight == 0, 1.0, weight))


def mean_loss(losses: jax.Array, metrics: Mapping[str, jax.Array] = {}, aux: Any = None) -> Loss:
  """The Loss whose value is the mean of `losses`, bit for bit jnp.mean's.

  losses   float [B], one per example; or a scalar, for a loss that is not a sum over examples (microbatches have equal
           numbers of examples, and so equal weights)
  metrics  metrics by name, float or bool [B] or scalar, averaged in the same way
  aux      see Loss; {} by default
  """
  means = {name: _mean(values) for name, values in metrics.items()}
  return Loss(*_mean(losses), means, {} if aux is None else aux)


def _mean(values: jax.Array) -> Mean:
  values = jnp.asarray(values)
  return Mean(jnp.sum(values, dtype=jnp.float32), jnp.float32(values.size))


class Objective(abc.ABC):
  """Base class of training objectives: frozen dataclasses of networks and hyper-parameters."""

  @property
  def coupled(self) -> bool:
    """True if the loss couples the examples of a batch and defines `embed` and `couple` (see CoupledObjective)."""
    return False

  @property
  def frozen_networks(self) -> tuple[str, ...]:
    """Subtrees of `extra` that are parameters of a network, such as a teacher, and are sharded like parameters."""
    return ()

  @property
  def training_only(self) -> tuple[str, ...]:
    """Names at the top level of `params` that only the loss reads, such as a discriminator: `export` omits them."""
    return ()

  @property
  def logical_axes(self) -> tuple[Row, ...]:
    """Logical axes of parameters that no module creates (see parallel/parameter_axes.py)."""
    return ()

  @property
  @abc.abstractmethod
  def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of one example, field by field, without the batch axis."""

  @property
  def input_size(self) -> ImageSize | None:
    """Side in pixels, or (height, width), of the images or frames that `outputs` take; None for any size, and without
    image inputs."""
    image = self.example_batch.get('image')
    return None if image is None else size_of(image.shape)

  @property
  def class_counts(self) -> Mapping[str, tuple[int, int | None]]:
    """Batch fields that hold classes: field -> (number of classes, value for 'not labeled' or None)."""
    return {}

  @abc.abstractmethod
  def init(self, rng: jax.Array) -> tuple[Params, Any]:
    """(params, extra), float32; traced under eval_shape and jit, so that arrays are initialized sharded."""

  @abc.abstractmethod
  def loss(self, params: Params, batch: Batch, rng: jax.Array, extra: Any) -> Loss:
    """The loss of a batch as a sum and its weight (`mean_loss` for a mean over examples); traced, so pure."""

  def update_extra(self, extra: Any, params: Params, aux: Any, step: jax.Array) -> Any:
    """The next `extra`, from the already updated `params`."""
    return extra

  def full_params(self, params: Params, extra: Any) -> Params:
    """The full parameter tree of the network, including parameters that this objective keeps in `extra`."""
    return params

  def with_total_steps(self, steps: int) -> 'Objective':
    """A copy of this objective for a run of `steps` steps, for its own schedules over the length of the run."""
    return self

  def with_tokenizer(self, tokenizer: Tokenizer) -> 'Objective':
    """A copy of this objective for this tokenizer, which defines the ids of padding, start and end."""
    return self

  def outputs(self) -> Mapping[str, Output]:
    """Functions of a trained model, by name.

    Names shared by several objectives:
      logits          [B, classes]
      features        [B, D]
      embed_image     [B, E], unit length; embed_text [B, E], unit length, in the same space
      patch_features  [B, rows, columns, D]
      attention       [B, heads, rows, columns]
      masked_patches  bool [B, views, rows, columns]: True for masked patches, in the first views of the network inputs,
                      drawn from batch['rng'] as in the loss
      samples         images [B, H, W, 3]
    """
    return {}


def image_field(network: Any) -> jax.ShapeDtypeStruct:
  """Shape and dtype of the batch field 'image' for a network with `input_shape`, without the batch axis."""
  return jax.ShapeDtypeStruct(tuple(network.input_shape), jnp.uint8)


def size_of(shape: tuple[int, ...]) -> ImageSize:
  """The size of images [..., H, W, C]: the side of a square, or (height, width)."""
  height, width = shape[-3:-1]
  return height if height == width else (height, width)


def flax_variables(params: Params, extra: Mapping[str, Any], owner: str = '') -> dict[str, Any]:
  """Variables for `apply` of flax: the parameters and, for a network with batch norms, the statistics.

  Statistics are kept in extra['batch_stats'], and those of a frozen teacher in extra['teacher_batch_stats'].
  """
  statistics = extra.get(f'{owner}{BATCH_STATS}')
  return {'params': params} if statistics is None else {'params': params, BATCH_STATS: statistics}


class CoupledObjective(Objective):
  """A loss that couples the examples of a batch, such as a contrastive one.

  Split in two so that gradient accumulation is exact: `embed` treats examples independently and runs in microbatches;
  `couple` takes the embeddings of the whole batch (GradCache, Gao et al. 2021).
  """

  @property
  @override
  def coupled(self) -> bool:
    return True

  @abc.abstractmethod
  def embed(self, params: Params, batch: Batch, rng: jax.Array, extra: Any) -> tuple[Any, dict[str, Any]]:
    """(a tree of float arrays [B, ...], aux); aux is averaged over microbatches and passed to update_extra."""

  @abc.abstractmethod
  def couple(self, params: Params, embeddings: Any, batch: Batch, extra: Any) -> Loss:
    """The loss of the whole batch from its embeddings; `params` for scalars such as the temperature."""

  @override
  def loss(self, params: Params, batch: Batch, rng: jax.Array, extra: Any) -> Loss:
    embeddings, aux = self.embed(params, batch, rng, extra)
    loss = self.couple(params, embeddings, batch, extra)
    return loss._replace(aux={**aux, **loss.aux})
