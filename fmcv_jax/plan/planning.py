"""Ahead-of-time cost planning for TPU pods: compiles the train step of a config with the real TPU compiler.

The compiler (libtpu) runs on any Linux x86-64 machine, without a TPU.
"""

import dataclasses
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, get_args

import jax
from rich.console import Console
from rich.table import Table

from fmcv_jax.config import paths_of
from fmcv_jax.console import make_console
from fmcv_jax.errors import UserError
from fmcv_jax.experiment import load_config
from fmcv_jax.models.common.scan import Remat
from fmcv_jax.plan import hlo, kernels
from fmcv_jax.run import Run, parameter_count
from fmcv_jax.train.flops import matmul_flops

GIB = 2**30
REMATS = get_args(Remat)


@dataclasses.dataclass(frozen=True)
class Chip:
  """Specification of one chip, from Google's pages: dense bf16 FLOP/s, HBM bytes/s, interconnect bytes/s, clock in Hz,
  cores that share a step; `hbm` is the number of bytes that the compiler allows a program."""

  flops: float
  hbm: float
  bandwidth: float
  interconnect: float
  clock: float
  cores: int = 1


CHIPS = {
  'v5e': Chip(197e12, 15.75 * GIB, 819e9, 200e9, 1.5e9),
  'v5p': Chip(459e12, 95.74 * GIB, 2765e9, 600e9, 1.75e9, cores=2),
  'v6e': Chip(918e12, 31.25 * GIB, 1640e9, 448e9, 1.75e9),
}


class DoesNotFit(UserError):
  """Raised for a program that needs more memory than a chip has."""


@dataclasses.dataclass(frozen=True)
class Plan:
  """Cost of a train step. Bytes and FLOPs are per chip; `temporaries` is the peak size of activations and other
  intermediate values."""

  config: str
  topology: str
  mesh: dict[str, int]
  chips: int
  batch: int
  parameters: int
  parameter_bytes: int
  optimizer_bytes: int
  other_bytes: int
  batch_bytes: int
  temporaries: int
  hbm: int
  flops: float
  model_flops: float
  bytes_accessed: int
  collectives: list[hlo.Collective]
  estimated_seconds: float
  compute_seconds: float
  memory_seconds: float
  interconnect_seconds: float
  steps: int

  @property
  def needed(self) -> int:
    """Bytes of HBM that one chip needs for the step."""
    return self.parameter_bytes + self.optimizer_bytes + self.other_bytes + self.batch_bytes + self.temporaries

  @property
  def utilization(self) -> float:
    """Model FLOPs utilization (MFU), assuming the compiler's estimate and fully overlapped collectives."""
    return self.compute_seconds * self.model_flops / self.flops / self.estimated_seconds

  def days(self, utilization: float) -> float:
    """Days of the whole run at an assumed model FLOPs utilization (0 to 1)."""
    return self.steps * self.compute_seconds * self.model_flops / self.flops / utilization / 86400


def pod(topology: str, slices: int = 1) -> list[Any]:
  """Abstract devices of a topology such as 'v5e:16x16'; UserError for an unknown topology or a missing libtpu."""
  kind = topology.partition(':')[0]
  if kind not in CHIPS or not re.fullmatch(r'\w+:\d+(x\d+)+', topology):
    raise UserError(
      f'--topology: {topology!r} is not a topology; write v5e:4x4, v6e:16x16 or v5p:4x4x4 ({", ".join(CHIPS)})'
    )
  # libtpu probes for TPU hardware; these values satisfy the probe. No chip is locked: several may run at once.
  os.environ.update(TPU_SKIP_MDS_QUERY='1', TPU_ACCELERATOR_TYPE='v5litepod-16', TPU_WORKER_HOSTNAMES='localhost')
  os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'
  kernels.record()
  jax.config.update('jax_platforms', 'cpu')
  from jax.experimental import topologies

  options = {'num_slices': slices} if slices > 1 else {}
  try:
    return list(topologies.get_topology_desc(platform='tpu', topology_name=topology, **options).devices)
  except Exception as error:  # a missing libtpu and an invalid shape raise different classes
    if ('libtpu' in str(error) and 'open' in str(error)) or 'No module' in str(error):
      raise UserError('plan needs the TPU compiler; pip install fmcv-jax[tpu] (Linux x86-64)') from error
    reason = ' '.join(str(error).split())[:200]
    raise UserError(f'--topology: {topology}: {reason}; if libtpu is missing: pip install fmcv-jax[tpu]') from error


