"""Batches of numpy arrays from a source, in an order that does not depend on the number of processes.

Global batch t holds positions [t B, (t + 1) B) of the run's order (see `order.py`), of which process p of P takes rows
[p B / P, (p + 1) B / P). Batches straddle epochs, so every record appears exactly once per epoch.
"""

import copy
import dataclasses
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fmcv_jax.bounds import Fraction, NonNegativeInt, PositiveFloat, PositiveInt
from fmcv_jax.data.images.decode import decode
from fmcv_jax.data.order import Order, RunOrder
from fmcv_jax.data.sources import values
from fmcv_jax.data.sources.base import UNREADABLE, BadRecord, Example, Source, reason_of
from fmcv_jax.data.tokenizers import Tokenizer
from fmcv_jax.data.transforms import ImageTransform, transform_label_map
from fmcv_jax.data.workers.prefetch import Prefetcher
from fmcv_jax.errors import UserError

logger = logging.getLogger(__name__)

FIELDS = ('image', 'label', 'tokens', 'segments')
_ATTEMPTS = 100  # consecutive unreadable records after which all are assumed to be
_MIN_CHECKED = 1000  # records; a few early failures do not stop a run that would stay below max_bad


@dataclasses.dataclass(frozen=True)
class MultiCrop:
  """`count` random crops of each image by the transform `image` (multi-crop: SwAV, Caron et al. 2020)."""

  image: ImageTransform
  count: PositiveInt

  def __post_init__(self) -> None:
    if self.count < 1:
      raise ValueError(f'count: expected at least 1, got {self.count}')


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """Input pipeline: a source, and the transforms from its records to examples.

  image              transform to uint8 [size, size, 3]; None for a source whose images are arrays of one size
  caption_templates  sentences with a '{}' for the caption or class name; training draws one per example, evaluation
                     uses the first
  views              name -> MultiCrop; each adds a field of that name
  shuffle            a new order in each epoch of training; evaluation never shuffles
  workers            decoding processes; 0 reads in two threads of this process
  max_bad            fraction of unreadable records above which a run stops
  timeout            seconds without a batch after which a run stops
  """

  source: Source
  image: ImageTransform | None = None
  caption_templates: tuple[str, ...] = ('{}',)
  views: Mapping[str, MultiCrop] = dataclasses.field(default_factory=dict)
  shuffle: bool = True
  workers: NonNegativeInt = 0
  max_bad: Fraction = 0.01
  timeout: PositiveFloat = 600.0

  def __post_init__(self) -> None:
    if not self.caption_templates or any(prompt.count('{}') != 1 for prompt in self.caption_templates):
      raise ValueError(f"caption_templates: each needs one '{{}}' for the text, got {self.caption_templates}")
    if taken := set(self.views) & set(FIELDS):
      raise ValueError(f'views: {sorted(taken)} are fields already; choose another name')
    if self.workers < 0:
      raise ValueError(f'workers: expected at least 0, got {self.workers}')
    if not 0 <= self.max_bad <= 1:
      raise ValueError(f'max_bad: expected a fraction from 0 to 1, got {self.max_bad}')
    if self.timeout <= 0:
      raise ValueError(f'timeout: expected seconds above 0, got {self.timeout}')


