"""What a local folder can do and an object store cannot."""

import os
import pathlib

from etils import epath


def local(path: epath.Path) -> pathlib.Path | None:
  """The path as one of this machine's file systems, or None for one of an object store such as gs://."""
  text = os.fspath(path)
  return None if '://' in text else pathlib.Path(text)


def inode(path: epath.Path) -> int | None:
  """What tells a local folder from another of its name; None for one that is not there, or in an object store."""
  here = local(path)
  return here.stat().st_ino if here and here.exists() else None
