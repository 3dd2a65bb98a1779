"""Bidirectional mapping of names and shapes between published checkpoints and our parameters.

A row names our path, theirs, and how the array changes. '{i}' stands for the layer in their name; we stack layers
along a first axis, where blocks come in pairs those of '{2i}' and of '{2i+1}' apart, and where they count through all
stages those of '{3..7}'. '{*}' is in a name that
they repeat, with the same array, in every layer, and that we have once. Where several rows name the same array of
theirs, it is ours joined along its first axis, in their order: queries, keys and values in one matrix.
"""

import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fmcv_jax.errors import UserError, did_you_mean
from fmcv_jax.pretrained.arrays import Tensors
from fmcv_jax.pretrained.tensors import LazyArray

Shape = tuple[int, ...]

LAYER = re.compile(r'\{(2?)i(\+1)?\}|\{(\d+)\.\.(\d+)\}')
EVERY = '{*}'


class ArrayTransform(NamedTuple):
  """Conversion of one layer's array: ours -> theirs, theirs -> ours (given our shape), and their shape -> ours.

  The last raises ValueError for an unsupported number of axes.
  """

  write: Callable[[np.ndarray], np.ndarray]
  read: Callable[[np.ndarray, Shape], np.ndarray]
  shape: Callable[[Shape], Shape]


def _reshaped(x: np.ndarray, shape: Shape) -> np.ndarray:
  return x.reshape(shape)


def _turned(shape: Shape) -> Shape:
  outputs, inputs = shape
  return inputs, outputs


def _of_a_point(shape: Shape) -> Shape:
  outputs, inputs, _, _ = shape
  return inputs, outputs


def _spatial(shape: Shape) -> Shape:
  outputs, inputs, rows, columns = shape
  return rows, columns, inputs, outputs


SAME = ArrayTransform(lambda x: x, _reshaped, lambda shape: shape)
LINEAR = ArrayTransform(lambda x: x.T, lambda x, shape: x.T, _turned)
# A convolution of one pixel.
POINT = ArrayTransform(lambda x: x.T[..., None, None], lambda x, shape: x[..., 0, 0].T, _of_a_point)
SPATIAL = ArrayTransform(lambda x: x.transpose(3, 2, 0, 1), lambda x, shape: x.transpose(2, 3, 1, 0), _spatial)
BATCHED = ArrayTransform(lambda x: x[None], _reshaped, lambda shape: shape[1:])  # [N, D] and [1, N, D]
ROW = ArrayTransform(lambda x: x[0], _reshaped, lambda shape: (1, *shape))  # [1, D] and [D]
SCALAR_AS_1D = ArrayTransform(lambda x: x[None], _reshaped, lambda shape: ())  # [] and [1]


