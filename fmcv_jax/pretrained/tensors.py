"""Reads published weight files and folders one array at a time, and writes files for other libraries."""

import contextlib
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from fmcv_jax.errors import UserError
from fmcv_jax.pretrained.arrays import Tensors, first_line
from fmcv_jax.pretrained.npz_file import NpzFile
from fmcv_jax.pretrained.safetensors_file import SafetensorsFile
from fmcv_jax.pretrained.torch_file import TorchFile
from fmcv_jax.pretrained.unread import kind_of, refuse_others

TORCH = ('.pth', '.pt', '.bin', '.ckpt', '.pyth', '.tar', '.th')
PARTS = ('unet', 'transformer', 'vae', 'text_encoder')  # of a pipeline of diffusers: folders of networks that learn
# What the libraries call the weights in a folder, where there are several files.
STEMS = ('diffusion_pytorch_model', 'model', 'open_clip_model', 'pytorch_model', 'open_clip_pytorch_model')
DTYPES = {'<f4': 'F32', '<i8': 'I64'}  # of what we write, as safetensors call them

_READERS: dict[str, Callable[[pathlib.Path], Tensors]] = {
  'safetensors': SafetensorsFile,
  'npz': NpzFile,
  'torch': TorchFile,
}
_KINDS = {'.safetensors': 'safetensors', '.npz': 'npz', **dict.fromkeys(TORCH, 'torch')}


def open_tensors(path: str | os.PathLike[str]) -> Tensors:
  """Opens a weight file, or a folder of transformers, diffusers, timm or OpenCLIP; UserError for anything else.

  Types are detected by content: .safetensors, .npz without objects, and what torch.save wrote (.pth, .pth.tar, .pt,
  .bin, .ckpt), by torch's weights-only loading. In a folder there is one file of weights, or shards with their index;
  .safetensors take precedence over .bin, and full precision over a variant such as fp16. In a diffusers folder with
  several networks, names begin with the network's: 'unet.conv_in.weight'.
  """
  file = pathlib.Path(path)
  if file.is_dir():
    return _folder(file)
  if not file.exists():
    raise UserError(f'{file}: no such file or folder')
  try:
    kind = kind_of(file) or _KINDS.get(file.suffix)
  except OSError as error:
    raise UserError(f'{file}: cannot be read ({first_line(error)})') from error
  if kind is None:
    raise UserError(f'{file}: unknown kind of file; known are {", ".join(_KINDS)} and folders of .safetensors')
  return _READERS[kind](file)


class _Several(Tensors):
  """Shards of one set, or the networks of a pipeline, whose names then have a prefix each."""

  def __init__(self, parts: Iterable[tuple[str, Tensors]]):
    self._owner = {prefix + name: (part, name) for prefix, part in parts for name in part.shapes}
    self.notes = tuple(dict.fromkeys(note for part, _ in self._owner.values() for note in part.notes))

  @property
  def shapes(self) -> Mapping[str, tuple[int, ...]]:
    return {name: part.shapes[own] for name, (part, own) in self._owner.items()}

  def __getitem__(self, name: str) -> np.ndarray:
    part, own = self._owner[name]
    return part[own]


class _Set(NamedTuple):
  """One file of weights in a folder, or an index of shards; `variant` is 'fp16' of model.fp16.safetensors."""

  file: pathlib.Path
  stem: str
  variant: str
  is_torch: bool


# model.safetensors, model.fp16.safetensors, and indexes: model.safetensors.index.json,
# model.safetensors.index.fp16.json, model.fp16.safetensors.index.json.
_SET = re.compile(
  r'(?P<stem>[^.]+)(\.(?P<before>\w+))?\.(?P<kind>safetensors|bin)(?P<index>\.index(\.(?P<after>\w+))?\.json)?'
)
_SHARD = re.compile(r'.*-\d{5}-of-\d{5}\..*')


