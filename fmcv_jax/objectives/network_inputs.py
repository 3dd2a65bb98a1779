"""Network inputs: the images that a loss passes to its network, after augmentation on the device, and control maps."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fmcv_jax.augment.control_maps import Control
from fmcv_jax.augment.normalize import Normalize
from fmcv_jax.objectives.base import Objective
from fmcv_jax.objectives.image_condition import ImageCondition
from fmcv_jax.objectives.outputs import Batch


@dataclasses.dataclass(frozen=True)
class _Recording(Normalize):
  """Records the images before normalization, which is the last step before the network in every loss."""

  record: list[jax.Array] = dataclasses.field(default_factory=list, compare=False)

  def __call__(self, images: jax.Array) -> jax.Array:
    self.record.append(images)
    return super().__call__(images)


@dataclasses.dataclass(frozen=True)
class _RecordingControl(Control):
  """Records the control maps that are passed to a ControlNet."""

  control: Control
  record: list[jax.Array] = dataclasses.field(default_factory=list, compare=False)

  def __call__(self, images: jax.Array) -> jax.Array:
    self.record.append(self.control(images))
    return self.record[-1]


def network_inputs(objective: Objective, batch: Any, rng: jax.Array) -> list[jax.Array]:
  """All images that the loss of a batch passes to the network, each float32 [B, views, H, W, 3] in [0, 1].

  The loss is traced with parameters that are never allocated; XLA removes the computation after the recorded images.
  """
  count = len(next(iter(batch.values())))

  @jax.jit
  def traced(batch: Batch, rng: jax.Array) -> Any:
    record: list[jax.Array] = []
    params, extra = _zero_state(objective)
    _recorded(objective, record).loss(params, batch, rng, extra)
    return [images.reshape(count, -1, *images.shape[1:]) for images in record]

  return traced(batch, rng)


def masked_patches(objective: Objective, batch: Any, rng: jax.Array) -> jax.Array | None:
  """Masked patches in the loss of a batch with this rng: bool [B, views, rows, columns].

  The views are the first ones of `network_inputs`. None for an objective without masks.
  """
  output = objective.outputs().get('masked_patches')
  if output is None:
    return None

  @jax.jit
  def traced(batch: Batch, rng: jax.Array) -> Any:
    params, extra = _zero_state(objective)
    return output.call(params, extra, {**{name: batch[name] for name in output.reads}, 'rng': rng})

  return traced(batch, rng)


def _zero_state(objective: Objective) -> Any:
  """(params, extra) of zeros, for a traced function that does not read their values: they are then never allocated."""
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(objective.init, jax.random.key(0)))


def _recorded(objective: Any, record: list[jax.Array]) -> Any:
  changed: dict[str, Any] = {}
  for field in dataclasses.fields(objective):
    value = getattr(objective, field.name)
    if field.name == 'normalize':
      changed['normalize'] = _Recording(value.mean, value.std, record)
    elif isinstance(value, Control):
      changed[field.name] = _RecordingControl(value, record)
    elif isinstance(value, Objective | ImageCondition):
      changed[field.name] = _recorded(value, record)
  return dataclasses.replace(objective, **changed)
