"""What is learnt: the contract between a loss and the one train step.

`params` is whatever the gradient trains, `extra` whatever is carried along without a gradient (EMA teachers, centres,
queues). Everything is a pure function of its arguments, so one step, one loop and one checkpoint serve all objectives.
"""

import abc
from collections.abc import Mapping
from typing import Any

import jax

from fmcv_jax.objectives.outputs import Batch, Output, Params

Metrics = dict[str, jax.Array]
LossOutput = tuple[jax.Array, tuple[Metrics, Any]]

# Flax's name for what batch norms keep from step to step. A loss applies its network with mutable=[BATCH_STATS] and
# hands what came back to update_extra; of a network without batch norms that is nothing.
BATCH_STATS = 'batch_stats'


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
  @abc.abstractmethod
  def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of one example, field by field, without the batch axis."""

  @property
  def input_size(self) -> int | None:
    """Side of the images that `outputs` take; None for any, and for a model that takes none."""
    image = self.example_batch.get('image')
    return None if image is None else image.shape[0]

  @abc.abstractmethod
  def init(self, rng: jax.Array) -> tuple[Params, Any]:
    """(params, extra), float32; traced under eval_shape and jit, so that arrays are born sharded."""

  @abc.abstractmethod
  def loss(self, params: Params, batch: Batch, rng: jax.Array, extra: Any) -> LossOutput:
    """(loss, (metrics, aux)): means over the batch, float32 scalars in `metrics`; `aux` goes to update_extra."""

  def update_extra(self, extra: Any, params: Params, aux: Any, step: jax.Array) -> Any:
    """The next `extra`, from the already updated `params`."""
    return extra

  def full_params(self, params: Params, extra: Any) -> Params:
    """All parameters of the network, as an objective that trains all of them has them in `params`."""
    return params

  def with_total_steps(self, steps: int) -> 'Objective':
    """This objective in a run of so many steps, for schedules of its own that last as long as the run."""
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
  def couple(self, params: Params, embeddings: Any, batch: Batch, extra: Any) -> LossOutput:
    """The loss of the whole batch from its embeddings; `params` for scalars such as the temperature."""

  def loss(self, params, batch, rng, extra):
    embeddings, aux = self.embed(params, batch, rng, extra)
    loss, (metrics, more) = self.couple(params, embeddings, batch, extra)
    return loss, (metrics, {**aux, **more})
