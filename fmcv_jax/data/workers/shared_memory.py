"""Transfers arrays from worker processes through reused blocks of shared memory.

A new block per batch would cost page faults, more than a tenth of the time of decoding. Blocks are unlinked once both
processes have mapped them, so that none is left behind, however a run ends.
"""

import contextlib
import dataclasses
import itertools
import os
import pathlib
import secrets
from multiprocessing.shared_memory import SharedMemory
from typing import Any, NamedTuple, Protocol

import numpy as np

_ALIGNED = 64  # bytes


class RandomAccess(Protocol):
  """A random-access source: pure and picklable, so that any process or thread can compute any element."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Any: ...


class Array(NamedTuple):
  """Location of an array in a block; `offset` in bytes."""

  offset: int
  shape: tuple[int, ...]
  dtype: str


_STAMP = Array(0, (1,), '<i8')


@dataclasses.dataclass(frozen=True)
class SharedMemoryHandle:
  """An element whose arrays are in the block `name`, valid while the stamp of the block equals `turn`."""

  name: str
  turn: int
  element: Any


class SharedMemoryWriter:
  """Wraps a source: its elements (nested dicts and tuples with arrays) become `SharedMemoryHandle`s, in one of `blocks`
  blocks in turn. An element must be read before the `blocks`-th element after it is computed."""

  def __init__(self, source: RandomAccess, blocks: int):
    self._source, self._turn = source, 0
    self._blocks: list[SharedMemory | None] = [None] * blocks
    self.prefix = f'psm_{secrets.token_hex(4)}_'  # of the names of all blocks, in whatever process they are made
    self._numbers = itertools.count()

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> SharedMemoryHandle:
    element = self._source[index]
    arrays: list[np.ndarray] = []
    layout, size = _laid_out(element, _ALIGNED, arrays)
    slot = self._turn % len(self._blocks)
    block = self._blocks[slot]
    if block is None or block.size < size:
      name = f'{self.prefix}{os.getpid()}_{next(self._numbers)}'
      block = self._blocks[slot] = SharedMemory(name, create=True, size=size)
    stamp = _view(block, _STAMP)
    stamp[0] = -1  # incomplete
    for place, array in zip(_places(layout), arrays, strict=True):
      _view(block, place)[...] = array
    stamp[0] = self._turn
    self._turn += 1
    return SharedMemoryHandle(block.name, self._turn - 1, layout)

  def __getstate__(self) -> dict[str, Any]:
    blocks = [None] * len(self._blocks)
    return {
      '_source': self._source,
      '_turn': 0,
      '_blocks': blocks,
      'prefix': self.prefix,
      '_numbers': itertools.count(),
    }


def unlink_unread(prefix: str) -> None:
  """Removes the blocks of a writer that were never read, once its processes have ended.

  Python's resource tracker would do so as the program ends, with a warning about leaked objects. Only Linux lists
  shared memory; elsewhere it is left to the tracker.
  """
  for path in pathlib.Path('/dev/shm').glob(f'{prefix}*'):
    with contextlib.suppress(FileNotFoundError):
      block = SharedMemory(path.name)
      block.close()
      block.unlink()


class SharedMemoryReader:
  """Restores elements from handles, with copies of the arrays."""

  def __init__(self) -> None:
    self._blocks: dict[str, SharedMemory] = {}

  def __call__(self, handle: SharedMemoryHandle) -> Any:
    """The element of a handle; RuntimeError if the writer has overwritten its block."""
    block = self._blocks.get(handle.name)
    if block is None:
      block = self._blocks[handle.name] = SharedMemory(handle.name)
      block.unlink()
    element = _taken(handle.element, block)
    if _view(block, _STAMP)[0] != handle.turn:
      raise RuntimeError('a batch was overwritten by a later one before it was read')
    return element

  def close(self) -> None:
    """Unmaps all blocks."""
    for block in self._blocks.values():
      block.close()
    self._blocks.clear()


def _laid_out(element: Any, start: int, arrays: list[np.ndarray]) -> tuple[Any, int]:
  """The element with its arrays replaced by `Array` and added to `arrays`, and the end offset of the last one."""
  if isinstance(element, np.ndarray):
    arrays.append(element)
    return Array(start, element.shape, element.dtype.str), start + -(-element.nbytes // _ALIGNED) * _ALIGNED
  if isinstance(element, dict):
    laid: dict[Any, Any] = {}
    for key, value in element.items():
      laid[key], start = _laid_out(value, start, arrays)
    return laid, start
  if isinstance(element, tuple):
    parts = []
    for value in element:
      part, start = _laid_out(value, start, arrays)
      parts.append(part)
    return tuple(parts), start
  return element, start


def _places(layout: Any) -> list[Array]:
  if isinstance(layout, Array):
    return [layout]
  inner = layout.values() if isinstance(layout, dict) else layout if isinstance(layout, tuple) else ()
  return [place for value in inner for place in _places(value)]


def _taken(layout: Any, block: SharedMemory) -> Any:
  if isinstance(layout, Array):
    return np.array(_view(block, layout))
  if isinstance(layout, dict):
    return {key: _taken(value, block) for key, value in layout.items()}
  return tuple(_taken(value, block) for value in layout) if isinstance(layout, tuple) else layout


def _view(block: SharedMemory, place: Array) -> np.ndarray:
  return np.ndarray(place.shape, place.dtype, buffer=block.buf, offset=place.offset)
