"""griffe extension: lays out the docstrings of this package for Markdown.

A docstring describes fields in two columns, the name and then two spaces or more before its meaning; Markdown would run
the lines together, so each such block becomes a list. Code that is indented by four spaces stays code.
"""

import re
from typing import Any

import griffe

ROW = re.compile(r'^(?P<name>[A-Za-z_*][\w.*]*(?:, [\w*]+)*)(?: {2,}|: )(?P<text>\S.*)$')
COLUMNS = re.compile(r'^[A-Za-z_*][\w.*]*(?:, [\w*]+)* {2,}\S')


class TwoColumns(griffe.Extension):
  def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
    if obj.docstring:
      obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
  """The docstring with every block of columns as a list: '- `name`: meaning', continuation lines joined."""
  blocks = []
  for block in re.split(r'\n\s*\n', text):
    lines = block.split('\n')
    blocks.append('\n'.join(listed(lines)) if COLUMNS.match(lines[0]) else block)
  return '\n\n'.join(blocks)


def listed(lines: list[str]) -> list[str]:
  rows: list[str] = []
  for line in lines:
    match = COLUMNS.match(line) and ROW.match(line)
    if match:
      rows.append(f'- `{match["name"]}`: {match["text"]}')
    else:
      rows[-1] += ' ' + line.strip()
  return rows
