"""What a compiled program does, read from its HLO after partitioning: collectives by mesh axis, estimated cycles.

Bodies of loops count as often as they run.
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
_START = re.compile(r'^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$')
_COLLECTIVE = re.compile(rf' = (.*?) ({"|".join(KINDS)})(-start)?\((.*)')
_WHILE = re.compile(r' while\(.*body=%?([\w.\-]+)')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CALLED = re.compile(
  r'(?:to_apply|true_computation|false_computation|calls)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}'
)


class Collective(NamedTuple):
  """One kind of exchange over some mesh axes: how often a step has it, and the bytes a device sends in all of them."""

  kind: str
  axes: tuple[str, ...]
  times: int
  bytes: int


def runs(text: str) -> Iterator[tuple[str, int]]:
  """(instruction, how often a step executes it) of a module's text; insides of fusions and reducers are left out."""
  computations, entry = _computations(text)
  yield from _runs(computations, entry, 1)


def collectives(text: str, mesh: Mapping[str, int]) -> list[Collective]:
  """The exchanges of a program that runs on a mesh of these axes and sizes, slowest axis first; largest first."""
  found: dict[tuple[str, tuple[str, ...]], list[int]] = {}
  for line, times in runs(text):
    if not (match := _COLLECTIVE.search(line)):
      continue
    shape, kind, start, rest = match.groups()
    group = _group(rest)
    size = len(group)
    if size < 2:
      continue
    # What is started asynchronously gives a tuple of what goes in and what comes out.
    arrays = [_size(*array) for array in _ARRAY.findall(shape)]
    moved = max(arrays) if start else sum(arrays)
    share = {
      'all-reduce': 2 * (size - 1) / size,
      'all-gather': (size - 1) / size,
      'reduce-scatter': (size - 1) if not start else (size - 1) / size,
      'all-to-all': (size - 1) / size,
      'collective-permute': 1,
    }[kind]
    entry = found.setdefault((kind, _axes(group, mesh)), [0, 0])
    entry[0] += times
    entry[1] += round(times * moved * share)
  rows = [Collective(kind, axes, times, size) for (kind, axes), (times, size) in found.items()]
  return sorted(rows, key=lambda row: -row.bytes)


def estimated_cycles(text: str) -> int:
  """Sum of the TPU compiler's estimates for the fusions, copies and products of a step; no exchanges, no overlap, and
  nothing of the insides of Pallas kernels."""
  pattern = re.compile(r'"estimated_cycles":"(\d+)"')
  return sum(times * int(match[1]) for line, times in runs(text) if (match := pattern.search(line)))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  computations: dict[str, list[str]] = {}
  entry, lines = '', []
  for line in text.splitlines():
    if match := _START.match(line):
      lines = computations.setdefault(match[1], [])
      if line.startswith('ENTRY'):
        entry = match[1]
    elif line.startswith('}'):
      lines = []
    else:
      lines.append(line)
  return computations, entry


def _runs(computations: dict[str, list[str]], name: str, times: int) -> Iterator[tuple[str, int]]:
  for line in computations.get(name, ()):
    yield line, times
    if match := _WHILE.search(line):
      trips = _TRIPS.search(line)
      yield from _runs(computations, match[1], times * int(trips[1] if trips else 1))
    elif re.search(r' (call|conditional|async-start)\(', line):
      for called, branches in _CALLED.findall(line):
        for inner in [called, *re.split(r',\s*', branches)]:
          if inner:
            yield from _runs(computations, inner.lstrip('%'), times)


def _size(dtype: str, shape: str) -> int:
  return _BYTES.get(dtype, 0) * prod(int(n) for n in shape.split(',') if n)


def _group(rest: str) -> list[int]:
  """The devices of the first group that exchanges."""
  if match := re.search(r'replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', rest):
    groups, size, shape, order = match.groups()
    ids = np.arange(int(groups) * int(size)).reshape([int(n) for n in shape.split(',')])
    if order:
      ids = ids.transpose([int(n) for n in order.split(',')])
    return list(ids.reshape(int(groups), int(size))[0])
  if match := re.search(r'replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}', rest):
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
    along = re.findall(r"'(\w+)'", match[2])
    ids = np.arange(prod(sizes.values())).reshape(list(sizes.values()))
    return list(ids[tuple(slice(None) if name in along else 0 for name in sizes)].ravel())
  if match := re.search(r'replica_groups=\{\{([\d,]+)\}', rest):
    return [int(n) for n in match[1].split(',')]
  if match := re.search(r'source_target_pairs=\{(.*?)\}\}', rest):
    # Sending to a neighbour: the axes along which the pairs differ.
    pairs = re.findall(r'\{(\d+),(\d+)', match[1] + '}')
    return [int(n) for n in pairs[0]] if pairs else []
  return []


def _axes(group: list[int], mesh: Mapping[str, int]) -> tuple[str, ...]:
  """The mesh axes along which the devices of a group differ."""
  places = np.unravel_index(np.array(group), tuple(mesh.values()))
  return tuple(name for name, place in zip(mesh, places, strict=True) if len(set(place.tolist())) > 1)
