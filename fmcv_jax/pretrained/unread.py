"""Identifies files of unsupported formats: the name of the format, and what to do instead."""

import pathlib
import re
import tarfile
import zipfile
from collections.abc import Mapping
from typing import Literal

from fmcv_jax.errors import UserError

Kind = Literal['safetensors', 'npz', 'torch']
_BEGINNINGS = {
  b'GGUF': 'a GGUF file, whose weights are quantized; take the .safetensors of the same model',
  b'\x89HDF': 'an HDF5 file, as Keras writes it; take the .safetensors or .npz of the same model',
  b'\x1f\x8b': 'packed by gzip; unpack it first',
  b'BZh': 'packed by bzip2; unpack it first',
  b'7z\xbc\xaf': 'packed by 7-Zip; unpack it first',
  b'Rar!': 'packed by RAR; unpack it first',
}
_LFS = b'version https://git-lfs'
# Patterns of tensor names -> description of the files that have them.
_NAMES = {
  r'.*(lora_(up|down|A|B|a|b)|\.lora\.|lora_linear|hada_w\d|lokr_w\d|oft_(blocks|diag|R)).*': (
    'a LoRA or another adapter, which is not a network by itself; give its base by --onto'
  ),
  r'.*(exp_avg(_sq)?|momentum_buffer|max_exp_avg_sq)$': 'the state of an optimizer, which holds no weights',
  r'.*(\.SCB|\.absmax|\.qweight|\.qzeros|weight_scale(_inv)?|scale_weight|scaled_fp8|quant_state.*)$': (
    'quantized, with separate scales; take the unquantized file of the same model'
  ),
}


def refuse_others(file: pathlib.Path) -> None:
  """Raises UserError for a file with the signature of an unsupported format."""
  head = _head(file)
  if not head:
    raise UserError(f'{file}: is empty')
  if head.startswith(_LFS):
    raise UserError(f'{file}: is a pointer of Git LFS and not the file itself; fetch it by git lfs pull')
  for beginning, other in _BEGINNINGS.items():
    if head.startswith(beginning):
      raise UserError(f'{file}: seems to be {other}')
  if re.match(rb'\s*<(!doctype|html|\?xml)', head, re.IGNORECASE):
    raise UserError(f'{file}: is a page of the web and no file of weights; was the download refused?')


def kind_of(file: pathlib.Path) -> Kind | None:
  """Container format by content; None if it cannot be determined; UserError for an unsupported format."""
  refuse_others(file)
  head = _head(file)
  if head[8:9] == b'{':
    return 'safetensors'
  if zipfile.is_zipfile(file):
    with zipfile.ZipFile(file) as archive:
      names = archive.namelist()
    if any(name.endswith('.npy') for name in names):
      return 'npz'
    return 'torch' if any(name.endswith('data.pkl') for name in names) else None
  if head.startswith(b'\x80') or tarfile.is_tarfile(file):  # torch before 1.6 and before 0.1.10
    return 'torch'
  return None


def _head(file: pathlib.Path) -> bytes:
  with file.open('rb') as data:
    return data.read(2**10)


def seems(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
  """Description of a known kind of checkpoint that no family covers, detected by tensor names; None if unknown."""
  for pattern, other in _NAMES.items():
    if any(re.fullmatch(pattern, name) for name in shapes):
      return other
  vectors = all(len(shape) <= 2 and shape[-1:] > (127,) and '.' not in name for name, shape in shapes.items())
  if 0 < len(shapes) <= 4 and vectors:
    return 'a textual inversion, a few vectors for words, which is not a network by itself; give its base by --onto'
  return None
