"""A scan of the items of all devices, which rotate in a ring: each device sees every item, and none gathers them.

Sending overlaps with computing: the results of an item travel one step behind it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fmcv_jax.parallel.rules import mesh_axes


def ring_scan(
  body: Callable[..., tuple[Any, Any]],
  carry: Any,
  items: Any,
  results: Any,
  merge: Callable[[Any, Any], Any],
  *,
  axis: str,
  block: int,
) -> tuple[Any, Any]:
  """Ring scan: `carry` stays on its device, `items` and their `results` rotate over those of a logical axis.

  Returns (carry, results). Runs inside a `shard_mapped` function. Leaves of items and results are [c, ...], c items of
  this device, which `body` sees in blocks of at most `block`.

  body     (carry, (start, items), results) -> (carry, results) of one block; `start` is the number of its first item,
           counted from the first of this device (items of other devices are negative, or c and more)
  results  initial results of this device's items, which return to it with the contributions of all devices
  merge    (x, y) -> the joined contributions of two devices to an item
  """
  names = mesh_axes(axis)
  devices = jax.lax.axis_size(names) if names else 1
  index = jax.lax.axis_index(names) if names else 0
  size = len(jax.tree.leaves(items)[0])
  blocks = next(n for n in range(-(-size // block), size + 1) if size % n == 0)

  def in_blocks(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.reshape(blocks, size // blocks, *x.shape[1:]), tree)

  def rotate(tree: Any) -> Any:
    if not names:
      return tree
    around = [(i, (i + 1) % devices) for i in range(devices)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, names, around), tree)

  def visit(state: Any, step: Any) -> Any:
    carry, items, total = state
    offset = jnp.where(step > index, devices, 0) - step  # from this device to the one that the items are of

    def one(carry: Any, args: Any) -> Any:
      number, block, initial = args
      return body(carry, (offset * size + number * (size // blocks), block), initial)

    carry, added = jax.lax.scan(one, carry, (jnp.arange(blocks), in_blocks(items), in_blocks(results)))
    added = jax.tree.map(lambda x: x.reshape(size, *x.shape[2:]), added)
    return (carry, rotate(items), jax.tree.map(merge, rotate(total), added)), None

  (carry, _, total), _ = jax.lax.scan(visit, (carry, items, results), jnp.arange(devices))
  return carry, rotate(total)
