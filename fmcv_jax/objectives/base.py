"""What is learnt: the contract between a loss and the one train step.

`params` is whatever the gradient trains, `extra` whatever is carried along without a gradient (EMA teachers, centres,
queues). Everything is a pure function of its arguments, so one step, one loop and one checkpoint serve all objectives.
"""

import abc
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fmcv_jax.augment.normalize import Normalize
from fmcv_jax.data.tokenizers import Tokenizer
from fmcv_jax.diffusion.generator import Generator
from fmcv_jax.interpret.attention_maps import available_outputs

Params = Any
Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]
LossOutput = tuple[jax.Array, tuple[Metrics, Any]]

# Flax's name for what batch norms keep from step to step. A loss applies its network with mutable=[BATCH_STATS] and
# hands what came back to update_extra; of a network without batch norms that is nothing.
BATCH_STATS = 'batch_stats'


class ImageEncoder(NamedTuple):
  """The part of a trained model that looks at images: network.apply({'params': params}, normalize(images)).

  statistics  of its batch norms, where it has any
  """

  network: nn.Module
  params: Params
  normalize: Normalize
  statistics: Any = None


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
    """Sides of the pictures that `functions` take; None for any, and for a model that takes none."""
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

  def with_tokenizer(self, tokenizer: Tokenizer) -> 'Objective':
    """This objective in a run with this tokenizer, for the ids of padding, start and end."""
    return self

  def masked_patches(self, rng: jax.Array, images: int) -> jax.Array | None:
    """What the loss of a batch of so many images hides from the network with this rng, bool [B, views, rows, columns].

    The views are the first of those that it gives the network. None where nothing is hidden.
    """
    return None

  def functions(self) -> Mapping[str, Callable[[Params, Any, Batch], jax.Array]]:
    """What a trained model offers to evaluators and apps: name -> fn(params, extra, batch) -> [B, ...].

    Names: 'logits' [B, classes], 'features' [B, D], 'embed_image' and 'embed_text' (unit length) [B, E],
    'patch_features' [B, rows, columns, D], 'attention' [B, heads, rows, columns].
    """
    return {}

  def image_encoder(self, params: Params, extra: Any) -> ImageEncoder | None:
    """What `fmcv explain` looks into; None where there is no one such network."""
    return None

  def generator(self, params: Params, extra: Any) -> Generator | None:
    """What `fmcv generate` paints with; None for a model that makes no pictures."""
    return None


def encoder_functions(objective: Objective, network: nn.Module) -> dict[str, Callable[[Params, Any, Batch], jax.Array]]:
  """What can be read from an objective's image tower: of a ViT 'features', 'patch_features' and 'attention'."""

  def of_tower(read):
    def call(params, extra, batch):
      tower: Any = objective.image_encoder(params, extra)
      return read(tower.network, tower.params, tower.normalize(batch['image'].astype(jnp.float32) / 255))

    return call

  return {name: of_tower(read) for name, read in available_outputs(network).items()}


def flax_variables(params: Params, extra: Mapping[str, Any], owner: str = '') -> dict[str, Any]:
  """What `apply` takes: the parameters and, of a network with batch norms, its running statistics.

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
