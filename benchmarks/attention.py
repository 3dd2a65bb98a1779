"""The table of docs/attention.md: what the TPU compiler makes of each backend, by token count and head dimension."""

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from fmcv_jax.models.common.attention.dispatch import attention
from fmcv_jax.models.common.attention.single_tile import fits
from fmcv_jax.parallel.mesh import MeshShape, make_mesh
from fmcv_jax.parallel.rules import Placement
from fmcv_jax.plan import hlo, kernels
from fmcv_jax.plan.planning import CHIPS, pod

WIDTH, TOKENS = 768, 16_384  # in all examples


def compiled(backend: str, tokens: int, dim: int) -> str:
  """Temporaries and bytes accessed of forward and backward, in MiB, and microseconds by the compiler's cycles."""
  if backend == 'short' and not fits(tokens, tokens, WIDTH // dim, dim):
    return ''
  chips = 4 if backend == 'ring' else 1
  placement = Placement(make_mesh(MeshShape(data=1, sequence=chips), pod('v5e:2x2')[:chips]))
  shape = jax.ShapeDtypeStruct((TOKENS // tokens, tokens, WIDTH // dim, dim), jnp.bfloat16)
  whole = (placement.sharding(('batch', None, None, None), shape.shape, 'inputs'),) * 3

  def gradients(*args):
    with placement.active():
      return jax.grad(lambda *args: attention(*args, backend=backend).astype(jnp.float32).sum(), argnums=(0, 1, 2))(
        *args
      )

  traced = jax.jit(gradients, in_shardings=whole, out_shardings=whole).trace(shape, shape, shape)
  program = traced.lower(lowering_platforms=('tpu',)).compile()
  text, temporaries = program.as_text(), program.memory_analysis().temp_size_in_bytes / 2**20
  cycles = hlo.estimated_cycles(text) + kernels.cycles(text, kernels.steps(traced.jaxpr.jaxpr))
  accessed = program.cost_analysis()['bytes accessed'] / 2**20
  return f'{temporaries:,.0f} / {accessed:,.0f} / {1e6 * cycles / CHIPS["v5e"].clock:,.0f}'


def main() -> None:
  backends = ('xla', 'short', 'splash', 'ring')
  table = Table(title='temporaries, MiB / bytes accessed, MiB / microseconds by cycles, of one chip of v5e')
  for heading in ('tokens', 'head dimension', *backends):
    table.add_column(heading, justify='right')
  for dim in (64, 80):
    for tokens in (196, 257, 576, 1024, 4096):
      table.add_row(str(tokens), str(dim), *(compiled(backend, tokens, dim) for backend in backends))
  Console(width=120).print(table)


if __name__ == '__main__':
  main()