def convolution(channels: int) -> ArrayTransform:
  """Ours [rows * columns * channels, outputs], theirs [outputs, channels, rows, columns] with a square kernel."""

  def write(x: np.ndarray) -> np.ndarray:
    side = math.isqrt(x.shape[0] // channels)
    return x.reshape(side, side, channels, -1).transpose(3, 2, 0, 1)

  def read(x: np.ndarray, shape: Shape) -> np.ndarray:
    return x.transpose(2, 3, 1, 0).reshape(shape)

  return ArrayTransform(write, read, lambda shape: (math.prod(shape[1:]), shape[0]))


def patches(channels: int) -> ArrayTransform:
  """Ours [rows * columns * channels, outputs], flax's [rows, columns, channels, outputs] with a square kernel."""

  def write(x: np.ndarray) -> np.ndarray:
    side = math.isqrt(x.shape[0] // channels)
    return x.reshape(side, side, channels, -1)

  def shape(theirs: Shape) -> Shape:
    rows, columns, inputs, outputs = theirs
    return rows * columns * inputs, outputs

  return ArrayTransform(write, _reshaped, shape)


def expanding(factor: int) -> ArrayTransform:
  """Transposed convolutions with a stride of their size (`PixelExpand`): ours [inputs, factor * factor * outputs],
  theirs [inputs, outputs, factor, factor]."""

  def write(x: np.ndarray) -> np.ndarray:
    return x.reshape(len(x), factor, factor, -1).transpose(0, 3, 1, 2)

  def read(x: np.ndarray, shape: Shape) -> np.ndarray:
    return x.transpose(0, 2, 3, 1).reshape(shape)

  return ArrayTransform(write, read, lambda shape: (shape[0], math.prod(shape[1:])))


def _unbound(x: np.ndarray) -> np.ndarray:
  raise TypeError('the number of heads is not known yet: see with_heads')


def _of_heads(theirs: Shape) -> Shape:
  *before, heads, width = theirs
  return (*before, heads * width)


def _of_heads_out(theirs: Shape) -> Shape:
  *before, heads, width, outputs = theirs
  return (*before, heads * width, outputs)


# Ours [..., heads * width], flax's [..., heads, width]; ours [..., heads * width, D], flax's [..., heads, width, D].
# Their arrays tell the number of heads; ours do not, so that `with_heads` has to give it before anything is written.
INTO_HEADS = ArrayTransform(_unbound, _reshaped, _of_heads)
OUT_OF_HEADS = ArrayTransform(_unbound, _reshaped, _of_heads_out)


class Row(NamedTuple):
  """Our path of an array, their name for it, and how its array changes; '{i}' stands for the layer."""

  ours: str
  theirs: str
  transform: ArrayTransform = SAME


Rows = tuple[Row, ...]
Project = Callable[[str, str], Rows]  # our path and their name of a layer -> its arrays
QKV = ('query', 'key', 'value')


class Fixed(NamedTuple):
  """A constant array of theirs: our path for its shape, its name, and the function that computes it."""

  ours: str
  theirs: str
  make: Callable[[Any], np.ndarray]


class Layout(NamedTuple):
  """All rows of a format, including optional ones.

  ignored   patterns of names to ignore
  fixed     constant arrays of theirs, computed from the network's hyperparameters
  files     (prefix, file) where a checkpoint is a folder: names with the prefix, without it, are in that file
  """

  rows: Rows
  ignored: tuple[str, ...] = ()
  fixed: tuple[Fixed, ...] = ()
  files: tuple[tuple[str, str], ...] = ()


def _projection(transform: ArrayTransform) -> Project:
  return lambda ours, theirs: (
    Row(f'{ours}/kernel', f'{theirs}.weight', transform),
    Row(f'{ours}/bias', f'{theirs}.bias'),
  )


linear, point, spatial = _projection(LINEAR), _projection(POINT), _projection(SPATIAL)


def expand(factor: int) -> Project:
  """Kernel and bias of a `PixelExpand`."""
  return _projection(expanding(factor))


def matrix(ours: str, theirs: str) -> Rows:
  """A linear layer without a bias."""
  return (Row(f'{ours}/kernel', f'{theirs}.weight', LINEAR),)


def norm(ours: str, theirs: str) -> Rows:
  """Scale and bias of a norm."""
  return Row(f'{ours}/scale', f'{theirs}.weight'), Row(f'{ours}/bias', f'{theirs}.bias')


def patch(theirs: str, channels: int = 3) -> Rows:
  """The convolution that cuts an image into patches."""
  return Row('patch/kernel', f'{theirs}.weight', convolution(channels)), Row('patch/bias', f'{theirs}.bias')


def layer_rows(ours: str, theirs: str, names: Mapping[str, str], project: Project = linear) -> Rows:
  """Rows of several layers below one name; `names`: ours -> theirs."""
  return tuple(row for mine, name in names.items() for row in project(f'{ours}/{mine}', f'{theirs}.{name}'))


def fused(ours: str, theirs: str, parts: Sequence[str] = QKV) -> Rows:
  """Several linear layers in one matrix, in their order; `theirs` is all of the name before 'weight' and 'bias'."""
  return (
    *(Row(f'{ours}/{part}/kernel', f'{theirs}weight', LINEAR) for part in parts),
    *(Row(f'{ours}/{part}/bias', f'{theirs}bias') for part in parts),
  )


def with_heads(layout: Layout, heads: Callable[[str], int]) -> Layout:
  """The layout for a network whose attention at a path of ours has `heads(path)` heads."""

  def bound(row: Row) -> Row:
    if row.transform not in (INTO_HEADS, OUT_OF_HEADS):
      return row
    count = heads(row.ours)
    if row.transform is INTO_HEADS:
      return row._replace(transform=row.transform._replace(write=lambda x: x.reshape(*x.shape[:-1], count, -1)))
    write = lambda x: x.reshape(*x.shape[:-2], count, -1, x.shape[-1])  # noqa: E731
    return row._replace(transform=row.transform._replace(write=write))

  return layout._replace(rows=tuple(bound(row) for row in layout.rows))


def heads_in(layout: Layout, tensors: Tensors) -> dict[str, int]:
  """The number of heads of each stack of blocks, by the prefix of its paths, where the arrays have an axis of them."""
  suffix = 'blocks/attention/query/kernel'
  rows = [row for row in layout.rows if row.transform is INTO_HEADS and row.ours.endswith(suffix)]
  names = ((row.ours.removesuffix(suffix), row.theirs.replace('{i}', '0')) for row in rows)
  return {prefix: tensors.shapes[name][-2] for prefix, name in names if name in tensors.shapes}


def renamed(layout: Layout, prefixes: Mapping[str, str]) -> Layout:
  """Layout with renamed paths of ours: a prefix that is a key is replaced by its value."""

  def path(ours: str) -> str:
    return next((new + ours.removeprefix(old) for old, new in prefixes.items() if ours.startswith(old)), ours)

  return layout._replace(rows=tuple(row._replace(ours=path(row.ours)) for row in layout.rows))


def has_places(layout: Layout, shapes: Mapping[str, Shape]) -> bool:
  """True if the format can represent all of our parameters."""
  try:
    for theirs, rows in _joined(layout, shapes):
      _layers(layout, theirs, shapes, rows[0])
      if len({_shape(row.transform, _one(row, shapes))[1:] for row in rows}) > 1:
        return False  # one array of theirs cannot hold matrices of several widths
  except UserError:
    return False
  return True


def with_prefix(prefix: str, rows: Iterable[Row], theirs: str = '') -> Rows:
  """Rows of a part, with a prefix added to our paths and another to their names."""
  path = f'{prefix}/' if prefix else ''
  return tuple(Row(path + row.ours, theirs + row.theirs, row.transform) for row in rows)


def _joined(layout: Layout, shapes: Mapping[str, Shape]) -> Iterator[tuple[str, list[Row]]]:
  """Their names, and the rows of ours that each is made of; only of rows whose path is there."""
  groups: dict[str, list[Row]] = {}
  for row in layout.rows:
    if row.ours in shapes:
      groups.setdefault(row.theirs, []).append(row)
  filled = [row.ours for rows in groups.values() for row in rows]
  if missing := sorted(set(shapes) - set(filled)):
    raise UserError(f'this format cannot represent {missing[0]}{_more(missing)}')
  yield from groups.items()


def _layers(layout: Layout, theirs: str, shapes: Mapping[str, Shape], row: Row) -> list[tuple[str, int | None]]:
  """Their names of a row, one per layer."""
  if EVERY in theirs:
    depth = max(shapes[other.ours][0] for other in layout.rows if '{i}' in other.theirs and other.ours in shapes)
    return [(theirs.replace(EVERY, str(i)), None) for i in range(depth)]
  place = LAYER.search(theirs)
  if place is None:
    return [(theirs, None)]
  step, offset, last = counted(place)
  if place[3] and shapes[row.ours][0] != last - offset + 1:
    raise UserError(f'this format cannot represent {shapes[row.ours][0]} layers of {row.ours}')
  return [(theirs.replace(place[0], str(step * i + offset)), i) for i in range(shapes[row.ours][0])]


def counted(place: re.Match[str]) -> tuple[int, int, float]:
  """(step, offset, last): their layers are step * i + offset, up to the last."""
  if place[3]:
    return 1, int(place[3]), int(place[4])
  return int(place[1] or 1), int(place[2] or 0), math.inf


def _one(row: Row, shapes: Mapping[str, Shape]) -> Shape:
  """Our shape of one layer."""
  return shapes[row.ours][1:] if LAYER.search(row.theirs) else shapes[row.ours]


def write(layout: Layout, params: Mapping[str, np.ndarray], network: Any) -> dict[str, LazyArray]:
  """Converts our parameters, by path, to their arrays, including constant ones; UserError for a parameter that the
  format cannot represent."""
  shapes = {path: x.shape for path, x in params.items()}
  found = {
    name: LazyArray(functools.partial(_theirs, rows, layer, params))
    for theirs, rows in _joined(layout, shapes)
    for name, layer in _layers(layout, theirs, shapes, rows[0])
  }
  return found | {row.theirs: LazyArray(functools.partial(row.make, network)) for row in layout.fixed}


def _theirs(rows: Sequence[Row], layer: int | None, params: Mapping[str, np.ndarray]) -> np.ndarray:
  parts = [row.transform.write(params[row.ours] if layer is None else params[row.ours][layer]) for row in rows]
  return parts[0] if len(parts) == 1 else np.concatenate(parts)


class TheirArray(NamedTuple):
  """An array of theirs: its shape, the rows of ours that it is made of, several if it joins them, and their layer.

  layer  None for arrays that we do not stack
  """

  shape: Shape
  rows: tuple[Row, ...]
  layer: int | None


def arrays(layout: Layout, shapes: Mapping[str, Shape]) -> dict[str, TheirArray]:
  """Their arrays that hold our parameters of these shapes, by name, without constant ones."""
  found: dict[str, TheirArray] = {}
  for theirs, rows in _joined(layout, shapes):
    parts = [_shape(row.transform, _one(row, shapes)) for row in rows]
    joined = (sum(part[0] for part in parts), *parts[0][1:]) if len(parts) > 1 else parts[0]
    found |= {name: TheirArray(joined, tuple(rows), layer) for name, layer in _layers(layout, theirs, shapes, rows[0])}
  return found


def check(layout: Layout, tensors: Tensors, shapes: Mapping[str, Shape], network: Any, what: str) -> None:
  """Raises UserError for missing, unexpected or misshapen arrays, by name; reads no data."""
  fixed = {row.theirs: row.make(network).shape for row in layout.fixed}
  expected = fixed | {name: array.shape for name, array in arrays(layout, shapes).items()}
  found = tensors.shapes
  if missing := sorted(set(expected) - set(found)):
    raise UserError(f'{what}: {missing[0]} is missing{_more(missing)}; {did_you_mean(missing[0], list(found))}')
  extra = [name for name in found if name not in expected and not is_ignored(layout, name)]
  if extra:
    raise UserError(f'{what}: unexpected array {sorted(extra)[0]}{_more(extra)}; is it of another family?')
  for name, shape in expected.items():
    if tuple(found[name]) != shape:
      raise UserError(f'{what}: {name} is {tuple(found[name])}, but the network needs {shape}')


def read(
  layout: Layout, tensors: Tensors, shapes: Mapping[str, Shape], network: Any, what: str
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields (our path, float32 array); UserError for NaN or Inf. Call `check` first."""
  for fixed in layout.fixed:
    if not np.allclose(tensors[fixed.theirs], fixed.make(network), atol=1e-3):
      raise UserError(f'{what}: {fixed.theirs} is not the table that this network computes; it cannot be used')
  for theirs, rows in _joined(layout, shapes):
    layers = _layers(layout, theirs, shapes, rows[0])
    results = [_empty(shapes[row.ours]) for row in rows]
    for name, layer in layers[:1] if EVERY in theirs else layers:
      x = tensors[name]
      if not np.isfinite(x).all():
        raise UserError(f'{what}: {name} contains NaN or Inf')
      parts = [x]
      if len(rows) > 1:
        parts = np.split(x, np.cumsum([_shape(row.transform, _one(row, shapes))[0] for row in rows[:-1]]))
      for row, result, part in zip(rows, results, parts, strict=True):
        value = row.transform.read(part, _one(row, shapes))
        if layer is None:
          result[...] = value
        else:
          result[layer] = value
    yield from zip((row.ours for row in rows), results, strict=True)


def _empty(shape: Shape) -> np.ndarray:
  """Empty float32 array aligned to 64 bytes, which JAX on a CPU uses without a copy."""
  size = 4 * math.prod(shape)
  data = np.empty(size + 63, np.uint8)
  begin = -data.ctypes.data % 64
  return data[begin : begin + size].view(np.float32).reshape(shape)


def is_ignored(layout: Layout, name: str) -> bool:
  """True for a name of theirs that the layout leaves out on purpose."""
  return any(re.fullmatch(pattern, name) for pattern in layout.ignored)


def _shape(transform: ArrayTransform, ours: Shape) -> Shape:
  return transform.write(np.broadcast_to(np.float32(0), ours)).shape


def _more(names: list[str]) -> str:
  return f' and {len(names) - 1} more' if len(names) > 1 else ''
