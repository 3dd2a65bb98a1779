"""Recognizes a newcomer's data: class folders, tables of captions or labels, and Parquet shards, with their splits."""

import os
from collections.abc import Sequence
from typing import Any

from fmcv_jax.data import storage
from fmcv_jax.data.sources import arrow_columns, caption_tables, folder_index, splits
from fmcv_jax.data.sources.image_folder import METADATA
from fmcv_jax.errors import UserError

Spec = dict[str, Any]  # of a source in a config

_LABELS = ('label', 'labels', 'class', 'category', 'fine_label')
_CAPTIONS = (*folder_index.CAPTION_COLUMNS, 'captions', 'texts', 'sentences')
_IMAGES = ('image', 'img', 'jpg', 'png', 'webp', 'image_bytes')
_TABLES = ('.csv', '.tsv', '.jsonl')
_EVALUATED = ('validation', 'test')


def source_of(path: str, given: Spec | None = None) -> Spec:
  """The source of a folder or file, as the fields of a config; the fields `given` win, such as names of columns.

  A folder of .parquet tables with encoded images, a folder of images (with class folders, metadata or text files), a
  folder with one table of captions or labels, or such a table itself. Raises UserError for anything else.
  """
  given = given or {}
  expanded = path if storage.is_remote(path) else os.path.expanduser(path)
  found = storage.files_below(expanded)
  if found is not None:
    return _of_folder(path, expanded, found, given) | given
  if not storage.is_remote(path) and not os.path.isfile(expanded):
    raise UserError(f'{path}: no such folder or file (relative to {os.getcwd()})')
  suffix = caption_tables.suffix(path)
  if suffix == '.parquet' and (columns := _parquet_columns(path, expanded, given)):
    return {'name': 'parquet', 'path': path, **columns} | given
  if suffix in caption_tables.KINDS:
    folder, _, name = expanded.rpartition('/')
    return _of_table(folder or '.', name, given) | given
  raise UserError(
    f'{path}: is not a folder, nor a table ({", ".join(caption_tables.KINDS)}); give the folder of the images, or the '
    f'table that names them'
  )


def _of_folder(path: str, expanded: str, found: Sequence[str], given: Spec) -> Spec:
  if not found:
    raise UserError(f'{path}: is empty; give a folder of images in class folders, or with a table of captions')
  images = any(folder_index.is_image(name) for name in found)
  tables = [name for name in found if name.endswith('.parquet')]
  if tables and not images:
    columns = _parquet_columns(path, storage.join(expanded, tables[0]), given)
    if columns is None:
      raise UserError(f'{path}: {tables[0]} has no column of encoded images; write it with the bytes of the files')
    return {'name': 'parquet', 'path': path, **columns}
  if not images and any(name.endswith('.tar') for name in found):
    raise UserError(
      f'{path}: holds .tar shards, whose members have to be named; use configs/finetune.py with '
      f'--config.data.source.name=webdataset (docs/data.md)'
    )
  # The reader finds class folders, text files and metadata itself. A table of another name is for images without these,
  # which may all be in one subfolder.
  metadata = any(name.rpartition('/')[2] in METADATA for name in found)
  listed = [name for name in found if '/' not in name and caption_tables.suffix(name) in _TABLES]
  if listed and not metadata and len(storage.folders_in(expanded)) < 2:
    if len(listed) > 1:
      raise UserError(f'{path}: has several tables ({", ".join(listed)}); give one: {path.rstrip("/")}/{listed[0]}')
    return _of_table(path, listed[0], given)
  return {'name': 'image_folder', 'path': path}


def _of_table(folder: str, table: str, given: Spec) -> Spec:
  spec = {'name': 'image_folder', 'path': folder, 'captions': table}
  if {'caption_column', 'label_column'} & set(given):
    return spec
  try:
    _, row = next(caption_tables.rows(storage.join(folder, table), 'data'), (0, {}))
  except (FileNotFoundError, IsADirectoryError) as error:
    raise UserError(f'{storage.join(folder, table)}: no such table') from error
  captions = next((name for name in _CAPTIONS if name in row), None)
  label = next((name for name in _LABELS if name in row), None)
  if captions is not None:
    return spec | ({} if captions in folder_index.CAPTION_COLUMNS else {'caption_column': captions})
  if label is not None:
    return spec | {'label_column': label}
  raise UserError(
    f'{storage.join(folder, table)}: has neither captions ({", ".join(_CAPTIONS)}) nor labels ({", ".join(_LABELS)}) '
    f'among its columns ({", ".join(row) or "none"}); rename one, or set --config.data.source.caption_column'
  )


def _parquet_columns(path: str, table: str, given: Spec) -> Spec | None:
  """The columns of images and of labels or captions; None for a table without encoded images."""
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError as error:
    raise UserError(f'{path}: needs pyarrow: pip install fmcv-jax[parquet]') from error
  try:
    with storage.open_file(table) as file:
      schema = pyarrow.parquet.read_schema(file)
  except (pyarrow.ArrowException, OSError) as error:
    raise UserError(f'{table}: is not a Parquet table ({" ".join(str(error).split())[:150]})') from error

  def fits(name: str, field: str) -> bool:
    try:
      arrow_columns.find(schema, {}, field, name, table)
    except UserError:
      return False
    return True

  names = [*(name for name in _IMAGES if name in schema.names), *schema.names]
  image = given.get('image') or next((name for name in names if fits(name, 'image')), None)
  if image is None:
    return None

  def column(field: str, known: Sequence[str]) -> str | None:
    if field in given:
      return given[field]
    return next((name for name in known if name in schema.names and fits(name, field)), None)

  label, text = column('label', _LABELS), column('text', _CAPTIONS)
  if label is None and text is None:
    raise UserError(
      f'{table}: has neither labels ({", ".join(_LABELS)}) nor captions ({", ".join(_CAPTIONS)}) among its columns '
      f'({", ".join(schema.names)}); set --config.data.source.label or .text'
    )
  return {'image': image} | ({'label': label} if label else {'text': text})


def splits_in(spec: Spec) -> list[str]:
  """The splits that the names of folders or shards stand for: of 'train', 'validation' and 'test' those that exist."""
  path = os.path.expanduser(spec.get('path', ''))
  if spec.get('split') or storage.files_below(path) is None:
    return []
  if spec['name'] == 'image_folder' and spec.get('captions') is None:
    found = [splits.named(f'{name}/') for name in storage.folders_in(path)]
    return list(dict.fromkeys(name for name in found if name)) if all(found) else []
  if spec['name'] == 'parquet':
    tables = (name for name in storage.files_below(path) or () if name.endswith('.parquet'))
    found = [splits.named(name) for name in tables]
    return list(dict.fromkeys(name for name in found if name))
  return []


def parts_of(spec: Spec) -> tuple[Spec, dict[str, Spec]]:
  """The source to train on, and those to evaluate on by name: the data's own splits, or a random one.

  Raises UserError for data with splits of which none is for training.
  """
  own = splits_in(spec)
  if own and 'train' not in own:
    raise UserError(f'{spec["path"]}: has the splits {", ".join(own)}, but none to train on; rename one to train')
  if own:
    spec = spec | {'split': 'train'}
  if evaluated := [name for name in _EVALUATED if name in own]:
    part = {name: _split(spec | {'split': name}, 'all') for name in evaluated}
    return _split(spec, 'all'), part
  return _split(spec, 'train'), {'held_out': _split(spec, 'held_out')}


def _split(spec: Spec, part: str) -> Spec:
  return {'name': 'random_split', 'source': spec, 'part': part}
