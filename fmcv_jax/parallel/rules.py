"""Sharding rules: logical axes -> mesh axes.

Modules name the logical axes of their parameters (`parameter_axes`); the config maps them to mesh axes. There are no
silent fallbacks: a parameter without a matching pattern, a logical axis without a rule, a mesh axis used twice for one
array, or a dimension that is not divisible by its number of shards is a `UserError`.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fmcv_jax.errors import UserError, did_you_mean
from fmcv_jax.parallel.parameter_axes import LogicalAxes, Row, Rows, axes_of

# Activations and parameters have separate names if the same dimension is sharded differently: under FSDP the batch uses
# the `fsdp` axis, so the `width` of an activation is not sharded while the `embed` of a parameter is.
AXIS_RULES: dict[str, tuple[str, ...]] = {
  'batch': ('slice', 'data', 'fsdp'),
  'tokens': ('sequence',),
  'width': (),
  'embed': ('fsdp',),
  'heads': ('tensor',),
  'mlp': ('tensor',),
  'vocab': ('tensor',),
  'layers': (),
  'everywhere': ('slice', 'data', 'fsdp', 'sequence', 'tensor'),
}


@dataclasses.dataclass(frozen=True)
class Rules:
  """Sharding overrides of a config: `axes` for rows of AXIS_RULES, `parameters` precede the rows of the modules."""

  axes: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
  parameters: tuple[Row, ...] = ()

  def spec(self, axes: LogicalAxes, shape: tuple[int, ...], mesh: Mesh, what: str) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes; `what` names it in errors."""
    if len(axes) != len(shape):
      raise UserError(f'{what}: {len(axes)} logical axes {axes} for an array of shape {shape}')
    rules = {**AXIS_RULES, **self.axes}
    entries: list[tuple[str, ...] | None] = []
    used: dict[str, str] = {}
    for axis, size in zip(axes, shape, strict=True):
      if axis is None:
        entries.append(None)
        continue
      if axis not in rules:
        raise UserError(
          f'config.rules.axes: no rule for the logical axis {axis!r} of {what}; {did_you_mean(axis, rules)}'
        )
      ways = 1
      for name in rules[axis]:
        if name not in mesh.shape:
          raise UserError(f'config.rules.axes.{axis}: no mesh axis {name!r}; {did_you_mean(name, mesh.shape)}')
        if mesh.shape[name] > 1 and name in used:
          raise UserError(
            f'config.rules.axes: {what} of shape {shape} would use the mesh axis {name!r} twice, '
            f'for {used[name]!r} and {axis!r}'
          )
        used[name] = axis
        ways *= mesh.shape[name]
      # The partitioner pads an odd number of tokens (a class token); any other indivisible dimension is an error.
      if size % ways and axis != 'tokens':
        split = ' x '.join(f'{name}={mesh.shape[name]}' for name in rules[axis] if mesh.shape[name] > 1)
        raise UserError(f'{what}: axis {axis!r} of size {size} (shape {shape}) is not divisible by {split}')
      entries.append(tuple(name for name in rules[axis] if mesh.shape[name] > 1) or None)
    while entries and entries[-1] is None:  # JAX compares specs literally: one spelling for one sharding
      entries.pop()
    return PartitionSpec(*entries)


