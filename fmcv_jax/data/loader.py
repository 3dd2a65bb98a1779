"""From a source to batches of numpy arrays: the same ones, in the same order, however many processes share the work.

Global batch t holds positions [t B, (t + 1) B) of the run's order (see `order.py`), of which process p of P takes rows
[p B / P, (p + 1) B / P). Batches straddle epochs, so every record comes exactly once per epoch.
"""

import copy
import dataclasses
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

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
_ATTEMPTS = 100  # so many records in a row are unreadable only where all are
_JUDGED_FROM = 1000  # records; a few early ones do not stop a run that would stay below max_bad


@dataclasses.dataclass(frozen=True)
class MultiCrop:
  """`count` pictures of each image, each by the transform `image` with its own chance (SwAV, Caron et al. 2020)."""

  image: ImageTransform
  count: int

  def __post_init__(self) -> None:
    if self.count < 1:
      raise ValueError(f'count: expected at least 1, got {self.count}')


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """How records become examples.

  image     makes every image uint8 [size, size, 3]; None for a source whose images are arrays of one size
  caption_templates  sentences with a '{}' for the caption or class name; training draws one for each example,
                     evaluation takes
            the first
  shuffle   a new order in each epoch of training; evaluation never shuffles
  workers   decoding processes; 0 reads in two threads of this process
  max_bad   share of unreadable records above which a run stops
  timeout   seconds without a batch after which a run stops
  """

  source: Source
  image: ImageTransform | None = None
  caption_templates: tuple[str, ...] = ('{}',)
  views: Mapping[str, MultiCrop] = dataclasses.field(default_factory=dict)
  shuffle: bool = True
  workers: int = 0
  max_bad: float = 0.01
  timeout: float = 600.0

  def __post_init__(self) -> None:
    if not self.caption_templates or any(prompt.count('{}') != 1 for prompt in self.caption_templates):
      raise ValueError(f"caption_templates: each needs one '{{}}' for the text, got {self.caption_templates}")
    if taken := set(self.views) & set(FIELDS):
      raise ValueError(f'views: {sorted(taken)} are fields already; choose another name')
    if self.workers < 0:
      raise ValueError(f'workers: expected at least 0, got {self.workers}')
    if not 0 <= self.max_bad <= 1:
      raise ValueError(f'max_bad: expected a share from 0 to 1, got {self.max_bad}')
    if self.timeout <= 0:
      raise ValueError(f'timeout: expected seconds above 0, got {self.timeout}')


class TrainLoader:
  """Endless batches: dicts of this process's rows of the wanted `fields`.

    image    uint8 [b, H, W, 3]
    label    int32 [b]
    segments uint8 [b, H, W], the classes of the image's pixels
    tokens   int32 [b, L], by `tokenizer`
    the pipeline's views, uint8 [b, count, size, size, 3]
    and whatever arrays the records hold, such as latents of `fmcv precompute`, [b, ...]

  batch   the global batch size, b times `process_count`
  start   examples of the run that are behind us, from `resume`

  An unreadable record is replaced by a readable one of the same epoch, so that the order stays arithmetic; it is logged
  once and kept in `skipped`. More of them than `max_bad`, a field that the source cannot give and a worker that dies
  raise UserError. `close` ends the workers.
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
    """What a checkpoint keeps of the data: all of it."""
    return {'examples': self._examples, 'fingerprint': self._fingerprint}

  @property
  def skipped(self) -> dict[str, str]:
    """Key -> reason of every record of this process that could not be read, in the order they were met."""
    return dict(self._tally.reasons)

  def close(self) -> None:
    self._ahead.close()


def fingerprint(pipeline: Pipeline, seed: int) -> str:
  """Whatever determines which record stands at which position."""
  return f'{pipeline.source.order_name} shuffle={pipeline.shuffle} seed={seed}'


def resume(state: Mapping[str, Any], pipeline: Pipeline, seed: int) -> int:
  """The `start` that continues a `TrainLoader.state()`; UserError if this pipeline's order is another one."""
  now = fingerprint(pipeline, seed)
  if state['fingerprint'] != now:
    raise UserError(
      f'data: the checkpoint was trained on ({state["fingerprint"]}), this run reads ({now}); its order cannot be '
      f'continued: restore the old data settings, or start a new workdir from its weights'
    )
  return int(state['examples'])


