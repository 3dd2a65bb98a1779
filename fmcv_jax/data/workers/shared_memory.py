"""Arrays from worker processes through blocks of shared memory that are used again and again.

A fresh block for each batch costs the kernel a page at a time: more than a tenth of what decoding costs. A block loses
its name as soon as both sides have it, so that nothing is left behind, however a run ends.
"""

import dataclasses
from multiprocessing.shared_memory import SharedMemory
from typing import Any, NamedTuple, Protocol

import numpy as np

_ALIGNED = 64  # bytes


class RandomAccess(Protocol):
  """What is read: pure and picklable, so that any process or thread may compute any element."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Any: ...


class Array(NamedTuple):
  """Where an array lies in a block."""

  offset: int
  shape: tuple[int, ...]
  dtype: str


_STAMP = Array(0, (1,), '<i8')


@dataclasses.dataclass(frozen=True)
class SharedMemoryHandle:
  """An element whose arrays lie in the block `name`, which is stamped with `turn` while they do."""

  name: str
  turn: int
  element: Any


class SharedMemoryWriter:
  """A source whose elements, dicts and tuples of arrays and other things, come as `SharedMemoryHandle`, each in the
  next of `blocks` blocks. Elements are asked for in turn, and one is taken before the `blocks`-th after it is made."""

  def __init__(self, source: RandomAccess, blocks: int):
    self._source, self._turn = source, 0
    self._blocks: list[SharedMemory | None] = [None] * blocks

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> SharedMemoryHandle:
    element = self._source[index]
    arrays: list[np.ndarray] = []
    layout, size = _laid_out(element, _ALIGNED, arrays)
    slot = self._turn % len(self._blocks)
    block = self._blocks[slot]
    if block is None or block.size < size:
      block = self._blocks[slot] = SharedMemory(create=True, size=size)
    stamp = _view(block, _STAMP)
    stamp[0] = -1  # not yet whole
    for place, array in zip(_places(layout), arrays, strict=True):
      _view(block, place)[...] = array
    stamp[0] = self._turn
    self._turn += 1
    return SharedMemoryHandle(block.name, self._turn - 1, layout)

  def __getstate__(self) -> dict[str, Any]:
    return {'_source': self._source, '_turn': 0, '_blocks': [None] * len(self._blocks)}


class SharedMemoryReader:
  """The other side: the elements as they were, with arrays of their own."""

  def __init__(self) -> None:
    self._blocks: dict[str, SharedMemory] = {}

  def __call__(self, handed: SharedMemoryHandle) -> Any:
    block = self._blocks.get(handed.name)
    if block is None:
      block = self._blocks[handed.name] = SharedMemory(handed.name)
      block.unlink()
    element = _taken(handed.element, block)
    if _view(block, _STAMP)[0] != handed.turn:
      raise RuntimeError('a batch was overwritten by a later one before it was read')
    return element

  def close(self) -> None:
    for block in self._blocks.values():
      block.close()
    self._blocks.clear()


def _laid_out(element: Any, start: int, arrays: list[np.ndarray]) -> tuple[Any, int]:
  """The element with `Array` for its arrays, which are added to `arrays`, and where the last of them ends."""
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
