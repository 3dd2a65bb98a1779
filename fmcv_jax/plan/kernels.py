"""Cycles of a step's Pallas kernels, which the TPU compiler's estimates leave out: from the schedules it writes."""

import atexit
import collections
import functools
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from math import prod

from jax.extend import core

from fmcv_jax.plan import hlo

# A kernel's name and the shapes of its results.
Kernel = tuple[str, tuple[tuple[int, ...], ...]]


@functools.cache
def record() -> pathlib.Path:
  """The folder in which the compiler leaves its schedules; to be called before libtpu is loaded, which is done once."""
  folder = tempfile.mkdtemp(prefix='fmcv_schedules_')
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  flags = f'--xla_jf_dump_to={folder} --xla_jf_dump_llo_pass_label_regex=final_bundles'
  os.environ['LIBTPU_INIT_ARGS'] = ' '.join([*os.environ.get('LIBTPU_INIT_ARGS', '').split(), flags])
  return pathlib.Path(folder)


def steps(jaxpr: core.Jaxpr) -> dict[Kernel, int]:
  """Points of the grid of each Pallas kernel of known size in a function."""
  found: dict[Kernel, int] = {}
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'pallas_call':
      grid = equation.params['grid_mapping'].grid
      shapes = tuple(tuple(getattr(out.aval, 'shape', ())) for out in equation.outvars)
      if all(isinstance(size, int) for size in grid):
        found[equation.params['name'], shapes] = prod(grid)
      continue
    for inner in core.jaxprs_in_params(equation.params):
      found |= steps(inner)
  return found


def cycles(text: str, grids: Mapping[Kernel, int]) -> int:
  """Of all kernels in a compiled step: a bundle of instructions a cycle, for each point of the grid.

  Loops and branches inside of a kernel count once; one that has no schedule or no known grid does not count. Forgets
  the schedules that were written so far.
  """
  calls, bundles = collections.Counter[Kernel](), dict[Kernel, int]()
  schedules = dict(_schedules(record()))
  for name, shapes, times in hlo.kernels(text):
    kernel = next((kernel for kernel in grids if kernel[0] in name and kernel[1] == shapes), None)
    if kernel:
      calls[kernel] += times
      if name in schedules:  # of equal kernels the compiler schedules one
        bundles[kernel] = schedules[name]
  return sum(times * grids[kernel] * bundles.get(kernel, 0) for kernel, times in calls.items())


def _schedules(folder: pathlib.Path) -> Iterator[tuple[str, int]]:
  for path in sorted(folder.iterdir()):  # the newest last: names begin with the time
    found = re.fullmatch(r'\d+-(.+)-\d+-schedule-analysis_final_bundles\.txt', path.name)
    bundles = found and re.search(r'total scheduled bundles:\s+(\d+)', path.read_text())
    if found and bundles:
      yield found[1], int(bundles[1])
    if path.is_file():
      path.unlink()
