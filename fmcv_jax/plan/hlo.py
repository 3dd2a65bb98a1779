"""Analysis of the partitioned HLO of a compiled program: collectives by mesh axis, bytes and cycles.

Loop bodies count once per iteration; loops whose trip count depends on data (rejection sampling) count once.
"""

import re
from collections.abc import Iterator, Mapping
from math import prod
from typing import NamedTuple

import numpy as np

KINDS = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')

_BYTES = {'pred': 1, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4, 'f32': 4, 's64': 8,
          'u64': 8, 'f64': 8}  # fmt: skip
_ARRAY = re.compile(r'\b([a-z]+\d*)\[([\d,]*)\]')
_INSTRUCTION = re.compile(r'^\s*(ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\(([^)]*)\)(.*)$')
_PLACED = re.compile(r'\b([a-z]+\d*)\[([\d,]*)\](?:\{([^}]*)\})?')
_START = re.compile(r'^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$')
_COLLECTIVE = re.compile(rf' = (.*?) ({"|".join(KINDS)})(-start)?\((.*)')
_WHILE = re.compile(r' while\(%?([\w.\-]+)\)(?:.*condition=%?([\w.\-]+))?.*body=%?([\w.\-]+)')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_GATHER = re.compile(r' = \w+\[([\d,]*)\]\S* gather\(.*slice_sizes=\{([\d,]*)\}')
GATHER_CYCLES = 8  # the compiler schedules 7.6 bundles per pixel of an image, 5.3 per row of a vocabulary
_CALLED = re.compile(
  r'(?:to_apply|true_computation|false_computation|calls)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}'
)


class Collective(NamedTuple):
  """One kind of collective over some mesh axes: number per step, and total bytes that a device sends."""

  kind: str
  axes: tuple[str, ...]
  times: int
  bytes: int


def runs(text: str) -> Iterator[tuple[str, int]]:
  """(instruction, executions per step) of a module's text, without the bodies of fusions and reducers."""
  computations, entry = _computations(text)
  yield from _runs(computations, entry, 1)


def collectives(text: str, mesh: Mapping[str, int]) -> list[Collective]:
  """Collectives of a program, largest first; `mesh` maps axis names to sizes, slowest axis first."""
  found: dict[tuple[str, tuple[str, ...]], list[int]] = {}
  for exchange, times, parted in _exchanges(text):
    shape, kind, start, rest = exchange.groups()
    group = _group(rest)
    size = len(group)
    if size < 2:
      continue
    # Asynchronous starts return a tuple of inputs and outputs.
    arrays = [_size(*array) for array in _ARRAY.findall(shape)]
    moved = max(arrays) if start else sum(arrays)
    share = {
      'all-reduce': 2 * (size - 1) / size,
      'all-gather': (size - 1) / size,
      'reduce-scatter': (size - 1) if not start else (size - 1) / size,
      'all-to-all': (size - 1) / size,
      'collective-permute': 1,
    }[kind]
    if parted:
      kind, share = 'reduce-scatter', (size - 1) / size
    entry = found.setdefault((kind, _axes(group, mesh)), [0, 0])
    entry[0] += times
    entry[1] += round(times * moved * share)
  rows = [Collective(kind, axes, times, size) for (kind, axes), (times, size) in found.items()]
  return sorted(rows, key=lambda row: -row.bytes)


def _exchanges(text: str) -> Iterator[tuple[re.Match[str], int, bool]]:
  """(match of _COLLECTIVE, executions per step, True for a reduce-scatter) of all collectives.

  TPUs fuse some of them: a reduce-scatter is in one fusion; others are overlapped with computation and are in several,
  which have their channel and chain in common. Equal layers share channels, but not chains.
  """
  computations, entry = _computations(text)
  found = set()
  for line, times in _runs(computations, entry, 1):
    if match := _COLLECTIVE.search(line):
      yield match, times, False
    elif called := re.search(r' fusion\(.*calls=%?([\w.\-]+)', line):
      scattered = called[1].startswith('all-reduce-scatter')
      for inner in computations.get(called[1], ()):
        if match := _COLLECTIVE.search(inner):
          exchange = called[1] if scattered else tuple(re.findall(r'channel_id=\d+|chain_id="\d+"', inner))
          if exchange not in found:
            found.add(exchange)
            yield match, times, scattered


def kernels(text: str) -> Iterator[tuple[str, tuple[tuple[int, ...], ...], int]]:
  """(name, shapes of the results, executions per step) of each Pallas TPU kernel."""
  for line, times in runs(text):
    if 'custom_call_target="tpu_custom_call"' in line and (found := _INSTRUCTION.match(line)):
      shapes = (tuple(int(size) for size in shape.split(',') if size) for _, shape in _ARRAY.findall(found[3]))
      yield found[2], tuple(shapes), times


