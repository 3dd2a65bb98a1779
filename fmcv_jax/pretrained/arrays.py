"""Arrays by name, as every kind of file offers them."""

import abc
from collections.abc import Mapping

import numpy as np


class Tensors(abc.ABC):
  """Arrays by name, of which none is read before it is asked for.

  notes   what was chosen or left out on the way to these arrays, one sentence each, for whoever reads them
  """

  notes: tuple[str, ...] = ()

  @property
  @abc.abstractmethod
  def shapes(self) -> Mapping[str, tuple[int, ...]]:
    """The name and shape of each."""

  @abc.abstractmethod
  def __getitem__(self, name: str) -> np.ndarray:
    """One of them, in float32 if it was stored in fewer bits."""


def widened(x: np.ndarray) -> np.ndarray:
  """Floats of fewer than 32 bits, those of ml_dtypes among them, as float32."""
  return x.astype(np.float32) if x.dtype.kind in 'fV' and x.dtype.itemsize < 4 else x


def first_line(error: BaseException) -> str:
  lines = str(error).strip().splitlines()
  return (lines[0] if lines else type(error).__name__)[:160]
