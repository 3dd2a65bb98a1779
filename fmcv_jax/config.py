"""Config files, overrides, and the objects they describe.

A config is plain data that describes a tree of constructors. The constructors' own signatures are the schema:
a field that no constructor takes, a value of the wrong type or a missing field is a `UserError` that names the
field's path. A parameter annotated with a *kind* (a type listed in the `kinds` table) is described by a dict whose
`name` picks the constructor, either a name of the table or `package.module:attribute` for code outside this package.
"""

import ast
import collections.abc
import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import logging
import pathlib
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import ml_collections

from fmcv_jax import config_aliases
from fmcv_jax.errors import UserError, did_you_mean

logger = logging.getLogger(__name__)

Kinds = Mapping[type, Mapping[str, Callable[..., Any]]]


def shipped_configs() -> pathlib.Path:
  """The folder of the configs that come with the package: of an installation, or of a checkout."""
  package = pathlib.Path(__file__).parent
  installed = package / 'configs'
  return installed if installed.is_dir() else package.parent / 'configs'


def find_file(path: str) -> pathlib.Path:
  """The config file at `path`, or else the config of that name that comes with the package.

  A shipped config is named as in a checkout ('configs/demo/clip.py') or shortly ('demo/clip'). UserError if there is
  neither, with the nearest name.
  """
  file, shipped = pathlib.Path(path), shipped_configs()
  if file.is_file():
    return file
  name = path.removeprefix('configs/').removesuffix('.py') + '.py'
  if not file.is_absolute() and (shipped / name).is_file():
    return shipped / name
  here = [str(p) for p in file.parent.glob('*.py')] if file.parent.is_dir() else []
  names = [p.relative_to(shipped).with_suffix('').as_posix() for p in sorted(shipped.rglob('*.py'))]
  near = [*here, *names, *(f'configs/{known}.py' for known in names)]
  raise UserError(f'--config: no file {path!r}, and no config of that name in the package; {did_you_mean(path, near)}')


