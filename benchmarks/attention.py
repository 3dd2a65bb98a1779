"""The tables of docs/attention.md: what the TPU compiler makes of each backend, by token count and head dimension."""

import argparse

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from fmcv_jax.models.common.attention.dispatch import attention
from fmcv_jax.models.common.attention.masks import PrefixMask
from fmcv_jax.models.common.attention.single_tile import fits
from fmcv_jax.parallel.mesh import MeshShape, make_mesh
from fmcv_jax.parallel.rules import Placement
from fmcv_jax.plan import hlo, kernels
from fmcv_jax.plan.planning import CHIPS, pod

WIDTH, TOKENS = 768, 16_384  # in all examples
# Heads, key-value heads, head dimension and softcap of the text decoders of PaliGemma 3B and PaliGemma 2 3B.
DECODERS = {'PaliGemma 3B': (8, 1, 256, None), 'PaliGemma 2 3B': (8, 4, 256, 50.0)}
PIXELS = {304: 224, 1072: 448}  # tokens: those of the image, and 48 of the text


def compiled(
  backend: str,
  tokens: int,
  dim: int,
  heads: int,
  kv_heads: int,
  *,
  prefix: bool = False,
  softcap: float | None = None,
) -> str:
  """Temporaries and bytes accessed of forward and backward, in MiB, and microseconds by the compiler's cycles."""
  if backend == 'short' and not fits(tokens, tokens, heads, dim):
    return ''
  chips = 4 if backend == 'ring' else 1
  placement = Placement(make_mesh(MeshShape(data=1, sequence=chips), pod('v5e:2x2')[:chips]))
  query, key = (
    jax.ShapeDtypeStruct((TOKENS // tokens, tokens, count, dim), jnp.bfloat16) for count in (heads, kv_heads)
  )
  whole = tuple(placement.sharding(('batch', None, None, None), shape.shape, 'inputs') for shape in (query, key, key))

  def gradients(*args):
    mask = PrefixMask(jnp.broadcast_to(jnp.arange(tokens) < tokens - 32, (TOKENS // tokens, tokens)))

    def total(*args):
      y = attention(*args, mask=mask if prefix else None, softcap=softcap, backend=backend)
      return y.astype(jnp.float32).sum()

    with placement.active():
      return jax.grad(total, argnums=(0, 1, 2))(*args)

  traced = jax.jit(gradients, in_shardings=whole, out_shardings=whole).trace(query, key, key)
  program = traced.lower(lowering_platforms=('tpu',)).compile()
  text, temporaries = program.as_text(), program.memory_analysis().temp_size_in_bytes / 2**20
  cycles = hlo.estimated_cycles(text) + kernels.cycles(text, kernels.steps(traced.jaxpr.jaxpr))
  accessed = program.cost_analysis()['bytes accessed'] / 2**20
  return f'{temporaries:,.0f} / {accessed:,.0f} / {1e6 * cycles / CHIPS["v5e"].clock:,.0f}'


def encoders() -> Table:
  """Full attention, as in image networks, by token count and head dimension."""
  backends = ('xla', 'short', 'splash', 'ring')
  table = Table(title='temporaries, MiB / bytes accessed, MiB / microseconds by cycles, of one chip of v5e')
  for heading in ('tokens', 'head dimension', *backends):
    table.add_column(heading, justify='right')
  for dim in (64, 80):
    for tokens in (196, 257, 576, 1024, 4096):
      heads = WIDTH // dim
      table.add_row(str(tokens), str(dim), *(compiled(backend, tokens, dim, heads, heads) for backend in backends))
  return table


def decoders() -> Table:
  """Attention of language models that read an image: the mask of a prefix, few key-value heads, softcap."""
  backends = ('xla', 'short', 'splash')
  table = Table(title='the same, with the mask of a prefix')
  for heading in ('decoder', 'image', 'tokens', *backends):
    table.add_column(heading, justify='right')
  for name, (heads, kv_heads, dim, softcap) in DECODERS.items():
    for tokens, pixels in PIXELS.items():
      cells = (compiled(backend, tokens, dim, heads, kv_heads, prefix=True, softcap=softcap) for backend in backends)
      table.add_row(name, f'{pixels} px', str(tokens), *cells)
  return table


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('networks', nargs='*', choices=['encoders', 'decoders'], help='default: both')
  for name in parser.parse_args().networks or ['encoders', 'decoders']:
    Console(width=120).print({'encoders': encoders, 'decoders': decoders}[name]())


if __name__ == '__main__':
  main()
