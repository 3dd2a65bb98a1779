"""Columns of Arrow tables, checked by their types before anything is read: encoded images, captions and classes."""

import dataclasses
import urllib.parse
from collections.abc import Mapping
from typing import Any

from fmcv_jax.data.sources import values
from fmcv_jax.data.sources.base import BadRecord
from fmcv_jax.errors import UserError, did_you_mean

NULL = 'null'  # the type of a column without values
_NULL_PARTITION = '__HIVE_DEFAULT_PARTITION__'


@dataclasses.dataclass(frozen=True)
class Column:
  """A column, or with `path` a field of the objects in it; `kind` is its Arrow type, for people."""

  name: str
  path: tuple[str, ...]
  kind: str
  of_texts: bool
  maps: bool = False

  def __str__(self) -> str:
    return repr('/'.join((self.name, *self.path)))

  def value(self, scalar: Any) -> Any:
    """The value of a row, as plain Python; raises BadRecord."""
    try:
      value = scalar.as_py(maps_as_pydicts='strict') if self.maps else scalar.as_py()
    except KeyError as error:
      raise BadRecord(f'{self.name} has the key {error} twice') from error
    return values.at(value, self.path, self.name)


def find(schema: Any, partition: Mapping[str, str | None], field: str, spec: str, where: str) -> Column:
  """The column that `spec`, 'caption' or 'answers/text', names for a field of an example.

  Raises UserError, begun by `where`, if there is none, or if its type cannot hold what the field is: bytes of an image,
  a text or a list of texts, one class.
  """
  name, *path = [spec] if spec in schema.names or spec in partition else spec.split('/')
  if name not in schema.names:
    if name in partition:
      return Column(name, (), 'the name of a folder', True)
    raise UserError(f'{where} has no column {name!r}, set {field}; {did_you_mean(name, [*schema.names, *partition])}')
  if schema.names.count(name) > 1:
    raise UserError(f'{where} has {schema.names.count(name)} columns {name!r}; rename all but one')
  kind = _inside(schema.field(name).type, path, f'{where}: column {name!r}', field)
  whole = _without_wrapping(schema.field(name).type)
  if str(kind) == NULL:  # of one table among others, in which all values are null
    return Column(name, tuple(path), NULL, False)
  if wrong := _CHECKS[field](kind, spec):
    raise UserError(f'{where}: column {spec!r} {wrong}')
  return Column(name, tuple(path), str(kind), _is_text(kind), 'map<' in str(whole))


def partition_of(path: str) -> dict[str, str | None]:
  """The columns that folders stand for: 'year=2024/kind=cat/0.parquet' -> {'year': '2024', 'kind': 'cat'}."""
  pairs = [folder.partition('=') for folder in path.split('/')[:-1] if '=' in folder]
  return {key: None if value == _NULL_PARTITION else urllib.parse.unquote(value) for key, _, value in pairs}


def _without_wrapping(kind: Any) -> Any:
  """The type of the values of an extension type, or of what a dictionary encodes."""
  import pyarrow

  while True:
    if isinstance(kind, pyarrow.BaseExtensionType):
      kind = kind.storage_type
    elif pyarrow.types.is_dictionary(kind):
      kind = kind.value_type
    else:
      return kind


def _is_list(kind: Any) -> bool:
  import pyarrow.types as t

  return t.is_list(kind) or t.is_large_list(kind) or t.is_fixed_size_list(kind)


def _inside(kind: Any, path: list[str], where: str, field: str) -> Any:
  """The type of a field inside objects, of the elements of lists and maps."""
  import pyarrow.types as t

  kind = _without_wrapping(kind)
  for depth, part in enumerate(path):
    while _is_list(kind):
      kind = _without_wrapping(kind.value_type)
    if t.is_map(kind):  # its keys are not in its type
      kind = _without_wrapping(kind.item_type)
      continue
    names = [kind.field(at).name for at in range(kind.num_fields)] if t.is_struct(kind) else []
    if part not in names:
      raise UserError(f'{where} has no field {"/".join(path[: depth + 1])!r}, set {field}; {did_you_mean(part, names)}')
    kind = _without_wrapping(kind.field(part).type)
  return kind


def _is_text(kind: Any) -> bool:
  return str(kind) in ('string', 'large_string', 'string_view')


def _is_bytes(kind: Any) -> bool:
  return str(kind) in ('binary', 'large_binary', 'binary_view') or str(kind).startswith('fixed_size_binary')


def _not_an_image(kind: Any, spec: str) -> str:
  import pyarrow.types as t

  if t.is_struct(kind):
    names = [kind.field(at).name for at in range(kind.num_fields)]
    return '' if 'bytes' in names else f'is {kind}; set image to the field with the encoded bytes'
  if _is_text(kind):
    return (
      'holds paths or text, not encoded images; write the table with the bytes of the files (in `datasets`: '
      "ds.cast_column('image', Image(decode=False)) and embed_table_storage), or read the folder by image_folder"
    )
  return '' if _is_bytes(kind) else f'holds {kind}, not encoded images; set image to the column of their bytes'


def _not_a_text(kind: Any, spec: str) -> str:
  import pyarrow.types as t

  while _is_list(kind):
    kind = _without_wrapping(kind.value_type)
  if t.is_struct(kind):
    names = [kind.field(at).name for at in range(kind.num_fields)]
    return f'holds objects of {", ".join(map(repr, names))}, not texts; set text to a field, such as {spec}/{names[0]}'
  if t.is_map(kind):
    return f'holds maps, not texts; set text to a key of theirs, as {spec}/KEY'
  return '' if _is_text(kind) or _is_bytes(kind) else f'holds {kind}, not texts; set text to the column of captions'


def _not_a_class(kind: Any, spec: str) -> str:
  import pyarrow.types as t

  if t.is_struct(kind):
    names = [kind.field(at).name for at in range(kind.num_fields)]
    held = ', '.join(map(repr, names))
    return f'holds objects of {held}, not a class; set label to a field, such as {spec}/{names[0]}'
  if _is_number(kind) or t.is_boolean(kind) or _is_text(kind) or _is_bytes(kind):
    return ''
  return f'holds {kind}, not one class number or name a row; set label to a column that does, or to None'


def _not_boxes(kind: Any, spec: str) -> str:
  inner, depth = _elements(kind)
  if depth and (_is_number(inner) or str(inner) == NULL):
    return ''
  return f'holds {kind}, not lists of numbers; set boxes to the column or field of boxes, such as objects/bbox'


def _not_classes(kind: Any, spec: str) -> str:
  import pyarrow.types as t

  inner, _ = _elements(kind)
  if t.is_integer(inner) or _is_text(inner) or str(inner) == NULL:
    return ''
  return (
    f'holds {kind}, not a class of each box; set classes to the column or field of classes, such as objects/category'
  )


def _elements(kind: Any) -> tuple[Any, int]:
  """(the type inside of nested lists, how many lists)."""
  depth = 0
  while _is_list(kind):
    kind, depth = _without_wrapping(kind.value_type), depth + 1
  return kind, depth


def _is_number(kind: Any) -> bool:
  import pyarrow.types as t

  return t.is_integer(kind) or t.is_floating(kind) or t.is_decimal(kind)


_CHECKS = {
  'image': _not_an_image,
  'text': _not_a_text,
  'label': _not_a_class,
  'boxes': _not_boxes,
  'classes': _not_classes,
}
