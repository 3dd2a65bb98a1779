"""Reading programs whose exchanges are known: what this process' own compiler makes of them, and lines of the TPU's."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fmcv_jax.parallel.mesh import MeshShape, make_mesh
from fmcv_jax.plan import hlo

MESH = {'slice': 1, 'data': 2, 'fsdp': 4, 'sequence': 1, 'tensor': 1}


def compiled(function, *specs):
  mesh = make_mesh(MeshShape(data=2, fsdp=4), jax.devices())
  args = [jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=NamedSharding(mesh, spec)) for spec in specs]
  out = NamedSharding(mesh, P())
  return jax.jit(function, out_shardings=out).lower(*args).compile().as_text()


def test_a_gather_is_found_with_its_axes_and_bytes():
  (row,) = hlo.collectives(compiled(lambda x: x * 2, P(('data', 'fsdp'))), MESH)
  assert (row.kind, row.axes, row.times) == ('all-gather', ('data', 'fsdp'), 1)
  assert row.bytes == 8 * 64 * 4 * 7 / 8


def test_what_a_loop_does_counts_each_time():
  def function(x):
    return jax.lax.scan(lambda total, _: (total + jnp.tanh(total).sum(0, keepdims=True), None), x, None, length=5)[
      0
    ].sum()

  rows = [row for row in hlo.collectives(compiled(function, P('data')), MESH) if row.axes == ('data',)]
  assert max(row.times for row in rows) >= 5


@pytest.mark.parametrize(
  ('groups', 'axes'),
  [
    ('replica_groups={{0,4},{1,5},{2,6},{3,7}}', ('data',)),
    ('replica_groups=[4,2]<=[2,4]T(1,0)', ('data',)),
    ('replica_groups=[2,4]<=[8]', ('fsdp',)),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", ('fsdp',)),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", ('data', 'fsdp')),
  ],
)
def test_groups_are_read_in_every_spelling(groups, axes):
  line = f'  %r = f32[8]{{0}} all-reduce(%x), channel_id=1, {groups}, to_apply=%add'
  text = f'ENTRY %main (x: f32[8]) -> f32[8] {{\n{line}\n}}'
  (row,) = hlo.collectives(text, MESH)
  assert row.axes == axes
  size = {('data',): 2, ('fsdp',): 4, ('data', 'fsdp'): 8}[axes]
  assert row.bytes == 2 * 32 * (size - 1) / size


def test_estimated_cycles_of_a_loop_count_each_time():
  text = """%body (p: f32[]) -> f32[] {
  %f = f32[] fusion(%p), kind=kLoop, calls=%inner, backend_config={"estimated_cycles":"10"}
}

ENTRY %main (x: f32[]) -> f32[] {
  %w = f32[] while(%x), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"12"}}
  %g = f32[] fusion(%w), kind=kLoop, calls=%inner, backend_config={"estimated_cycles":"7"}
}"""
  assert hlo.estimated_cycles(text) == 127
