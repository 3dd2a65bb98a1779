"""Masks from polygons and run lengths, by pycocotools."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fmcv_jax.data.sources.base import BadRecord
from fmcv_jax.errors import UserError


def is_shape(shape: Any) -> bool:
  """True for a segmentation with pixels: run lengths, or at least one polygon of three points or more."""
  if isinstance(shape, dict):
    return 'counts' in shape and 'size' in shape
  return isinstance(shape, list) and any(_is_polygon(part) for part in shape)


def masks(shapes: Sequence[Any], height: int, width: int) -> np.ndarray:
  """bool [N, height, width] of N segmentations, each {'size', 'counts'} or a list of polygons [x0, y0, x1, y1, ...].

  Polygons of fewer than three points are left out, as by Detectron2; pycocotools stops where the first is one.
  Raises BadRecord for run lengths of another size.
  """
  rle = pycocotools_mask()
  out = np.zeros((len(shapes), height, width), bool)
  for mask, shape in zip(out, shapes):
    if isinstance(shape, dict):
      if list(shape['size']) != [height, width]:
        raise BadRecord(f'run lengths of {shape["size"]} pixels in an image of {height} x {width} (height x width)')
      whole = rle.frPyObjects([shape], height, width)[0] if isinstance(shape['counts'], list) else shape
    else:
      whole = rle.merge(rle.frPyObjects([part for part in shape if _is_polygon(part)], height, width))
    mask[:] = rle.decode(whole)
  return out


def pycocotools_mask() -> Any:
  """The module `pycocotools.mask`; raises UserError if it is not installed."""
  try:
    import pycocotools.mask
  except ImportError as error:
    raise UserError('masks need pycocotools: pip install fmcv-jax[detection]') from error
  return pycocotools.mask


def _is_polygon(part: Any) -> bool:
  return isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0
