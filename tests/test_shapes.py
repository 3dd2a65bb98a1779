"""Shapes in annotations: a mistake that arithmetic would broadcast is an error while tests run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from fmcv_jax.augment.apply import move_boxes
from fmcv_jax.augment.color import blurred
from fmcv_jax.augment.mixing import mix
from fmcv_jax.augment.warp import warp
from fmcv_jax.diffusion.guidance import guided
from fmcv_jax.diffusion.process import Process
from fmcv_jax.diffusion.samplers import add_noise
from fmcv_jax.objectives.dino_losses import view_loss
from fmcv_jax.objectives.distillation import disagreement
from fmcv_jax.objectives.ring_contrastive import pair_loss

KEY = jax.random.key(0)


def x(*shape):
  return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
  'call',
  [
    lambda: Process().add_noise(x(4, 2, 2, 3), x(4, 2, 2, 3), x(1)),  # one time for all images
    lambda: Process().target(x(4, 2, 2, 3), x(1, 2, 2, 3), x(4)),  # the same noise for all images
    lambda: add_noise(Process(), x(1, 2, 2, 3), jax.random.split(KEY, 4), (2, 2, 3), 5.0),
    lambda: guided(lambda x, time, condition: x, {}, {}, 2.0)(jnp.zeros((4, 2, 2, 3)), jnp.zeros(1)),
    lambda: disagreement(x(4, 3), x(1, 3), 'soft'),
    lambda: view_loss(x(4, 3, 5), x(1, 2, 5)),
    lambda: pair_loss(x(4, 8), x(4, 8), x(1), x(), 'softmax'),
    lambda: mix(x(4, 2, 2, 3), x(1, 5), KEY, mixup=0.2, cutmix=0.0),
    lambda: blurred(x(4, 8, 8, 3), x(1) + 1),
    lambda: warp(x(4, 8, 8, 3), x(1, 2, 3), 0.0),
    lambda: move_boxes(x(4, 5, 4), x(1, 2, 3), (8, 8)),
  ],
)
def test_an_array_that_would_be_broadcast_over_the_batch_is_an_error(call):
  with pytest.raises(TypeCheckError):
    call()
