"""A network that was trained elsewhere: what it offers, and nothing to learn."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from typing_extensions import override

from fmcv_jax.augment.normalize import Normalize
from fmcv_jax.errors import UserError
from fmcv_jax.fields import ImageSize
from fmcv_jax.objectives.base import Loss, Objective, flax_variables, image_field
from fmcv_jax.objectives.outputs import Batch, ImageEncoder, Output, Params, encoder_outputs


@dataclasses.dataclass(frozen=True)
class PretrainedEncoder(Objective):
  """An image network as it was imported: evaluated, looked into, and where other runs begin (config.init_from)."""

  network: nn.Module
  normalize: Normalize = Normalize()

  @property
  @override
  def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
    return {'image': image_field(self.network)}

  @property
  @override
  def input_size(self) -> ImageSize | None:
    return None if getattr(self.network, 'any_size', False) else super().input_size

  @override
  def init(self, rng: jax.Array) -> tuple[Params, Any]:
    extra = dict(self.network.init(rng, jnp.zeros((1, *self.network.input_shape))))  # type: ignore[attr-defined]
    return extra.pop('params'), extra

  @override
  def loss(self, params: Params, batch: Batch, rng: jax.Array, extra: Any) -> Loss:
    raise UserError(
      "config.objective: 'encoder' is a network as it was imported, which is not trained; choose another objective, "
      'and begin with its weights by --config.init_from.params.workdir=...'
    )

  @override
  def outputs(self) -> Mapping[str, Output]:
    return encoder_outputs(self.network, self._encoder)

  def _encoder(self, params: Params, extra: Any) -> ImageEncoder:
    return ImageEncoder(self.network, flax_variables(params, extra), self.normalize)
