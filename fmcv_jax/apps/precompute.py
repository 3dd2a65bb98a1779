"""`fmcv precompute`: what networks make of every record of a source, as ArrayRecord shards for others to train on."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress

from fmcv_jax import experiment
from fmcv_jax.data.loader import evaluation_batches
from fmcv_jax.data.packing import PackingPlan, ShardWriter, open_on_all_processes
from fmcv_jax.data.sources.base import Example, Source
from fmcv_jax.errors import UserError, did_you_mean
from fmcv_jax.evaluate.base import EvaluatedModel
from fmcv_jax.parallel.batches import to_devices
from fmcv_jax.run import Run, load_trained_params
from fmcv_jax.train.warm_start import load_partial_state

_SHARD_RECORDS = 8192
_OF_TEXTS = {'embed_text', 'words', 'whole_text'}


def run(
  names: Sequence[str],
  to: str,
  overrides: Sequence[str] = (),
  *,
  config: str | None = None,
  model: str | None = None,
  step: int | None = None,
  batch: int | None = None,
  shards: int | None = None,
  images: bool = False,
) -> None:
  """Writes for each record of config.data its label, texts and key, and the functions `names` of its image, as float16.
  Of texts ('embed_text', 'words', 'whole_text') the first is taken, by the first prompt.

  config   a training config, whose frozen networks (config.init_from) suffice for the functions
  model    or the workdir of a trained model, at its checkpoint `step`
  batch    images at a time, over the mesh (default: as in training)
  images   whether a record keeps its image too

  All processes compute and the first one writes. Run again, it goes on with the shards that are missing.
  """
  if (config is None) == (model is None):
    raise UserError('give --config FILE, whose frozen networks compute, or --model DIR, a trained model')
  job = Run(experiment.load_config(config, overrides)) if config else Run.reopen(str(model), overrides)
  functions = job.experiment.objective.functions()
  if unknown := [name for name in names if name not in functions]:
    raise UserError(f'{unknown[0]!r} is not offered by this objective; {did_you_mean(unknown[0], functions)}')
  source, batch = job.experiment.data.source, batch or job.experiment.train.batch_size
  if not batch:
    raise UserError('--batch: this config has no train.batch_size; give one')
  subject = _frozen(job) if config else job.restored_model(step)[0]
  origin = {
    'functions': list(names),
    **{name: job.config['data'][name] for name in ('source', 'image')},
    'objective': job.config['objective'],
    'from': {'init_from': job.config['init_from']} if config else {'model': str(model), 'step': step},
    'images': images,
  }
  plan = PackingPlan(len(source), shards or -(-len(source) // _SHARD_RECORDS), source.names, origin)
  with contextlib.ExitStack() as stack:
    begun, total, missing = open_on_all_processes(to, plan, stack)
    plan = dataclasses.replace(plan, shards=total)
    rows = np.concatenate([np.arange(0), *(np.array(plan.rows(shard)) for shard in missing)]).astype(int)
    computed = _computed(job, subject, names, batch, rows)
    if begun is None:
      for _ in computed:
        pass
      return
    made = _write(begun, missing, source, computed, images)
  Console().print(
    f'{made["records"]} records with {", ".join(names)}, {made["bytes"] / 1e6:.1f} MB in {to}; '
    f'{made["skipped"]} were left out',
    highlight=False,
    soft_wrap=True,
  )


@dataclasses.dataclass(frozen=True)
class Subset(Source):
  """Some records of a source: `rows` int [N]."""

  source: Source
  rows: np.ndarray

  def __len__(self):
    return len(self.rows)

  def __getitem__(self, index):
    return self.source[int(self.rows[index])]

  def key_of(self, index):
    return self.source.key_of(int(self.rows[index]))


def _frozen(job: Run) -> EvaluatedModel:
  """A subject without parameters, and with those parts of `extra` that config.init_from fills."""
  subject, sources = job.subject(), job.experiment.init_from
  filled = {target: part for target, part in sources.items() if target.split('/')[0] == 'extra'}
  keep = {target.split('/')[1] for target in filled if '/' in target}

  def born() -> dict[str, Any]:
    return {name: tree for name, tree in job.init().extra.items() if name in keep}

  shardings = {name: tree for name, tree in job.shardings.extra.items() if name in keep}
  extra = jax.jit(born, out_shardings=shardings)()
  state = job.abstract_state.replace(params={}, ema=None, extra=extra)
  subject.extra = load_partial_state(state, filled, load_trained_params).extra
  return subject


def _computed(
  job: Run, subject: EvaluatedModel, names: Sequence[str], batch: int, rows: np.ndarray
) -> Iterator[tuple[int, dict[str, np.ndarray] | None]]:
  """(record, what the functions make of it or None where it cannot be read) for all `rows`, in their order."""
  if not len(rows):
    return
  pipeline = dataclasses.replace(job.experiment.data, source=Subset(job.experiment.data.source, rows), views={})

  def call(params, extra, batch):
    with job.placement.active():
      return {name: subject.functions[name](params, extra, batch) for name in names}, batch['mask']

  over_mesh = jax.jit(call, out_shardings=job.placement.replicated())
  done = 0
  for local in evaluation_batches(
    pipeline,
    batch=batch,
    fields=('image', 'tokens') if _OF_TEXTS.intersection(names) else ('image',),
    tokenizer=job.experiment.tokenizer,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  ):
    placed = to_devices(local, job.placement)
    try:
      values, readable = jax.device_get(over_mesh(subject.params, subject.extra, placed))
    except (KeyError, TypeError) as error:
      if subject.params is not None:
        raise
      raise UserError(
        f'{", ".join(names)}: needs more than the frozen networks that config.init_from fills ({error}); give --model, '
        f'a trained run, or fill them'
      ) from error
    half = {name: np.asarray(value, np.float16) for name, value in values.items()}
    for row in range(min(batch, len(rows) - done)):  # the last batch is filled up
      yield int(rows[done + row]), {name: value[row] for name, value in half.items()} if readable[row] else None
    done += batch


def _write(
  begun: ShardWriter,
  missing: Sequence[int],
  source: Source,
  computed: Iterator[tuple[int, dict[str, np.ndarray] | None]],
  images: bool,
) -> dict[str, Any]:
  total = begun.plan.records
  with Progress() as bar:
    left = sum(len(begun.plan.rows(shard)) for shard in missing)
    task = bar.add_task('computing', total=total, completed=total - left)
    for shard in missing:
      skipped: dict[str, str] = {}

      def examples(shard=shard, skipped=skipped) -> Iterator[Example]:
        for record, values in itertools.islice(computed, len(begun.plan.rows(shard))):
          bar.advance(task)
          if values is None or not all(np.isfinite(value).all() for value in values.values()):
            skipped[source.key_of(record)] = 'cannot be read' if values is None else 'its values are not finite'
            continue
          kept = {name: value for name, value in source[record].items() if images or name != 'image'}
          yield {**kept, **values}

      begun.write(shard, examples(), skipped)
  return begun.finish()
