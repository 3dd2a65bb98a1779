"""Exported folders, with parameters in one small file instead of checkpoints, and those that ship with the package.

A folder has config.json, the tokenizer, classes.json (names for `classify`) and params.safetensors, and opens like the
workdir of a run. Matrices are stored as bfloat16, everything else as float32.
"""

import contextlib
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fmcv_jax.errors import UserError
from fmcv_jax.parallel.rules import path_of

PARAMS = 'params.safetensors'
Purpose = Literal['embed', 'generate']

# Name -> folder in fmcv_jax/weights of the model for each purpose.
MODELS: Mapping[str, Mapping[Purpose, str]] = {'demo': {'embed': 'clip'}}


def locate(model: str | os.PathLike[str], purpose: Purpose = 'embed') -> str:
  """The folder of a model of the package by its name ('demo'); any other path is returned as it is.

  An existing run in a folder of that name comes first. Raises UserError if no model of the package has that purpose.

  purpose  'embed': the model of images and texts; 'generate': the model that generates images
  """
  name = os.fspath(model)
  if name not in MODELS or (epath.Path(name) / 'config.json').exists():
    return name
  if purpose not in MODELS[name]:
    raise UserError(
      f'{name}: no model of this package generates images; train one in minutes with `make demo-generate` or '
      f'configs/demo/text_to_image.py, and give its workdir'
    )
  return str(pathlib.Path(__file__).parents[1] / 'weights' / MODELS[name][purpose])


def write_params(file: epath.Path, tree: Any, step: int) -> None:
  """Writes a tree of arrays and the training step; names are paths, such as 'params/image/head/kernel'."""
  arrays = {path_of(path): _narrow(np.asarray(x)) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}
  file.write_bytes(save(arrays, {'step': str(step)}))


def read_params(file: epath.Path, target: Any) -> Any:
  """The arrays that `write_params` stored, with the dtypes and shardings of `target`, a tree of ShapeDtypeStructs.

  Raises UserError for a damaged file, and for one whose names or shapes are not those of the target.
  """
  with _opened(file) as stored:
    values = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
  flat, treedef = jax.tree_util.tree_flatten_with_path(target)
  expected = {path_of(path): leaf for path, leaf in flat}
  for name in sorted(values.keys() | expected.keys()):
    found, shape = (x[name].shape if name in x else 'missing' for x in (values, expected))
    if found != shape:
      raise UserError(f'{file}: {name} is {found} in the file and {shape} in its config')
  leaves = [jax.device_put(values[name].astype(leaf.dtype), leaf.sharding) for name, leaf in expected.items()]
  return jax.tree_util.tree_unflatten(treedef, leaves)


def step_of(file: epath.Path) -> int:
  """The training step of the parameters."""
  with _opened(file) as stored:
    return int(stored.metadata()['step'])


def _narrow(x: np.ndarray) -> np.ndarray:
  # Not ascontiguousarray, which gives a scalar an axis.
  return np.array(x.astype(ml_dtypes.bfloat16) if x.dtype == np.float32 and x.ndim >= 2 else x, order='C')


@contextlib.contextmanager
def _opened(file: epath.Path) -> Iterator[Any]:
  try:
    with safe_open(file, 'np') as stored:
      yield stored
  except (SafetensorError, OSError) as error:
    raise UserError(f'{file}: cannot be read ({str(error).splitlines()[0]})') from error