@dataclasses.dataclass(frozen=True)
class Placement:
  """A mesh and the sharding rules of arrays on it."""

  mesh: Mesh
  rules: Rules = Rules()

  def sharding(self, axes: LogicalAxes, shape: tuple[int, ...], what: str) -> NamedSharding:
    """Sharding of an array with these logical axes; UserError naming `what` if a side is not divisible."""
    return NamedSharding(self.mesh, self.rules.spec(axes, shape, self.mesh, what))

  def replicated(self) -> NamedSharding:
    """Sharding of an array that every device holds whole."""
    return NamedSharding(self.mesh, PartitionSpec())

  def parameters(self, tree: Any, rows: Rows) -> Any:
    """Shardings of a tree of parameters (arrays or ShapeDtypeStructs), leaf by leaf, by rows from `trace_init`."""

    def leaf(key_path: Any, x: Any) -> Any:
      path = path_of(key_path)
      return self.sharding(axes_of(path, x.shape, self.rules.parameters, rows), x.shape, f'parameter {path}')

    return jax.tree_util.tree_map_with_path(leaf, tree)

  def batch(self, tree: Any) -> Any:
    """Shardings of a batch: the leading axis of each leaf is `batch`, other axes are not sharded."""

    def leaf(key_path: Any, x: Any) -> Any:
      axes = ('batch',) + (None,) * (len(x.shape) - 1)
      return self.sharding(axes, x.shape, f'batch field {path_of(key_path)!r}')

    return jax.tree_util.tree_map_with_path(leaf, tree)

  @contextlib.contextmanager
  def active(self) -> Iterator[None]:
    """Context in which traced code constrains activations by these rules (see `with_logical_constraint`)."""
    token = _ACTIVE.set(self)
    try:
      yield
    finally:
      _ACTIVE.reset(token)


_ACTIVE: contextvars.ContextVar[Placement | None] = contextvars.ContextVar('fmcv_placement', default=None)


def with_logical_constraint(x: jax.Array, *axes: str | None) -> jax.Array:
  """Constrains the sharding of an activation by its logical axes; the identity if no placement is active.

  Example: `with_logical_constraint(x, 'batch', 'tokens', 'width')` inside a network. Raises UserError if a dimension
  other than that of tokens is not divisible by its number of shards.
  """
  placement = _ACTIVE.get()
  if placement is None:
    return x
  return jax.lax.with_sharding_constraint(x, placement.sharding(axes, x.shape, f'activation {axes}'))


def platform() -> str | None:
  """Platform of the active placement ('cpu', 'gpu', 'tpu'); None if no placement is active."""
  placement = _ACTIVE.get()
  return placement.mesh.devices.flat[0].platform if placement else None


def mesh_axes(axis: str) -> tuple[str, ...]:
  """Mesh axes of more than one device over which the active placement splits a logical axis; () without a placement."""
  placement = _ACTIVE.get()
  if placement is None:
    return ()
  names = {**AXIS_RULES, **placement.rules.axes}[axis]
  return tuple(name for name in names if placement.mesh.shape[name] > 1)


def num_shards(axis: str) -> int:
  """Number of shards of a logical axis under the active placement; 1 if none is active."""
  placement = _ACTIVE.get()
  return math.prod(placement.mesh.shape[name] for name in mesh_axes(axis)) if placement else 1


def shard_mapped(function: Callable[..., Any], inputs: tuple[LogicalAxes, ...], outputs: Any) -> Callable[..., Any]:
  """`function` as a shard_map over the active placement, run by each device on its own shards; unchanged without one.

  inputs are the logical axes of the arguments (arrays or trees of arrays of one rank), outputs those of the results.
  Inside, `mesh_axes` gives the axes for collectives. Raises UserError if a dimension is not divisible.
  """
  placement = _ACTIVE.get()
  if placement is None:
    return function

  def run(*args: Any) -> Any:
    for axes, arg in zip(inputs, args, strict=True):
      for leaf in jax.tree.leaves(arg):
        placement.sharding(axes, leaf.shape, f'activation {axes}')
    specs = [
      jax.tree.map(
        lambda axes: PartitionSpec(*((axis and mesh_axes(axis)) or None for axis in axes)), side, is_leaf=_is_axes
      )
      for side in (inputs, outputs)
    ]
    return jax.shard_map(function, mesh=placement.mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False)(*args)

  return run


def _is_axes(x: Any) -> bool:
  return isinstance(x, tuple) and all(axis is None or isinstance(axis, str) for axis in x)


def path_of(key_path: tuple[Any, ...]) -> str:
  """A jax key path as 'a/b/c'; dict keys, attributes and indices alike."""
  return jax.tree_util.keystr(key_path, simple=True, separator='/')
