"""The table of docs/attention.md: what the TPU compiler makes of each backend, by token count and head dimension."""

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from fmcv_jax.models.attention import attention
from fmcv_jax.parallel.mesh import MeshShape, make_mesh
from fmcv_jax.parallel.rules import Placement
from fmcv_jax.plan.planning import pod

WIDTH, BATCH = 768, 4


def compiled(backend: str, tokens: int, dim: int) -> tuple[float, float]:
  """Temporaries and bytes accessed of forward and backward, in MiB by one chip."""
  chips = 4 if backend == 'ring' else 1
  placement = Placement(make_mesh(MeshShape(data=1, sequence=chips), pod('v5e:2x2')[:chips]))
  shape = jax.ShapeDtypeStruct((BATCH, tokens, WIDTH // dim, dim), jnp.bfloat16)
  whole = (placement.sharding(('batch', None, None, None), shape.shape, 'inputs'),) * 3

  def gradients(*args):
    with placement.active():
      return jax.grad(lambda *args: attention(*args, backend=backend).astype(jnp.float32).sum(), argnums=(0, 1, 2))(
        *args
      )

  program = jax.jit(gradients, in_shardings=whole, out_shardings=whole).lower(shape, shape, shape).compile()
  bytes_accessed = program.cost_analysis()['bytes accessed']
  return program.memory_analysis().temp_size_in_bytes / 2**20, bytes_accessed / 2**20


def main() -> None:
  backends = ('xla', 'splash', 'ring')
  table = Table(title='temporaries / bytes accessed, MiB by one chip of v5e')
  for heading in ('tokens', 'head dimension', *backends):
    table.add_column(heading, justify='right')
  for dim in (64, 80):
    for tokens in (197, 257, 1024, 4096):
      cells = (compiled(backend, tokens, dim) for backend in backends)
      table.add_row(
        str(tokens), str(dim), *(f'{temporaries:,.0f} / {accessed:,.0f}' for temporaries, accessed in cells)
      )
  Console().print(table)


if __name__ == '__main__':
  main()
