"""Writes a dataset as ArrayRecord shards, in several processes, and resumes after an interruption.

An incomplete dataset is in a hidden folder `.NAME.partial` next to its destination. A shard is complete once it has
its final name and a note (counts, checksum). The last step renames the folder, so that an incomplete dataset is never
read as a complete one.
"""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import multiprocessing
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np

from fmcv_jax.data.sources.array_record import encode_record, shard_path, write_info, write_shard
from fmcv_jax.data.sources.base import UNREADABLE, Example, Source, reason_of
from fmcv_jax.data.workers.prefetch import end_with_parent
from fmcv_jax.errors import UserError
from fmcv_jax.fields import Field
from fmcv_jax.parallel import distributed

SHARD_BYTES = 512 << 20
SUMS = 'SHA256SUMS'
_PLAN = 'plan.json'
_NAMED_BAD = 100  # unreadable records listed in the note of a shard


@dataclasses.dataclass(frozen=True)
class PackingPlan:
  """The dataset to write. `origin`, plain data, describes the input; it must be unchanged when writing is resumed."""

  records: int
  shards: int
  names: tuple[str, ...]
  origin: Any
  fields: Mapping[str, Field] = dataclasses.field(default_factory=dict)

  def rows(self, shard: int) -> range:
    """Numbers of the records of a shard; shards differ by at most one record."""
    return range(self.records * shard // self.shards, self.records * (shard + 1) // self.shards)


@dataclasses.dataclass(frozen=True)
class ShardWriter:
  """A dataset that is being written. Picklable, so that other processes can write shards of it."""

  target: pathlib.Path
  folder: pathlib.Path
  plan: PackingPlan

  def missing(self) -> list[int]:
    """Indices of the shards that are missing or incomplete."""
    return [shard for shard in range(self.plan.shards) if self.note(shard) is None]

  def note(self, shard: int) -> dict[str, Any] | None:
    """The note of a complete shard: its size and skipped records; None for a missing or incomplete one."""
    path = shard_path(self.folder, shard, self.plan.shards)
    try:
      note = json.loads(_note_path(path).read_text())
      return note if path.stat().st_size == note['bytes'] else None
    except (OSError, ValueError, KeyError):
      return None

  def write(self, shard: int, examples: Iterable[Example], skipped: dict[str, str] | None = None) -> None:
    """Writes a shard and then its note, with the content of `skipped` after the last example: key -> reason."""
    path, counted = shard_path(self.folder, shard, self.plan.shards), _Counted(examples)
    write_shard(counted, path)
    with path.open('rb') as file:
      digest = hashlib.file_digest(file, 'sha256').hexdigest()
      os.fsync(file.fileno())
    reasons = dict(list((skipped or {}).items())[:_NAMED_BAD])
    note = {'records': counted.count, 'bytes': path.stat().st_size, 'sha256': digest}
    partial = _note_path(path).with_suffix('.partial')
    partial.write_text(json.dumps({**note, 'skipped': len(skipped or {}), 'reasons': reasons}))
    partial.rename(_note_path(path))

  def finish(self) -> dict[str, Any]:
    """Renames the complete dataset; returns its total {'records', 'bytes', 'skipped', 'reasons'}."""
    notes = [self.note(shard) for shard in range(self.plan.shards)]
    whole: list[dict[str, Any]] = [note for note in notes if note is not None]
    assert len(whole) == self.plan.shards, 'finished before all shards were written'
    paths = [shard_path(self.folder, shard, self.plan.shards) for shard in range(self.plan.shards)]
    (self.folder / SUMS).write_text(''.join(f'{note["sha256"]}  {path.name}\n' for note, path in zip(whole, paths)))
    counts = [note['records'] for note in whole]
    skipped = sum(note['skipped'] for note in whole)
    write_info(
      self.folder, sum(counts), self.plan.shards, self.plan.names, counts, skipped, self.plan.origin, self.plan.fields
    )
    for path in paths:
      _note_path(path).unlink()
    (self.folder / _PLAN).unlink()
    self.folder.rename(self.target)
    reasons = {key: reason for note in whole for key, reason in note['reasons'].items()}
    return {
      'records': sum(counts),
      'bytes': sum(note['bytes'] for note in whole),
      'skipped': skipped,
      'reasons': reasons,
    }


class _Counted:
  def __init__(self, examples: Iterable[Example]):
    self._examples, self.count = examples, 0

  def __iter__(self) -> Iterator[Example]:
    for example in self._examples:
      self.count += 1
      yield example


def _note_path(shard: pathlib.Path) -> pathlib.Path:
  return shard.with_suffix('.json')


@contextlib.contextmanager
def unfinished(to: str | os.PathLike[str], plan: PackingPlan) -> Iterator[ShardWriter]:
  """Starts or resumes the dataset `to`, with the number of shards that it was started with; holds a lock.

  Raises UserError if the dataset is complete, was started from different data, or is being written.
  """
  target = pathlib.Path(to).expanduser()
  if target.exists():
    raise UserError(f'--to {target}: exists already; choose another folder or remove it')
  folder = target.with_name(f'.{target.name}.partial')
  try:
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
  except OSError as error:
    raise UserError(f'--to {target}: cannot be written ({error.strerror})') from error
  try:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise UserError(f'--to {target}: another process is writing it; wait until it ends') from error
    except OSError:  # a file system without locks
      pass
    yield ShardWriter(target, folder, _agreed(folder, target, plan))
  finally:
    os.close(lock)


def open_on_all_processes(
  to: str | os.PathLike[str], plan: PackingPlan, stack: contextlib.ExitStack
) -> tuple[ShardWriter | None, int, list[int]]:
  """Starts or resumes a dataset that all processes of a run compute: returns the ShardWriter (None in all processes
  but the first), the number of shards, and the missing ones. The lock is held until `stack` closes.
  """
  begun, failure = None, None
  if distributed.is_main():
    try:
      begun = stack.enter_context(unfinished(to, plan))
    except UserError as error:  # raised after the broadcast, for which the others wait
      failure = error
  shards = int(distributed.from_main(np.array(begun.plan.shards if begun else 0)))
  if not shards:
    raise failure or UserError(f'--to {to}: the first process cannot write it')
  flags = np.zeros(shards, bool)
  if begun:
    flags[begun.missing()] = True
  return begun, shards, np.flatnonzero(distributed.from_main(flags)).tolist()


def _agreed(folder: pathlib.Path, target: pathlib.Path, plan: PackingPlan) -> PackingPlan:
  """The plan that the folder was started with; raises UserError if more than the number of shards differs."""
  for leftover in folder.glob('.*.partial'):
    leftover.unlink()
  file = folder / _PLAN
  now = json.loads(json.dumps(dataclasses.asdict(plan)))
  try:
    begun = json.loads(file.read_text())
  except FileNotFoundError:
    partial = folder / '.plan.partial'
    partial.write_text(json.dumps(now))
    partial.rename(file)
    begun = now
  if different := [key for key in now if key != 'shards' and begun.get(key) != now[key]]:
    key = different[0]
    raise UserError(
      f'--to {target}: was started from different data ({key} was {begun.get(key)!r}, now {now[key]!r}); choose '
      f'another folder, or remove {folder}'
    )
  return dataclasses.replace(plan, shards=begun['shards'])


def pack(
  source: Source,
  to: str | os.PathLike[str],
  *,
  origin: Any,
  shards: int | None = None,
  workers: int = 1,
  max_bad: float = 0.01,
  progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
  """Writes every record of `source` in its order; returns what `ShardWriter.finish` does.

  shards    default: about half a GiB per shard, and enough for all workers
  max_bad   maximum fraction of unreadable records; more raise UserError
  progress  called with the number of finished records and the total
  """
  if not len(source):
    raise UserError('pack: the source has no records')
  if shards is not None and not 1 <= shards <= len(source):
    raise UserError(f'--shards {shards}: expected between 1 and the {len(source)} records')
  plan = PackingPlan(len(source), shards or _shards(source, workers), source.names, origin, source.fields)
  with unfinished(to, plan) as begun:
    missing = begun.missing()
    done = plan.records - sum(len(begun.plan.rows(shard)) for shard in missing)
    progress(done, plan.records)
    for shard in _written(begun, source, missing, workers):
      done += len(begun.plan.rows(shard))
      progress(done, plan.records)
    _check_skipped(begun, max_bad)
    return begun.finish()


def _written(begun: ShardWriter, source: Source, missing: list[int], workers: int) -> Iterator[int]:
  """Writes the missing shards, in this process or in several; yields each index when it is written."""
  if workers == 1:
    for shard in missing:
      _pack_shard(begun, source, shard)
      yield shard
    return
  context = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(min(workers, len(missing)) or 1, context, _start) as pool:
    futures = {pool.submit(_pack_shard, begun, source, shard): shard for shard in missing}
    try:
      for future in concurrent.futures.as_completed(futures):
        future.result()
        yield futures[future]
    except BrokenProcessPool as error:
      raise UserError(
        'pack: a worker process died, usually out of memory; the same command resumes from the shards that are '
        'written, and fewer --workers need less memory'
      ) from error
    except BaseException:
      pool.shutdown(wait=False, cancel_futures=True)
      raise


def _check_skipped(begun: ShardWriter, max_bad: float) -> None:
  notes = [begun.note(shard) or {} for shard in range(begun.plan.shards)]
  skipped = sum(note['skipped'] for note in notes)
  if skipped > max_bad * begun.plan.records:
    reasons = [f'{key}: {reason}' for note in notes for key, reason in note['reasons'].items()]
    raise UserError(
      f'pack: {skipped} of {begun.plan.records} records cannot be read, more than --max-bad {max_bad:g}; the first '
      f'are {"; ".join(reasons[:3])}; repair the source and remove {begun.folder}, or allow more'
    )


def _shards(source: Source, workers: int) -> int:
  """The default number of shards, by the size of sampled records; at least 4 per worker if there are enough records."""
  sizes = []
  for index in range(0, len(source), max(1, len(source) // 16)):
    with contextlib.suppress(*UNREADABLE):
      sizes.append(len(encode_record(source[index])))
  mean = sum(sizes) / len(sizes) if sizes else 0
  return max(1, round(mean * len(source) / SHARD_BYTES), min(4 * workers, len(source) // 1000))


def _start() -> None:
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
  threading.Thread(target=end_with_parent, daemon=True).start()


def _pack_shard(begun: ShardWriter, source: Source, shard: int) -> None:
  skipped: dict[str, str] = {}

  def examples() -> Iterator[Example]:
    for index in begun.plan.rows(shard):
      try:
        yield source[index]
      except UNREADABLE as error:
        skipped[source.key_of(index)] = reason_of(error)

  begun.write(shard, examples(), skipped)
