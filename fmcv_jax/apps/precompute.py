"""`fmcv precompute`: writes outputs of a model for every record of a source as ArrayRecord shards to train on."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np
from rich.progress import Progress

from fmcv_jax import experiment
from fmcv_jax.console import make_console
from fmcv_jax.data.packing import PackingPlan, ShardWriter, open_on_all_processes
from fmcv_jax.data.sources.base import Example, Source
from fmcv_jax.data.sources.subset import Subset
from fmcv_jax.errors import UserError, did_you_mean
from fmcv_jax.evaluate.base import EvaluatedModel
from fmcv_jax.inference.output_files import storable
from fmcv_jax.parallel.rules import path_of
from fmcv_jax.pretrained import packaged
from fmcv_jax.run import Run, load_trained_params
from fmcv_jax.train.warm_start import load_partial_state

_SHARD_RECORDS = 8192
FloatDtype = Literal['float16', 'float32']


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
  dtype: FloatDtype | None = None,
) -> None:
  """Writes label, texts and key of each record of config.data, and the outputs `names` of a model.

  An output that is a tree of arrays becomes one field per array, 'name/key'. An output that reads text receives the
  first text in the first caption template.

  config   training config whose frozen networks (config.init_from) compute the outputs
  model    workdir of a trained model, at its checkpoint `step`; exactly one of config and model is given
  batch    global batch size; default: the training batch size
  images   also stores the images
  dtype    stores float arrays as 'float16' or 'float32', and raises UserError for values that float16 cannot hold.
           By default each array keeps its own dtype (bfloat16, which numpy lacks, becomes float32): integers are exact,
           embeddings and features float32. 'latents', 'words' and 'whole_text' of a diffusion objective are float16,
           as the batch fields of these names that training reads

  All processes compute; the first one writes. Running it again writes only the missing shards.
  """
  if (config is None) == (model is None):
    raise UserError('pass exactly one of --config and --model')
  job = Run(experiment.load_config(config, overrides)) if config else Run.reopen(packaged.locate(str(model)), overrides)
  outputs = job.experiment.objective.outputs()
  if unknown := [name for name in names if name not in outputs]:
    raise UserError(f'{unknown[0]!r} is not an output of this objective; {did_you_mean(unknown[0], outputs)}')
  source, batch = job.experiment.data.source, batch or job.experiment.train.batch_size
  if not batch:
    raise UserError('--batch: this config has no train.batch_size; set one')
  subject, step = (_frozen(job), None) if config else job.restored_model(step)
  origin = {
    'outputs': list(names),
    **{name: job.config['data'][name] for name in ('source', 'image')},
    'objective': job.config['objective'],
    'from': {'init_from': job.config['init_from']} if config else {'model': str(model), 'step': step},
    'images': images,
    'dtype': dtype,
  }
  plan = PackingPlan(len(source), shards or -(-len(source) // _SHARD_RECORDS), source.names, origin, source.fields)
  with contextlib.ExitStack() as stack:
    begun, total, missing = open_on_all_processes(to, plan, stack)
    plan = dataclasses.replace(plan, shards=total)
    rows = np.concatenate([np.arange(0), *(np.array(plan.rows(shard)) for shard in missing)]).astype(int)
    computed = _computed(job, subject, names, batch, rows, dtype)
    if begun is None:
      for _ in computed:
        pass
      return
    made = _write(begun, missing, source, computed, images)
  make_console().print(
    f'{made["records"]} records with {", ".join(names)}, {made["bytes"] / 1e6:.1f} MB in {to}; '
    f'{made["skipped"]} were skipped',
    highlight=False,
    soft_wrap=True,
  )


def _frozen(job: Run) -> EvaluatedModel:
  """An evaluated model without parameters, with only those parts of `extra` that config.init_from loads."""
  subject, sources = job.subject(), job.experiment.init_from
  filled = {target: part for target, part in sources.items() if target.split('/')[0] == 'extra'}
  keep = {target.split('/')[1] for target in filled if '/' in target}

  def initialized() -> dict[str, Any]:
    return {name: tree for name, tree in job.init().extra.items() if name in keep}

  shardings = {name: tree for name, tree in job.shardings.extra.items() if name in keep}
  extra = jax.jit(initialized, out_shardings=shardings)()
  state = job.abstract_state.replace(params={}, ema=None, extra=extra)
  subject.extra = load_partial_state(state, filled, load_trained_params).extra
  return subject


def _computed(
  job: Run, subject: EvaluatedModel, names: Sequence[str], batch: int, rows: np.ndarray, dtype: FloatDtype | None
) -> Iterator[tuple[int, dict[str, np.ndarray] | None]]:
  """Yields (record index, fields) for all `rows` in order; the fields are None for an unreadable record."""
  if not len(rows):
    return
  pipeline = dataclasses.replace(job.experiment.data, source=Subset(job.experiment.data.source, rows))
  records = subject.map_records(names, pipeline, batch)
  for record in map(int, rows):
    try:
      values = next(records)
    except (KeyError, TypeError) as error:
      if subject.params is not None:
        raise
      raise UserError(
        f'{", ".join(names)}: needs networks that config.init_from does not load ({error}); load them, or pass '
        f'--model with a trained run'
      ) from error
    leaves = jax.tree_util.tree_flatten_with_path(values)[0]
    fields = {path_of(path): _stored(path_of(path), record, x, dtype) for path, x in leaves}
    yield record, None if values is None else fields


def _stored(name: str, record: int, value: np.ndarray, dtype: FloatDtype | None) -> np.ndarray:
  """The array in the dtype that is stored, see `storable`; floats as `dtype` if it is given."""
  stored = value = storable(value)
  if dtype is not None and np.issubdtype(value.dtype, np.floating):
    with np.errstate(over='ignore'):  # reported below
      stored = value.astype(dtype)
  if np.isfinite(value).all() and not np.isfinite(stored).all():
    raise UserError(
      f'--dtype {dtype}: {name} of record {record} has values up to {np.abs(value).max():g}, the float16 maximum '
      f'is 65504; omit --dtype'
    )
  return stored


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

      def examples(shard: int = shard, skipped: Any = skipped) -> Iterator[Example]:
        for record, values in itertools.islice(computed, len(begun.plan.rows(shard))):
          bar.advance(task)
          if values is None or not all(np.isfinite(value).all() for value in values.values()):
            skipped[source.key_of(record)] = 'cannot be read' if values is None else 'its values are not finite'
            continue
          kept = {name: value for name, value in source[record].items() if images or name != 'image'}
          if taken := kept.keys() & values.keys():
            raise UserError(
              f'precompute: the records already have a field {min(taken)!r}, which the output would overwrite; use a '
              f'source without it'
            )
          yield {**kept, **values}

      begun.write(shard, examples(), skipped)
  return begun.finish()
