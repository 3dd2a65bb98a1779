"""Batches of numpy arrays from a source, in an order that does not depend on the number of processes.

Global batch t holds positions [t B, (t + 1) B) of the run's order (see `order.py`), of which process p of P takes rows
[p B / P, (p + 1) B / P). Batches straddle epochs, so every record appears exactly once per epoch.
"""

import dataclasses
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fmcv_jax.data.examples import Examples
from fmcv_jax.data.order import Order, RunOrder
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.data.sources.base import UNREADABLE, Example, Source, reason_of
from fmcv_jax.data.tokenizers import Tokenizer
from fmcv_jax.data.workers.prefetch import Prefetcher
from fmcv_jax.errors import UserError, did_you_mean
from fmcv_jax.fields import FIELDS

logger = logging.getLogger(__name__)

_ATTEMPTS = 100  # consecutive unreadable records after which all are assumed to be
_MIN_CHECKED = 1000  # records; a few early failures do not stop a run that would stay below max_bad


class TrainLoader:
  """Infinite iterator of batches: dicts of this process's rows of the requested `fields`.

    image    uint8 [b, H, W, C]
    label    int32 [b]
    tokens   int32 [b, L], by `tokenizer`
    queries  int32 [b, Q, L], the texts of data.queries; rows of zeros where there are fewer
    geometry float32 [b, 6], the crop of each image (`Geometry.array`)
    the pipeline's views, uint8 [b, count, H, W, C]
    and any arrays in the records, [b, ...]: what belongs to positions in the image follows its geometry, and rows of
    objects are padded to one number, each by the kind of its `Field`

  batch   the global batch size, b times `process_count`
  start   number of examples already consumed, from `resume`

  An unreadable record is replaced deterministically by another record of the epoch, logged once, and kept in
  `skipped`. More of them than `max_bad`, a field that the source does not provide, and the death of a worker raise
  UserError. `close` stops the workers.
  """

  def __init__(
    self,
    pipeline: Pipeline,
    *,
    batch: int,
    seed: int,
    fields: Sequence[str],
    tokenizer: Tokenizer | None = None,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
  ):
    rows = _local_rows(batch, process_index, process_count)
    order = _order(pipeline, seed)
    batches = _Batches(pipeline, order, tuple(fields), tokenizer, batch, start, rows, train=True)
    batches.check()
    self._tally = _BadRecordCounter(order.records, pipeline.max_bad)
    self._batch, self._examples, self._fingerprint = batch, start, fingerprint(pipeline, seed)
    self._ahead = Prefetcher(batches, pipeline.workers, pipeline.timeout)

  def __iter__(self) -> 'TrainLoader':
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    arrays, replaced, reasons = next(self._ahead)
    try:
      self._tally.add(len(replaced), int(replaced.sum()), reasons)
    except UserError:
      self.close()
      raise
    self._examples += self._batch
    return arrays

  def state(self) -> dict[str, Any]:
    """The position in the data, for a checkpoint."""
    return {'examples': self._examples, 'fingerprint': self._fingerprint}

  @property
  def skipped(self) -> dict[str, str]:
    """Key -> reason of every record that this process could not read, in order of occurrence."""
    return dict(self._tally.reasons)

  def close(self) -> None:
    """Stops the workers."""
    self._ahead.close()


def fingerprint(pipeline: Pipeline, seed: int) -> str:
  """A string of everything that determines the order of records."""
  return f'{pipeline.source.order_name} shuffle={pipeline.shuffle} seed={seed}'


def resume(state: Mapping[str, Any], pipeline: Pipeline, seed: int) -> int:
  """The `start` that continues a `TrainLoader.state()`; raises UserError if the order of this pipeline differs."""
  now = fingerprint(pipeline, seed)
  if state['fingerprint'] != now:
    raise UserError(
      f'data: the checkpoint was trained on ({state["fingerprint"]}), this run reads ({now}); its order cannot be '
      f'continued: restore the old data settings, or start a new workdir from its weights'
    )
  return int(state['examples'])


