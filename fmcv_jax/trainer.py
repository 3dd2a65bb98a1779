"""A run from its config to its final state: opens the workdir, restores what stands there, and runs the loop."""

import contextlib
import errno
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from rich.console import Console

from fmcv_jax import config as config_lib
from fmcv_jax import startup
from fmcv_jax.console import make_console
from fmcv_jax.data.loader import TrainLoader, record_keys, resume
from fmcv_jax.errors import UserError, did_you_mean
from fmcv_jax.evaluate.base import Evaluator, evaluate
from fmcv_jax.experiment import Experiment, resolve
from fmcv_jax.parallel.batches import to_devices
from fmcv_jax.parallel.distributed import is_main
from fmcv_jax.run import Run, keep_class_names, keep_tokenizer, load_trained_params, parameter_count
from fmcv_jax.train import goodput, lock, loop
from fmcv_jax.train.checkpoint import Checkpointer
from fmcv_jax.train.goodput import GoodputTimer
from fmcv_jax.train.metrics import METRICS_FILE, Writer, peak_of
from fmcv_jax.train.state import TrainState
from fmcv_jax.train.storage import read_metrics, write_json
from fmcv_jax.train.warm_start import load_partial_state
from fmcv_jax.version import __version__

# Of a file system, whatever file it was: no space, quota, file too large, read-only, broken, gone.
STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)

# What a run may change between a stop and its resumption: where and how it runs, not what it computes.
RESUMABLE = (
  'mesh',
  'rules',
  'evaluators',
  'checkpoint',
  'log',
  'topology',
  'debug',
  'data.workers',
  'data.max_bad',
  'data.timeout',
  'train.grad_accum_steps',
  'train.max_nonfinite_steps',
)
# Fields of networks, anywhere in the objective, that say how something is computed and not what.
RESUMABLE_NAMES = ('remat', 'unroll', 'attention')


def train(config: dict[str, Any], workdir: str | pathlib.Path, console: Console | None = None) -> TrainState:
  """Runs a resolved config in a workdir, from where it stands there; returns the final state."""
  console = console or make_console()
  run = Run(config, workdir)
  for field in ('steps', 'batch_size'):
    if not getattr(run.experiment.train, field):
      raise UserError(f'config.train.{field}: missing or 0; set at least 1')
  jax.config.update('jax_debug_nans', run.experiment.debug.nans)
  _open_workdir(run, console)
  with _storage_errors(run.workdir), lock.held(run.workdir) if is_main() else contextlib.nullcontext():
    return _train(run, console)


@contextlib.contextmanager
def _storage_errors(workdir: epath.Path) -> Iterator[None]:
  """Turns the error of a full, missing or read-only disk into a UserError."""
  try:
    yield
  except OSError as error:
    inside = error.filename is not None and str(error.filename).startswith(os.fspath(workdir))
    if not inside and error.errno not in STORAGE_ERRORS:
      raise
    raise UserError(
      f'{error.filename or workdir}: cannot be written ({error.strerror}); earlier checkpoints are kept, and the '
      f'same command resumes from them'
    ) from error


