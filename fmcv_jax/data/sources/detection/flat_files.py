"""Contents of large annotation files as flat arrays in the cache: written once, memory-mapped by every reader."""

import hashlib
import logging
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from fmcv_jax.data import storage

logger = logging.getLogger(__name__)


def cached(name: str, key: str, write: Callable[[pathlib.Path], None]) -> pathlib.Path:
  """The folder that `write` fills once for each `key`; a folder appears when it is complete."""
  folder = storage.cache_folder() / name / hashlib.sha256(key.encode()).hexdigest()[:16]
  if not folder.exists():
    logger.warning('%s: creating the index %s', name, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    written = pathlib.Path(tempfile.mkdtemp(dir=folder.parent))
    try:
      write(written)
      try:
        os.rename(written, folder)
      except OSError:  # another process was first
        if not folder.exists():
          raise
    finally:
      shutil.rmtree(written, ignore_errors=True)
  return folder


def load(folder: pathlib.Path, name: str) -> np.ndarray:
  """The array `name` of a folder, memory-mapped."""
  return np.load(folder / f'{name}.npy', mmap_mode='r')


class Strings(Sequence[str]):
  """Texts as one array of bytes, and where each ends."""

  def __init__(self, folder: pathlib.Path, name: str):
    self._data, self._ends = load(folder, name), load(folder, f'{name}_ends')

  def __len__(self) -> int:
    return len(self._ends)

  def __getitem__(self, index: Any) -> Any:
    begin = int(self._ends[index - 1]) if index else 0
    return self._data[begin : int(self._ends[index])].tobytes().decode()

  @staticmethod
  def save(folder: pathlib.Path, name: str, texts: Iterable[str]) -> None:
    """Writes texts as `Strings(folder, name)` reads them."""
    encoded = [text.encode() for text in texts]
    np.save(folder / f'{name}.npy', np.frombuffer(b''.join(encoded), np.uint8))
    np.save(folder / f'{name}_ends.npy', np.cumsum([len(text) for text in encoded], dtype=np.int64))
