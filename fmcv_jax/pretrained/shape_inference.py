"""Shapes in a checkpoint by our parameter paths, as a layout maps them; network configs are inferred from these."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fmcv_jax.pretrained.arrays import Tensors
from fmcv_jax.pretrained.layout import EVERY, LAYER, Layout, Row, Shape, counted, is_ignored


class MissingPath(Exception):
  """A path of ours that a network requires and a checkpoint lacks."""

  def __init__(self, path: str):
    super().__init__(path)
    self.path = path


class Shapes(dict[str, Shape]):
  """Shapes of our parameters by path. A missing key raises MissingPath with its full path.

  prefix   what the paths had in front before `part` took it off
  """

  def __init__(self, shapes: Mapping[str, Shape] | Iterable[tuple[str, Shape]] = (), prefix: str = ''):
    super().__init__(shapes)
    self.prefix = prefix

  def __missing__(self, path: str) -> Shape:
    raise MissingPath(self.prefix + path)


def infer_shapes(layout: Layout, tensors: Tensors, limit: float = math.inf) -> tuple[Shapes, list[str]]:
  """Returns the shapes of our parameters in a checkpoint, by path, and the names that the layout does not have.

  Layers are as many as the highest of their numbers tells, of whichever array. Fixed arrays are there by their own
  paths. More than `limit` unknown names end the search.
  """
  rows: dict[str, list[Row]] = {}
  for row in layout.rows:
    rows.setdefault(row.theirs, []).append(row)
  places = {place[0]: counted(place) for theirs in rows if (place := LAYER.search(theirs))}
  fixed = {row.theirs: row.ours for row in layout.fixed}
  found = Shapes()
  depths: dict[str, int] = {}  # by their name up to the layer
  unknown: list[str] = []
  for name, shape in tensors.shapes.items():
    if len(unknown) > limit:
      break
    if is_ignored(layout, name):
      continue
    if name in fixed:
      found[fixed[name]] = tuple(shape)
      continue
    theirs, layer = next(_places(name, rows, places), (None, None))
    if theirs is None:
      unknown.append(name)
      continue
    for row in rows[theirs]:
      part = (shape[0] // len(rows[theirs]), *shape[1:]) if shape and len(rows[theirs]) > 1 else tuple(shape)
      try:
        found[row.ours] = row.transform.shape(part)
      except ValueError:
        unknown.append(name)
        break
    if layer is not None:
      stack = _stack(theirs)
      depths[stack] = max(depths.get(stack, 0), layer + 1)
  for row in layout.rows:
    if row.ours in found and (stack := _stack(row.theirs)) in depths:
      found[row.ours] = (depths[stack], *found[row.ours])
  return found, unknown


def _stack(theirs: str) -> str:
  place = LAYER.search(theirs)
  return theirs[: place.end()] if place else ''


def name_of(layout: Layout, path: str) -> str:
  """Name in the checkpoint of our parameter `path`; for stacked layers, that of the first layer."""
  names = {row.ours: row.theirs for row in layout.fixed} | {row.ours: row.theirs for row in reversed(layout.rows)}
  theirs = names.get(path, path)
  place = LAYER.search(theirs)
  return theirs.replace(place[0], str(counted(place)[1])) if place else theirs.replace(EVERY, '0')


def part(shapes: Mapping[str, Shape], prefix: str) -> Shapes:
  """Shapes of one part of a network, without its prefix."""
  inner = {path.removeprefix(prefix): shape for path, shape in shapes.items() if path.startswith(prefix)}
  return Shapes(inner, getattr(shapes, 'prefix', '') + prefix)


def count(shapes: Mapping[str, Shape], pattern: str) -> int:
  """Largest number that `pattern` matches at the beginning of a path, plus one; 0 without a match."""
  return max((1 + int(found[1]) for path in shapes if (found := re.match(pattern, path))), default=0)


def has(shapes: Mapping[str, Shape], prefix: str) -> bool:
  """True if any path starts with `prefix`."""
  return any(path.startswith(prefix) for path in shapes)


def _places(
  name: str, rows: Mapping[str, Any], places: Mapping[str, tuple[int, int, float]]
) -> Iterator[tuple[str, int | None]]:
  """(the name in the table, the layer) for each of `rows` that a name of theirs is of."""
  if name in rows:
    yield name, None
  for number in re.finditer(r'\d+', name):
    before, after = name[: number.start()], name[number.end() :]
    if (theirs := before + EVERY + after) in rows:
      yield theirs, None
    for place, (step, offset, last) in places.items():
      layer, rest = divmod(int(number[0]) - offset, step)
      if not rest and offset <= int(number[0]) <= last and (theirs := before + place + after) in rows:
        yield theirs, layer