def record_keys(pipeline: Pipeline, seed: int, start: int, count: int) -> list[str]:
  """What the source calls the records at `count` positions of a run's order, from position `start` on."""
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
  """One pass in the source's order, as many batches on every process.

  To the fields come `index` int32 [b], the record, and `mask` bool [b], False for what must not count: rows that fill
  up the last batch, and stand-ins for records that cannot be read.
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
  """Element t: this process's rows of global batch t, which rows are stand-ins (bool [b]), and key -> reason of what
  could not be read. This is all that a worker is given."""

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
    """Raises UserError if the source, the transform or the tokenizer cannot give the fields."""
    if 'tokens' in self.fields:
      if self.tokenizer is None:
        raise UserError('data: tokens are wanted, but there is no tokenizer; set one')
      self.tokenizer([''])  # trains it, if it is trained, once for all workers
    self._read(self.start, {})

  @functools.cached_property
  def _arrays(self) -> list[str]:
    """The fields that records hold as they are."""
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
      f'data: {min(_ATTEMPTS, self.order.records)} records in a row cannot be read; the first, {key}: {reason}'
    )

  def _example(self, index: int, rng: np.random.Generator) -> Example:
    record = self.pipeline.source[index]
    row: Example = {}
    if 'tokens' in self.fields:
      row['tokens'] = self._text(record, rng)
    if 'label' in self.fields:
      row['label'] = self._classes.number(self._given(record, 'label'), 'label')
    chance = copy.deepcopy(rng) if 'segments' in self.fields else rng  # they are cropped as the image is
    if 'image' in self.fields:
      image = self._given(record, 'image')
      if self.pipeline.image is not None:
        image = self.pipeline.image(image, rng)
      elif not isinstance(image, np.ndarray):
        raise UserError("data: the source gives encoded images; set the pipeline's image, such as resize_crop")
      row['image'] = image
    if 'segments' in self.fields:
      row['segments'] = self._given(record, 'segments')
      if self.pipeline.image is not None:
        row['segments'] = transform_label_map(self.pipeline.image, row['segments'], chance)
    if names := [name for name in self.pipeline.views if name in self.fields]:
      image = self._given(record, 'image')
      image = image if isinstance(image, np.ndarray) else decode(image)  # once for all views
      for name in names:
        views = self.pipeline.views[name]
        row[name] = np.stack([views.image(image, rng) for _ in range(views.count)])
    for name in self._arrays:
      if not isinstance(record.get(name), np.ndarray):
        given = ', '.join((*FIELDS, *self.pipeline.views, 'arrays of the records'))
        raise UserError(f'data: unknown fields {self._arrays}; a loader gives {given} and what data.views names')
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
        f'data: {field} is needed ({", ".join(self.fields)} are read), but {name} has none; its records hold {given}'
      )
    return record[field]


class _BadRecordCounter:
  """Counts what was read and what could not be, in the main process, and stops the run when that is too much."""

  def __init__(self, records: int, max_bad: float):
    self._records, self._max_bad = records, max_bad
    self._seen = self._bad = 0
    self.reasons: dict[str, str] = {}

  def add(self, seen: int, bad: int, reasons: Mapping[str, str]) -> None:
    self._seen, self._bad = self._seen + seen, self._bad + bad
    for key, reason in reasons.items():
      if key not in self.reasons:
        self.reasons[key] = reason
        logger.warning('skipped %s: %s', key, reason)
    if self._bad > self._max_bad * max(self._seen, min(self._records, _JUDGED_FROM)):
      first = '; '.join(f'{key}: {reason}' for key, reason in list(self.reasons.items())[:3])
      raise UserError(
        f'data: {self._bad} of {self._seen} records ({self._bad / self._seen:.1%}) cannot be read, more than '
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