class TrainLoader:
  """Infinite iterator of batches: dicts of this process's rows of the requested `fields`.

    image    uint8 [b, H, W, 3]
    label    int32 [b]
    segments uint8 [b, H, W], the class of each pixel
    tokens   int32 [b, L], by `tokenizer`
    the pipeline's views, uint8 [b, count, size, size, 3]
    and any arrays in the records, such as latents of `fmcv precompute`, [b, ...]

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
    if field in ('tokens', 'label'):
      columns.setdefault(field, []).append(value)
      return
    if field not in columns:
      columns[field] = np.empty((len(self.rows), *value.shape), value.dtype)
    column = columns[field]
    if (value.shape, value.dtype) != (column.shape[1:], column.dtype):
      both = f'{column.dtype} {column.shape[1:]} and {value.dtype} {value.shape}'
      if field in self._arrays:
        raise UserError(f'data: {field} differ in shape: {both}')
      raise UserError(f"data: images differ in size: {both}; set the pipeline's image, such as resize_crop")
    column[row] = value

  def _whole(self, field: str, column: Any) -> np.ndarray:
    if field == 'tokens':
      assert self.tokenizer is not None
      return self.tokenizer(column)
    return np.array(column, np.int32) if field == 'label' else column

  def check(self) -> None:
    """Raises UserError if the source, the transform or the tokenizer cannot provide the fields."""
    if 'tokens' in self.fields:
      if self.tokenizer is None:
        raise UserError('data: the objective needs tokens but config.tokenizer is not set')
      self.tokenizer([''])  # a tokenizer that has to be trained is trained once for all workers
    self._read(self.start, {})

  @functools.cached_property
  def _arrays(self) -> list[str]:
    """The fields that are taken from records unchanged."""
    return [field for field in self.fields if field not in FIELDS and field not in self.pipeline.views]

  def _read(self, position: int, reasons: dict[str, str]) -> tuple[Example, bool]:
    for attempt in range(min(_ATTEMPTS, self.order.records)):
      index = self.order(position, attempt)
      try:
        return self._example(index, self.order.rng(position)), attempt > 0
      except UNREADABLE as error:
        reasons[self.pipeline.source.key_of(index)] = reason_of(error)
    key, reason = next(iter(reasons.items()))
    raise UserError(
      f'data: {min(_ATTEMPTS, self.order.records)} consecutive records could not be read; the first, {key}: {reason}'
    )

  def _example(self, index: int, rng: np.random.Generator) -> Example:
    record = self.pipeline.source[index]
    row: Example = {}
    if 'tokens' in self.fields:
      row['tokens'] = self._text(record, rng)
    if 'label' in self.fields:
      row['label'] = self._classes.number(self._given(record, 'label'), 'label')
    label_map_rng = copy.deepcopy(rng) if 'segments' in self.fields else rng  # the same crop as the image
    if 'image' in self.fields:
      image = self._given(record, 'image')
      if self.pipeline.image is not None:
        image = self.pipeline.image(image, rng)
      elif not isinstance(image, np.ndarray):
        raise UserError("data: the source provides encoded images; set the pipeline's image, such as resize_crop")
      row['image'] = image
    if 'segments' in self.fields:
      row['segments'] = self._given(record, 'segments')
      if self.pipeline.image is not None:
        row['segments'] = transform_label_map(self.pipeline.image, row['segments'], label_map_rng)
    if names := [name for name in self.pipeline.views if name in self.fields]:
      image = self._given(record, 'image')
      image = image if isinstance(image, np.ndarray) else decode(image)  # once for all views
      for name in names:
        views = self.pipeline.views[name]
        row[name] = np.stack([views.image(image, rng) for _ in range(views.count)])
    for name in self._arrays:
      if not isinstance(record.get(name), np.ndarray):
        given = ', '.join((*FIELDS, *self.pipeline.views, 'arrays of the records'))
        raise UserError(f'data: unknown fields {self._arrays}; available: {given}, and the names in data.views')
      row[name] = record[name]
    return row

  @functools.cached_property
  def _classes(self) -> values.Classes:
    return values.Classes(self.pipeline.source.names)

  def _text(self, record: Example, rng: np.random.Generator) -> str:
    if 'texts' in record or 'text' in record:
      texts = values.texts(record.get('texts', record.get('text')), 'its text')
    elif self._classes.names and 'label' in record:
      texts = (self._classes.names[self._classes.number(record['label'], 'label')],)
    else:
      texts = values.texts(self._given(record, 'text'), 'its text')
    if not texts:
      raise BadRecord('has no text')
    templates = self.pipeline.caption_templates
    chosen = (rng.integers(len(templates)), rng.integers(len(texts))) if self.train else (0, 0)
    return templates[chosen[0]].replace('{}', texts[chosen[1]])

  def _given(self, record: Example, field: str) -> Any:
    if field not in record:
      name, given = type(self.pipeline.source).__name__, ', '.join(sorted(set(record) - {'key'}))
      raise UserError(
        f'data: the objective needs the fields {", ".join(self.fields)}, but {name} has no {field}; it provides {given}'
      )
    return record[field]


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
