"""Weak scaling of a config at a fixed batch per chip: FLOPs, memory and communication per chip.

python benchmarks/weak_scaling.py [CONFIG] [--a.b=value ...] --figure docs/weak_scaling.png
"""

import argparse
import pathlib
from math import prod

import matplotlib

matplotlib.use('Agg')

from matplotlib import pyplot
from rich.console import Console
from rich.table import Table

from fmcv_jax.plan.planning import GIB, Plan, make

TOPOLOGIES = ('2x2x4', '4x4x4', '4x8x8', '8x8x16', '16x16x16')  # v5p, 16 to 4,096 chips
PER_CHIP = 64  # examples per chip


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('config', nargs='?', default='configs/vit_i1k.py:L/16')
  parser.add_argument('--figure', type=pathlib.Path)
  args, overrides = parser.parse_known_args()
  given = [override.removeprefix('--config.').removeprefix('--') for override in overrides]
  plans = []
  for shape in TOPOLOGIES:
    chips = prod(int(side) for side in shape.split('x'))
    plans.append(make(args.config, [*given, f'train.batch_size={PER_CHIP * chips}'], f'v5p:{shape}'))
    Console(stderr=True).print(row(plans[-1]), highlight=False)
  table = Table('chips', 'T FLOPs', 'GiB allocated', 'GiB of HBM traffic', 'MiB sent', 'by kind')
  for plan in plans:
    table.add_row(*row(plan))
  Console(width=120).print(table)
  if args.figure:
    draw(plans, args.figure)


def row(plan: Plan) -> list[str]:
  sent = sum(collective.bytes for collective in plan.collectives)
  kinds = ', '.join(f'{collective.kind} {collective.bytes / 2**20:.0f}' for collective in plan.collectives[:3])
  numbers = (plan.flops / 1e12, plan.needed / GIB, plan.bytes_accessed / GIB)
  return [f'{plan.chips:,}', *(f'{number:.2f}' for number in numbers), f'{sent / 2**20:,.0f}', kinds]


def draw(plans: list[Plan], file: pathlib.Path) -> None:
  """Plots FLOPs per chip, and bytes sent per chip by kind of collective, over the number of chips."""
  figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.2), layout='constrained')
  chips = [plan.chips for plan in plans]
  left.plot(chips, [plan.flops / 1e12 for plan in plans], 'o-')
  left.set(xscale='log', ylim=(0, None), xlabel='chips', ylabel='TFLOPs per chip and step')
  kinds = sorted({collective.kind for plan in plans for collective in plan.collectives})
  for kind in kinds:
    sent = [
      sum(collective.bytes for collective in plan.collectives if collective.kind == kind) / 2**20 for plan in plans
    ]
    right.plot(chips, sent, 'o-', label=kind)
  right.set(xscale='log', ylim=(0, None), xlabel='chips', ylabel='MiB sent per chip and step')
  right.legend(frameon=False, loc='upper left', bbox_to_anchor=(1, 1))
  for axes in (left, right):
    axes.spines[['top', 'right']].set_visible(False)
    axes.set_xticks(chips, [f'{count:,}' for count in chips])
    axes.minorticks_off()
  figure.suptitle(f'{plans[0].config}, {plans[0].batch // plans[0].chips} images per chip, v5p')
  figure.savefig(file, dpi=150)


if __name__ == '__main__':
  main()
