"""The utilization tables of docs/plan.md, from cycle estimates of the TPU compiler.

python benchmarks/utilization.py pods     # whole steps on pods
python benchmarks/utilization.py depth    # unrolled and scanned layers, with compile times
"""

import argparse
import resource

from rich.console import Console

from fmcv_jax.plan import planning

# The plain train step, as in the recipes of other libraries.
PLAIN = ('train.ema_decay=None', 'objective.augment=()', 'objective.mixup=0', 'objective.cutmix=0')
PLAIN += ('objective.network.drop_path=0', 'train.batch_size=1024')
MESHES = {'data': ('mesh.data=-1', 'mesh.fsdp=1'), 'fsdp': ('mesh.data=1', 'mesh.fsdp=-1')}
PAIRS = ('train.batch_size=16384',)
UNSAVED = ('objective.network.remat=none', 'objective.network.unroll=True')

PODS = [
  (f'{name}, {mesh}', f'configs/vit_i1k.py:{name}', topology, (*PLAIN, *axes))
  for name, topology in (('B/16', 'v5e:4x4'), ('L/16', 'v5e:4x4'), ('B/16', 'v5p:4x4x4'))
  for mesh, axes in MESHES.items()
]
PODS += [
  ('SigLIP B/16, data', 'configs/siglip_b16.py', 'v5e:4x4', PAIRS),
  ('SigLIP B/16, data, no rematerialization', 'configs/siglip_b16.py', 'v5p:4x4x4', (*PAIRS, *UNSAVED)),
]


def depth(layers: int, unroll: int, remat: str) -> tuple[str, str, str, tuple[str, ...]]:
  network = {'depth': layers, 'unroll': unroll, 'remat': remat}
  overrides = (f'objective.network.{name}={value}' for name, value in network.items())
  label = f'{layers} layers, {"unrolled" if unroll == layers else "scanned"}, remat={remat}'
  return label, 'configs/vit_i1k.py:B/16', 'v5e:4x4', (*PLAIN, 'train.batch_size=256', *MESHES['data'], *overrides)


DEPTHS = [depth(layers, layers, 'none') for layers in (12, 48)]
DEPTHS += [depth(layers, 1, 'dots') for layers in (12, 48)]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('table', choices=('pods', 'depth'))
  console = Console(width=160)
  console.print('| step | pod | batch | estimate | utilization | HBM per chip | model/executed | CPU s to compile |')
  for label, config, topology, overrides in PODS if parser.parse_args().table == 'pods' else DEPTHS:
    start = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    plan = planning.make(config, overrides, topology)
    console.print(
      f'| {label} | {topology} | {plan.batch:,} | {1e3 * plan.estimated_seconds:.1f} ms | {plan.utilization:.2f} | '
      f'{plan.needed / planning.GIB:.2f} of {plan.hbm / planning.GIB:.2f} GiB | {plan.model_flops / plan.flops:.2f} | '
      f'{resource.getrusage(resource.RUSAGE_SELF).ru_utime - start:.0f} |'
    )


if __name__ == '__main__':
  main()
