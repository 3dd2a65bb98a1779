"""One change of geometry for all that belongs to an image: pixels, maps, masks, boxes and points."""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

from fmcv_jax.data.images.resize import Box
from fmcv_jax.errors import BadRecord
from fmcv_jax.fields import Field


@dataclasses.dataclass(frozen=True)
class Geometry:
  """A box of an image of `height` x `width` pixels, resized to `size`; what it has outside of the image is filled.

  box   (left, top, right, bottom) in pixels from the top left corner of the image
  size  (height, width) of the output in pixels
  """

  height: int
  width: int
  box: Box
  size: tuple[int, int]

  @property
  def identity(self) -> bool:
    """True if the output is the image itself."""
    return self.box == (0, 0, self.width, self.height) and self.size == (self.height, self.width)

  @functools.cached_property
  def inside(self) -> tuple[int, int, int, int]:
    """The part (left, top, right, bottom) of the output that shows the image, in whole pixels."""
    left, top, right, bottom = self.box
    rows, columns = self.size
    x, y = columns / (right - left), rows / (bottom - top)
    return (
      max(0, round(-left * x)),
      max(0, round(-top * y)),
      min(columns, round((self.width - left) * x)),
      min(rows, round((self.height - top) * y)),
    )

  @classmethod
  def of(cls, array: np.ndarray, size: tuple[int, int]) -> 'Geometry':
    """The geometry whose `array` this is, for an output of `size` (height, width)."""
    left, top, right, bottom, height, width = (float(x) for x in array)
    return cls(round(height), round(width), (left, top, right, bottom), size)

  @property
  def array(self) -> np.ndarray:
    """float32 [6]: the box, then the height and width of the image, for `original_boxes`."""
    return np.array([*self.box, self.height, self.width], np.float32)

  @property
  def visible_box(self) -> Box:
    """The part of the box that lies in the image, which is resized to `inside`."""
    left, top, right, bottom = self.box
    return max(left, 0), max(top, 0), min(right, self.width), min(bottom, self.height)

  def apply(self, name: str, values: np.ndarray, field: Field) -> np.ndarray:
    """A map, masks, boxes or points of the image as those of the output; see `kept` for rows of boxes that go.

    Raises BadRecord for arrays that are not as `field` says, or not of the size of the image.
    """
    values = np.asarray(values)
    if field.kind in ('map', 'masks') and self.identity:
      return self._of_image(name, values, (0, 1) if field.kind == 'map' else (1, 2))
    if field.kind == 'map':
      return self._nearest(self._of_image(name, values, (0, 1)), field.fill, 0)
    if field.kind == 'masks':
      return self._nearest(self._of_image(name, values, (1, 2)), field.fill, 1)
    if field.kind == 'boxes':
      corners = self._points(self._boxes(name, values).reshape(-1, 2, 2))
      return np.clip(corners, 0, self.size[::-1]).reshape(-1, 4).astype(np.float32)
    assert field.kind == 'points', field.kind
    if values.shape[-1:] == (3,):
      moved = self._points(values[..., :2])
      within = ((moved >= 0) & (moved < self.size[::-1])).all(-1)
      return np.concatenate([moved, np.where(within, values[..., 2], 0)[..., None]], -1).astype(np.float32)
    return self._points(_floats(name, values, 2)).astype(np.float32)

  def kept(self, name: str, boxes: np.ndarray) -> np.ndarray:
    """bool [N]: whether something of each box is in the output.

    A box that lies in the output entirely is kept at any size; of one that is cut, at least a pixel has to remain along
    each side.
    """
    corners = self._points(self._boxes(name, np.asarray(boxes)).reshape(-1, 2, 2)).reshape(-1, 4)
    visible = np.clip(corners.reshape(-1, 2, 2), 0, self.size[::-1]).reshape(-1, 4)
    sides = visible[:, 2:] - visible[:, :2]
    return np.isclose(visible, corners, atol=1e-3).all(-1) | (sides >= 1).all(-1)

  def _boxes(self, name: str, boxes: np.ndarray) -> np.ndarray:
    """Refuses boxes in another convention, which would be other boxes: as (x, y, width, height), or as fractions."""
    boxes = _floats(name, boxes, 4)
    if (boxes[..., 2:] < boxes[..., :2]).any():
      raise BadRecord(f'{name}: a right or bottom edge lies before its left or top one; give left, top, right, bottom')
    if boxes.any() and boxes.max() <= 1 and min(self.height, self.width) > 4:
      raise BadRecord(f'{name}: all edges lie within one pixel; they look like fractions, give pixels')
    return boxes

  def _points(self, points: np.ndarray) -> np.ndarray:
    left, top, right, bottom = self.box
    scale = np.array([self.size[1] / (right - left), self.size[0] / (bottom - top)])
    return (points.astype(np.float64) - (left, top)) * scale

  def _nearest(self, values: np.ndarray, fill: float, axis: int) -> np.ndarray:
    """The pixel of `values` under each pixel's center; the height is at `axis`, the width after it."""
    left, top, right, bottom = self.box
    out = values
    for offset, (start, end, size, side) in enumerate(
      ((top, bottom, self.size[0], self.height), (left, right, self.size[1], self.width))
    ):
      place = np.floor(start + (np.arange(size) + 0.5) * ((end - start) / size)).astype(np.int64)
      inside = (place >= 0) & (place < side)
      out = np.take(out, np.clip(place, 0, side - 1), axis=axis + offset)
      if not inside.all():
        index = (slice(None),) * (axis + offset)
        out[(*index, ~inside)] = np.array(fill).astype(values.dtype)
    return out

  def _of_image(self, name: str, values: np.ndarray, axes: tuple[int, int]) -> np.ndarray:
    sides = tuple(values.shape[axis] for axis in axes if axis < values.ndim)
    if sides != (self.height, self.width):
      raise BadRecord(
        f'{name} {values.dtype} {list(values.shape)} is not of the size of the image, '
        f'{self.height} x {self.width} pixels (height x width)'
      )
    return values


