"""Fine-tunes a model on a newcomer's own images, and says how good it is and how to use it."""

import hashlib
import os
import pathlib
from collections.abc import Sequence

from fmcv_jax import config as config_lib
from fmcv_jax import experiment, trainer
from fmcv_jax.apps.conversion import import_checkpoint
from fmcv_jax.apps.finetune_data import source_of
from fmcv_jax.apps.finetune_model import is_workdir
from fmcv_jax.console import make_console
from fmcv_jax.errors import UserError
from fmcv_jax.experiment import Experiment
from fmcv_jax.parallel.distributed import is_main
from fmcv_jax.pretrained import packaged
from fmcv_jax.run import Run
from fmcv_jax.train.checkpoint import Checkpointer
from fmcv_jax.train.storage import read_metrics

SMALL = (
  'a small model of drawings of 32 pixels; for photographs give published weights with --model (docs/pretrained.md)'
)


def run(
  data: str,
  model: str = 'demo',
  workdir: str | None = None,
  overrides: Sequence[str] = (),
  *,
  config: str = 'configs/finetune.py',
) -> str:
  """Fine-tunes `model` on `data`; returns the workdir. The same command resumes a run.

  data     folder of images, a table that names them, or a folder of Parquet tables (see `finetune_data.source_of`)
  model    a workdir, a model of the package by name, or published weights, which are imported into the workdir first
  workdir  default: runs/NAME, by the name of the data

  Raises UserError, before the model is read, for data that cannot be used.
  """
  own = [field for field in overrides if field.startswith('data.source.')]
  source_of(data, config_lib.override({'data': {'source': {}}}, own)['data']['source'])  # before weights are imported
  name = pathlib.PurePath(data.rstrip('/')).stem
  workdir = workdir or f'runs/{name}'
  if model in packaged.MODELS and is_main():
    make_console().print(f'--model {model}: {SMALL}', highlight=False, soft_wrap=True)
  model = packaged.locate(model)
  pretrained = model if is_workdir(model) else _imported(model, workdir)
  fields = [f'data.source.path={data!r}', f'init_from.params.workdir={pretrained!r}', *overrides]
  trainer.train(experiment.load_config(config, fields), workdir)
  if is_main():
    _close(workdir)
  return workdir


def _imported(model: str, workdir: str) -> str:
  """A workdir of published weights inside `workdir`; the same weights are imported once."""
  if not os.path.exists(os.path.expanduser(model)):
    raise UserError(
      f'--model {model}: no such file or folder (relative to {os.getcwd()}); give a workdir of `fmcv train` or '
      f'`fmcv import`, or a downloaded file or folder of published weights (docs/pretrained.md)'
    )
  path = os.path.abspath(os.path.expanduser(model))
  name = f'{pathlib.PurePath(path).stem}-{hashlib.sha256(path.encode()).hexdigest()[:8]}'
  to = os.path.join(workdir, 'pretrained', name)
  if not is_workdir(to):
    import_checkpoint(path, to)
  return to


def _close(workdir: str) -> None:
  """Prints the best figure on the held-out data, and the command that uses the model."""
  e = Run.reopen(workdir).experiment
  step, figure = _best(workdir, e)
  classifies = 'label' in e.objective.class_counts
  at = '' if step is None or step == e.train.steps else f' --step {step}'
  labels = '' if classifies else ' --text "LABEL" "LABEL"'
  console = make_console()
  if figure is not None and (metric := e.checkpoint.best) is not None:
    count = _records(e, metric.partition('/')[0])
    console.print(
      f'{metric} {figure:.3f} on {count} images, at step {step} of {e.train.steps}', highlight=False, soft_wrap=True
    )
  console.print(f'use it: fmcv classify FILE --model {workdir}{at}{labels}', highlight=False, soft_wrap=True)


def _best(workdir: str, e: Experiment) -> tuple[int | None, float | None]:
  checkpointer = Checkpointer(workdir, e.checkpoint, create=False)
  step = checkpointer.best()
  checkpointer.close()
  rows = [row for row in read_metrics(checkpointer.directory.parent / 'best.jsonl') if row['step'] == step]
  return step, rows[-1][e.checkpoint.best] if rows and e.checkpoint.best else None


def _records(e: Experiment, evaluator: str) -> int:
  return len(e.evaluators[evaluator].data.source)  # type: ignore[attr-defined]