def make(config: str, overrides: Sequence[str] = (), topology: str | None = None, slices: int = 1) -> Plan:
  """Compiles the train step of a config for a topology (default: the config's own).

  Raises DoesNotFit with the compiler's largest buffers, and UserError for a dimension that is not divisible.
  """
  resolved = load_config(config, overrides)
  topology = _topology(config, resolved, topology)
  devices, chip = pod(topology, slices), CHIPS[topology.partition(':')[0]]
  run = Run(resolved, devices=devices)
  step: Any = run.train_step()
  traced = step.trace(run.abstract_state, run.batch_shapes)
  try:
    compiled = traced.lower().compile()
  except Exception as error:  # jaxlib's class has no public base class
    if 'memory' not in str(error).lower():
      raise
    raise DoesNotFit(f'{config} does not fit {topology}: {_largest(str(error))}') from error
  memory, text = compiled.memory_analysis(), compiled.as_text()
  mesh, count = dict(run.placement.mesh.shape), len(devices)
  exchanged = hlo.collectives(text, mesh)
  state, shardings = run.abstract_state, run.shardings
  parameters = _bytes(state.params, shardings.params)
  optimizer = _bytes(state.opt_state, shardings.opt_state)
  batch = _bytes(run.batch_shapes, run.placement.batch(run.batch_shapes))
  # The grid of a kernel is split over the cores; the compiler's own estimates are per core already.
  scheduled = kernels.cycles(text, kernels.steps(traced.jaxpr.jaxpr))
  executed, moved = matmul_flops(step, state, run.batch_shapes), hlo.bytes_accessed(text)
  return Plan(
    config=config,
    topology=topology if slices == 1 else f'{slices} x {topology}',
    mesh=mesh,
    chips=count,
    batch=run.experiment.train.batch_size,
    parameters=parameter_count(state.params),
    parameter_bytes=parameters,
    optimizer_bytes=optimizer,
    other_bytes=memory.argument_size_in_bytes - parameters - optimizer - batch,
    batch_bytes=batch,
    temporaries=memory.peak_memory_in_bytes - memory.argument_size_in_bytes,
    hbm=int(chip.hbm),
    flops=executed / count,
    model_flops=run.step_flops() / count,
    bytes_accessed=moved,
    collectives=exchanged,
    estimated_seconds=(hlo.estimated_cycles(text) + scheduled / chip.cores) / chip.clock,
    compute_seconds=executed / count / chip.flops,
    memory_seconds=moved / chip.bandwidth,
    interconnect_seconds=sum(row.bytes for row in exchanged) / chip.interconnect,
    steps=run.experiment.train.steps,
  )


def _topology(config: str, resolved: dict[str, Any], given: str | None) -> str:
  topology = given or resolved['topology']
  if not topology:
    raise UserError(f'{config}: no topology set; pass --topology, such as v5e:16x16')
  return topology


def show(plan: Plan, console: Console, utilization: float) -> None:
  """Prints the plan: memory, communication, time and cost."""
  table = Table(title=f'{plan.config} on {plan.topology}, one chip of {plan.chips}', show_header=False)
  axes = ' x '.join(f'{name} {size}' for name, size in plan.mesh.items() if size > 1) or '1 device'
  bounds = {'compute': plan.compute_seconds, 'HBM': plan.memory_seconds, 'interconnect': plan.interconnect_seconds}
  for name, value in {
    'mesh': axes,
    'global batch': f'{plan.batch:,}',
    'parameters of the model': f'{plan.parameters / 1e6:,.1f} M',
    'HBM: parameters': f'{plan.parameter_bytes / GIB:.2f} GiB',
    'HBM: optimizer': f'{plan.optimizer_bytes / GIB:.2f} GiB',
    'HBM: average, frozen networks, counters': f'{plan.other_bytes / GIB:.2f} GiB',
    'HBM: batch': f'{plan.batch_bytes / GIB:.2f} GiB',
    'HBM: temporaries': f'{plan.temporaries / GIB:.2f} GiB',
    'HBM: total': f'{plan.needed / GIB:.2f} of {plan.hbm / GIB:.2f} GiB',
    'FLOPs executed in matrix products': f'{plan.flops / 1e12:.3f} T',
    'model FLOPs over executed': f'{plan.model_flops / plan.flops:.2f}',
    **{
      f'{row.kind} over {", ".join(row.axes)}': f'{row.times} x, {row.bytes / 2**20:,.1f} MiB sent'
      for row in plan.collectives
    },
    'HBM read and written': f'{plan.bytes_accessed / GIB:.2f} GiB',
    'at the peak of the chip': ', '.join(f'{name} {1e3 * seconds:.1f} ms' for name, seconds in bounds.items())
    + f'; bound by: {max(bounds, key=bounds.__getitem__)}',
    "step by the compiler's cycles (an estimate, no exchanges)": f'{1e3 * plan.estimated_seconds:.1f} ms',
    'utilization by that estimate': f'{plan.utilization:.2f}',
    f'{plan.steps:,} steps at a utilization of {utilization:g}': f'{plan.days(utilization):.2f} days, '
    f'{24 * plan.days(utilization) * plan.chips:,.0f} chip-hours',
  }.items():
    table.add_row(name, value)
  console.print(table)


def run(
  config: str,
  overrides: Sequence[str],
  *,
  topology: str | None,
  slices: int = 1,
  utilization: float = 0.4,
  json_file: str | None = None,
  searched: bool = False,
  batches: Sequence[int] | None = None,
) -> None:
  """Prints a plan, or with `searched` a table of plans by mesh, remat and batch; optionally writes them as JSON."""
  console = make_console()
  if searched:
    plans = search(config, overrides, topology=topology, slices=slices, batches=batches, console=console)
  else:
    plans = [make(config, overrides, topology, slices)]
    show(plans[0], console, utilization)
  if json_file:
    with open(json_file, 'w', encoding='utf-8') as file:
      json.dump([_plain(plan) for plan in plans], file, indent=1)


