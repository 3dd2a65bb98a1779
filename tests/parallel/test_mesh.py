import jax
import pytest

from fmcv_jax.errors import UserError
from fmcv_jax.parallel.mesh import MeshShape, make_mesh


def test_minus_one_takes_the_devices_that_are_left():
  assert MeshShape(fsdp=2, tensor=2).sizes_for(8) == (1, 2, 2, 1, 2)
  assert dict(make_mesh(MeshShape(fsdp=2)).shape) == {'slice': 1, 'data': 4, 'fsdp': 2, 'sequence': 1, 'tensor': 1}


@pytest.mark.parametrize(('devices', 'data', 'fsdp'), [(8, 1, 8), (16, 1, 16), (256, 16, 16), (48, 3, 16), (22, 2, 11)])
def test_fsdp_takes_no_more_than_it_may_and_the_rest_are_replicas(devices, data, fsdp):
  assert MeshShape(data=1, fsdp=-1, max_fsdp=16).sizes_for(devices) == (1, data, fsdp, 1, 1)


def test_the_bound_of_fsdp_bounds_nothing_else():
  assert MeshShape(data=-1, fsdp=1, max_fsdp=2).sizes_for(8) == (1, 8, 1, 1, 1)
  assert MeshShape(data=1, tensor=-1, max_fsdp=2).sizes_for(8) == (1, 1, 1, 1, 8)
  with pytest.raises(ValueError, match='max_fsdp'):
    MeshShape(fsdp=-1, data=1, max_fsdp=0)


def test_indivisible_mesh_is_one_clear_line():
  with pytest.raises(UserError, match='tensor=3 needs a multiple of 3 devices, but there are 8'):
    make_mesh(MeshShape(tensor=3))
  with pytest.raises(UserError, match='data=4 is 4 devices, but there are 8; set one axis to -1'):
    make_mesh(MeshShape(data=4))
  with pytest.raises(ValueError, match='-1 at most once'):
    MeshShape(data=-1, fsdp=-1)


def test_axes_are_auto_so_that_linen_layers_partition():
  assert set(make_mesh(MeshShape()).axis_types) == {jax.sharding.AxisType.Auto}
