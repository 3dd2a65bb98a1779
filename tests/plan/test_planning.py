import importlib.util
import json
import math

import pytest

from fmcv_jax import __main__ as cli
from fmcv_jax.errors import UserError
from fmcv_jax.parallel.mesh import MeshShape
from fmcv_jax.plan import planning

needs_compiler = pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='needs libtpu')


def test_an_unknown_topology_is_refused():
  for name in ('v5e', 'v7x:2x2', 'v5e:2by2'):
    with pytest.raises(UserError, match='--topology'):
      planning.pod(name)


def test_largest_buffers_are_read_from_the_compilers_complaint():
  message = (
    'XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 19.01G of 15.75G hbm.\n'
    '  Size: 4.00G\n     Operator: op_name="jit(step)/dot_general"\n  Size: 2.00G\n     Shape: f32[1,2]{1,0}\n'
  )
  line = planning._largest(message)
  assert line.startswith('needs 19.01G of 15.75G bytes of HBM; largest: 4.00G jit(step)/dot_general; 2.00G f32[1,2]')
  early = (
    'Ran out of memory on HBM, the total memory required for HLO temporaries (16.66G) exceeds available HBM (15.75G).'
  )
  assert planning._largest(early).startswith('needs 16.66G of 15.75G bytes of HBM; largest: unknown')


def test_the_pareto_front_is_marked():
  cheap, quick, beaten = planning.Cost(2.0, 1.0, 5), planning.Cost(1.0, 3.0, 5), planning.Cost(2.0, 3.0, 6)
  assert planning.pareto_front([cheap, quick, beaten, cheap]) == [True, True, False, True]


def test_a_search_tries_each_mesh_remat_and_batch_and_keeps_the_other_axes():
  config = planning.load_config('configs/clip.py:B/16', ['mesh.tensor=2'])
  found = list(planning.choices(config, (64, 128), chips=32))
  assert len({(mesh, remat, batch) for mesh, remat, batch, _ in found}) == len(found) == 3 * 3 * 2
  for mesh, remat, batch, overrides in found:
    changed = planning.load_config('configs/clip.py:B/16', ['mesh.tensor=2', *overrides])
    assert (changed['mesh']['tensor'], changed['train']['batch_size']) == (2, batch)
    assert changed['objective']['network']['remat'] == remat
    assert (changed['mesh']['fsdp'] == 1) == (mesh == 'data')
    assert math.prod(MeshShape(**changed['mesh']).sizes_for(32)) == 32


@needs_compiler
@pytest.mark.slow
def test_a_plan_of_a_small_step(tmp_path, capsys):
  file = tmp_path / 'plan.json'
  args = ['plan', '--config', 'configs/demo/clip.py', '--topology', 'v5e:2x2', '--json', str(file)]
  assert cli.main(args) == 0
  (plan,) = json.loads(file.read_text())
  assert plan['chips'] == 4
  # Muon keeps one moment of most parameters; nothing of it is split over the data axis.
  assert plan['parameter_bytes'] == pytest.approx(4 * plan['parameters'], rel=0.01)
  kinds = {row['kind'] for row in plan['collectives']}
  assert {'all-reduce', 'collective-permute'} <= kinds
  assert plan['flops'] > 0
