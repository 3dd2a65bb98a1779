"""Evaluates the checkpoint of a workdir and keeps the figures beside it."""

from collections.abc import Sequence

from etils import epath
from rich.console import Console
from rich.table import Table

from fmcv_jax.errors import UserError
from fmcv_jax.experiment import Run, evaluate
from fmcv_jax.parallel.distributed import is_main
from fmcv_jax.train.checkpoint import write_json


def evaluate_workdir(
  workdir: str | epath.Path, overrides: Sequence[str] = (), *, step: int | None = None
) -> dict[str, float]:
  """Runs every evaluator of the workdir's config (with overrides) on a checkpoint; prints and writes the figures."""
  run = Run.reopen(workdir, overrides)
  if not run.experiment.evaluators:
    raise UserError(f'{workdir}: its config names no evaluators; add one with --config.evaluators.NAME.name=...')
  subject, step = run.restored_subject(step)
  figures = evaluate(subject, run.experiment.evaluators)
  if is_main():
    path = run.workdir / f'evaluation_{step}.json'
    write_json(path, {'step': step, **figures})
    table = Table(title=f'{workdir} at step {step}')
    table.add_column('figure')
    table.add_column('value', justify='right')
    for name, value in figures.items():
      table.add_row(name, f'{value:.4f}')
    Console().print(table)
    Console().print(f'written to {path}', highlight=False)
  return figures
