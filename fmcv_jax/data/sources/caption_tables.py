"""Rows of a table of captions: .csv, .tsv, .jsonl and .parquet, read strictly.

Malformed input is an error with its line number, never repaired: an extra cell is a comma inside a caption, and an
unclosed quotation mark would swallow whole rows.
"""

import csv
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from fmcv_jax.data import storage
from fmcv_jax.errors import UserError

KINDS = ('.csv', '.tsv', '.jsonl', '.parquet')
Row = dict[str, Any]

# Cells that pandas, and by it `datasets`, reads as null.
_NULLS = frozenset(
  ('', '#N/A', '#N/A N/A', '#NA', '-1.#IND', '-1.#QNAN', '-NaN', '-nan', '1.#IND', '1.#QNAN', '<NA>', 'N/A', 'NA')
  + ('NULL', 'NaN', 'None', 'n/a', 'nan', 'null')
)
_SEPARATORS = {',': 'comma', ';': 'semicolon', '\t': 'tab'}
_QUOTED = re.compile(r'"(?:[^"]|"")*"')


def suffix(table: str) -> str:
  """Extension of a table file in lower case, with its dot."""
  return os.path.splitext(table)[1].lower()


def rows(table: str, what: str) -> Iterator[tuple[int, Row]]:
  """(line or row number from 1, row) of a table; a null, an empty cell and a missing cell are None.

  Raises FileNotFoundError or IsADirectoryError, and UserError, with the prefix `what`, the line and a remedy, for a
  table that cannot be read.
  """
  read = {'.csv': _csv, '.tsv': _tsv, '.jsonl': _jsonl, '.parquet': _parquet}[suffix(table)]
  line = 0
  try:
    for line, row in read(table):
      yield line, row
  except (FileNotFoundError, IsADirectoryError):
    raise
  except _Fault as fault:
    raise UserError(f'{what}: {table}:{fault.line}: {fault}') from fault
  except UnicodeDecodeError as error:
    raise UserError(
      f'{what}: {table} is not UTF-8 text ({error.reason} after line {line}); save it as UTF-8'
    ) from error
  except (ValueError, OSError) as error:  # Arrow's errors are ValueErrors
    raise UserError(f'{what}: {table} is damaged after line {line}: {" ".join(str(error).split())}') from error


class _Fault(Exception):
  def __init__(self, line: int, message: str):
    super().__init__(message)
    self.line = line


def _text(table: str, **options: Any) -> TextIO:
  return io.TextIOWrapper(storage.open_file(table), encoding='utf-8-sig', **options)


def _csv(table: str) -> Iterator[tuple[int, Row]]:
  """Comma-separated; semicolon- or tab-separated, as spreadsheets write, if line 1 has no comma but these."""
  with _text(table, newline='') as file:
    first = file.readline()
  yield from _separated(table, next((separator for separator in _SEPARATORS if separator in first), ','))


def _tsv(table: str) -> Iterator[tuple[int, Row]]:
  yield from _separated(table, '\t')


def _separated(table: str, delimiter: str) -> Iterator[tuple[int, Row]]:
  csv.field_size_limit(sys.maxsize)
  with _text(table, newline='') as file:
    first = file.readline()
    file.seek(0)
    # A tab-separated file is plain text, where a quotation mark is one of the caption's own characters, unless all
    # names in its first line are quoted.
    quoted = delimiter != '\t' or all(_QUOTED.fullmatch(cell) for cell in first.rstrip('\r\n').split(delimiter))
    options: Any = {'strict': True} if quoted else {'quoting': csv.QUOTE_NONE}
    reader = csv.reader(file, delimiter=delimiter, **options)
    line, names, opened = 1, None, 0
    while True:
      begin = reader.line_num + 1
      try:
        cells = next(reader, None)
      except csv.Error as error:
        raise _Fault(begin, _why(str(error), reader.line_num)) from error
      if cells is None:
        return
      if not cells:  # an empty line
        continue
      if names is None:
        names = _names(cells, begin)
        continue
      line = begin
      if len(cells) > len(names):
        mark = 'a cell of its own, without a tab in it' if delimiter == '\t' else 'quotation marks'
        raise _Fault(
          line,
          f'has {len(cells)} cells, but there are {len(names)} columns ({", ".join(names)}); put the text with a '
          f'{_SEPARATORS[delimiter]} in {mark}',
        )
      if not quoted:
        if opened and len(cells) < len(names):
          raise _Fault(
            opened, 'a quoted text continues on the next line; write it on one line, or quote all names in line 1'
          )
        opened = line if cells[-1].startswith('"') and cells[-1].count('"') % 2 else 0
        cells = [_unquoted(cell) for cell in cells]
      row: Row = dict.fromkeys(names)
      row |= {name: None if cell.strip() in _NULLS else cell for name, cell in zip(names, cells)}
      yield line, row


def _names(cells: list[str], line: int) -> list[str]:
  cells = [name.strip() for name in cells]
  if twice := [name for name in cells if cells.count(name) > 1]:
    raise _Fault(line, f'has two columns {twice[0]!r}; rename one')
  return cells


def _why(error: str, line: int) -> str:
  if 'unexpected end' in error:
    return 'a quotation mark opened in this row is never closed; close it, or double it ("") where it is a character'
  return f'{error}, at line {line}; a quotation mark inside a quoted text is doubled ("")'


def _unquoted(cell: str) -> str:
  """The text of a quoted cell, recognized by its doubled quotation marks; other cells are unchanged."""
  if '""' in cell[1:-1] and _QUOTED.fullmatch(cell):
    return cell[1:-1].replace('""', '"')
  return cell


def _jsonl(table: str) -> Iterator[tuple[int, Row]]:
  with _text(table) as file:
    for line, text in enumerate(file, 1):
      if not text.strip():
        continue
      try:
        row = json.loads(text)
      except ValueError as error:
        raise _Fault(line, f'is not JSON ({error}); each line is one object') from error
      if not isinstance(row, dict):
        raise _Fault(line, 'is not a JSON object; each line is one, such as {"file_name": "x.jpg", "text": "a cat"}')
      yield line, row


def _parquet(table: str) -> Iterator[tuple[int, Row]]:
  try:
    import pyarrow.parquet
  except ImportError as error:
    raise UserError(f'image folder: {table} needs pyarrow: pip install pyarrow') from error
  line = 0
  with storage.open_file(table) as opened, pyarrow.parquet.ParquetFile(opened) as file:
    for batch in file.iter_batches(use_threads=False):
      for row in batch.to_pylist(maps_as_pydicts='lossy'):
        line += 1
        yield line, row