class Cost(NamedTuple):
  """Objectives of the search, to be minimized: seconds and bytes sent per example and chip, and HBM bytes."""

  seconds: float
  sent: float
  hbm: int


def figures(plan: Plan) -> Cost:
  """The objectives of the search for a plan, per example and chip."""
  examples = plan.batch / plan.chips
  sent = sum(row.bytes for row in plan.collectives)
  return Cost(plan.estimated_seconds / examples, sent / examples, plan.needed)


def pareto_front(found: Sequence[Cost]) -> list[bool]:
  """True for each choice on the Pareto front."""

  def dominated(one: Cost) -> bool:
    return any(other != one and all(x <= y for x, y in zip(other, one, strict=True)) for other in found)

  return [not dominated(one) for one in found]


def choices(config: dict[str, Any], batches: Sequence[int], chips: int) -> Iterator[tuple[str, str, int, list[str]]]:
  """(mesh, remat, batch, overrides) of all candidates of `search`; other mesh axes keep the values of the config."""
  fields = paths_of(config['objective'], 'remat', 'objective')
  meshes = {'data': (-1, 1), 'fsdp': (1, -1), **({'data x fsdp 8': (-1, 8)} if chips > 16 else {})}
  for (mesh, (data, fsdp)), remat, batch in itertools.product(meshes.items(), REMATS, batches):
    sizes = [f'mesh.data={data}', f'mesh.fsdp={fsdp}', f'train.batch_size={batch}']
    yield mesh, remat, batch, [*sizes, *(f'{field}={remat}' for field in fields)]


def search(
  config: str,
  overrides: Sequence[str],
  *,
  topology: str | None,
  slices: int,
  batches: Sequence[int] | None,
  console: Console,
) -> list[Plan]:
  """Compiles a config with several meshes, remat policies and batch sizes; prints each, and marks the Pareto front."""
  resolved = load_config(config, overrides)
  topology = _topology(config, resolved, topology)
  table = Table(title=f'{config} on {topology}')
  for heading in ('mesh', 'remat', 'batch', 'HBM', 'model/executed', 'sent an example', 'estimate an example', ''):
    table.add_column(heading, justify='right')
  plans, rows = [], []
  for mesh, remat, batch, more in choices(
    resolved, batches or (resolved['train']['batch'],), len(pod(topology, slices))
  ):
    try:
      plan = make(config, [*overrides, *more], topology, slices)
    except DoesNotFit:
      console.print(f'{mesh}, remat {remat}, batch {batch:,}: does not fit', highlight=False)
      continue
    plans.append(plan)
    cost = figures(plan)
    rows.append(
      (
        mesh,
        remat,
        f'{batch:,}',
        f'{plan.needed / GIB:.2f} GiB',
        f'{plan.model_flops / plan.flops:.2f}',
        f'{cost.sent / 2**20:,.2f} MiB',
        f'{1e6 * cost.seconds:.0f} us',
      )
    )
    console.print(f'{mesh}, remat {remat}, batch {batch:,}: {", ".join(rows[-1][3:])}', highlight=False)
  for row, marked in zip(rows, pareto_front([figures(plan) for plan in plans]), strict=True):
    table.add_row(*row, 'Pareto-optimal' if marked else '')
  console.print(table)
  console.print(
    'Pareto-optimal: no other is better in memory, exchange or estimate without being worse in another of them'
  )
  return plans


def _plain(plan: Plan) -> dict[str, Any]:
  return {**dataclasses.asdict(plan), 'collectives': [row._asdict() for row in plan.collectives]}


def _bytes(tree: Any, shardings: Any) -> int:
  """Bytes per device of a tree of ShapeDtypeStructs."""
  sizes = jax.tree.map(lambda x, s: _count(s.shard_shape(x.shape)) * x.dtype.itemsize, tree, shardings)
  return sum(jax.tree.leaves(sizes))


def _count(shape: tuple[int, ...]) -> int:
  total = 1
  for size in shape:
    total *= size
  return total


def _largest(message: str) -> str:
  """Required memory and the three largest buffers, from the compiler's error message."""
  used = re.search(r'Used ([\d.]+\w?) of ([\d.]+\w?)', message) or re.search(
    r'required for HLO temporaries \(([\d.]+\w?)\) exceeds available HBM \(([\d.]+\w?)\)', message
  )
  sizes = re.findall(r'Size: ([\d.]+\w+)\s*\n\s*(?:Operator: op_name="([^"]*)"|Shape: (\S+))', message)[:3]
  named = '; '.join(f'{size} {(operator or shape)[-80:]}' for size, operator, shape in sizes)
  need = f'needs {used[1]} of {used[2]} bytes of HBM' if used else 'the compiler ran out of memory'
  return f'{need}; largest: {named or "unknown"}; use remat, more fsdp, microbatches or a smaller batch'
