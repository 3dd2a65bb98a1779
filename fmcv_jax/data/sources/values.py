"""Stored values as captions and class numbers: one rule for tables, tar members, JSON and other people's sources."""

import collections
import decimal
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from fmcv_jax.data.sources.base import BadRecord
from fmcv_jax.errors import did_you_mean

_NUMBER = re.compile(r'[+-]?\d+(\.\d*)?', re.ASCII)


def texts(value: Any, where: str) -> tuple[str, ...]:
  """All captions of a stored value, in order; null and blank ones are left out.

  value   None, a text, UTF-8 bytes, or a list, tuple or array of these
  where   what messages call the value, such as a column

  Raises BadRecord for anything else: a number or an object is never taken for the caption that it prints.
  """
  if isinstance(value, np.generic):
    value = value.item()
  if value is None:
    return ()
  if isinstance(value, bytes):
    value = decoded(value, where)
  if isinstance(value, str):
    return (value,) if value.strip() else ()
  if isinstance(value, (list, tuple, np.ndarray)):
    return tuple(text for item in value for text in texts(item, where))
  if isinstance(value, dict):
    fields = ', '.join(map(repr, value)) or 'no fields'
    hint = f'; name the field, such as {where}/{next(iter(value))}' if value else ''
    raise BadRecord(f'{where} is an object of {fields}, not a text{hint}')
  if isinstance(value, float) and math.isnan(value):  # how pandas writes a null
    return ()
  raise BadRecord(f'{where} is {value!r} ({type(value).__name__}), not a text')


def at(value: Any, path: Sequence[str], where: str) -> Any:
  """The field `path` inside a stored object, of each element of a list; None where an object on the way is null.

  Raises BadRecord, with the nearest name, for a field that the object does not have.
  """
  for depth, part in enumerate(path):
    if value is None:
      return None
    if isinstance(value, (list, tuple, np.ndarray)):
      return [at(item, path[depth:], where) for item in value]
    if not isinstance(value, dict):
      raise BadRecord(f'{where} is {_short(value)}, which has no field {part!r}')
    if part not in value:
      raise BadRecord(f'{where} has no field {"/".join(path[: depth + 1])!r}; {did_you_mean(part, value)}')
    value = value[part]
  return value


def decoded(data: bytes, where: str) -> str:
  """UTF-8 bytes as text, without a byte order mark; raises BadRecord."""
  try:
    return data.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    raise BadRecord(f'{where} is not UTF-8 text ({error.reason} at byte {error.start})') from error


class Classes:
  """Stored labels as class numbers, by the names of the classes where they are known."""

  def __init__(self, names: Sequence[str]):
    self.names = tuple(names)
    self._numbers = {name: number for number, name in enumerate(self.names)}
    self._shared = {name for name, count in collections.Counter(self.names).items() if count > 1}

  def number(self, value: Any, where: str) -> int:
    """The class number of a stored label.

    A text is the name of a class, or a number where it is not a name. Numbers may be of any type, but must be whole: a
    class 0.7 is not class 0. Raises BadRecord for what is missing, is not one value, or is not one of the classes.
    """
    if isinstance(value, bytes):
      value = decoded(value, where)
    if isinstance(value, str):
      text = value.strip()
      if text in self._shared:
        raise BadRecord(f'{where} is {text!r}, which several classes are called; give their names a difference')
      if text in self._numbers:
        return self._numbers[text]
      value = _parsed(text)
      if value is None:
        raise BadRecord(f'has no {where}' if not text else f'{where} is {text!r}, {self._unknown(text)}')
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
      value = value.item()
    if value is None or (isinstance(value, (float, decimal.Decimal)) and math.isnan(value)):
      raise BadRecord(f'has no {where}')
    if not isinstance(value, (int, float, decimal.Decimal)):
      raise BadRecord(f'{where} is {_short(value)}; expected one class number or name')
    if not math.isfinite(value) or value != int(value):
      raise BadRecord(f'{where} is {value}, which is not a whole number')
    if value < 0 or (self.names and value >= len(self.names)):
      known = f'not one of the classes 0 to {len(self.names) - 1}' if self.names else 'which stands for no class'
      raise BadRecord(f'{where} is {int(value)}, {known}')
    return int(value)

  def _unknown(self, text: str) -> str:
    if self.names:
      return f'not one of the {len(self.names)} class names; {did_you_mean(text, self.names)}'
    return 'a name where there are no class names; set class_names to the list of them'


def names_among(labels: Iterable[Any]) -> tuple[str, ...]:
  """The class names that a column of labels holds, in order, as `datasets` numbers them; none where all are numbers."""
  stored = (decoded(label, 'label') if isinstance(label, bytes) else label for label in labels)
  names = {label.strip() for label in stored if isinstance(label, str) and label.strip()}
  return tuple(sorted(names)) if any(_parsed(name) is None for name in names) else ()


def _parsed(text: str) -> int | float | None:
  if not _NUMBER.fullmatch(text):  # Python's own int() and float() also take 1_0 and nan, which may be names
    return None
  return float(text) if '.' in text else int(text)


def _short(value: Any) -> str:
  if isinstance(value, dict):
    return f'an object of {", ".join(map(repr, value)) or "no fields"}'
  if isinstance(value, (list, tuple, np.ndarray)):
    return f'a list of {len(value)}'
  return f'{str(value)[:40]!r} ({type(value).__name__})'
