"""The interface of all file readers: a lazy mapping from names to arrays."""

import abc
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np


class Tensors(abc.ABC):
  """Lazy mapping from names to arrays; each is read on access.

  notes     what was chosen or left out on the way to these arrays, one sentence each, for whoever reads them
  metadata  texts by key that the file has next to its arrays (safetensors)
  """

  notes: tuple[str, ...] = ()
  metadata: Mapping[str, str] = MappingProxyType({})

  @property
  @abc.abstractmethod
  def shapes(self) -> Mapping[str, tuple[int, ...]]:
    """The name and shape of each."""

  @abc.abstractmethod
  def __getitem__(self, name: str) -> np.ndarray:
    """Reads one array; floats of fewer than 32 bits become float32."""


def widened(x: np.ndarray) -> np.ndarray:
  """Converts floats of fewer than 32 bits, including those of ml_dtypes, to float32."""
  return x.astype(np.float32) if x.dtype.kind in 'fV' and x.dtype.itemsize < 4 else x


def first_line(error: BaseException) -> str:
  """First line of an error, at most 160 characters; the name of its class if it has no text."""
  lines = str(error).strip().splitlines()
  return (lines[0] if lines else type(error).__name__)[:160]