def _sets(folder: pathlib.Path) -> list[_Set]:
  """Weight files of a folder, in order of preference."""
  sets = []
  for file in sorted(folder.iterdir()):
    found = _SET.fullmatch(file.name)
    if found is None or _SHARD.fullmatch(file.name):
      continue
    if found['kind'] == 'bin' and found['stem'] not in STEMS:
      continue  # optimizer.bin, training_args.bin
    variant = found['before'] or found['after'] or ''
    sets.append(_Set(file, found['stem'], variant, found['kind'] == 'bin'))
  return sorted(sets, key=lambda one: (bool(one.variant), one.variant == 'non_ema', one.is_torch))


def _folder(folder: pathlib.Path) -> Tensors:
  parts = [part for part in PARTS if (folder / part).is_dir()]
  if parts:
    return _Several((f'{part}.', _folder(folder / part)) for part in parts)
  sets = _sets(folder)
  first = [one for one in sets if one[2:] == sets[0][2:]]
  if len(first) > 1:  # as adapters are, or the consolidated weights of the authors
    first = [one for stem in STEMS for one in first if one.stem == stem][:1] or first
  indices = [one for one in first if one.file.suffix == '.json']
  if len(first) != 1 and not indices:
    others = sorted(file.name for file in folder.iterdir() if file.suffix in (*TORCH, '.npz'))
    advice = f'; to read {others[0]}, give it by its own name' if others else ''
    raise UserError(f'{folder}: expected one .safetensors file or an index of shards, found {len(first)} files{advice}')
  chosen = (indices or first)[0]
  tensors = _shards(chosen) if indices else open_tensors(chosen.file)
  if chosen.variant:
    tensors.notes = (*tensors.notes, f'{chosen.file}: the variant {chosen.variant!r} was read, for want of another')
  return tensors


def _shards(index: _Set) -> Tensors:
  refuse_others(index.file)
  try:
    names = json.loads(index.file.read_text(encoding='utf-8'))['weight_map']
    files = sorted(set(names.values()))
  except (ValueError, KeyError, AttributeError, TypeError) as error:
    raise UserError(f'{index.file}: is not an index of shards ({first_line(error)})') from error
  folder = index.file.parent
  for name in files:
    if '/' in name or not (folder / name).exists():
      raise UserError(f'{index.file}: names the shard {name}, which is not in {folder}')
  whole = _Several([('', open_tensors(folder / name)) for name in files])
  if missing := sorted(set(names) - set(whole.shapes)):
    raise UserError(f'{index.file}: names {missing[0]}, which is in none of its shards')
  return whole


class LazyArray:
  """Lazy array: computed when numpy accesses it, and not kept."""

  def __init__(self, compute: Callable[[], np.ndarray]):
    self._compute = compute

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    return np.asarray(self._compute(), dtype)


def write_tensors(
  file: pathlib.Path, tensors: Mapping[str, np.ndarray | LazyArray], metadata: Mapping[str, str] = MappingProxyType({})
) -> None:
  """Writes a file atomically, one array at a time: .npz by name, else .safetensors with `metadata` in its header."""
  temporary = file.with_name(f'.{os.getpid()}.{file.name}')
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == '.npz':
      arrays: Any = tensors
      np.savez(temporary, **arrays)
    else:
      _write_safetensors(temporary, tensors, metadata)
    temporary.replace(file)
  except OSError as error:
    raise UserError(f'{file}: cannot be written ({error})') from error
  finally:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)


def _write_safetensors(
  file: pathlib.Path, tensors: Mapping[str, np.ndarray | LazyArray], metadata: Mapping[str, str]
) -> None:
  """Writes the same bytes as the library `safetensors`, which needs all arrays in memory at once.

  https://github.com/huggingface/safetensors#format: the length of a table as JSON, the table, the arrays.
  """
  kinds = {name: (x.dtype, x.shape) for name in tensors for x in [np.asarray(tensors[name])]}
  names = sorted(kinds, key=lambda name: (-kinds[name][0].itemsize, name))
  table: dict[str, Any] = {'__metadata__': {'format': 'pt', **metadata}}
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
