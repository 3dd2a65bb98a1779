"""Evaluates checkpoints of workdirs and stores the metrics in them."""

from collections.abc import Sequence

from etils import epath
from rich.table import Table

from fmcv_jax.console import make_console
from fmcv_jax.errors import UserError
from fmcv_jax.evaluate.base import evaluate
from fmcv_jax.parallel.distributed import is_main
from fmcv_jax.run import Run
from fmcv_jax.train.storage import write_json


def evaluate_workdirs(workdirs: Sequence[str], overrides: Sequence[str] = (), *, step: int | None = None) -> None:
  """Evaluates every workdir and prints one table, with one column per workdir."""
  found = {workdir: evaluate_workdir(workdir, overrides, step=step) for workdir in workdirs}
  if not is_main():
    return
  short = {workdir: workdir.rstrip('/').rpartition('/')[2] for workdir in found}
  unique_names = len(set(short.values())) == len(short)
  table = Table()
  table.add_column('metric', no_wrap=True)
  for workdir, (_, at) in found.items():
    table.add_column(f'{short[workdir] if unique_names else workdir}\nstep {at}', justify='right', overflow='fold')
  for name in dict.fromkeys(name for metrics, _ in found.values() for name in metrics):
    table.add_row(name, *(f'{metrics[name]:.4f}' if name in metrics else '' for metrics, _ in found.values()))
  make_console(markup=False).print(table)


def evaluate_workdir(
  workdir: str | epath.Path, overrides: Sequence[str] = (), *, step: int | None = None
) -> tuple[dict[str, float], int]:
  """Runs every evaluator of a workdir's config (with overrides) on a checkpoint; writes and returns the metrics."""
  run = Run.reopen(workdir, overrides)
  if not run.experiment.evaluators:
    raise UserError(f'{workdir}: its config has no evaluators; add one with --config.evaluators.NAME.name=...')
  subject, step = run.restored_model(step)
  for evaluator in run.experiment.evaluators.values():
    evaluator.prepare(subject)
  metrics = evaluate(subject, run.experiment.evaluators)
  if is_main():
    path = run.workdir / f'evaluation_{step}.json'
    write_json(path, {'step': step, **metrics})
    make_console().print(f'written to {path}', highlight=False, soft_wrap=True)
  return metrics, step
