"""The device mesh: five named axes; every choice of their sizes runs the same program."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from fmcv_jax.bounds import AxisSize, PositiveInt
from fmcv_jax.errors import UserError

AXES = ('slice', 'data', 'fsdp', 'sequence', 'tensor')


@dataclasses.dataclass(frozen=True)
class MeshShape:
  """Sizes of the mesh axes, slowest network first; -1, at most once, means all remaining devices.

  slice     data parallelism over the data-center network, one replica per TPU slice or GPU host group
  data      data parallelism: parameters replicated, batch split
  fsdp      fully sharded data parallelism: batch and parameters split (parameters gathered per layer)
  sequence  sequence parallelism: tokens of an example split
  tensor    tensor parallelism: heads and hidden units of a layer split

  `max_fsdp` bounds fsdp=-1; the remaining devices are replicas. For shards of only a few rows the TPU compiler replaces
  the all-gather of parameters by a sum, at twice the bytes (docs/plan.md).
  """

  slice: AxisSize = 1
  data: AxisSize = -1
  fsdp: AxisSize = 1
  sequence: AxisSize = 1
  tensor: AxisSize = 1
  max_fsdp: PositiveInt | None = None

  def __post_init__(self) -> None:
    sizes = self.sizes()
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
      raise ValueError(f'axis sizes must be positive, with -1 at most once for the remaining devices; got {self}')
    if self.max_fsdp is not None and self.max_fsdp < 1:
      raise ValueError(f'max_fsdp: expected a positive number, got {self.max_fsdp}')

  def sizes(self) -> list[int]:
    """Axis sizes in the order of AXES; -1 is not filled in."""
    return [getattr(self, axis) for axis in AXES]

  def sizes_for(self, device_count: int) -> tuple[int, ...]:
    """Axis sizes on `device_count` devices, with -1 filled in; UserError if `device_count` is not divisible by them."""
    sizes = self.sizes()
    fixed = math.prod(size for size in sizes if size != -1)
    shown = ' x '.join(f'{axis}={size}' for axis, size in zip(AXES, sizes, strict=True) if size != 1) or 'data=1'
    if -1 in sizes:
      if device_count % fixed:
        raise UserError(f'config.mesh: {shown} needs a multiple of {fixed} devices, but there are {device_count}')
      left = taken = device_count // fixed
      if self.fsdp == -1 and self.max_fsdp:
        taken = max(n for n in range(1, min(left, self.max_fsdp) + 1) if left % n == 0)
      sizes[sizes.index(-1)] = taken
      sizes[AXES.index('data')] *= left // taken
    elif fixed != device_count:
      raise UserError(
        f'config.mesh: {shown} is {fixed} devices, but there are {device_count}; set one axis to -1 to use them all'
      )
    return tuple(sizes)


def make_mesh(shape: MeshShape, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh over `devices` (default: all of every process).

  On TPU the order of devices follows the physical topology, so that the fast axes are neighbors. Axes are Auto: the
  partitioner propagates the shardings of inputs, parameters and of activations with `with_logical_constraint`.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = shape.sizes_for(len(devices))
  if devices[0].platform == 'tpu' and sizes[0] == 1:
    from jax.experimental import mesh_utils

    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
  elif devices[0].platform == 'tpu':
    from jax.experimental import mesh_utils

    grid = mesh_utils.create_hybrid_device_mesh(
      (1, *sizes[1:]), (sizes[0], 1, 1, 1, 1), devices, allow_split_physical_axes=True
    )
  else:
    grid = np.array(devices).reshape(sizes)
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
