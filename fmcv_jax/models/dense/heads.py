"""Multilayer perceptrons as heads of dense predictions."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from fmcv_jax.models.common.layers import ACTIVATIONS, Activation, dense


class MlpHead(nn.Module):
  """Three layers with an activation between them, [..., D] -> float32 [..., outputs].

  last_init  initializes the last layer
  hidden     width of the first two, None for that of the input
  """

  logical_axes = (
    (r'(.*/)?layer1/kernel', ('embed', 'mlp')),
    (r'(.*/)?layer2/kernel', ('mlp', 'embed')),
    (r'(.*/)?layer3/kernel', ('embed', None)),
    (r'(.*/)?layer[123]/bias', (None,)),
  )

  outputs: int
  dtype: str
  last_init: nn.initializers.Initializer = nn.initializers.zeros
  activation: Activation = 'gelu'
  hidden: int | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for number in (1, 2):
      x = ACTIVATIONS[self.activation](dense(self.hidden or x.shape[-1], self.dtype, f'layer{number}')(x))
    return dense(self.outputs, self.dtype, 'layer3', init=self.last_init)(x).astype(jnp.float32)
