"""Checkpointing with orbax: asynchronous, atomic, keeps the latest N and the best, and stores the data position."""

import contextlib
import dataclasses
import json
import logging
import math
import pathlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from fmcv_jax.bounds import PositiveInt
from fmcv_jax.errors import UserError, did_you_mean
from fmcv_jax.parallel.distributed import any_process, is_main
from fmcv_jax.parallel.rules import path_of
from fmcv_jax.train import checksums
from fmcv_jax.train.state import TrainState
from fmcv_jax.train.storage import append_line, inode, read_metrics

DAMAGED = 'damaged'
# Target file size in bytes. Packed data is held in memory until a file is full; orbax's default is 2 GiB.
TARGET_FILE_BYTES = 2**26


@contextlib.contextmanager
def _without_warnings(library: str) -> Iterator[None]:
  """Hides the warnings that a library logs in the block."""
  log = logging.getLogger(library)
  before = log.level
  log.setLevel(logging.ERROR)
  try:
    yield
  finally:
    log.setLevel(before)


# Replicas share the writing of an array by slicing it, which compiles one program per shape: useful for large arrays.
with _without_warnings('absl'):  # orbax says that its own handler is replaced, which is the purpose
  ocp.type_handlers.register_type_handler(
    jax.Array, ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**24), override=True
  )


@dataclasses.dataclass(frozen=True)
class Checkpointing:
  """Checkpoint interval and retention.

  every   steps between saves; the last step is always saved
  keep    number of the latest checkpoints to keep
  best    metric of an evaluator, such as 'val/top1', whose best checkpoint is kept in addition; higher is better. The
          run then also saves whenever that evaluator runs, so that the metric belongs to a checkpoint
  """

  every: PositiveInt = 1000
  keep: PositiveInt = 2
  best: str | None = None


@dataclasses.dataclass
class _KeepBest(ocp.checkpoint_managers.PreservationPolicy):
  """Preserves the step with the highest finite metric; `metrics` is read whenever a step is about to be deleted."""

  metrics: Callable[[], Mapping[int, float]]

  def should_preserve(self, checkpoints: Any, *, context: Any) -> Any:
    best = _best_of(self.metrics(), {info.step for info in checkpoints})
    return [info.step == best for info in checkpoints]


def _best_of(metrics: Mapping[int, float], steps: Collection[int]) -> int | None:
  """The step with the highest finite metric among `steps` (the latest in case of ties), or None."""
  scored = [(value, step) for step, value in metrics.items() if step in steps and math.isfinite(value)]
  return max(scored)[1] if scored else None


