"""Attention as it is compiled for TPUs, with the heads that networks here have."""

import jax
import jax.numpy as jnp
import pytest

from fmcv_jax.models.attention import attention
from fmcv_jax.parallel.mesh import MeshShape, make_mesh
from fmcv_jax.parallel.rules import Placement
from fmcv_jax.plan.planning import pod


@pytest.mark.parametrize('dim', [256, 384, 512])
def test_heads_up_to_the_autoencoders_fit_the_chip(dim):
  """512: the one head of kl-f8, which looks at 4,096 pixels of the latents of 512 x 512 pixels."""
  pytest.importorskip('libtpu')
  placement = Placement(make_mesh(MeshShape(), pod('v5e:2x2')))
  x = jax.ShapeDtypeStruct((8, 4096, 1, dim), jnp.bfloat16, sharding=placement.batch(jnp.zeros((8, 1, 1, 1))))

  def total(query, key, value):
    with placement.active():
      return attention(query, key, value).astype(jnp.float32).sum()

  text = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(x, x, x).compile().as_text()
  assert text.count('tpu_custom_call') >= 3  # the kernel, and those of both halves of its gradient
