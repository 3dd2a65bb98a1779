"""Class activation maps: what each place of an image gave to an output (Zhou et al. 2016, section 2).

For networks that average their last map and then are linear, such as Swin and EfficientNet: there the outputs are the
mean of what the places would give alone.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fmcv_jax.models.backbones.efficientnet import EfficientNet
from fmcv_jax.models.backbones.swin import Swin
from fmcv_jax.models.common.outputs import linear_head


def is_global_average_pooled(network: nn.Module) -> bool:
  """Whether a network is of this kind."""
  return isinstance(network, (Swin, EfficientNet))


def class_activation_maps(network: Any, variables: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The last map of normalized images [B, H, W, 3], float32 [B, rows, columns, D], and what each of its places gives to
  the outputs, float32 [B, rows, columns, E]: their mean over the places is the network's output."""
  tokens = network.apply(variables, images).tokens
  height, width = (-(-side // network.patch_size) for side in images.shape[1:3])
  given = tokens
  if network.num_classes:
    given = linear_head(network.num_classes, True, 'float32').apply({'params': variables['params']['head']}, tokens)
  return tuple(x.astype(jnp.float32).reshape(len(images), height, width, -1) for x in (tokens, given))