def _train(run: Run, console: Console) -> TrainState:
  e, main = run.experiment, is_main()
  clock = GoodputTimer(run.workdir / goodput.FILE if main else None)
  checkpointer = Checkpointer(run.workdir, e.checkpoint)
  restored = checkpointer.restore_newest(
    run.abstract_state, run.shardings, lambda notice: console.print(notice, highlight=False, soft_wrap=True)
  )
  start, position = None, None
  if restored:
    state, kept = restored
    start, position = int(state.step), kept['data']
  else:
    state = jax.jit(run.init, out_shardings=run.shardings)()
    if e.init_from:
      state = load_partial_state(state, e.init_from, load_trained_params)

  fields = tuple(run.batch_shapes)
  loader = TrainLoader(
    e.data,
    batch=e.train.batch_size,
    seed=e.seed,
    fields=fields,
    tokenizer=e.tokenizer,
    start=resume(position, e.data, e.seed) if position else 0,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  writer = (
    Writer(run.workdir, total=e.train.steps, start=start or 0, tensorboard=e.log.tensorboard, console=console)
    if main
    else None
  )
  subject = run.subject()
  last = e.train.steps

  def due(step: int, evaluator: Evaluator) -> bool:
    return step == last or bool(evaluator.every and step % evaluator.every == 0)

  def evaluates(step: int) -> bool:
    return any(due(step, evaluator) for evaluator in e.evaluators.values())

  def saves(step: int) -> bool:
    best = e.evaluators.get((e.checkpoint.best or '').split('/')[0])
    return step % e.checkpoint.every == 0 or (best is not None and due(step, best))

  def evaluate_at(state: TrainState, step: int, raise_if_stopped: Callable[[], None]) -> dict[str, float]:
    subject.params, subject.extra, subject.between_batches = state.eval_params, state.extra, raise_if_stopped
    names = [name for name, evaluator in e.evaluators.items() if due(step, evaluator)]
    return evaluate(subject, {name: e.evaluators[name] for name in names})

  _check_best(e)
  lines = startup.account(run)
  if main:
    keep_class_names(run)
    startup.write(run.workdir, lines)
    for line in lines:
      console.print(line, highlight=False, soft_wrap=True, markup=False)
  with config_lib.config_path_context('config.optimizer'):
    e.optimizer.check(run.abstract_state.params)
  for evaluator in e.evaluators.values():
    evaluator.prepare(subject)
  if main:
    _announce(run, console, start)
  peak = e.log.peak_flops or peak_of(jax.devices()[0].device_kind)
  try:
    return loop.run(
      run.train_step(),
      state,
      _device_batches(loader, run, start or 0),
      loop.LoopConfig(
        steps=last,
        log_every=e.log.every,
        saves=saves,
        evaluates=evaluates,
        max_nonfinite_steps=e.train.max_nonfinite_steps,
        evaluate_first=start is not None and evaluates(start) and not _evaluated(run.workdir, start),
      ),
      batch_size=e.train.batch_size,
      step_flops=run.step_flops() if peak else 0.0,
      peak_flops=peak and peak * jax.device_count(),
      evaluate=evaluate_at,
      position=loader.state,
      checkpointer=checkpointer,
      writer=writer,
      clock=clock,
    )
  finally:
    if writer:
      writer.close()
    if loader.skipped:
      first = '; '.join(f'{key}: {reason}' for key, reason in list(loader.skipped.items())[:3])
      console.print(f'{len(loader.skipped)} records could not be read and were skipped: {first}', highlight=False)
    loader.close()
    checkpointer.close()


def _check_best(e: Experiment) -> None:
  """Raises UserError where config.checkpoint.best names no evaluator; the metric is known after its first run."""
  if e.checkpoint.best is None:
    return
  name, slash, metric = e.checkpoint.best.partition('/')
  if not (slash and metric):
    raise UserError(f"config.checkpoint.best: {e.checkpoint.best!r} is not of the form 'evaluator/metric'")
  if name not in e.evaluators:
    raise UserError(
      f'config.checkpoint.best: {e.checkpoint.best!r} needs an evaluator {name!r} (None keeps no best checkpoint); '
      f'{did_you_mean(name, e.evaluators)}'
    )


def _evaluated(workdir: epath.Path, step: int) -> bool:
  """True if evaluator metrics of this step were written."""
  rows = [row for row in read_metrics(workdir / METRICS_FILE) if row['step'] == step]
  return any('/' in name and not name.startswith('train/') for row in rows for name in row)


def _device_batches(loader: TrainLoader, run: Run, start: int) -> Iterator[Any]:
  """The loader's batches on the devices, from step `start` on.

  The shapes of the first are compared with what the objective expects, the labels of every one with the network's
  classes.
  """
  e = run.experiment
  expected, counts = e.objective.example_batch, e.objective.class_counts
  rows = e.train.batch_size // jax.process_count()

  def keys(count: int) -> list[str]:
    first = (start + count) * e.train.batch_size + jax.process_index() * rows
    return record_keys(e.data, e.seed, first, rows)

  for count, local in enumerate(loader):
    if count == 0:
      for name, want in expected.items():
        if local[name].shape[1:] != want.shape:
          raise UserError(
            f'config.data gives {name} of shape {local[name].shape[1:]}, but the objective expects {want.shape}; '
            f'make the size of config.data.image and image_size of the network (or the token lengths) agree'
          )
        if _number_kind(local[name].dtype) != _number_kind(want.dtype):
          raise UserError(
            f'config.data gives {name} of dtype {local[name].dtype}, but the objective expects {want.dtype}; '
            f'convert it in the source'
          )
    startup.check_labels(local, counts, functools.partial(keys, count))
    yield to_devices(local, run.placement)


def _number_kind(dtype: Any) -> str:
  """'floating', 'integer' or 'other': precision may differ, but images in [0, 1] are not images in 0..255."""
  kinds = {'floating': jnp.floating, 'integer': jnp.integer}
  return next((name for name, kind in kinds.items() if jnp.issubdtype(dtype, kind)), 'other')


def _open_workdir(run: Run, console: Console) -> None:
  """Creates the workdir, or checks that it belongs to this very experiment; writes what identifies the run."""
  workdir, config = run.workdir, run.config
  path = workdir / 'config.json'
  if path.exists():
    saved = resolve(config_lib.to_plain_dict(json.loads(path.read_text())))
    difference = first_difference(saved, config)
    if difference:
      field, old, new = difference
      raise UserError(
        f'{workdir}: belongs to another experiment: config.{field} is {old!r} there and {new!r} here; use a new '
        f'--workdir (--config.init_from.params.workdir={workdir} initializes it from these weights)'
      )
  if not is_main():
    return
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(path, config)
    write_json(workdir / 'run.json', identity(run))
  except OSError as error:
    raise UserError(f'--workdir {workdir}: cannot be written ({error.strerror})') from error
  keep_tokenizer(run)


def first_difference(saved: Any, config: Any, path: str = '') -> tuple[str, Any, Any] | None:
  """The first field, outside RESUMABLE, in which two resolved configs differ: (path, old value, new value)."""
  if path in RESUMABLE or saved == config:
    return None
  if path.startswith('objective.') and path.rsplit('.', 1)[-1] in RESUMABLE_NAMES:
    return None
  if isinstance(saved, dict) and isinstance(config, dict):
    for key in [*saved, *(key for key in config if key not in saved)]:
      found = first_difference(saved.get(key), config.get(key), f'{path}.{key}' if path else key)
      if found:
        return found
    return None
  return path, saved, config


def identity(run: Run) -> dict[str, Any]:
  """Versions, machine, mesh and command, to reproduce a run."""
  devices = jax.devices()
  return {
    'command': sys.argv,
    'started': time.strftime('%Y-%m-%dT%H:%M:%S%z'),
    'versions': {
      'fmcv_jax': __version__,
      'python': platform.python_version(),
      **{
        package: importlib.metadata.version(package)
        for package in ('jax', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')
      },
    },
    'git': git_commit(),
    'devices': {'kind': devices[0].device_kind, 'count': len(devices), 'processes': jax.process_count()},
    'mesh': dict(run.placement.mesh.shape),
    'parameters': parameter_count(run.abstract_state.params),
  }


def git_commit() -> str | None:
  """The commit of the checkout that this package runs from, with '+' where it has changes; None outside of one."""
  here = pathlib.Path(__file__).parent
  try:
    commit = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=here, capture_output=True, text=True, check=True)
    dirty = subprocess.run(['git', 'status', '--porcelain', '-uno'], cwd=here, capture_output=True, text=True)
  except (OSError, subprocess.CalledProcessError):
    return None
  return commit.stdout.strip() + ('+' if dirty.stdout.strip() else '')


def _announce(run: Run, console: Console, start: int | None) -> None:
  mesh = ' x '.join(f'{axis} {size}' for axis, size in run.placement.mesh.shape.items() if size > 1) or '1 device'
  count = parameter_count(run.abstract_state.params)
  begin = f'resumes at step {start}' if start is not None else 'starts'
  console.print(
    f'{begin}: {count / 1e6:.2f} M parameters on {jax.devices()[0].device_kind} ({mesh}), workdir {run.workdir}',
    highlight=False,
  )
