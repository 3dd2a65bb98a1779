"""Annotation files of COCO and VQA: one JSON object with lists of objects, read strictly."""

import json
import os
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from fmcv_jax.data import storage
from fmcv_jax.errors import UserError, did_you_mean

Row = dict[str, Any]


def read(path: str, what: str) -> Row:
  """The JSON object of a file. Raises UserError with the prefix `what`."""
  try:
    with storage.open_file(os.path.expanduser(path)) as file:
      content = json.loads(file.read().decode('utf-8-sig'))
  except FileNotFoundError as error:
    raise UserError(f'{what}: no file {path!r} (relative to {os.getcwd()})') from error
  except (ValueError, OSError) as error:
    raise UserError(f'{what}: {path}: cannot be read as JSON ({" ".join(str(error).split())})') from error
  if not isinstance(content, dict):
    raise UserError(f'{what}: {path}: expected a JSON object, got {_kind(content)}')
  return content


def rows(content: Row, name: str, fields: Mapping[str, type | tuple[type, ...]], where: str) -> Sequence[Row]:
  """The list `name` of a file, of objects that have `fields` with values of these types.

  where   what messages call the file. Raises UserError with the number of the first object that is not so.
  """
  if name not in content:
    raise UserError(f'{where}: has no list {name!r}; {did_you_mean(name, content)}')
  found = content[name]
  if not isinstance(found, list):
    raise UserError(f'{where}: {name!r} is {_kind(found)}, not a list')
  for number, row in enumerate(found):
    if not isinstance(row, dict):
      raise UserError(f'{where}: {name}[{number}] is {_kind(row)}, not an object')
    for field, kind in fields.items():
      if field not in row:
        raise UserError(f'{where}: {name}[{number}] has no {field!r}; {did_you_mean(field, row)}')
      if not isinstance(row[field], kind) or isinstance(row[field], bool):
        expected = ' or '.join(_NAMES[x] for x in (kind if isinstance(kind, tuple) else (kind,)))
        raise UserError(f'{where}: {name}[{number}].{field} is {_kind(row[field])}, expected {expected}')
  return found


def by_id(found: Sequence[Row], field: str, where: str) -> dict[Hashable, Row]:
  """Objects by the value of a field, in their order. Raises UserError for a value that occurs twice."""
  result: dict[Hashable, Row] = {}
  for row in found:
    if row[field] in result:
      raise UserError(f'{where}: {field} {row[field]} occurs twice')
    result[row[field]] = row
  return result


def check_folder(folder: str, file: str, what: str) -> None:
  """Raises UserError if the first image is not in the folder: all others would be missing, too."""
  path = storage.join(os.path.expanduser(folder), file)
  try:
    storage.open_file(path).close()
  except OSError as error:
    raise UserError(f'{what}: no image {file!r} in {folder!r}, where the annotations expect it; set images') from error


_NAMES = {int: 'a whole number', str: 'a text', list: 'a list'}


def _kind(value: Any) -> str:
  if value is None:
    return 'null'
  return {bool: 'true or false', dict: 'an object', list: 'a list'}.get(type(value)) or f'{value!r:.60}'
