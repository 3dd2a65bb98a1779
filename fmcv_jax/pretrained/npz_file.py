"""Reads .npz files of plain arrays, in which big_vision also keeps bfloat16."""

import math
import pathlib
import zipfile
from collections.abc import Mapping

import numpy as np
from typing_extensions import override

from fmcv_jax.errors import UserError
from fmcv_jax.pretrained.arrays import Tensors, first_line, widened

INFLATION = 100  # weights never compress this well: a larger ratio is a decompression bomb


class NpzFile(Tensors):
  """One .npz file; UserError if it is truncated, holds objects, or declares a wrong size."""

  def __init__(self, file: pathlib.Path):
    self._file = file
    try:
      self._open = np.load(file, allow_pickle=False)
      check_inflation(file, self._open.zip)
      self._shapes = {name: self._header(name) for name in self._open.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
      raise UserError(f'{file}: is not a complete npz file of plain arrays ({first_line(error)})') from error

  def _header(self, name: str) -> tuple[int, ...]:
    """Shape from the header; the data, whose declared size may be false, is not read."""
    with self._open.zip.open(f'{name}.npy') as data:
      version = np.lib.format.read_magic(data)
      read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
      shape, _, dtype = read(data)
      start = data.tell()
    if dtype.hasobject:
      raise ValueError(f'{name} holds objects, which only pickle could read')
    if start + math.prod(shape) * dtype.itemsize != self._open.zip.getinfo(f'{name}.npy').file_size:
      raise ValueError(f'{name} says it is {shape}, but is not as long')
    return shape

  @property
  @override
  def shapes(self) -> Mapping[str, tuple[int, ...]]:
    return self._shapes

  def __getitem__(self, name: str) -> np.ndarray:
    try:
      x = self._open[name]
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
      raise UserError(f'{self._file}: {name} cannot be read ({first_line(error)})') from error
    # big_vision stores bfloat16 as untyped pairs of bytes.
    return x.view('<u2').astype('<u4').__lshift__(16).view('<f4') if x.dtype.str == '|V2' else widened(x)


def check_inflation(file: pathlib.Path, archive: zipfile.ZipFile) -> None:
  """Raises UserError for an archive that would grow beyond INFLATION times its size when it is read."""
  held, size = sum(info.file_size for info in archive.infolist()), file.stat().st_size
  if held > INFLATION * size:
    raise UserError(f'{file}: would grow from {size:,} to {held:,} bytes; refused as a decompression bomb')
