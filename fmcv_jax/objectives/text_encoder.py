"""A text network that was trained elsewhere: what it offers, and nothing to learn."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from typing_extensions import override

from fmcv_jax.errors import UserError
from fmcv_jax.models.common.norms import l2_normalize
from fmcv_jax.objectives.base import Loss, Objective
from fmcv_jax.objectives.outputs import Batch, Output, Params


@dataclasses.dataclass(frozen=True)
class TextEncoder(Objective):
  """A text tower as it was imported alone: its embeddings, and where a diffusion model takes it from.

  Embeddings are the network's outputs, of a tower without a projection the pooled features, of unit length.
  """

  network: nn.Module

  @property
  @override
  def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
    return {'tokens': jax.ShapeDtypeStruct((self.network.length,), jnp.int32)}

  @override
  def init(self, rng: jax.Array) -> tuple[Params, Any]:
    return self.network.init(rng, jnp.zeros((1, self.network.length), jnp.int32))['params'], {}

  @override
  def loss(self, params: Params, batch: Batch, rng: jax.Array, extra: Any) -> Loss:
    raise UserError(
      "config.objective: 'text_encoder' is a network as it was imported, which is not trained; choose another one, "
      'and begin with its weights by --config.init_from.params/text.workdir=...'
    )

  @override
  def outputs(self) -> Mapping[str, Output]:
    def encode_text(params: Params, extra: Any, batch: Batch) -> jax.Array:
      features: Any = self.network.apply({'params': params}, batch['tokens'])
      return l2_normalize(features.output.astype(jnp.float32))

    return {'embed_text': Output(encode_text, 'embedding', ('tokens',))}