def record_keys(pipeline: Pipeline, seed: int, start: int, count: int) -> list[str]:
  """Keys of the records at positions `start` to `start + count` of the order of a run."""
  order = _order(pipeline, seed)
  return [pipeline.source.key_of(order(position)) for position in range(start, start + count)]


def evaluation_batches(
  pipeline: Pipeline,
  *,
  batch: int,
  fields: Sequence[str],
  tokenizer: Tokenizer | None = None,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
  """One pass in the order of the source, with the same number of batches on every process.

  Adds the fields `index` int32 [b], the record, and `mask` bool [b], False for rows to ignore: padding of the last
  batch, and replacements of unreadable records.
  """
  rows = _local_rows(batch, process_index, process_count)
  order = Order(_length(pipeline.source), shuffle=False)
  batches = _Batches(pipeline, order, tuple(fields), tokenizer, batch, 0, rows, train=False)
  batches.check()
  return _evaluate(batches)


def _evaluate(batches: '_Batches') -> Iterator[dict[str, np.ndarray]]:
  tally = _BadRecordCounter(batches.order.records, batches.pipeline.max_bad)
  ahead = Prefetcher(batches, batches.pipeline.workers, batches.pipeline.timeout)
  try:
    for arrays, replaced, reasons in ahead:
      real = arrays['position'] < batches.order.records
      tally.add(int(real.sum()), int((replaced & real).sum()), reasons)
      arrays['mask'] = real & ~replaced
      arrays['index'] = (arrays.pop('position') % batches.order.records).astype(np.int32)
      yield arrays
  finally:
    ahead.close()


@dataclasses.dataclass(frozen=True)
class _Batches:
  """Element t: this process's rows of global batch t, a mask of replaced rows (bool [b]), and key -> reason of
  unreadable records. Pickled to the workers."""

  pipeline: Pipeline
  order: RunOrder
  fields: tuple[str, ...]
  tokenizer: Tokenizer | None
  batch: int
  start: int
  rows: range
  train: bool

  def __len__(self) -> int:
    return 1 << 60 if self.train else -(-self.order.records // self.batch)

  def __getitem__(self, t: int) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, str]]:
    positions = [self.start + t * self.batch + row for row in self.rows]
    reasons: dict[str, str] = {}
    columns: dict[str, Any] = {}
    replaced = np.zeros(len(positions), bool)
    for row, position in enumerate(positions):
      example, replaced[row] = self._read(position, reasons)
      for field in self.fields:
        self._put(columns, field, row, example[field])
    arrays = {field: self._whole(field, columns[field]) for field in self.fields}
    if not self.train:
      arrays['position'] = np.array(positions)
    return arrays, replaced, reasons

  def _put(self, columns: dict[str, Any], field: str, row: int, value: Any) -> None:
    """Adds a row to a column of the batch: an array at once, while it is still in the processor's cache."""
    if not isinstance(value, np.ndarray):
      columns.setdefault(field, []).append(value)
      return
    if field not in columns:
      columns[field] = np.empty((len(self.rows), *value.shape), value.dtype)
    column = columns[field]
    if (value.shape, value.dtype) != (column.shape[1:], column.dtype):
      both = f'{column.dtype} {column.shape[1:]} and {value.dtype} {value.shape}'
      kind = self.pipeline.field(field)
      if kind is not None and kind.ragged:
        raise UserError(f'data: {field} differ in number: {both}; set data.fields.{field}.pad_to')
      if kind is None or not kind.spatial:
        raise UserError(f'data: {field} differ in shape: {both}')
      raise UserError(
        f"data: {field}s differ in size: {both}; set the pipeline's image, such as data.image.name=resize_crop"
      )
    column[row] = value

  def _whole(self, field: str, column: Any) -> np.ndarray:
    if field == 'tokens':
      assert self.tokenizer is not None
      return self.tokenizer(column)
    if field == 'queries':
      assert self.tokenizer is not None
      tokens = self.tokenizer([text for texts in column for text in texts])
      there = np.array([[bool(text) for text in texts] for texts in column])
      return np.where(there[..., None], tokens.reshape(*there.shape, -1), 0).astype(np.int32)
    return np.array(column, np.int32) if isinstance(column, list) else column

  def check(self) -> None:
    """Raises UserError if the source, the transform or the tokenizer cannot provide the fields."""
    if {'tokens', 'queries'} & set(self.fields):
      if self.tokenizer is None:
        raise UserError('data: the objective needs tokens but config.tokenizer is not set')
      self.tokenizer([''])  # a tokenizer that has to be trained is trained once for all workers
    self._read(self.start, {})
    if self.train:
      self._check_names()

  def _check_names(self) -> None:
    """Raises UserError for a name in data.fields that no record field has, such as a misspelled one."""
    source = self.pipeline.source
    for name in self.pipeline.fields:
      if name in self.fields or name in FIELDS:
        continue
      records = (_readable(source, index) for index in range(min(_ATTEMPTS, len(source))))
      record: Example = next((record for record in records if record), {})
      if name not in record:
        known = sorted({*record, *FIELDS} - {'key'})
        raise UserError(f'data.fields: {name!r} is not a field of the records; {did_you_mean(name, known)}')

  @functools.cached_property
  def _examples(self) -> Examples:
    return Examples(self.pipeline, self.fields, self.train)

  def _read(self, position: int, reasons: dict[str, str]) -> tuple[Example, bool]:
    # Where any number of records may be unreadable, as many as there are may be so one after another.
    attempts = self.order.records if self.pipeline.max_bad == 1 else min(_ATTEMPTS, self.order.records)
    for attempt in range(attempts):
      if attempt and self._replacements:
        return self._replacements[0], True
      index = self.order(position, attempt)
      try:
        example = self._examples.read(index, self.order.rng(position))
      except UNREADABLE as error:
        reasons[self.pipeline.source.key_of(index)] = reason_of(error)
        continue
      if not self.train and not self._replacements:
        self._replacements.append(example)
      return example, attempt > 0
    key, reason = next(iter(reasons.items()))
    if attempts == 1:
      raise UserError(f'data: {key} cannot be read: {reason}')
    raise UserError(f'data: {attempts} consecutive records could not be read; the first, {key}: {reason}')

  @functools.cached_property
  def _replacements(self) -> list[Example]:
    """In evaluation, one readable example: masked rows need no other."""
    return []