def load_file(spec: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
  """Runs `get_config(arg)` of a python file; `spec` is 'path/to/config.py' or 'path/to/config.py:arg' (`find_file`).

  overrides  'a.b=value' assignments. A file may also define `complete(config)`, which gets the config with them
             applied, as plain data, and returns it with the fields that follow from others, such as from the data.
  """
  path, _, arg = spec.partition(':')
  file = find_file(path)
  module_spec = importlib.util.spec_from_file_location(f'fmcv_config_{file.stem}', file)
  assert module_spec
  assert module_spec.loader
  module = importlib.util.module_from_spec(module_spec)
  try:
    module_spec.loader.exec_module(module)
    if not hasattr(module, 'get_config'):
      raise UserError(f'{path}: defines no get_config()')
    takes_arg = bool(inspect.signature(module.get_config).parameters)
    if arg and not takes_arg:
      raise UserError(f'{path}: get_config() takes no argument, but {arg!r} was given after the colon')
    config = override(to_plain_dict(module.get_config(arg) if arg else module.get_config()), overrides)
    if hasattr(module, 'complete'):
      config = to_plain_dict(module.complete(config))
  except UserError:
    raise
  except Exception as error:  # a config is the user's own code: whatever it raises is reported at its own line
    raise UserError(f'{path}:{_line_in(error, str(file))}: {type(error).__name__}: {error}') from error
  return config


def _line_in(error: BaseException, file: str) -> int:
  if isinstance(error, SyntaxError):
    return error.lineno or 0
  lines, trace = [0], error.__traceback__
  while trace:
    if trace.tb_frame.f_code.co_filename.endswith(file):
      lines.append(trace.tb_lineno)
    trace = trace.tb_next
  return lines[-1]


def to_plain_dict(value: Any) -> Any:
  """A ConfigDict (or any mapping, list, tuple) as plain dicts and tuples, in the order it was written."""
  if isinstance(value, ml_collections.ConfigDict):
    value = value.to_dict()
  if isinstance(value, collections.abc.Mapping):
    return {key: to_plain_dict(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return tuple(to_plain_dict(item) for item in value)
  return value


def override(config: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
  """Returns `config` with each 'a.b.c=value' applied; values are Python literals, anything else is a string."""
  for assignment in assignments:
    path, equals, text = assignment.partition('=')
    if not equals or not path or not path.isprintable():
      shown = assignment if assignment.isprintable() else repr(assignment)
      raise UserError(f'--config.{shown}: write --config.path.to.field=value')
    try:
      value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
      value = {'true': True, 'false': False}.get(text.lower(), text)
    config = _assign(config, path.split('.'), to_plain_dict(value), path)
  return config


def _assign(tree: Any, keys: list[str], value: Any, path: str) -> Any:
  if not keys:
    return value
  key, rest = keys[0], keys[1:]
  if isinstance(tree, tuple):
    if not key.isdigit() or int(key) >= len(tree):
      raise UserError(f'--config.{path}: {key!r} is not a valid index into a list of length {len(tree)}')
    at = int(key)
    return tree[:at] + (_assign(tree[at], rest, value, path),) + tree[at + 1 :]
  if tree is None:
    tree = {}
  if not isinstance(tree, dict):
    raise UserError(f'--config.{path}: cannot set {key!r}: the value {tree!r} is not a mapping')
  return {**tree, key: _assign(tree.get(key), rest, value, path)}


def paths_of(tree: Any, name: str, path: str) -> list[str]:
  """The paths of all fields of this name in `tree`, which stands at `path`."""
  if not isinstance(tree, dict):
    return []
  here = [f'{path}.{name}'] if name in tree else []
  return here + [found for key, value in tree.items() for found in paths_of(value, name, f'{path}.{key}')]


def resolve(annotation: Any, value: Any, kinds: Kinds, path: str = 'config') -> Any:
  """Checks plain data against an annotation and fills in every default; the result describes the run
  completely.
  """
  return _visit(annotation, value, kinds, path, lambda name, constructor, fields, path: {**name, **fields})


def build(annotation: Any, value: Any, kinds: Kinds, path: str = 'config') -> Any:
  """Constructs what plain data describes. A ValueError of a constructor is reported with the field's path."""

  def construct(name: Any, constructor: Callable[..., Any], fields: Mapping[str, Any], path: str) -> Any:
    with config_path_context(path):
      return constructor(**fields)

  return _visit(annotation, value, kinds, path, construct)


@contextlib.contextmanager
def config_path_context(path: str) -> Iterator[None]:
  """A ValueError in the block becomes a UserError that names this place of the config."""
  try:
    yield
  except ValueError as error:
    raise UserError(f'{path}: {error}') from error


def _visit(annotation: Any, value: Any, kinds: Kinds, path: str, make: Callable[..., Any]) -> Any:
  origin, args = typing.get_origin(annotation), typing.get_args(annotation)

  if origin is typing.Annotated:
    value = _visit(args[0], value, kinds, path, make)
    for bound in args[1:]:
      if value is not None and (problem := bound.problem(value)):
        raise UserError(f'{path}: {problem}')
    return value
  if annotation in kinds:
    return _visit_spec(kinds[annotation], value, kinds, path, make)
  if annotation is Any or annotation is inspect.Parameter.empty:
    return value
  if origin in (typing.Union, types.UnionType):
    return _visit_union(args, value, kinds, path, make)
  if origin is Literal:
    if value not in args:
      raise UserError(f'{path}: {value!r} is not one of {", ".join(map(repr, args))}; {did_you_mean(value, args)}')
    return value
  if origin in (collections.abc.Mapping, dict):
    if not isinstance(value, dict):
      raise UserError(f'{path}: expected a dict, got {value!r}')
    named = args[1] in kinds
    items = {key: {'name': key, **item} if named and isinstance(item, dict) else item for key, item in value.items()}
    return {key: _visit(args[1], item, kinds, f'{path}.{key}', make) for key, item in items.items()}
  if origin is tuple:
    if not isinstance(value, tuple):
      raise _WrongType(f'{path}: expected a list, got {value!r}')
    each = (args[0],) * len(value) if args[1:] == (...,) else args
    if len(each) != len(value):
      raise UserError(f'{path}: expected {len(each)} values, got {len(value)}: {value!r}')
    return tuple(_visit(a, v, kinds, f'{path}.{i}', make) for i, (a, v) in enumerate(zip(each, value, strict=True)))
  if dataclasses.is_dataclass(annotation):
    if not isinstance(value, dict):
      raise UserError(f'{path}: expected a dict of {", ".join(_parameters(annotation))}, got {value!r}')
    return _visit_call({}, annotation, value, kinds, path, make)
  if annotation is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if annotation is type(None):
    annotation = types.NoneType
  if not isinstance(value, annotation) or (annotation is int and isinstance(value, bool)):
    raise _WrongType(f'{path}: expected {annotation.__name__}, got {type(value).__name__} {value!r}')
  return value


class _WrongType(UserError):
  """A value of another type than the field's, as opposed to one out of its range."""


def _visit_union(args: Any, value: Any, kinds: Kinds, path: str, make: Callable[..., Any]) -> Any:
  if value is None and types.NoneType in args:
    return None
  options = [option for option in args if option is not types.NoneType]
  errors = []
  for option in options:
    try:
      return _visit(option, value, kinds, path, make)
    except UserError as error:
      errors.append(error)
  # A number out of range is not also said to be no list.
  fitting = [error for error in errors if not isinstance(error, _WrongType)] or errors
  raise fitting[0] if len(fitting) == 1 else UserError(f'{path}: got {value!r}; ' + '; or '.join(map(str, fitting)))


def _visit_spec(
  table: Mapping[str, Callable[..., Any]], value: Any, kinds: Kinds, path: str, make: Callable[..., Any]
) -> Any:
  if isinstance(value, str):  # a name alone stands for the name with every default
    value = {'name': value}
  if not isinstance(value, dict) or not isinstance(value.get('name'), str):
    raise UserError(f'{path}: expected a dict with a name; known names: {", ".join(sorted(table))}; got {value!r}')
  name = value['name']
  if name not in table and (today := config_aliases.CONSTRUCTORS.get(name)) in table:
    logger.warning('%s.name: %r is now called %r', path, name, today)
    name = today
  constructor = _import(name, path) if ':' in name else table.get(name)
  if constructor is None:
    raise UserError(f'{path}.name: unknown {name!r}; {did_you_mean(name, table)}')
  fields = {key: item for key, item in value.items() if key != 'name'}
  return _visit_call({'name': name}, constructor, fields, kinds, path, make)


def _visit_call(
  name: Mapping[str, Any],
  constructor: Any,
  fields: Mapping[str, Any],
  kinds: Kinds,
  path: str,
  make: Callable[..., Any],
) -> Any:
  parameters = _parameters(constructor)
  fields = _in_present_names(fields, parameters, path)
  for key in fields:
    if key not in parameters:
      raise UserError(f'{path}.{key}: unknown field; {did_you_mean(key, parameters)}')
  built = {}
  for key, (annotation, default) in parameters.items():
    default = _described(default, kinds)
    if key in fields:
      given = fields[key]
      if isinstance(given, dict) and 'name' not in given and isinstance(default, dict) and 'name' in default:
        given = {**default, **given}  # overriding one field of a default spec keeps the rest of it
      built[key] = _visit(annotation, given, kinds, f'{path}.{key}', make)
    elif default is inspect.Parameter.empty:
      raise UserError(f'{path}.{key}: missing; it has no default')
    else:
      built[key] = _visit(annotation, default, kinds, f'{path}.{key}', make)
  return make(name, constructor, built, path)


def _in_present_names(fields: Mapping[str, Any], parameters: Mapping[str, Any], path: str) -> dict[str, Any]:
  """`fields` with the names and values of earlier versions replaced by those of today, each with a warning."""
  present = to_plain_dict(fields)
  for old in fields:
    name = config_aliases.renamed_field(old, parameters)
    if name is None:
      continue
    logger.warning('%s.%s is now called %s', path, old, name)
    *parents, last = name.split('.')
    place = present
    for parent in parents:
      place = place.setdefault(parent, {}) if isinstance(place, dict) else place
    if not isinstance(place, dict) or last in place:
      raise UserError(f'{path}: {old} is the earlier name of {name}, and both are given; leave {old} out')
    place[last] = present.pop(old)
  for old, (name, entry) in config_aliases.SWITCHES.items():
    if old in present and old not in parameters and name in parameters:
      logger.warning('%s.%s is now an entry of %s: %r', path, old, name, {'name': entry})
      if present.pop(old):
        present[name] = [*present.get(name, ()), {'name': entry}]
  for key, value in present.items():
    if isinstance(value, str) and value in (renamed := config_aliases.VALUES.get(key, {})):
      logger.warning('%s.%s: %r is now called %r', path, key, value, renamed[value])
      present[key] = renamed[value]
  return present


def _described(default: Any, kinds: Kinds) -> Any:
  """A default that is an object, such as `rule: Rule = AdamW()`, as the plain data that describes it."""
  if dataclasses.is_dataclass(default) and not isinstance(default, type):
    names = {constructor: name for table in kinds.values() for name, constructor in table.items()}
    name = {'name': names[type(default)]} if type(default) in names else {}
    return name | {f.name: _described(getattr(default, f.name), kinds) for f in dataclasses.fields(default) if f.init}
  return to_plain_dict(default)


def _parameters(constructor: Any) -> dict[str, tuple[Any, Any]]:
  """Parameter name -> (annotation, default). Dataclass defaults that are made by a factory are made here."""
  if dataclasses.is_dataclass(constructor):
    hints = typing.get_type_hints(constructor, include_extras=True)
    return {
      field.name: (
        hints[field.name],
        field.default
        if field.default is not dataclasses.MISSING
        else field.default_factory()
        if field.default_factory is not dataclasses.MISSING
        else inspect.Parameter.empty,
      )
      for field in dataclasses.fields(constructor)
      if field.init
    }
  hints = typing.get_type_hints(constructor, include_extras=True)
  return {
    name: (hints.get(name, Any), parameter.default)
    for name, parameter in inspect.signature(constructor).parameters.items()
  }


def _import(name: str, path: str) -> Any:
  module_name, _, attribute = name.partition(':')
  try:
    return getattr(importlib.import_module(module_name), attribute)
  except (ImportError, AttributeError, ValueError) as error:
    raise UserError(f'{path}.name: cannot import {name!r}: {error}') from error