def original_boxes(boxes: np.ndarray, geometry: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Boxes float32 [B, N, 4] of outputs of `size` (height, width) as those of the images, cut at their edges.

  geometry  float [B, 6], of each example as in `Geometry.array`
  """
  box, sides = geometry[:, :4], geometry[:, [5, 4]]
  scale = (box[:, 2:] - box[:, :2]) / np.array(size[::-1])
  corners = boxes.reshape(len(boxes), -1, 2) * scale[:, None] + box[:, None, :2]
  return np.clip(corners, 0, sides[:, None]).reshape(boxes.shape).astype(np.float32)


class OriginalPixels(NamedTuple):
  """Resampling of maps of an output to pixels of the image: `rows` float32 [h, rows of the map] and `columns` float32
  [w, columns of the map] give the h x w pixels at `place`, those that the output shows."""

  rows: np.ndarray
  columns: np.ndarray
  place: tuple[slice, slice]

  def of(self, maps: np.ndarray) -> np.ndarray:
    """Maps float [..., rows, columns] at these pixels, float32 [..., h, w]."""
    return (self.rows @ maps) @ self.columns.T


def original_pixels(resolution: tuple[int, ...], geometry: Geometry) -> OriginalPixels:
  """Of maps of the whole output in this resolution (rows, columns): they are interpolated to the size of the output
  first, and what shows the image then to the pixels of the image, both times between centers, without a filter."""
  left, top, right, bottom = geometry.inside
  x_low, y_low, x_high, y_high = (round(edge) for edge in geometry.visible_box)
  x_high, y_high = max(x_high, x_low + 1), max(y_high, y_low + 1)
  rows = interpolation(bottom - top, y_high - y_low) @ interpolation(resolution[0], geometry.size[0])[top:bottom]
  columns = interpolation(right - left, x_high - x_low) @ interpolation(resolution[1], geometry.size[1])[left:right]
  place = slice(y_low, y_high), slice(x_low, x_high)
  return OriginalPixels(rows.astype(np.float32), columns.astype(np.float32), place)


def interpolation(old: int, new: int) -> np.ndarray:
  """float64 [new, old]: the matrix of linear interpolation between the centers of pixels; the edge is repeated."""
  place = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
  first = np.floor(place).astype(int)
  matrix = np.zeros((new, old))
  matrix[np.arange(new), first] = 1 - (place - first)
  matrix[np.arange(new), np.minimum(first + 1, old - 1)] += place - first
  return matrix


def _floats(name: str, values: np.ndarray, columns: int) -> np.ndarray:
  """Checks float [..., columns]; an empty list has no rows."""
  if values.size == 0:
    return np.zeros((0, columns), np.float32)
  if values.shape[-1] != columns or values.dtype.kind not in 'fiu' or not np.isfinite(values).all():
    raise BadRecord(f'{name} {values.dtype} {list(values.shape)} is not finite numbers [..., {columns}]')
  return values
