"""Reads the tensors of torch.save files, including training checkpoints, by torch's weights-only loading.

Code in a file is never executed.
"""

import pathlib
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from typing_extensions import override

from fmcv_jax.errors import UserError
from fmcv_jax.pretrained.arrays import Tensors, first_line
from fmcv_jax.pretrained.npz_file import check_inflation

# Keys under which training scripts save weights. Averaged ones come first: they are what is evaluated and published,
# and what timm loads of its own checkpoints.
AVERAGES = (
  'state_dict_ema',
  'model_state_dict_ema',
  'model_ema_state_dict',
  'model_ema',
  'ema_state_dict',
  'ema_model',
  'ema',
  'params_ema',
  'shadow',
)
WEIGHTS = (
  'teacher',
  'state_dict',
  'model_state_dict',
  'model_state',
  'model',
  'module',
  'params',
  'network',
  'net',
  'weights',
  'student',
)
# Keys of other training state, tensors or not.
TRAINING = re.compile(r'.*(optim|sched|scaler|amp|loss|criterion|callback|loop|rng|opt_state|args|config|hyper).*')

# Records of how a run was configured or went, which torch would have to import. They are read as objects that hold
# nothing, so that the weights in the same file can be read.
_RECORDS = re.compile(
  r'argparse\.Namespace|pathlib\.\w+|numpy\..*|omegaconf\..*|yacs\.config\.\w+|(pytorch_)?lightning\..*|typing\.\w+'
)


class TorchFile(Tensors):
  """One torch file; UserError if reading it would run code, or if it has no named tensors."""

  def __init__(self, file: pathlib.Path):
    self._file = file
    is_mapped = False  # read when asked for, which only arrays can be that lie in the file as they are
    if zipfile.is_zipfile(file):
      with zipfile.ZipFile(file) as archive:
        check_inflation(file, archive)
        if any('/code/' in name for name in archive.namelist()):
          raise UserError(f'{file}: is a TorchScript program, which is not run here; save its state_dict instead')
        is_mapped = all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
    try:
      import torch
    except ImportError as error:
      raise UserError(f'{file}: to read it, pip install torch (or convert it to .safetensors)') from error
    found, self.notes = unwrapped(_loaded(file, is_mapped), str(file))
    self._tensors = {name: x for name, x in found.items() if isinstance(x, torch.Tensor)}

  @property
  @override
  def shapes(self) -> Mapping[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in self._tensors.items()}

  def __getitem__(self, name: str) -> np.ndarray:
    x = self._tensors[name].detach()  # a parameter otherwise keeps its gradient's place
    try:
      return (x.float() if x.is_floating_point() and x.element_size() < 4 else x).resolve_conj().resolve_neg().numpy()
    except (TypeError, RuntimeError) as error:  # sparse, quantized, without memory
      raise UserError(f'{self._file}: {name} is not a plain tensor ({first_line(error)})') from error


class _Record:
  """Takes what pickle hands to an object, and keeps none of it."""

  def __init__(self, *args: Any, **kwargs: Any):
    del args, kwargs

  def __setstate__(self, state: Any) -> None:
    del state


def _loaded(file: pathlib.Path, is_mapped: bool) -> Any:
  import torch

  records: list[Any] = [torch.nn.ParameterDict]  # of the first textual inversions
  while True:
    try:
      with torch.serialization.safe_globals(records):
        return torch.load(file, map_location='cpu', weights_only=True, mmap=is_mapped)
    except Exception as error:  # torch raises of every kind: pickle, zip, runtime, EOF, OS
      code = re.search(r'GLOBAL (\S+)', str(error))
      if code is None:
        raise UserError(f'{file}: is not a complete file of plain tensors ({first_line(error)})') from error
      if _RECORDS.fullmatch(code[1]) and code[1] not in {name for _, name in records[1:]}:
        records.append((_Record, code[1]))
        continue
      raise UserError(
        f'{file}: holds more than tensors, which only running {code[1]} could read; save its state_dict instead'
      ) from error


def unwrapped(tree: Any, what: str) -> tuple[dict[str, Any], tuple[str, ...]]:
  """Returns (weights in a training checkpoint, notes on what was used and dropped); UserError for none or several."""
  notes: list[str] = []
  while True:
    tree = {str(name): x for name, x in tree.items()} if isinstance(tree, Mapping) else {}
    if {'state', 'param_groups'} <= set(tree):
      raise UserError(f'{what}: holds the state of an optimizer and no weights')
    if 'string_to_param' in tree:
      return _inversion(tree, what), tuple(notes)
    inner = [name for name, x in tree.items() if isinstance(x, Mapping) and _has_tensors(x)]
    weights = [name for name in inner if not TRAINING.fullmatch(name)]
    known = [name for name in (*AVERAGES, *WEIGHTS) if name in weights]
    own = [name for name, x in tree.items() if _is_tensor(x)]
    if not known and (own or not weights):
      if not own:
        raise UserError(f'{what}: holds no tensors with names' + _aside(inner))
      return tree, tuple(notes)
    if not known and len(weights) > 1:
      raise UserError(f'{what}: holds several sets of weights, {", ".join(sorted(weights))}; save the one meant')
    key, *others = known or weights
    left = [*others, *(name for name in weights if name not in (key, *known))]
    if left:
      averaged = ', the averaged weights' if key in AVERAGES else ''
      notes.append(f'{key!r} was taken{averaged}; left out: {", ".join(sorted(left))}')
    tree = tree[key]


def _inversion(tree: Mapping[str, Any], what: str) -> dict[str, Any]:
  """The vectors of a textual inversion by their words; '*' stands for the name of the embedding, or of its file."""
  vectors = {str(word): x for word, x in tree['string_to_param'].items()}
  if len(vectors) == 1 and '*' in vectors:
    return {str(tree.get('name') or pathlib.Path(what).stem): vectors['*']}
  return vectors


def _aside(inner: list[str]) -> str:
  return f', but for those of {", ".join(sorted(inner))}' if inner else ''


def _has_tensors(tree: Mapping[Any, Any]) -> bool:
  return any(_is_tensor(x) or (isinstance(x, Mapping) and _has_tensors(x)) for x in tree.values())


def _is_tensor(x: Any) -> bool:
  import torch

  return isinstance(x, torch.Tensor)
