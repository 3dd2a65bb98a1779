"""Annotations of an evaluation set, such as reference captions and answers, read before the images."""

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.data.sources.base import UNREADABLE, reason_of
from fmcv_jax.errors import UserError

logger = logging.getLogger(__name__)

T = TypeVar('T')
_SAMPLE = 256  # evenly spaced records that are read before the first step


def read_annotations(data: Pipeline, read: Callable[[int], T], name: str) -> dict[int, T]:
  """`read(number)` of every record of the source that has it, by the number of the record.

  read   raises BadRecord for a record without annotations, which is left out and reported
  name   of the evaluator, for messages

  Raises UserError if more than data.max_bad of the records are left out.
  """
  found, missing = _read(data, read, range(len(data.source)))
  if missing:
    logger.warning('%s: left out %d records: %s', name, len(missing), _first(missing))
  if not found or len(missing) > data.max_bad * len(data.source):
    raise _nothing(name, missing, len(data.source))
  return found


def sample_annotations(data: Pipeline, read: Callable[[int], T], name: str) -> list[T]:
  """`read(number)` of some evenly spaced records; UserError if none of them has it."""
  rows = np.unique(np.linspace(0, len(data.source) - 1, min(_SAMPLE, len(data.source))).astype(int))
  found, missing = _read(data, read, rows.tolist())
  if not found:
    raise _nothing(name, missing, len(rows))
  return list(found.values())


def _read(data: Pipeline, read: Callable[[int], T], rows: Sequence[int]) -> tuple[dict[int, T], dict[str, str]]:
  found, missing = {}, {}
  for row in rows:
    try:
      found[row] = read(row)
    except UNREADABLE as error:
      missing[data.source.key_of(row)] = reason_of(error)
  return found, missing


def _nothing(name: str, missing: dict[str, str], count: int) -> UserError:
  first = _first(missing) or 'the source is empty'
  return UserError(f'config.evaluators: {name}: {len(missing)} of {count} records cannot be compared with; {first}')


def _first(missing: dict[str, str]) -> str:
  return '; '.join(f'{key}: {reason}' for key, reason in list(missing.items())[:3])
