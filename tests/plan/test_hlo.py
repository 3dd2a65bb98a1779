"""Reading programs whose exchanges are known: what this process' own compiler makes of them, and lines of the TPU's."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from fmcv_jax.parallel.mesh import MeshShape, make_mesh
from fmcv_jax.plan import hlo, planning

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
    ("replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0'}", ('fsdp',)),
    ("replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}", ('data',)),
  ],
)
def test_groups_are_read_in_every_spelling(groups, axes):
  line = f'  %r = f32[8]{{0}} all-reduce(%x), channel_id=1, {groups}, to_apply=%add'
  text = f'ENTRY %main (x: f32[8]) -> f32[8] {{\n{line}\n}}'
  (row,) = hlo.collectives(text, MESH)
  assert row.axes == axes
  size = {('data',): 2, ('fsdp',): 4, ('data', 'fsdp'): 8}[axes]
  assert row.bytes == 2 * 32 * (size - 1) / size


@pytest.mark.parametrize(('first', 'end', 'trips'), [(0, 12, 12), (2, 12, 10)])
def test_a_loop_without_a_known_count_is_counted_from_its_condition(first, end, trips):
  text = f"""%below (p: (s32[], f32[])) -> pred[] {{
  %p = (s32[], f32[]) parameter(0)
  %end = s32[]{{:T(128)}} constant({end})
  %i = s32[]{{:T(128)}} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{{:T(512)}} compare(%i, %end), direction=LT, metadata={{op_name="lt"}}
}}

%body (p: (s32[], f32[])) -> (s32[], f32[]) {{
  %f = f32[] fusion(%p), kind=kLoop, calls=%inner, backend_config={{"estimated_cycles":"10"}}
}}

ENTRY %main (x: f32[]) -> f32[] {{
  %first = s32[]{{:T(128)}} constant({first})
  %copy = s32[]{{:T(128)}} copy(%first)
  %state = (s32[], f32[]) tuple(%copy, /*index=1*/%x)
  %w = (s32[], f32[]) while(%state), condition=%below, body=%body, metadata={{op_name="while"}}
}}
"""
  assert hlo.estimated_cycles(text) == 10 * trips


def test_estimated_cycles_of_a_loop_count_each_time():
  text = """%body (p: f32[]) -> f32[] {
  %f = f32[] fusion(%p), kind=kLoop, calls=%inner, backend_config={"estimated_cycles":"10"}
}

ENTRY %main (x: f32[]) -> f32[] {
  %w = f32[] while(%x), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"12"}}
  %g = f32[] fusion(%w), kind=kLoop, calls=%inner, backend_config={"estimated_cycles":"7"}
}"""
  assert hlo.estimated_cycles(text) == 127


def test_gathers_count_by_the_slices_that_they_take():
  text = """%inner (a: f32[64,300,3], b: s32[64,100]) -> f32[64,100,3] {
  %a = f32[64,300,3]{2,1,0} parameter(0)
  %b = s32[64,100]{1,0} parameter(1)
  ROOT %gather.3 = f32[64,100,3]{2,1,0:T(8,128)} gather(%a, %b), offset_dims={2}, slice_sizes={1,1,3}, metadata={}
}

%body (p: f32[]) -> f32[] {
  %f = f32[64,100,3] fusion(%p, %p), kind=kCustom, calls=%inner
}

ENTRY %main (x: f32[]) -> f32[] {
  %w = f32[] while(%x), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"2"}}
  %words = bf16[5,768]{1,0} gather(%t, %i), offset_dims={1}, slice_sizes={1,768}
}"""
  assert hlo.gathered(text) == 2 * 6400 + 5
  assert hlo.estimated_cycles(text) == hlo.GATHER_CYCLES * hlo.gathered(text)


def test_bytes_of_a_loop_over_stacked_layers():
  text = """%inner (a: f32[3,8], b: s32[]) -> f32[8] {
  %a = f32[3,8]{1,0} parameter(0)
  %b = s32[] parameter(1)
  %slice = f32[1,8]{1,0} dynamic-slice(%a, %b, %b), dynamic_slice_sizes={1,8}
  ROOT %flat = f32[8]{0} bitcast(%slice)
}

%store (c: f32[3,8], d: f32[8], e: s32[]) -> f32[3,8] {
  %c = f32[3,8]{1,0} parameter(0)
  %d = f32[8]{0} parameter(1)
  %e = s32[] parameter(2)
  %row = f32[1,8]{1,0} bitcast(%d)
  ROOT %put = f32[3,8]{1,0} dynamic-update-slice(%c, %row, %e, %e)
}

