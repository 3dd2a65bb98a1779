"""A configuration file of a library; every key is set in our config, compared, ignored by name or reported.

A table says of each key that the library reads whether a field of ours is set by it (`Sets`) or whether our network has
to compute with that value already (`Has`). What a file leaves out is the library's default, which is then said to be
assumed.
"""

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fmcv_jax.errors import UserError

UNSET = object()


class Sets(NamedTuple):
  """A key that sets a field of ours.

  field    name of the field, below the part of our config that the file describes
  default  the library's default for a missing key; UNSET leaves our own value
  convert  their value -> ours; raises ValueError for an unsupported value
  """

  field: str
  default: Any = UNSET
  convert: Callable[[Any], Any] = lambda value: value


class Has(NamedTuple):
  """A key that sets no field; our network has to agree with its value.

  ours     our network's value: a constant, or a function of the network
  default  the library's default for a missing key; UNSET skips the comparison
  """

  ours: Any
  default: Any = UNSET


Table = Mapping[str, Sets | Has]


class Findings:
  """Result of reading the configuration files next to the weights.

  overrides  path in our config -> value
  said       lines that name a file and the keys read from it
  assumed    lines that name values that no file gives
  unknown    lines that name keys that are not recognized, and not used
  class_names  names of the classes by label; () for none
  renamed    prefixes of our paths -> what they are instead, where a config says that an array is used elsewhere
  """

  def __init__(self) -> None:
    self.overrides: dict[str, Any] = {}
    self.said: list[str] = []
    self.assumed: list[str] = []
    self.unknown: list[str] = []
    self.renamed: dict[str, str] = {}
    self.class_names: tuple[str, ...] = ()

  def lines(self) -> list[str]:
    """One line for each file and kind, for a terminal."""
    kinds = (('read', self.said), ('assumed', self.assumed), ('not understood, and not used', self.unknown))
    return [f'{kind}: {line}' for kind, lines in kinds for line in lines]


class HubFile:
  """A JSON file, or one object in it, that records which keys were used.

  shown  its name in messages, such as 'config.json' or 'config.json: text_config'
  """

  def __init__(self, values: Mapping[str, Any], shown: str, findings: Findings):
    self.values, self.shown, self.findings = values, shown, findings
    self._taken: set[str] = set()
    self._read: list[str] = []
    self._assumed: list[str] = []

  def __contains__(self, key: str) -> bool:
    return self.values.get(key) is not None

  def get(self, key: str, default: Any = None) -> Any:
    """The value of a key, or the library's default, which is then reported as assumed (unless it is None)."""
    self._taken.add(key)
    value = self.values.get(key)
    if value is not None:
      self._read.append(f'{key}={_short(value)}')
      return value
    if default is not None and default is not UNSET and f'{key}={_short(default)}' not in self._assumed:
      self._assumed.append(f'{key}={_short(default)}')
    return None if default is UNSET else default

  def part(self, key: str) -> 'HubFile':
    """Object below a key; an empty one if the key is missing."""
    self._taken.add(key)
    value = self.values.get(key) or {}
    if not isinstance(value, Mapping):
      raise self.refusal(key, value, 'an object')
    return HubFile(value, f'{self.shown}: {key}', self.findings)

  def apply(self, table: Table, path: str, network: Any) -> None:
    """Sets the fields below `path` of our config, and compares the other keys with the network (of ours, built)."""
    for key, rule in table.items():
      value = self.get(key, rule.default)
      if value is None:
        continue
      if isinstance(rule, Has):
        self.agree(key, value, rule.ours(network) if callable(rule.ours) else rule.ours)
        continue
      try:
        self.set(f'{path}.{rule.field}', rule.convert(value))
      except ValueError as error:
        raise UserError(f'{self.shown}: {key} is {_short(value)}: {error}') from error

  def set(self, path: str, value: Any) -> None:
    """Sets a config field, by its path from the root of the config."""
    self.findings.overrides[path] = value

  def agree(self, key: str, value: Any, ours: Any) -> None:
    """Raises UserError unless their value equals that of our network."""
    if not _same(value, ours):
      raise self.refusal(key, value, _short(ours))

  def refusal(self, key: str, value: Any, ours: str) -> UserError:
    """The error about a value that our network would compute otherwise; `ours` says how."""
    said = '' if key in self else ' (the default of the library)'
    return UserError(f'{self.shown}: {key} is {_short(value)}{said}, but this would be computed with {ours}')

  def done(self, ignored: Collection[str] = ()) -> None:
    """Reports what was read, what was assumed, and the keys that are neither known nor in the patterns `ignored`."""
    if self._read:
      self.findings.said.append(f'{self.shown}: {", ".join(self._read)}')
    if self._assumed:
      self.findings.assumed.append(f'{self.shown} does not say: {", ".join(self._assumed)}')
    matches = re.compile('|'.join(ignored)).fullmatch if ignored else lambda key: None
    left = [key for key, value in self.values.items() if key not in self._taken and value is not None]
    if unknown := [f'{key}={_short(self.values[key])}' for key in left if not matches(key)]:
      self.findings.unknown.append(f'{self.shown}: {", ".join(unknown)}')


def opened(file: Path, shown: str, findings: Findings) -> HubFile | None:
  """Opens the file, or returns None if it does not exist; UserError for one that is not a JSON object."""
  if not file.is_file():
    return None
  try:
    found = json.loads(file.read_text(encoding='utf-8'))
  except (ValueError, OSError) as error:
    raise UserError(f'{file}: cannot be read ({error})') from error
  if not isinstance(found, dict):
    raise UserError(f'{file}: expected a JSON object, got {type(found).__name__}')
  return HubFile(found, shown, findings)


def one_of(known: Mapping[Any, Any]) -> Callable[[Any], Any]:
  """Conversion by lookup in a table; raises ValueError for a value that is not in it."""

  def convert(value: Any) -> Any:
    try:
      return known[value]
    except (KeyError, TypeError):
      raise ValueError(f'known here: {", ".join(map(str, known))}') from None

  return convert


# The names of activations in transformers; several are names of one function.
ACTIVATION = one_of(
  {
    'gelu': 'gelu',
    'gelu_python': 'gelu',
    'gelu_new': 'gelu_tanh',
    'gelu_fast': 'gelu_tanh',
    'gelu_accurate': 'gelu_tanh',
    'gelu_python_tanh': 'gelu_tanh',
    'gelu_pytorch_tanh': 'gelu_tanh',
    'quick_gelu': 'quick_gelu',
    'silu': 'silu',
    'swish': 'silu',
    'relu': 'relu',
  }
)


def _same(value: Any, ours: Any) -> bool:
  if isinstance(value, (list, tuple)) and isinstance(ours, (list, tuple)):
    return len(value) == len(ours) and all(map(_same, value, ours))
  if isinstance(value, bool) or isinstance(ours, bool):
    return bool(value) is bool(ours) if isinstance(value, (bool, int)) else False
  if isinstance(value, (int, float)) and isinstance(ours, (int, float)):
    return math.isclose(value, ours, rel_tol=1e-4)
  return bool(value == ours)


def _short(value: Any) -> str:
  text = json.dumps(value) if isinstance(value, (dict, list, tuple, str, bool)) else str(value)
  return text if len(text) <= 60 else f'{text[:57]}...'
