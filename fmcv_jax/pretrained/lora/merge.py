"""Adds adapters to the weights of a network, in the names and shapes of the library that they were trained with."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from typing_extensions import override

from fmcv_jax.errors import UserError
from fmcv_jax.pretrained.arrays import Tensors
from fmcv_jax.pretrained.layout import Layout, Shape, read, write
from fmcv_jax.pretrained.lora.adapter_file import AdapterFile, Module
from fmcv_jax.pretrained.lora.formulas import changed
from fmcv_jax.pretrained.lora.names import Place, located, sign_of

Change = Callable[[np.ndarray], np.ndarray]


def merge(
  adapter: AdapterFile,
  strength: float,
  layouts: Iterable[Layout],
  params: Mapping[str, Any],
  target: str,
) -> dict[str, np.ndarray]:
  """Our parameters that an adapter changes, with the change, float32, by path.

  layouts  of the network; a layout may have places for a part of `params` only
  params   our parameters by path, of any float type
  target   what errors call the network

  Raises UserError for a module that is not a layer of the network, and for arrays that do not fit it.
  """
  shapes: dict[str, Shape] = {path: tuple(x.shape) for path, x in params.items()}
  result: dict[str, np.ndarray] = {}
  for place in located(adapter, layouts, shapes, target):
    changes: dict[str, Change] = {}
    for module, layer in place.modules.items():
      changes |= _changes(adapter, adapter.modules[module], layer, place, strength)
    touched = {row for name in changes for row in place.arrays[name].rows}
    layout = place.layout._replace(rows=tuple(row for row in place.layout.rows if row in touched), fixed=())
    own = {row.ours: np.asarray(params[row.ours], np.float32) for row in touched}
    merged = _Merged(write(layout, own, None), {name: place.arrays[name].shape for name in place.arrays}, changes)
    result |= dict(read(layout, merged, {path: shapes[path] for path in own}, None, adapter.file))
  return result


class _Merged(Tensors):
  """The arrays of a network, of which some are changed when they are read."""

  def __init__(self, base: Mapping[str, Any], shapes: Mapping[str, Shape], changes: Mapping[str, Change]):
    self._base, self._shapes, self._changes = base, shapes, changes

  @property
  @override
  def shapes(self) -> Mapping[str, Shape]:
    return self._shapes

  def __getitem__(self, name: str) -> np.ndarray:
    x = np.asarray(self._base[name])
    return self._changes[name](x) if name in self._changes else x


def _changes(adapter: AdapterFile, module: Module, layer: str, place: Place, strength: float) -> dict[str, Change]:
  """The change of each array of a layer that its module adapts, by name."""
  found: dict[str, Change] = {}
  weight, bias = f'{layer}.weight', f'{layer}.bias'
  arrays = adapter.difference(module)

  def checked(change: Change) -> Change:
    def apply(x: np.ndarray) -> np.ndarray:
      try:
        return change(x)
      except ValueError as error:
        whose = sign_of(adapter)
        more = f'; the file seems to be for {whose}' if whose else ''
        raise UserError(f'{adapter.file}: {module.key}: {error}{more}') from error

    return apply

  if arrays is not None:
    parts, scaling = arrays
    found[weight] = checked(lambda x: changed(x, parts, scaling, strength))
    factors = parts.get('ia3_l')
    if factors is not None and factors.shape[-1] == 1 and bias in place.arrays:
      found[bias] = lambda x: x + strength * x * (factors[:, 0] - 1)  # PEFT scales all that the layer gives
  others = adapter.read(module, only=('weight', 'bias', 'bias_diff'))
  for part, name in (('weight', weight), ('bias', bias), ('bias_diff', bias)):
    if part not in others:
      continue
    if name in found or name not in place.arrays:
      why = 'is changed twice' if name in found else 'has no bias'
      raise UserError(f'{adapter.file}: {module.keys[part]}: {layer} {why}')
    move = functools.partial(_replaced, new=others[part], strength=strength, whole=part != 'bias_diff')
    found[name] = checked(move)
  if not found:
    raise UserError(f'{adapter.file}: {module.key} has no weights next to it')
  return found


def _replaced(x: np.ndarray, *, new: np.ndarray, strength: float, whole: bool) -> np.ndarray:
  """x with a difference added, or, for a `whole` array, x moved to it by `strength`."""
  if new.shape != x.shape:
    raise ValueError(f'has the shape {new.shape}, but the array that it changes {x.shape}')
  if whole:
    return new if strength == 1 else x + strength * (new - x)
  return x + strength * new
