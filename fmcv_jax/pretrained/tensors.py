"""Files of named arrays that others published, read one array at a time; nothing in them is ever executed."""

import abc
import contextlib
import json
import math
import os
import pathlib
import re
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from fmcv_jax.errors import UserError

# What a training script wraps around the weights, the moving average before the rest.
WRAPPERS = ('ema', 'model_ema', 'teacher', 'model', 'state_dict', 'module')
PREFIXES = ('module.', 'backbone.', '_orig_mod.')

INDEX = '*.safetensors.index.json'
TORCH = ('.pth', '.pt', '.bin', '.ckpt', '.pyth')
INFLATION = 100  # no weights are packed as tightly as this; what is would fill the memory
DTYPES = {'<f4': 'F32', '<i8': 'I64'}  # of what we write, as safetensors call them
PARTS = ('unet', 'transformer', 'vae', 'text_encoder')  # of a pipeline of diffusers: folders of networks that learn


class Tensors(abc.ABC):
  """Arrays by name, of which none is read before it is asked for."""

  @property
  @abc.abstractmethod
  def shapes(self) -> Mapping[str, tuple[int, ...]]:
    """The name and shape of each."""

  @abc.abstractmethod
  def __getitem__(self, name: str) -> np.ndarray:
    """One of them, in float32 if it was stored in fewer bits."""


def open_tensors(path: str | os.PathLike[str]) -> Tensors:
  """A file, or a folder of safetensors (one, or shards with their index); UserError for anything else.

  In a folder of diffusers, of several networks, names begin with the network's: 'unet.conv_in.weight'.
  .safetensors, .npz without objects, and .pth, .pt, .bin or .ckpt by torch's weights-only loading.
  """
  file = pathlib.Path(path)
  if file.is_dir():
    return _folder(file)
  if not file.exists():
    raise UserError(f'{file}: no such file or folder')
  kinds: dict[str, Callable[[pathlib.Path], Tensors]] = {
    '.safetensors': _Safetensors,
    '.npz': _Npz,
    **dict.fromkeys(TORCH, _Torch),
  }
  if file.suffix not in kinds:
    raise UserError(f'{file}: unknown kind of file; known are {", ".join(kinds)} and folders of .safetensors')
  return kinds[file.suffix](file)


class Late:
  """An array that is computed when numpy asks for it, and forgotten by the next."""

  def __init__(self, compute: Callable[[], np.ndarray]):
    self._compute = compute

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    return np.asarray(self._compute(), dtype)


def write_tensors(file: pathlib.Path, tensors: Mapping[str, np.ndarray | Late]) -> None:
  """Writes all or nothing, one array after the other: an .npz by its name, else .safetensors."""
  temporary = file.with_name(f'.{os.getpid()}.{file.name}')
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == '.npz':
      arrays: Any = tensors
      np.savez(temporary, **arrays)
    else:
      _write_safetensors(temporary, tensors)
    temporary.replace(file)
  except OSError as error:
    raise UserError(f'{file}: cannot be written ({error})') from error
  finally:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)


def _write_safetensors(file: pathlib.Path, tensors: Mapping[str, np.ndarray | Late]) -> None:
  """What the library `safetensors` writes, byte for byte; that one wants all arrays in memory at once.

  https://github.com/huggingface/safetensors#format: the length of a table as JSON, the table, the arrays.
  """
  kinds = {name: (x.dtype, x.shape) for name in tensors for x in [np.asarray(tensors[name])]}
  names = sorted(kinds, key=lambda name: (-kinds[name][0].itemsize, name))
  table: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  end = 0
  for name in names:
    dtype, shape = kinds[name]
    begin, end = end, end + math.prod(shape) * dtype.itemsize
    table[name] = {'dtype': DTYPES[dtype.str], 'shape': shape, 'data_offsets': (begin, end)}
  head = json.dumps(table, separators=(',', ':'), ensure_ascii=False).encode()
  head += b' ' * (-len(head) % 8)
  with file.open('wb') as out:
    out.write(len(head).to_bytes(8, 'little') + head)
    for name in names:
      out.write(np.asarray(tensors[name], order='C').data)


def _wide(x: np.ndarray) -> np.ndarray:
  return x.astype(np.float32) if x.dtype.kind in 'fV' and x.dtype.itemsize < 4 else x


