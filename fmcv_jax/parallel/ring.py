"""Every item of a device meets every item of all devices, which are passed around in a ring: nothing is gathered.

Sending overlaps with computing: what has been gathered about an item travels one step behind it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fmcv_jax.parallel.rules import mesh_axes


def ring_scan(
  meet: Callable[..., tuple[Any, Any]],
  row: Any,
  items: Any,
  column: Any,
  merge: Callable[[Any, Any], Any],
  *,
  axis: str,
  block: int,
) -> tuple[Any, Any]:
  """Lets `row`, which stays on its device, meet the items of all devices of the logical axis; -> (row, column).

  Runs inside a `shard_mapped` function. Leaves of items and column are [c, ...], c items of this device, which are met
  in blocks of at most `block`. meet(row, (start, items), column) -> (row, column) sees one block: `column` is about its
  items and comes home with them, and `start` is the number of its first item, counted from the first of the row's own
  device (those of other devices are negative or c and more). merge(x, y) joins what two devices gathered about an item.
  """
  names = mesh_axes(axis)
  devices = jax.lax.axis_size(names) if names else 1
  index = jax.lax.axis_index(names) if names else 0
  size = len(jax.tree.leaves(items)[0])
  blocks = next(n for n in range(-(-size // block), size + 1) if size % n == 0)

  def cut(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.reshape(blocks, size // blocks, *x.shape[1:]), tree)

  def turn(tree: Any) -> Any:
    if not names:
      return tree
    around = [(i, (i + 1) % devices) for i in range(devices)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, names, around), tree)

  def visit(carry: Any, step: Any) -> Any:
    row, items, gathered = carry
    home = jnp.where(step > index, devices, 0) - step  # the device that these items are of, counted from this one

    def one(row: Any, args: Any) -> Any:
      number, block, column = args
      return meet(row, (home * size + number * (size // blocks), block), column)

    row, met = jax.lax.scan(one, row, (jnp.arange(blocks), cut(items), cut(column)))
    met = jax.tree.map(lambda x: x.reshape(size, *x.shape[2:]), met)
    return (row, turn(items), jax.tree.map(merge, turn(gathered), met)), None

  (row, _, gathered), _ = jax.lax.scan(visit, (row, items, column), jnp.arange(devices))
  return row, turn(gathered)
