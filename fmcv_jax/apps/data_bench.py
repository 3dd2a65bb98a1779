"""`fmcv data --bench`: the throughput of every stage of a config's input pipeline, and the bottleneck."""

import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from rich.table import Table

from fmcv_jax.apps.data_show import on_any_mesh
from fmcv_jax.console import make_console
from fmcv_jax.data.images import native_crop
from fmcv_jax.data.images.decode import decode
from fmcv_jax.data.loader import TrainLoader
from fmcv_jax.data.sources.base import UNREADABLE, reason_of
from fmcv_jax.errors import UserError
from fmcv_jax.experiment import load_config
from fmcv_jax.parallel.batches import to_devices
from fmcv_jax.run import Run

_STEPS = 3  # least number per stage
_MOST_IN_A_ROW = 100  # consecutive unreadable records


@dataclasses.dataclass(frozen=True)
class Stage:
  """A pipeline stage: `rate` in images per second, and what runs it, `by` one core, all workers or the devices."""

  name: str
  by: str
  rate: float


def run(config: str, overrides: Sequence[str] = (), *, seconds: float = 5.0, step: bool = True) -> list[Stage]:
  """Measures every stage for about `seconds` each and prints a table and the bottleneck.

  step   also compiles and measures the train step, and the time that it waits for data
  """
  if seconds <= 0:
    raise UserError(f'--seconds {seconds:g}: expected more than 0')
  console, benched = make_console(), Run(load_config(config, overrides)) if step else on_any_mesh(config, overrides)
  # The loader first: errors that stop a run, such as too many bad records, then read as they do in training.
  of_loader, bad = _loader_stages(benched, seconds), dict[str, str]()
  stages = [*_worker_stages(benched, seconds, bad), *of_loader]
  waited = None
  if step:
    made, waited = _step_stage(benched, seconds)
    stages.append(made)
  table = Table('stage', 'by', 'images/s', 'ms an image')
  for stage in stages:
    table.add_row(stage.name, stage.by, f'{stage.rate:,.0f}', f'{1000 / stage.rate:.3f}')
  console.print(table)
  for key, reason in itertools.islice(bad.items(), 1):
    line = f'{len(bad)} of the tried records cannot be read, the first {key}: {reason}'
    console.print(line, highlight=False, soft_wrap=True)
  if any(stage.name.startswith('decode') for stage in stages):
    console.print(f'images are cropped by: {native_crop.engine()}', highlight=False, soft_wrap=True)
  for line in verdict(stages, benched.experiment.data.workers, waited):
    console.print(line, highlight=False, soft_wrap=True)
  return stages


def verdict(stages: Sequence[Stage], workers: int, waited: float | None) -> list[str]:
  """Lines that name the slowest stage and a remedy; `waited` is the fraction of time that training waits for data."""
  rates = {stage.name: stage.rate for stage in stages}
  ends = [stage for stage in stages if stage.name in ('loader', 'transfer', 'step')]
  slowest = min(ends, key=lambda stage: stage.rate)
  lines = []
  if slowest.name == 'step':
    spare = min(stage.rate for stage in ends if stage.name != 'step') / slowest.rate
    lines.append(f'bottleneck: the step; the input pipeline is {spare:.1f} times as fast')
  elif slowest.name == 'transfer':
    lines.append('bottleneck: the transfer to the devices')
  else:
    inside = min((stage for stage in stages if stage.by == 'one core'), key=lambda stage: stage.rate)
    lines.append(f'bottleneck: the loader, most of it in: {inside.name}')
    alone = 1 / sum(1 / stage.rate for stage in stages if stage.by == 'one core')
    if 'step' in rates:
      wanted, cores = int(np.ceil(rates['step'] / alone)), os.cpu_count() or 1
      more = f'; this machine has {cores} cores' if wanted > cores else f' (now {workers})'
      lines.append(f'the step takes {rates["step"]:,.0f} images/s: --config.data.workers={wanted}{more}')
  if waited is not None:
    lines.append(f'training waits for data {waited:.1%} of the time')
  return lines


def _timed(work: Iterator[Any], seconds: float, clock: Callable[[], float] = time.perf_counter) -> float:
  """Elements of `work` per second, not counting the first."""
  next(work)
  start, count = clock(), 0
  while count < _STEPS or clock() - start < seconds:
    next(work)
    count += 1
  return count / (clock() - start)