class Checkpointer:
  """The checkpoints of one workdir.

  Each has the items `params`, `ema` and `extra` (if not empty), `rest`, and `run` (JSON), and the checksums of all
  files.
  """

  def __init__(self, workdir: str | pathlib.Path, options: Checkpointing = Checkpointing(), *, create: bool = True):
    self.directory = epath.Path(workdir).absolute() / 'checkpoints'
    if not create and not self.directory.exists():
      raise UserError(f'{workdir}: holds no checkpoints; give the workdir of a run that has saved at least once')
    self._best = options.best
    self._metrics_file = epath.Path(workdir).absolute() / 'best.jsonl'
    self._saving = -1
    managers = ocp.checkpoint_managers
    policies: list[Any] = [managers.LatestN(options.keep)]
    if options.best:
      policies.append(_KeepBest(self._metrics))
    trees = {name: ocp.PyTreeCheckpointHandler() for name in ('params', 'ema', 'extra', 'rest')}
    self._manager = ocp.CheckpointManager(
      self.directory,
      item_handlers={**trees, 'run': ocp.JsonCheckpointHandler()},
      options=ocp.CheckpointManagerOptions(
        preservation_policy=managers.AnyPreservationPolicy(policies),
        create=create,
        # Deletion starts with a rename, so that a process killed meanwhile leaves no half-deleted step in the list.
        todelete_subdir='deleted' if create else None,
        # Runs before a step is committed, so that every step has checksums.
        async_options=ocp.options.AsyncOptions(post_finalization_callback=self._write_checksums),
      ),
    )

    self._inode = inode(self.directory)

  def latest(self) -> int | None:
    """The latest committed step, or None."""
    return self._manager.latest_step()

  def steps(self) -> list[int]:
    """All kept steps, in increasing order."""
    return sorted(self._manager.all_steps())

  def best(self) -> int | None:
    """The step with the highest finite metric among those kept, or None."""
    return _best_of(self._metrics(), self._manager.all_steps())

  def record(self, step: int, metrics: Mapping[str, float]) -> None:
    """Records the metrics of the checkpoint of `step`, which was saved before they were computed."""
    if self._best is None or self._best.split('/')[0] not in {name.split('/')[0] for name in metrics}:
      return
    if self._best not in metrics:
      raise UserError(f'config.checkpoint.best: no metric {self._best!r}; {did_you_mean(self._best, sorted(metrics))}')
    if is_main():
      append_line(self._metrics_file, json.dumps({'step': step, self._best: _json_number(metrics[self._best])}) + '\n')

  def _metrics(self) -> dict[int, float]:
    """The recorded metric of each step; the last record counts if a step was evaluated more than once."""
    if self._best is None:
      return {}
    metrics = {}
    for step in self._manager.all_steps():
      stored = self.directory / str(step) / 'metrics' / 'metrics'  # where 0.1.0 kept them
      if stored.exists() and isinstance(value := json.loads(stored.read_text()).get(self._best), int | float):
        metrics[step] = float(value)
    rows = [row for row in read_metrics(self._metrics_file) if row.get(self._best) is not None]
    return metrics | {row['step']: row[self._best] for row in rows}

  def save(self, state: TrainState, run: dict[str, Any]) -> None:
    """Starts to save; returns once the arrays are off the devices. `run` is any JSON, such as the data position."""
    step = int(state.step)
    if step in self._manager.all_steps():
      return
    if inode(self.directory) != self._inode:  # orbax would silently create a new folder
      raise UserError(f'{self.directory}: was moved or deleted during training; checkpoints can no longer be saved')
    args = {
      name: ocp.args.PyTreeSave(item, ocdbt_target_data_file_size=TARGET_FILE_BYTES)
      for name, item in _items(state).items()
    }
    self.wait()  # for the save before this one
    self._saving = step
    with self._reported(step):
      self._manager.save(step, args=ocp.args.Composite(run=ocp.args.JsonSave(run), **args))

  def restore(self, abstract: TrainState, shardings: TrainState, step: int | None = None) -> tuple[TrainState, dict]:
    """The state of `step` (default: the latest), placed by `shardings` whatever mesh wrote it, and its `run`."""
    step = self.resolve_step(step)
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    loaded = self._load(step, _items(target))
    state = TrainState(
      params=loaded['params'], ema=loaded.get('ema'), extra=loaded.get('extra', target.extra), **loaded['rest']
    )
    return state, loaded['run']

  def restore_newest(
    self, abstract: TrainState, shardings: TrainState, report: Callable[[str], None]
  ) -> tuple[TrainState, dict] | None:
    """`restore` of the latest step with valid checksums, or None if there is no checkpoint yet.

    Damaged steps are moved to `damaged` in the workdir and reported; UserError if no intact step is left.
    """
    damage = None
    while (step := self.latest()) is not None:
      try:
        return self.restore(abstract, shardings, step)
      except checksums.Damaged as error:
        damage = error
        self._set_aside(step)
        report(f'{error}; moved to {self.directory.parent / DAMAGED}, and the newest whole checkpoint is taken')
    if damage:
      raise UserError(f'{damage}; no complete checkpoint is left: restart training in another --workdir') from damage
    return None

  def _set_aside(self, step: int) -> None:
    if is_main():
      folder = self.directory.parent / DAMAGED
      folder.mkdir(exist_ok=True)
      (self.directory / str(step)).rename(folder / f'{step}-{time.time():.0f}')
    any_process(False)  # barrier: no process lists the steps before the move
    self._manager.reload()

  def restore_params(self, target: Any, step: int | None = None, *, extra: Any = None) -> tuple[Any, Any]:
    """(parameters to evaluate, extra) without the optimizer state; targets are ShapeDtypeStructs with shardings."""
    step = self.resolve_step(step)
    name = 'ema' if (self.directory / str(step) / 'ema').exists() else 'params'
    items = {name: target, 'extra': extra} if jax.tree.leaves(extra) else {name: target}
    loaded = self._load(step, items)
    return loaded[name], loaded.get('extra', extra)

  def resolve_step(self, step: int | None) -> int:
    """`step`, or the latest for None; UserError if it does not exist."""
    step = self.latest() if step is None else step
    if step is None or step not in self.steps():
      raise UserError(f'{self.directory}: no checkpoint{"" if step is None else f" of step {step}"}; '
                      f'steps there: {", ".join(map(str, self.steps())) or "none"}')  # fmt: skip
    return step

  def _load(self, step: int, items: dict[str, Any]) -> dict[str, Any]:
    args = {
      name: ocp.args.PyTreeRestore(item, restore_args=ocp.checkpoint_utils.construct_restore_args(item))
      for name, item in items.items()
    }
    try:
      checksums.verify(self.directory / str(step), (*items, 'run'))
      for name, item in items.items():
        self._check(step, name, item)
      loaded = self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore(), **args))
    except (ValueError, OSError, KeyError) as error:
      raise UserError(f'{self.directory / str(step)}: this checkpoint cannot be read ({_first_line(error)})') from error
    return {'run': loaded.run, **{name: loaded[name] for name in items}}

  def _check(self, step: int, name: str, item: Any) -> None:
    """Compares paths and shapes with the stored ones, to report a mismatch before anything is read."""
    items = self._manager.item_metadata(step)
    if name not in items or items[name] is None:
      raise UserError(
        f'{self.directory / str(step)}: this checkpoint has no {name!r}; was it saved with another config?'
      )
    stored, wanted = _shapes(items[name]), _shapes(item)
    for path in sorted(stored.keys() | wanted.keys()):
      if stored.get(path) != wanted.get(path):
        raise UserError(
          f'{self.directory / str(step)}: {name}/{path} is {stored.get(path, "missing")} in the checkpoint and '
          f'{wanted.get(path, "missing")} in the config'
        )

  def wait(self) -> None:
    """Waits until all saves are committed; UserError if one failed in the background."""
    with self._reported(self._saving):
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Closes the checkpoint manager, after its pending saves."""
    self._manager.close()

  @contextlib.contextmanager
  def _reported(self, step: int) -> Iterator[None]:
    try:
      yield
    except (OSError, ValueError, RuntimeError) as error:
      self._manager.reload()
      latest = self.latest()
      kept = 'no checkpoint is complete yet' if latest is None else f'step {latest} is the latest complete checkpoint'
      raise UserError(
        f'{self.directory}: step {step} could not be saved ({_first_line(error)}); {kept}: free some space, or make '
        f'the folder writable, and rerun the same command to resume from there'
      ) from error

  def _write_checksums(self) -> None:
    folder = next(path for path in self.directory.iterdir() if path.name.split('.')[0] == str(self._saving))
    checksums.write(folder)


def _items(state: TrainState) -> dict[str, Any]:
  """The state as items that can be read separately; orbax does not store empty trees."""
  rest = {name: getattr(state, name) for name in ('step', 'skipped', 'streak', 'rng', 'opt_state')}
  items = {'params': state.params, 'ema': state.ema, 'extra': state.extra, 'rest': rest}
  return {name: item for name, item in items.items() if jax.tree.leaves(item)}


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {path_of(key_path): tuple(leaf.shape) for key_path, leaf in flat if hasattr(leaf, 'shape')}


def _json_number(value: float) -> float | None:
  """The value, or None for NaN and infinities, which JSON does not have."""
  return float(value) if math.isfinite(value) else None


def _first_line(error: BaseException) -> str:
  """Start and end of the message, where orbax and tensorstore state the failure and its cause."""
  line = str(error).strip().split('\n')[0]
  return line if len(line) <= 240 else f'{line[:80]} ... {line[-150:]}'