def estimated_cycles(text: str) -> int:
  """Sum of the TPU compiler's cycle estimates for the fusions, copies and products of a step, without collectives,
  overlap and Pallas kernels. Gathers, for which there is no estimate, count by their number of slices."""
  pattern = re.compile(r'"estimated_cycles":"(\d+)"')
  estimated = sum(times * int(match[1]) for line, times in runs(text) if (match := pattern.search(line)))
  return estimated + GATHER_CYCLES * gathered(text)


def gathered(text: str) -> int:
  """Total number of slices of the gathers of a step."""
  computations, _ = _computations(text)
  inside = {name: sum(map(_slices, lines)) for name, lines in computations.items()}
  total = 0
  for line, times in runs(text):
    called = re.search(r' fusion\(.*calls=%?([\w.\-]+)', line)
    total += times * (inside.get(called[1], 0) if called else _slices(line))
  return total


def _slices(line: str) -> int:
  if found := _GATHER.search(line):
    whole, one = (prod(int(n) for n in sizes.split(',') if n) for sizes in found.groups())
    return whole // one
  return 0


# Instructions that move no bytes, or are counted elsewhere: in their bodies, or at their start.
_STILL = {'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'conditional', 'call', 'iota'}
_STILL |= {'after-all', 'partition-id', 'replica-id', 'opt-barrier', 'add-dependency', 'async-start'}


class _Instruction(NamedTuple):
  """An HLO instruction; `bytes` of HBM of the result; `arguments` as written, and the names in them, `operands`."""

  root: bool
  name: str
  kind: str
  bytes: int
  arguments: str
  rest: str

  @property
  def operands(self) -> list[str]:
    return re.findall(r'%([\w.\-]+)', self.arguments)


def bytes_accessed(text: str) -> int:
  """Bytes of HBM that the scheduled instructions of a program read and write, with the padding of tiled layouts.

  Slices and slice updates count with the size of the slice, not of the array: an iteration over stacked layers reads
  one of them. Arrays in on-chip memory (space 1) do not count.
  """
  computations, _ = _computations(text)
  parsed = {name: [found for line in lines if (found := _parse(line))] for name, lines in computations.items()}
  sizes = {found.name: found.bytes for lines in parsed.values() for found in lines}
  total = 0
  for line, times in runs(text):
    if (found := _parse(line)) and found.kind not in _STILL and not found.kind.endswith('-done'):
      total += times * _moved(found, sizes, parsed)
  return total


def _parse(line: str) -> _Instruction | None:
  match = _INSTRUCTION.match(line)
  if match is None:
    return None
  root, name, shape, kind, arguments, rest = match.groups()
  placed = (found for found in _PLACED.findall(shape) if 'S(' not in found[2])
  held = sum(_size(dtype, _tiled(dims, layout)) for dtype, dims, layout in placed)
  return _Instruction(bool(root), name, kind, held, arguments, rest)


def _moved(found: _Instruction, sizes: Mapping[str, int], parsed: Mapping[str, list[_Instruction]]) -> int:
  read = [sizes.get(operand, 0) for operand in found.operands]
  if found.kind.endswith('-start'):
    return found.bytes  # a tuple of outputs and inputs
  if found.kind == 'dynamic-slice':
    return 2 * found.bytes
  if found.kind == 'dynamic-update-slice':
    return 2 * read[1]
  called = re.search(r'calls=%?([\w.\-]+)', found.rest)
  if found.kind != 'fusion' or called is None:
    return found.bytes + sum(read)
  inside = parsed.get(called[1], [])
  written = found.bytes
  for line in inside:
    number = int(line.arguments) if line.kind == 'parameter' else -1
    if 0 <= number < len(read):
      read[number] = min(read[number], _read_of(line.name, inside, read[number]))
    if line.kind == 'dynamic-update-slice' and line.bytes <= written:
      update = next((other.bytes for other in inside if other.name == line.operands[1]), 0)
      written -= line.bytes - update
  return written + sum(read)


def _read_of(name: str, inside: list[_Instruction], whole: int) -> int:
  """Bytes that a fusion reads of a parameter: the slices if it is only sliced, 0 if it is only written into, otherwise
  all."""
  total = 0
  for line in inside:
    if name not in line.operands:
      continue
    if line.kind == 'bitcast':
      total += _read_of(line.name, inside, whole)
    elif line.kind == 'dynamic-slice' and line.operands[0] == name:
      total += line.bytes
    elif line.kind == 'dynamic-update-slice' and line.operands[0] == name:
      continue
    else:
      total += whole
  return total


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  computations: dict[str, list[str]] = {}
  entry, lines = '', []
  for line in text.splitlines():
    if match := _START.match(line):
      lines = computations.setdefault(match[1], [])
      if line.startswith('ENTRY'):
        entry = match[1]
    elif line == '}' or line.startswith('}, '):  # not '}}': attributes of a Pallas kernel are several lines
      lines = []
    else:
      lines.append(line)
  return computations, entry


def _runs(computations: dict[str, list[str]], name: str, times: int) -> Iterator[tuple[str, int]]:
  for line in computations.get(name, ()):
    yield line, times
    if match := _WHILE.search(line):
      known = _TRIPS.search(line)
      trips = int(known[1]) if known else _trips(computations, name, match[1], match[2])
      yield from _runs(computations, match[3], times * trips)
    elif re.search(r' (call|conditional|async-start)\(', line):
      for called, branches in _CALLED.findall(line):
        for inner in [called, *re.split(r',\s*', branches)]:
          if inner:
            yield from _runs(computations, inner.lstrip('%'), times)


def _trips(computations: dict[str, list[str]], outer: str, state: str, condition: str) -> int:
  """Trip count of a loop of `outer` that increments an element of its state by one while it is below a constant."""
  before, inside = (
    {found.name: found for line in computations[name] if (found := _parse(line))} for name in (outer, condition)
  )
  root = next(found for found in inside.values() if found.root)
  if root.kind != 'compare' or 'direction=LT' not in root.rest:
    return 1

  def begin(name: str) -> int | None:
    """Initial value of an operand of the comparison."""
    found = inside[name]
    if found.kind == 'get-tuple-element' and state in before:
      index = int(re.search(r'index=(\d+)', found.rest)[1])  # type: ignore[index]
      found = before[before[state].operands[index]]
    while found.kind in ('copy', 'bitcast'):
      found = before[found.operands[0]]
    return int(found.arguments) if found.kind == 'constant' else None

  first, end = (begin(name) for name in root.operands)
  return 1 if end is None else end - (first or 0)


def _tiled(shape: str, layout: str) -> str:
  """The shape with its dimensions padded to whole tiles: `{0,1:T(8,128)}` tiles dimension 1 by 8 and 0 by 128."""
  order, _, tiles = layout.partition(':')
  tile = re.match(r'T\(([\d,]+)\)', tiles)
  if tile is None or not shape:
    return shape
  sizes, minor_to_major = [int(n) for n in shape.split(',')], [int(n) for n in order.split(',')]
  for dimension, step in zip(minor_to_major, reversed([int(n) for n in tile[1].split(',')]), strict=False):
    sizes[dimension] = -(-sizes[dimension] // step) * step
  return ','.join(map(str, sizes))


def _size(dtype: str, shape: str) -> int:
  return _BYTES.get(dtype, 0) * prod(int(n) for n in shape.split(',') if n)


def _group(rest: str) -> list[int]:
  """The devices of the first replica group."""
  if match := re.search(r'replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', rest):
    groups, size, shape, order = match.groups()
    ids = np.arange(int(groups) * int(size)).reshape([int(n) for n in shape.split(',')])
    if order:
      ids = ids.transpose([int(n) for n in order.split(',')])
    return list(ids.reshape(int(groups), int(size))[0])
  if match := re.search(r'replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}', rest):
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
    along = re.findall(r"'(\w+)'", match[2])
    ids = np.arange(prod(sizes.values()))
    if order := re.search(r'device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\)', rest):
      shape, axes = ([int(n) for n in numbers.split(',')] for numbers in order.groups())
      ids = ids.reshape(shape).transpose(axes)
    ids = ids.reshape(list(sizes.values()))
    return list(ids[tuple(slice(None) if name in along else 0 for name in sizes)].ravel())
  if match := re.search(r'replica_groups=\{\{([\d,]+)\}', rest):
    return [int(n) for n in match[1].split(',')]
  if match := re.search(r'source_target_pairs=\{(.*?)\}\}', rest):
    # Collective permute: the axes along which the pairs differ.
    pairs = [pair for pair in re.findall(r'\{(\d+),(\d+)', match[1] + '}') if pair[0] != pair[1]]
    return [int(n) for n in pairs[0]] if pairs else []
  return []


def _axes(group: list[int], mesh: Mapping[str, int]) -> tuple[str, ...]:
  """The mesh axes along which the devices of a group differ."""
  places = np.unravel_index(np.array(group), tuple(mesh.values()))
  return tuple(name for name, place in zip(mesh, places, strict=True) if len(set(place.tolist())) > 1)
