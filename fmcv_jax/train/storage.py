"""Helpers for local file systems and object stores."""

import json
import os
import pathlib
from typing import Any

from etils import epath


def local(path: epath.Path) -> pathlib.Path | None:
  """The path on a local file system, or None for an object store such as gs://."""
  text = os.fspath(path)
  return None if '://' in text else pathlib.Path(text)


def inode(path: epath.Path) -> int | None:
  """Inode of a local folder, to tell it from a new folder of the same name; None for a missing one or object stores."""
  here = local(path)
  return here.stat().st_ino if here and here.exists() else None


def write_json(path: epath.Path, data: Any) -> None:
  """Writes JSON atomically: a reader gets the old file or the new one (object stores are atomic anyway)."""
  temporary = path.with_suffix(path.suffix + '.tmp')
  temporary.write_text(json.dumps(data, indent=2) + '\n')
  temporary.replace(path)


def read_metrics(path: epath.Path) -> list[dict[str, Any]]:
  """Rows of a JSON lines file; an incomplete last line, left by a killed process, is skipped."""
  rows = []
  for line in path.read_text().splitlines() if path.exists() else []:
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      continue
  return rows


def append_line(path: epath.Path, line: str) -> None:
  """Appends to a file, local or gs://."""
  if here := local(path):
    with here.open('a') as file:
      file.write(line)
  else:  # object stores cannot append; these files stay small
    path.write_text((path.read_text() if path.exists() else '') + line)
