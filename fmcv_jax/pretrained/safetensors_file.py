"""Reads .safetensors, with the types that numpy has not: bfloat16 and the float8 ones."""

import json
import math
import pathlib
from collections.abc import Mapping

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from typing_extensions import override

from fmcv_jax.errors import UserError
from fmcv_jax.pretrained.arrays import Tensors, first_line, widened

# https://github.com/huggingface/safetensors#format; types of fewer than 8 bits have no arrays in numpy.
DTYPES = {
  'BOOL': np.dtype(bool),
  **{f'I{bits}': np.dtype(f'<i{bits // 8}') for bits in (8, 16, 32, 64)},
  **{f'U{bits}': np.dtype(f'<u{bits // 8}') for bits in (8, 16, 32, 64)},
  **{f'F{bits}': np.dtype(f'<f{bits // 8}') for bits in (16, 32, 64)},
  'C64': np.dtype('<c8'),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn),
  'F8_E4M3FNUZ': np.dtype(ml_dtypes.float8_e4m3fnuz),
  'F8_E5M2': np.dtype(ml_dtypes.float8_e5m2),
  'F8_E5M2FNUZ': np.dtype(ml_dtypes.float8_e5m2fnuz),
  'F8_E8M0': np.dtype(ml_dtypes.float8_e8m0fnu),
}


class SafetensorsFile(Tensors):
  """One file; UserError for one that the library `safetensors` refuses."""

  def __init__(self, file: pathlib.Path):
    self._file = file
    try:
      with safe_open(file, 'np', backend='pread'):  # pages of a mapped file would stay in memory
        pass  # the library has held the table of contents against the length of the file
      with file.open('rb') as data:
        size = int.from_bytes(data.read(8), 'little')
        table = json.loads(data.read(size))
    except (SafetensorError, OSError, ValueError) as error:
      raise UserError(f'{file}: is not a complete safetensors file ({first_line(error)})') from error
    self.metadata = table.pop('__metadata__', None) or {}
    self._start, self._table = 8 + size, table

  @property
  @override
  def shapes(self) -> Mapping[str, tuple[int, ...]]:
    return {name: tuple(entry['shape']) for name, entry in self._table.items()}

  def __getitem__(self, name: str) -> np.ndarray:
    entry = self._table[name]
    if entry['dtype'] not in DTYPES:
      raise UserError(f'{self._file}: {name} is stored as {entry["dtype"]}, which is not read')
    dtype, shape, begin = DTYPES[entry['dtype']], tuple(entry['shape']), self._start + entry['data_offsets'][0]
    try:
      x = np.fromfile(self._file, np.uint8, math.prod(shape) * dtype.itemsize, offset=begin)
      return widened(x.view(dtype).reshape(shape))
    except (OSError, ValueError) as error:
      raise UserError(f'{self._file}: {name} cannot be read ({first_line(error)})') from error
