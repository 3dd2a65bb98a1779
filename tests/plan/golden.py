"""Runs on pods, as the TPU compiler sees them: what a chip holds and sends. `python -m tests.plan.golden` rewrites it.

A change of these figures is a change of how a run is sharded: look at the difference before writing it.
"""

import importlib.metadata
import json
import pathlib
from typing import NamedTuple

from fmcv_jax.plan import planning

FILE = pathlib.Path(__file__).with_name('golden.json')


class Case(NamedTuple):
  config: str
  topology: str
  slices: int = 1
  overrides: tuple[str, ...] = ()


CASES = {
  'ViT-L/16 on v5e': Case('configs/vit_i1k.py:L/16', 'v5e:16x16'),
  'CLIP L/14 on v5p': Case('configs/clip.py:L/14', 'v5p:4x4x8'),
  'CLIP L/14 on two slices of v5e': Case('configs/clip.py:L/14', 'v5e:16x16', 2, ('mesh.slice=2',)),
  'ViT-22B on v5p': Case('configs/vit_22b.py', 'v5p:8x8x8'),
}


def figures(case: Case) -> dict[str, float]:
  """Figures of one chip by name, in units that a person reads."""
  plan = planning.make(case.config, case.overrides, case.topology, case.slices)
  found = {
    'parameters, MiB': plan.parameter_bytes / 2**20,
    'optimizer, MiB': plan.optimizer_bytes / 2**20,
    'temporaries, MiB': plan.temporaries / 2**20,
    'TFLOPs executed': plan.flops / 1e12,
  }
  for row in plan.collectives:
    over = f'{row.kind} over {", ".join(row.axes)}'
    found[f'{over}, times'] = row.times
    found[f'{over}, MiB'] = row.bytes / 2**20
  return {name: round(value, 3) for name, value in found.items()}


def differences(before: dict[str, float], now: dict[str, float], tolerance: float) -> list[str]:
  """One line for each figure that has come, gone, or moved by more than a share `tolerance`."""
  lines = []
  for name in [*before, *(name for name in now if name not in before)]:
    old, new = before.get(name), now.get(name)
    if old is None or new is None or abs(new - old) > tolerance * max(abs(old), 1.0):
      lines.append(f'{name}: was {old}, is {new}')
  return lines


def main() -> None:
  runs = {name: figures(case) for name, case in CASES.items()}
  FILE.write_text(json.dumps({'libtpu': importlib.metadata.version('libtpu'), 'runs': runs}, indent=1) + '\n')


if __name__ == '__main__':
  main()
