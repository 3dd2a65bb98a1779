"""Reads textual inversions (Gal et al. 2022): learned vectors of words, for the token embedding of a text tower."""

import pathlib
import re

import numpy as np

from fmcv_jax.errors import UserError
from fmcv_jax.pretrained.arrays import Tensors
from fmcv_jax.pretrained.tensors import open_tensors

_SDXL = re.compile(r'clip_[lg]|text_encoders?_(2|g|l)')
_OF_THE_FILE = 'emb_params'  # A1111's name for the vectors of a .safetensors, whose word is the name of the file


def is_inversion(path: str) -> bool:
  """True for a file of vectors whose names are words, and neither parts of networks nor of adapters."""
  if pathlib.Path(path).is_dir():
    return False
  shapes = open_tensors(path).shapes
  return bool(shapes) and all(len(x) <= 2 and not re.search(r'\w\.\w', name) for name, x in shapes.items())


def read_inversion(tensors: Tensors, file: str, width: int) -> dict[str, np.ndarray]:
  """Vectors float32 [n, width] by word: of diffusers ({word: vectors}), and of A1111 (.pt, and `emb_params`).

  UserError for vectors of another width, and for those of the two text towers of SDXL.
  """
  found = {}
  for name, shape in tensors.shapes.items():
    if _SDXL.fullmatch(name):
      raise UserError(f'{file}: {name} is an embedding of SDXL, which has two text towers')
    word = pathlib.Path(file).stem if name == _OF_THE_FILE else name
    if len(shape) not in (1, 2) or shape[-1] != width:
      whose = {768: ', as of Stable Diffusion 1', 1024: ', as of Stable Diffusion 2'}.get(shape[-1] if shape else 0, '')
      raise UserError(f'{file}: {name} has the shape {tuple(shape)}{whose}, but the text tower has vectors of {width}')
    x = np.asarray(tensors[name], np.float32).reshape(-1, width)
    if not np.isfinite(x).all():
      raise UserError(f'{file}: {name} contains NaN or Inf')
    if not word or word != word.strip() or re.search(r'\s', word):
      raise UserError(f'{file}: {word!r} is not a word: it contains white space')
    found[word] = x
  if not found:
    raise UserError(f'{file}: is empty')
  return found


def token_names(word: str, count: int) -> list[str]:
  """Names of the vectors of a word, as in diffusers: '<cat>', '<cat>_1', '<cat>_2'."""
  return [word, *(f'{word}_{n}' for n in range(1, count))]
