"""Class activation maps (Zhou et al. 2016, section 2).

For networks with global average pooling and a linear head, such as Swin and EfficientNet: their output is the mean of
the head's outputs at each position.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fmcv_jax.models.common.outputs import linear_head


def class_activation_maps(network: Any, variables: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Last feature map of normalized images [B, H, W, 3], float32 [B, rows, columns, D], and the contribution of each
  position to the outputs, float32 [B, rows, columns, E], whose mean over positions is the output of the network.

  network  an AveragePooledNetwork
  """
  tokens = network.apply(variables, images).tokens
  height, width = (-(-side // network.patch_size) for side in images.shape[1:3])
  given = tokens
  if network.num_classes:
    given = linear_head(network.num_classes, True, 'float32').apply({'params': variables['params']['head']}, tokens)
  return tuple(x.astype(jnp.float32).reshape(len(images), height, width, -1) for x in (tokens, given))
