"""One config on ever more chips, with the same batch on each: what a chip computes, holds and sends.

python benchmarks/weak_scaling.py [CONFIG] [--a.b=value ...] --picture docs/weak_scaling.png
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

TOPOLOGIES = ('2x2x4', '4x4x4', '4x8x8', '8x8x16', '16x16x16')  # of v5p: 16 to 4,096 chips
PER_CHIP = 64  # examples


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('config', nargs='?', default='configs/vit_i1k.py:L/16')
  parser.add_argument('--picture', type=pathlib.Path)
  args, overrides = parser.parse_known_args()
  given = [override.removeprefix('--config.').removeprefix('--') for override in overrides]
  plans = []
  for shape in TOPOLOGIES:
    chips = prod(int(side) for side in shape.split('x'))
    plans.append(make(args.config, [*given, f'train.batch_size={PER_CHIP * chips}'], f'v5p:{shape}'))
    Console(stderr=True).print(row(plans[-1]), highlight=False)
  table = Table('chips', 'T FLOPs', 'GiB held', 'GiB of HBM moved', 'MiB sent', 'by kind')
  for plan in plans:
    table.add_row(*row(plan))
  Console(width=120).print(table)
  if args.picture:
    draw(plans, args.picture)


def row(plan: Plan) -> list[str]:
  sent = sum(exchange.bytes for exchange in plan.collectives)
  kinds = ', '.join(f'{exchange.kind} {exchange.bytes / 2**20:.0f}' for exchange in plan.collectives[:3])
  numbers = (plan.flops / 1e12, plan.needed / GIB, plan.bytes_accessed / GIB)
  return [f'{plan.chips:,}', *(f'{number:.2f}' for number in numbers), f'{sent / 2**20:,.0f}', kinds]


def draw(plans: list[Plan], file: pathlib.Path) -> None:
  """FLOPs of a chip, and what it sends by kind of exchange, over the number of chips."""
  figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.2), layout='constrained')
  chips = [plan.chips for plan in plans]
  left.plot(chips, [plan.flops / 1e12 for plan in plans], 'o-')
  left.set(xscale='log', ylim=(0, None), xlabel='chips', ylabel='T FLOPs of a chip and step')
  kinds = sorted({exchange.kind for plan in plans for exchange in plan.collectives})
  for kind in kinds:
    sent = [sum(exchange.bytes for exchange in plan.collectives if exchange.kind == kind) / 2**20 for plan in plans]
    right.plot(chips, sent, 'o-', label=kind)
  right.set(xscale='log', ylim=(0, None), xlabel='chips', ylabel='MiB a chip sends in a step')
  right.legend(frameon=False, loc='upper left', bbox_to_anchor=(1, 1))
  for axes in (left, right):
    axes.spines[['top', 'right']].set_visible(False)
    axes.set_xticks(chips, [f'{count:,}' for count in chips])
    axes.minorticks_off()
  figure.suptitle(f'{plans[0].config}, {plans[0].batch // plans[0].chips} images a chip, v5p')
  figure.savefig(file, dpi=150)


if __name__ == '__main__':
  main()
