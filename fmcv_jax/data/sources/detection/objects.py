"""Objects of an image as fields of an example, by the rules that all annotation formats share."""

import dataclasses
import io
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from typing_extensions import override

from fmcv_jax.data.images.decode import FORMATS
from fmcv_jax.data.images.jpeg import exif_orientation
from fmcv_jax.data.sources.base import BadRecord, Example, Source
from fmcv_jax.fields import Field

SLACK = 2.0  # pixels that rounded boxes may lie outside of their image
_TURNED = (5, 6, 7, 8)  # orientations that swap height and width

OUTSIDE, NO_AREA = 'boxes outside of their image', 'boxes without area'
NEGATIVE, NOT_FINITE = 'boxes with a negative width or height', 'boxes that are not four finite numbers'

# A row per object, next to `boxes`, `classes` and `masks`, which have these meanings everywhere.
OBJECT_FIELDS: Mapping[str, Field] = {
  name: Field('array', group='objects') for name in ('crowd', 'difficult', 'area', 'thing')
}


class ObjectSource(Source):
  """A source of images with objects and without texts; what it has opened does not travel to other processes."""

  @property
  @override
  def fields(self) -> Mapping[str, Field]:
    return OBJECT_FIELDS

  def _check(self, index: int) -> None:
    if not 0 <= index < len(self):
      raise IndexError(f'{index} of {len(self)}')

  @override
  def texts_of(self, index: int) -> tuple[str, ...]:
    raise BadRecord('has objects, but no text')

  def __getstate__(self) -> dict[str, Any]:
    own: Any = self
    return {field.name: getattr(self, field.name) for field in dataclasses.fields(own)}


@dataclasses.dataclass
class Objects:
  """The objects of one image, all with N rows.

  boxes    float [N, 4]: left, top, right, bottom in pixels
  classes  int32 [N]
  arrays   further fields with a row per object
  masks    bool [N, height, width]; None if they are not read
  """

  boxes: np.ndarray
  classes: np.ndarray
  arrays: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
  masks: np.ndarray | None = None


class StoredSize(NamedTuple):
  """Pixels of an encoded image as stored, and the EXIF orientation (1 to 8) that makes it upright."""

  height: int
  width: int
  orientation: int

  @property
  def upright(self) -> tuple[int, int]:
    """(height, width) after the orientation is applied."""
    return (self.width, self.height) if self.orientation in _TURNED else (self.height, self.width)


def stored_size(image: bytes) -> StoredSize:
  """Reads the header of an encoded image; raises BadRecord if there is none."""
  try:
    opened = Image.open(io.BytesIO(image), formats=FORMATS)
    width, height = opened.size
  except Exception as error:  # Pillow's plugins raise many types on damaged files
    raise BadRecord(' '.join(f'{type(error).__name__}: {error}'.split())) from error
  return StoredSize(height, width, exif_orientation(opened))


def clipped(boxes: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(boxes cut at the edges of their images, what is wrong with each: '' or the reason to leave it out).

  boxes            float [N, 4]: left, top, right, bottom in pixels
  heights, widths  [N] of the image of each box

  What is left out here is left out by the training code of DETR, too; torchvision and Detectron2 stop at it.
  """
  reasons = np.full(len(boxes), '', object)
  reasons[(boxes[:, 2:] == boxes[:, :2]).any(-1)] = NO_AREA
  reasons[(boxes[:, 2:] < boxes[:, :2]).any(-1)] = NEGATIVE
  cut = np.clip(boxes, 0, np.stack([widths, heights, widths, heights], -1))
  reasons[(cut[:, 2:] <= cut[:, :2]).any(-1) & (reasons == '')] = OUTSIDE
  reasons[~np.isfinite(boxes).all(-1)] = NOT_FINITE
  return cut, reasons


def make_example(image: bytes, key: str, objects: Objects, size: tuple[int, int] | None) -> Example:
  """The record of an image and its objects, as positions in the upright image.

  size  (height, width) of the image by its annotations. If the file has these sides only before its EXIF orientation is
        applied, objects are turned with the image; None or equal sides either way: they belong to the upright image

  Raises BadRecord if the file has other sides.
  """
  stored = stored_size(image)
  if size is not None and size != stored.upright:
    if size != (stored.height, stored.width):
      raise BadRecord(
        f'its annotations are of an image of {size[0]} x {size[1]} pixels, but the file has {stored.upright[0]} x '
        f'{stored.upright[1]} (height x width)'
      )
    objects = _upright(objects, stored)
  example: Example = {'image': image, 'key': key}
  example |= {'boxes': objects.boxes.astype(np.float32).reshape(-1, 4), 'classes': objects.classes.astype(np.int32)}
  if objects.masks is not None:
    example['masks'] = objects.masks
  return example | dict(objects.arrays)


def _upright(objects: Objects, stored: StoredSize) -> Objects:
  """Objects of the stored image as those of the upright one."""
  left, top, right, bottom = objects.boxes.T
  if stored.orientation in (2, 3, 7, 8):
    left, right = stored.width - right, stored.width - left
  if stored.orientation in (3, 4, 6, 7):
    top, bottom = stored.height - bottom, stored.height - top
  masks = objects.masks
  if masks is not None:
    masks = masks[:, :, ::-1] if stored.orientation in (2, 3, 7, 8) else masks
    masks = masks[:, ::-1] if stored.orientation in (3, 4, 6, 7) else masks
    masks = masks.swapaxes(1, 2) if stored.orientation in _TURNED else masks
  edges = (top, left, bottom, right) if stored.orientation in _TURNED else (left, top, right, bottom)
  return dataclasses.replace(objects, boxes=np.stack(edges, -1), masks=masks)
