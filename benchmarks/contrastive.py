"""Temporaries of the contrastive losses as chips and batch grow together: in a ring, and with all texts gathered."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from fmcv_jax.objectives.ring_contrastive import pair_loss
from fmcv_jax.parallel.mesh import MeshShape, make_mesh
from fmcv_jax.parallel.rules import Placement
from fmcv_jax.plan.planning import pod

PAIRS, WIDTH = 128, 512  # of one chip; of an embedding
TOPOLOGIES = {32: 'v5e:4x8', 64: 'v5e:8x8', 128: 'v5e:8x16', 256: 'v5e:16x16'}


def gathered(image, text, kind):
  """The plain loss: every chip meets all texts at once."""
  logits = 10 * jnp.einsum('ie,te->it', image, text, preferred_element_type=jnp.float32) - 10
  same = jnp.eye(len(logits), dtype=bool)
  if kind == 'sigmoid':
    return jnp.sum(jax.nn.softplus(jnp.where(same, -logits, logits))) / len(logits)
  own = jnp.sum(logits, axis=1, where=same)
  return jnp.mean(jax.nn.logsumexp(logits, axis=1) + jax.nn.logsumexp(logits, axis=0) - 2 * own) / 2


def ring(image, text, kind):
  return pair_loss(image, text, 10.0, -10.0, kind)[0]


def temporaries(loss, kind: str, mesh: Mesh, pairs: int) -> float:
  """MiB by one chip, of value and gradients."""
  placement = Placement(mesh)
  shape = jax.ShapeDtypeStruct((pairs, WIDTH), jnp.float32)
  split = placement.batch([shape, shape])

  def gradients(image, text):
    with placement.active():
      return jax.grad(lambda image, text: loss(image, text, kind), argnums=(0, 1))(image, text)

  program = jax.jit(gradients, in_shardings=tuple(split), out_shardings=tuple(split)).lower(shape, shape).compile()
  return program.memory_analysis().temp_size_in_bytes / 2**20


def main() -> None:
  table = Table(title=f'temporaries, MiB by one chip, {PAIRS} pairs a chip (the last row: 32,768 pairs)')
  for heading in ('chips', 'pairs', 'softmax, ring', 'softmax, gathered', 'sigmoid, ring', 'sigmoid, gathered'):
    table.add_column(heading, justify='right')
  for chips, topology in TOPOLOGIES.items():
    mesh = make_mesh(MeshShape(), pod(topology))
    cells = [temporaries(f, kind, mesh, PAIRS * chips) for kind in ('softmax', 'sigmoid') for f in (ring, gathered)]
    table.add_row(str(chips), f'{PAIRS * chips:,}', *(f'{cell:.2f}' for cell in cells))
  Console().print(table)


if __name__ == '__main__':
  main()