def _worker_stages(benched: Run, seconds: float, bad: dict[str, str]) -> list[Stage]:
  """Throughput of reading, decoding and tokenizing, each in this thread, over the first records of the run.

  Adds key -> reason of unreadable records to `bad`.
  """
  e = benched.experiment
  fields, data = tuple(benched.batch_shapes), e.data
  order = data.source.order(e.seed, data.shuffle)

  def readable(work: Callable[[Any], Any], items: Iterable[tuple[int, Any]]) -> Iterator[Any]:
    return _readable(work, items, data.source.key_of, bad)

  indices = ((index, index) for index in map(order, itertools.count()))
  stages = [Stage('read', 'one core', _timed(readable(data.source.__getitem__, indices), seconds))]
  first = [(index, index) for index in map(order, range(min(order.records, 256)))]
  some = list(readable(lambda index: (index, data.source[index]), first))
  images = itertools.cycle([(index, record['image']) for index, record in some if 'image' in record])
  rng = np.random.default_rng(e.seed)
  if 'image' in fields and data.image is not None:
    transform = data.image
    stages.append(Stage('decode, crop', 'one core', _timed(readable(lambda x: transform(x, rng), images), seconds)))
  if views := [data.views[name] for name in data.views if name in fields]:

    def cropped(image: Any) -> list[np.ndarray]:
      image = image if isinstance(image, np.ndarray) else decode(image)
      return [view.image(image, rng) for view in views for _ in range(view.count)]

    stages.append(Stage('decode, views', 'one core', _timed(readable(cropped, images), seconds)))
  if 'tokens' in fields and e.tokenizer is not None:
    texts = [(*record.get('texts', ()), record.get('text', ''))[0] for _, record in some]
    tokenizer = e.tokenizer
    rate = _timed((tokenizer(texts) for _ in itertools.count()), seconds / 5)
    stages.append(Stage('tokenize', 'one core', rate * len(texts)))
  return stages


def _readable(
  work: Callable[[Any], Any], items: Iterable[tuple[int, Any]], key_of: Callable[[int], str], bad: dict[str, str]
) -> Iterator[Any]:
  """Applies `work` to the item of each pair (record, item) and skips records that cannot be read."""
  in_a_row = 0
  for index, item in items:
    try:
      result = work(item)
    except UNREADABLE as error:
      bad[key_of(index)], in_a_row = reason_of(error), in_a_row + 1
      if in_a_row == _MOST_IN_A_ROW:
        raise UserError(
          f'data: {in_a_row} consecutive records could not be read; the last: {reason_of(error)}'
        ) from error
      continue
    in_a_row = 0
    yield result


def _loader_stages(benched: Run, seconds: float) -> list[Stage]:
  e = benched.experiment
  workers = f'{e.data.workers} workers' if e.data.workers else '2 threads'
  with_loader = _loader(benched)
  try:
    rate = _timed(with_loader, seconds)
    local = next(with_loader)
  finally:
    with_loader.close()
  transfer = _timed(
    (jax.block_until_ready(to_devices(local, benched.placement)) for _ in itertools.count()), seconds / 5
  )
  return [
    Stage('loader', workers, rate * e.train.batch_size),
    Stage('transfer', f'{jax.device_count()} devices', transfer * e.train.batch_size),
  ]


def _step_stage(benched: Run, seconds: float) -> tuple[Stage, float]:
  """Throughput of the train step on a fixed batch, and the fraction of time that it waits when the loader feeds it."""
  e = benched.experiment
  state = jax.jit(benched.init, out_shardings=benched.shardings)()
  step_fn, with_loader = benched.train_step(), _loader(benched)
  try:
    batch = to_devices(next(with_loader), benched.placement)

    def steps() -> Iterator[None]:
      nonlocal state
      while True:
        state, metrics = step_fn(state, batch)
        jax.block_until_ready(metrics)
        yield

    rate = _timed(steps(), seconds)
    waited, count, start, last = 0.0, 0, time.perf_counter(), None
    while count < _STEPS or time.perf_counter() - start < seconds:
      before = time.perf_counter()
      batch = to_devices(next(with_loader), benched.placement)
      waited += time.perf_counter() - before
      state, metrics = step_fn(state, batch)
      jax.block_until_ready(last)  # as the loop does: one step in flight
      last, count = metrics, count + 1
    jax.block_until_ready(last)
    share = waited / (time.perf_counter() - start)
  finally:
    with_loader.close()
  return Stage('step', f'{jax.device_count()} devices', rate * e.train.batch_size), share


def _loader(benched: Run) -> TrainLoader:
  e = benched.experiment
  return TrainLoader(
    e.data, batch=e.train.batch_size, seed=e.seed, fields=tuple(benched.batch_shapes), tokenizer=e.tokenizer
  )
