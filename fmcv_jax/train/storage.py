"""What a local folder can do and an object store cannot."""

import json
import os
import pathlib
from typing import Any

from etils import epath


def local(path: epath.Path) -> pathlib.Path | None:
  """The path as one of this machine's file systems, or None for one of an object store such as gs://."""
  text = os.fspath(path)
  return None if '://' in text else pathlib.Path(text)


def inode(path: epath.Path) -> int | None:
  """What tells a local folder from another of its name; None for one that is not there, or in an object store."""
  here = local(path)
  return here.stat().st_ino if here and here.exists() else None


def write_json(path: epath.Path, data: Any) -> None:
  """Writes JSON so that a reader sees the old file or the new one, never half of it (object stores do so anyway)."""
  temporary = path.with_suffix(path.suffix + '.tmp')
  temporary.write_text(json.dumps(data, indent=2) + '\n')
  temporary.replace(path)


def read_metrics(path: epath.Path) -> list[dict[str, Any]]:
  """The rows of a file of JSON lines; a last line that a kill left half-written is left out."""
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
  else:  # an object store cannot append; what a run writes here stays small
    path.write_text((path.read_text() if path.exists() else '') + line)