%body (p: (s32[], f32[3,8], f32[3,8])) -> (s32[], f32[3,8], f32[3,8]) {
  %p = (s32[], f32[3,8], f32[3,8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %w = f32[3,8]{1,0} get-tuple-element(%p), index=1
  %o = f32[3,8]{1,0} get-tuple-element(%p), index=2
  %taken = f32[8]{0} fusion(%w, %i), kind=kLoop, calls=%inner
  %near = f32[8]{0:T(128)S(1)} copy(%taken)
  %put.1 = f32[3,8]{1,0} fusion(%o, %taken, %i), kind=kLoop, calls=%store
  ROOT %t = (s32[], f32[3,8], f32[3,8]) tuple(%i, %w, %put.1)
}

ENTRY %main (x: (s32[], f32[3,8], f32[3,8])) -> (s32[], f32[3,8], f32[3,8]) {
  %x = (s32[], f32[3,8], f32[3,8]) parameter(0)
  ROOT %loop = (s32[], f32[3,8], f32[3,8]) while(%x), body=%body, backend_config={"known_trip_count":{"n":"3"}}
}"""
  taken = 4 + 32 + 32  # the index, the slice, the result
  copied = 32  # what goes into the chip's own memory costs its reading
  put = 4 + 32 + 32
  assert hlo.bytes_accessed(text) == 3 * (taken + copied + put)


def test_exchanges_inside_of_fusions_count_once_for_each_channel_and_chain():
  """As the TPU's compiler writes them, shortened: a gather next to two fusions, the same of another layer, and a
  sum that is split."""
  groups = 'replica_groups={{0,1,2,3},{4,5,6,7}}, use_global_device_ids=true'
  gather, other = (
    f'  %g = bf16[384,1536]{{1,0}} all-gather(%p), channel_id=135, {groups}, dimensions={{0}}, '
    f'frontend_attributes={{chain_id="{chain}"}}'
    for chain in (7, 8)
  )
  text = f"""%begin (p: bf16[96,1536]) -> bf16[384,1536] {{
{gather}
}}

%meanwhile (p: bf16[96,1536], x: f32[8]) -> f32[8] {{
{gather}
  ROOT %y = f32[8]{{0}} add(%x, %x)
}}

%next (p: bf16[96,1536]) -> bf16[384,1536] {{
{other}
}}

%all-reduce-scatter.7 (p: bf16[32,768]) -> bf16[8,768] {{
  %sum = bf16[32,768]{{1,0}} all-reduce(%p), channel_id=70, {groups}, to_apply=%add
  ROOT %mine = bf16[8,768]{{1,0}} dynamic-slice(%sum, %index, %zero), dynamic_slice_sizes={{8,768}}
}}

ENTRY %main (p: bf16[96,1536]) -> f32[8] {{
  %async-collective-start.4 = bf16[384,1536]{{1,0}} fusion(%p), kind=kCustom, calls=%begin
  %fusion.663 = f32[8]{{0}} fusion(%p, %x), kind=kOutput, calls=%meanwhile
  %async-collective-start.5 = bf16[384,1536]{{1,0}} fusion(%p), kind=kCustom, calls=%next
  %fusion.9 = bf16[8,768]{{1,0}} fusion(%z), kind=kCustom, calls=%all-reduce-scatter.7
}}"""
  gathered, summed = hlo.collectives(text, MESH)
  assert (gathered.kind, gathered.axes, gathered.times, gathered.bytes) == (
    'all-gather',
    ('fsdp',),
    2,
    2 * 2 * 384 * 1536 * 3 / 4,
  )
  assert (summed.kind, summed.axes, summed.times, summed.bytes) == (
    'reduce-scatter',
    ('fsdp',),
    1,
    2 * 32 * 768 * 3 / 4,
  )


def test_what_follows_a_kernel_with_attributes_of_several_lines_is_read():
  line = '  %r = f32[8]{0} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add'
  kernel = '  %k = f32[8]{0} custom-call(%x), frontend_attributes={kernel_metadata={\n"block": "1024"\n}}, metadata={}'
  text = f'ENTRY %main (x: f32[8]) -> f32[8] {{\n{kernel}\n{line}\n}}'
  assert [row.kind for row in hlo.collectives(text, MESH)] == ['all-reduce']


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int8', 'bool'])
@pytest.mark.parametrize('shape', [(4096, 3), (100, 77, 77), (12, 5, 130, 200), (1001,)])
def test_bytes_of_a_tpu_array_include_the_padding_of_its_tiles(shape, dtype):
  """Against the sizes that the TPU compiler states for the argument and the result."""
  pytest.importorskip('libtpu')
  array = jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(planning.pod('v5e:2x2')[0]))
  program = jax.jit(jnp.logical_not if dtype == 'bool' else jnp.negative).lower(array).compile()
  stated = program.memory_analysis()
  whole = stated.argument_size_in_bytes + stated.output_size_in_bytes
  assert hlo.bytes_accessed(program.as_text()) == whole > 2 * array.size * array.dtype.itemsize