class _BadRecordCounter:
  """Counts read and unreadable records in the main process, and stops the run if too many are unreadable."""

  def __init__(self, records: int, max_bad: float):
    self._records, self._max_bad = records, max_bad
    self._read = self._bad = 0
    self.reasons: dict[str, str] = {}

  def add(self, read: int, bad: int, reasons: Mapping[str, str]) -> None:
    self._read, self._bad = self._read + read, self._bad + bad
    for key, reason in reasons.items():
      if key not in self.reasons:
        self.reasons[key] = reason
        logger.warning('skipped %s: %s', key, reason)
    if self._bad > self._max_bad * max(self._read, min(self._records, _MIN_CHECKED)):
      first = '; '.join(f'{key}: {reason}' for key, reason in list(self.reasons.items())[:3])
      raise UserError(
        f'data: {self._bad} of {self._read} records ({self._bad / self._read:.1%}) cannot be read, more than '
        f'max_bad={self._max_bad:g}; repair or remove them, the first are {first}'
      )


def _readable(source: Source, index: int) -> Example | None:
  try:
    return source[index]
  except UNREADABLE:
    return None


def _local_rows(batch: int, process_index: int, process_count: int) -> range:
  if batch < 1 or batch % process_count:
    raise UserError(f'data: a batch of {batch} cannot be divided among {process_count} processes; choose a multiple')
  local = batch // process_count
  return range(process_index * local, (process_index + 1) * local)


def _order(pipeline: Pipeline, seed: int) -> RunOrder:
  _length(pipeline.source)
  return pipeline.source.order(seed, pipeline.shuffle)


def _length(source: Source) -> int:
  if not len(source):
    raise UserError(f'data: the source {type(source).__name__} has no records')
  return len(source)
