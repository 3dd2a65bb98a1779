"""`fmcv pack`: converts any source to ArrayRecord shards."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fmcv_jax import config as config_lib
from fmcv_jax import experiment
from fmcv_jax.console import make_console
from fmcv_jax.data import packing, storage
from fmcv_jax.data.sources.base import Source
from fmcv_jax.data.sources.folder_index import is_image
from fmcv_jax.errors import UserError, did_you_mean
from fmcv_jax.registry import KINDS

# Suffix of the files at a path, or in it -> name of the source.
_KINDS = {'.tar': 'webdataset', '.parquet': 'parquet', '.array_record': 'array_record'}


def run(
  what: str,
  to: str,
  overrides: Sequence[str] = (),
  *,
  shards: int | None = None,
  workers: int | None = None,
  max_bad: float = 0.01,
) -> None:
  """Writes the source `what` (see source_spec) as shards to the folder `to`; resumes if some are written already."""
  console, spec = make_console(), source_spec(what, overrides)
  source = config_lib.build(Source, spec, KINDS, 'config')
  columns = (TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
  with Progress(*columns, console=console) as bar:
    task = bar.add_task('packing', total=None)
    made = packing.pack(
      source,
      to,
      origin=spec,
      shards=shards,
      workers=workers or os.cpu_count() or 1,
      max_bad=max_bad,
      progress=lambda done, total: bar.update(task, completed=done, total=total),
    )
  for key, reason in list(made['reasons'].items())[:3]:
    console.print(f'left out: {key}: {reason}', highlight=False, soft_wrap=True)
  if made['skipped']:
    console.print(f'{made["skipped"]} records could not be read and were left out', highlight=False)
  console.print(
    f'{made["records"]} records, {made["bytes"] / 1e6:.1f} MB in {to}: data.source.name=array_record '
    f'data.source.path={to}; its checksums: sha256sum -c {packing.SUMS}',
    highlight=False,
    soft_wrap=True,
  )


def source_spec(what: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
  """The resolved source config of a config file (FILE.py[:ARG]), of a path, or of a source name.

  Overrides apply to the config file, or to the fields of the source.
  """
  if what.partition(':')[0].endswith('.py'):
    return experiment.load_config(what, overrides)['data']['source']
  spec = {'name': what} if what in KINDS[Source] else {'name': _source_name(what), 'path': what}
  return config_lib.resolve(Source, config_lib.override(spec, overrides), KINDS)


def _source_name(path: str) -> str:
  """Name of the source that reads a path, detected from its files."""
  for suffix, name in _KINDS.items():
    if path.endswith(suffix):
      return name
  if not storage.is_remote(path) and not pathlib.Path(path).expanduser().exists() and not any(c in path for c in '*?{'):
    known = [name for name in KINDS[Source] if name != 'none']
    raise UserError(
      f'{path!r} is not a config file (.py), path or source name (relative to {os.getcwd()}); '
      f'{did_you_mean(path, known)}'
    )
  # Images may have a table next to them, and shards may lie in subfolders, but only where there are no images.
  images = any(map(is_image, storage.files_below(os.path.expanduser(path)) or ()))
  for suffix, name in _KINDS.items():
    try:
      if not (images and suffix == '.parquet'):
        storage.find(path, suffix, 'pack', below=not images)
        return name
    except UserError:
      continue
  return 'image_folder'