class _Safetensors(Tensors):
  def __init__(self, file: pathlib.Path):
    self._file = file
    try:
      self._open = safe_open(file, 'np', backend='pread')  # pages of a mapped file would stay in memory
      names = list(self._open.keys())
      self._shapes = {name: tuple(self._open.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError) as error:
      raise UserError(f'{file}: is no whole safetensors file ({_line(error)})') from error

  @property
  def shapes(self):
    return self._shapes

  def __getitem__(self, name):
    try:
      return _wide(self._open.get_tensor(name))
    except (SafetensorError, TypeError) as error:
      raise UserError(f'{self._file}: {name} cannot be read ({_line(error)})') from error


class _Several(Tensors):
  """Shards of one set."""

  def __init__(self, parts: list[Tensors]):
    self._owner = {name: part for part in parts for name in part.shapes}

  @property
  def shapes(self):
    return {name: part.shapes[name] for name, part in self._owner.items()}

  def __getitem__(self, name):
    return self._owner[name][name]


class _Prefixed(Tensors):
  """One network of several."""

  def __init__(self, prefix: str, part: Tensors):
    self._prefix, self._part = prefix, part

  @property
  def shapes(self):
    return {self._prefix + name: shape for name, shape in self._part.shapes.items()}

  def __getitem__(self, name):
    return self._part[name.removeprefix(self._prefix)]


def _folder(folder: pathlib.Path) -> Tensors:
  parts = [part for part in PARTS if (folder / part).is_dir()]
  if parts:
    return _Several([_Prefixed(f'{part}.', _folder(folder / part)) for part in parts])
  indices = sorted(folder.glob(INDEX))
  if indices:
    try:
      names = json.loads(indices[0].read_text())['weight_map']
      files = sorted(set(names.values()))
    except (ValueError, KeyError, AttributeError) as error:
      raise UserError(f'{indices[0]}: is no index of safetensors ({_line(error)})') from error
    for name in files:
      if '/' in name or not (folder / name).exists():
        raise UserError(f'{indices[0]}: names the shard {name}, which is not in {folder}')
    whole = _Several([_Safetensors(folder / name) for name in files])
    if missing := sorted(set(names) - set(whole.shapes)):
      raise UserError(f'{indices[0]}: names {missing[0]}, which is in none of its shards')
    return whole
  # Beside a file of full precision there may be its twin in half.
  files = sorted(file for file in folder.glob('*.safetensors') if not file.stem.endswith(('.fp16', '.non_ema')))
  if len(files) != 1:
    others = sorted(file.name for file in folder.iterdir() if file.suffix in (*TORCH, '.npz'))
    advice = f'; to read {others[0]}, give it by its own name' if others else ''
    raise UserError(f'{folder}: expected one .safetensors file or an index of shards, found {len(files)} files{advice}')
  return _Safetensors(files[0])


class _Npz(Tensors):
  def __init__(self, file: pathlib.Path):
    self._file = file
    try:
      self._open = np.load(file, allow_pickle=False)
      _check_inflation(file, self._open.zip)
      self._shapes = {name: self._header(name) for name in self._open.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
      raise UserError(f'{file}: is no whole npz file of plain arrays ({_line(error)})') from error

  def _header(self, name: str) -> tuple[int, ...]:
    """The shape, without reading what may claim to be far larger than the file is."""
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
  def shapes(self):
    return self._shapes

  def __getitem__(self, name):
    try:
      x = self._open[name]
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
      raise UserError(f'{self._file}: {name} cannot be read ({_line(error)})') from error
    # big_vision stores bfloat16 as two bytes of no type.
    return x.view('<u2').astype('<u4').__lshift__(16).view('<f4') if x.dtype.str == '|V2' else _wide(x)


class _Torch(Tensors):
  def __init__(self, file: pathlib.Path):
    is_mapped = False  # read when asked for, which only arrays can be that lie in the file as they are
    if zipfile.is_zipfile(file):
      with zipfile.ZipFile(file) as archive:
        _check_inflation(file, archive)
        if any('/code/' in name for name in archive.namelist()):
          raise UserError(f'{file}: is a TorchScript program, which is not run here; save its state_dict instead')
        is_mapped = all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
    try:
      import torch
    except ImportError as error:
      raise UserError(f'{file}: to read it, pip install torch (or convert it to .safetensors)') from error
    try:
      loaded = torch.load(file, map_location='cpu', weights_only=True, mmap=is_mapped)
    except Exception as error:  # torch raises of every kind: pickle, zip, runtime, EOF, OS
      if code := re.search(r'GLOBAL (\S+)', str(error)):
        raise UserError(
          f'{file}: holds more than tensors, which only running {code[1]} could read; save its state_dict instead'
        ) from error
      raise UserError(f'{file}: is no whole file of plain tensors ({_line(error)})') from error
    self._tensors = {name: x for name, x in unwrapped(loaded).items() if isinstance(x, torch.Tensor)}
    if not self._tensors:
      raise UserError(f'{file}: holds no tensors')

  @property
  def shapes(self):
    return {name: tuple(x.shape) for name, x in self._tensors.items()}

  def __getitem__(self, name):
    x = self._tensors[name]
    return (x.float() if x.is_floating_point() and x.element_size() < 4 else x).numpy()


def _check_inflation(file: pathlib.Path, archive: zipfile.ZipFile) -> None:
  held, size = sum(info.file_size for info in archive.infolist()), file.stat().st_size
  if held > INFLATION * size:
    raise UserError(f'{file}: would grow from {size:,} to {held:,} bytes; such a file holds no weights')


def unwrapped(tree: Any) -> dict[str, Any]:
  """The weights in what a training script saved, without the names that its wrappers put before theirs."""
  while isinstance(tree, dict) and (inner := next((tree[key] for key in WRAPPERS if key in tree), None)) is not None:
    if not isinstance(inner, dict):
      break
    tree = inner
  tree = tree if isinstance(tree, dict) else {}
  for prefix in PREFIXES:
    if any(str(name).startswith(prefix) for name in tree):
      tree = {str(name).removeprefix(prefix): x for name, x in tree.items()}
  return tree


def _line(error: BaseException) -> str:
  lines = str(error).strip().splitlines()
  return (lines[0] if lines else type(error).__name__)[:160]
