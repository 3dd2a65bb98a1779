"""Recognizes a newcomer's data: class folders, tables of captions or labels, Parquet, tar shards, and their splits."""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fmcv_jax.data import storage
from fmcv_jax.data.sources import arrow_columns, caption_tables, folder_index, splits, values
from fmcv_jax.data.sources.base import BadRecord
from fmcv_jax.data.sources.image_folder import METADATA
from fmcv_jax.data.sources.webdataset import WebDataset
from fmcv_jax.errors import UserError

Spec = dict[str, Any]  # of a source in a config

_LABELS = ('label', 'labels', 'class', 'category', 'fine_label')
_CAPTIONS = (*folder_index.CAPTION_COLUMNS, 'captions', 'texts', 'sentences')
_IMAGE_PATHS = (*folder_index.IMAGE_COLUMNS, 'filename', 'file', 'path', 'image_path', 'img')
_IMAGES = ('image', 'img', 'jpg', 'png', 'webp', 'image_bytes')
_TABLES = ('.csv', '.tsv', '.jsonl')
_PROBED = 10  # samples whose JSON is read for the names of its fields
_ANNOTATIONS = (*_TABLES, folder_index.TEXT)
_EVALUATED = ('validation', 'test')


def source_of(path: str, given: Spec | None = None) -> Spec:
  """The source of a folder or file, as the fields of a config; the fields `given` win, such as names of columns.

  A folder of .parquet tables with encoded images, a folder of images (with class folders, metadata or text files), a
  folder with one table of captions or labels, or such a table itself; a .tar shard of a WebDataset, a pattern of shards
  or a folder of them. Raises UserError for anything else.
  """
  given = given or {}
  expanded = path if storage.is_remote(path) else os.path.expanduser(path)
  found = storage.files_below(expanded)
  if found is not None:
    return _of_folder(path, expanded, found, given) | given
  if caption_tables.suffix(path) == '.tar':
    return _of_shards(path, given) | given
  if not storage.is_remote(path) and not os.path.isfile(expanded):
    raise UserError(f'{path}: no such folder or file (relative to {os.getcwd()})')
  suffix = caption_tables.suffix(path)
  if suffix == '.parquet' and (columns := _parquet_columns(path, expanded, given)):
    return {'name': 'parquet', 'path': path, **columns} | given
  if suffix in caption_tables.KINDS:
    folder, _, name = expanded.rpartition('/')
    return _of_table(folder or '.', name, given) | given
  raise UserError(
    f'{path}: is not a folder, a table ({", ".join(caption_tables.KINDS)}) or a .tar shard; give the folder of the '
    f'images, or the table that names them; unpack other archives'
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
    return _of_shards(path, given)
  inner = storage.folders_in(expanded)
  below = [name.removeprefix(f'{inner[0]}/') for name in found] if inner else []
  wrapped = len(inner) == 1 and all('/' in name for name in found) and not splits.named(f'{inner[0]}/')
  if wrapped and any('/' in name or os.path.splitext(name)[1].lower() in _ANNOTATIONS for name in below):
    # A folder around the data, as archives have it; not a single class.
    return _of_folder(storage.join(path, inner[0]), storage.join(expanded, inner[0]), below, given)
  # The reader finds class folders, text files and metadata itself. A table of another name is for images without these,
  # which may all be in one subfolder.
  metadata = [name for name in found if name.rpartition('/')[2] in METADATA]
  if (
    len(metadata) == 1 and metadata[0] in METADATA and _is_table(storage.join(expanded, metadata[0]), len(inner), given)
  ):
    return _of_table(path, metadata[0], given)
  listed = [name for name in found if '/' not in name and caption_tables.suffix(name) in _TABLES]
  if listed and not metadata and len(storage.folders_in(expanded)) < 2:
    if len(listed) > 1:
      raise UserError(f'{path}: has several tables ({", ".join(listed)}); give one: {path.rstrip("/")}/{listed[0]}')
    return _of_table(path, listed[0], given)
  return {'name': 'image_folder', 'path': path}


def _is_table(table: str, folders: int, given: Spec) -> bool:
  """True for a metadata table with other column names than the hub's, which the reader of image folders would ignore.

  Next to class folders, one without images and captions or labels is left out and counted.
  """
  if {'image_column', 'caption_column', 'label_column', 'split', 'captions'} & set(given):
    return False
  row = _first_row(table)
  if row is None or folder_index.Columns(None, None, None, metadata=True).fit(set(row)):
    return False
  usual = _column(row, _IMAGE_PATHS) and (_column(row, _CAPTIONS) or _column(row, _LABELS))
  return bool(usual) or folders < 2


def _first_row(table: str) -> caption_tables.Row | None:
  try:
    return next((row for _, row in caption_tables.rows(table, 'data')), None)
  except (FileNotFoundError, IsADirectoryError) as error:
    raise UserError(f'{table}: no such table') from error


def _of_table(folder: str, table: str, given: Spec) -> Spec:
  spec = {'name': 'image_folder', 'path': folder, 'captions': table}
  path = storage.join(folder, table)
  row = _first_row(path)
  if row is None:
    raise UserError(f'{path}: has no rows below line 1, which names the columns, such as image,label')
  image = _column(row, _IMAGE_PATHS)
  if image is not None:
    spec |= {} if image in folder_index.IMAGE_COLUMNS else {'image_column': image}
  elif 'image_column' not in given:
    raise UserError(
      f'{path}: has no column of images ({", ".join(_IMAGE_PATHS)}) among its columns ({", ".join(row)}), which line 1 '
      f'names; rename one, or set --config.data.source.image_column'
    )
  if {'caption_column', 'label_column'} & set(given):
    return spec
  captions, label = _column(row, _CAPTIONS), _column(row, _LABELS)
  if captions is not None:
    return spec | ({} if captions in folder_index.CAPTION_COLUMNS else {'caption_column': captions})
  if label is not None:
    return spec | {'label_column': label}
  raise UserError(
    f'{path}: has neither captions ({", ".join(_CAPTIONS)}) nor labels ({", ".join(_LABELS)}) among its columns '
    f'({", ".join(row)}); rename one, or set --config.data.source.caption_column or .label_column'
  )


def _column(names: Iterable[str], known: Sequence[str]) -> str | None:
  """The first known name that is among `names`, in any case."""
  lower = {name.lower(): name for name in reversed(list(names))}
  return next((lower[name] for name in known if name in lower), None)


def _of_shards(path: str, given: Spec) -> Spec:
  """Tar shards: a classification by a member cls or a field of json, with its names; otherwise pairs by txt or json."""
  own = {field: given[field] for field in ('index', 'on_truncated') if field in given}
  source = WebDataset(path, text=None, label=None, split=given.get('split', splits.ALL), **own)
  spec: Spec = {'name': 'webdataset', 'path': path, 'label': None, 'text': None}
  fields = _json_fields(source)
  label = given.get('label', 'cls' if 'cls' in source.members else fields(_LABELS))
  if label is not None:
    return spec | {'label': label, 'class_names': given.get('class_names') or _names_in(source, label)}
  text = given.get('text', 'txt' if 'txt' in source.members else fields(_CAPTIONS))
  if text is not None:
    return spec | {'text': text}
  raise UserError(
    f'{path}: samples have neither labels (cls, or json with {", ".join(_LABELS)}) nor captions (txt, or json with '
    f'{", ".join(_CAPTIONS)}), only {", ".join(source.members)}; set --config.data.source.label or .text'
  )


def _json_fields(source: WebDataset) -> Callable[[Sequence[str]], str | None]:
  """A function of known names that returns 'json/NAME' for the first that the JSON of the first samples has."""
  found: dict[str, None] = {}
  for row in range(min(len(source), _PROBED) if 'json' in source.members else 0):
    value = _stored(source, row, 'json')
    found |= dict.fromkeys(value if isinstance(value, dict) else ())

  def first(known: Sequence[str]) -> str | None:
    name = _column(found, known)
    return None if name is None else f'json/{name}'

  return first


def _names_in(source: WebDataset, label: str) -> tuple[str, ...]:
  """The class names that the samples hold, sorted; () where they hold numbers."""
  return values.names_among(storage.in_threads(lambda row: _stored(source, row, label), range(len(source))))


def _stored(source: WebDataset, row: int, field: str) -> Any:
  """A value as the sample has it; None for one that cannot be read, which the split counts when it reads it again."""
  try:
    return source.value_of(row, field)
  except BadRecord:
    return None


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
  if suffix := {'parquet': '.parquet', 'webdataset': '.tar'}.get(spec['name']):
    shards = (name for name in storage.files_below(path) or () if name.endswith(suffix))
    found = [splits.named(name) for name in shards]
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
