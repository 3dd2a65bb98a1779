"""Segments image files: lines, COCO's JSON with run lengths, and drawings."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageColor, ImageDraw

from fmcv_jax.apps.image_results import COLORS, coco_format, new_folder, opened, print_lines, write_results
from fmcv_jax.data.sources.detection.polygons import pycocotools_mask
from fmcv_jax.evaluate.segments import Segments
from fmcv_jax.inference.image_files import find_images
from fmcv_jax.inference.model import Model
from fmcv_jax.objectives.mask_prediction import Task
from fmcv_jax.parallel.distributed import is_main

FILE = 'segments.json'
_OPACITY = 0.5


def run(
  paths: Sequence[str],
  model: str,
  task: Task | None = None,
  *,
  threshold: float | None = None,
  step: int | None = None,
  to: str | None = None,
) -> None:
  """Prints a line for each segment, and writes into the folder `to` segments.json and a drawing of each image.

  paths  image files, and folders that are read with their subfolders; files that cannot be read are named, counted and
         left out

  The other arguments are those of `Model.segment`. Raises UserError if no image can be read, and before the model is
  read for a folder that has results already, or if pycocotools, which writes them, is not installed.
  """
  folder = new_folder(to, FILE)
  if folder is not None:
    pycocotools_mask()
  files = find_images(paths)
  found = Model(model, step=step, unreadable='nan').segment(files, task, threshold=threshold)
  if not is_main():
    return
  print_lines(files, found, _lines)
  if folder is not None:
    read = {file: segments for file, segments in zip(files, found, strict=True) if segments is not None}
    drawings = {file: functools.partial(draw, file, segments) for file, segments in read.items()}
    write_results(folder, FILE, in_coco_format(read), drawings)


def _lines(found: Segments) -> list[str]:
  return [
    f'{name}  {score:.3f}  {mask.sum()} pixels'
    for name, score, mask in zip(found.names, found.scores, found.masks, strict=True)
  ]


def in_coco_format(found: Mapping[str, Segments]) -> dict[str, Any]:
  """COCO's JSON with scores: images, categories (the classes that were found, with their numbers from 1 as ids), and
  annotations with run lengths, box and area."""
  labels: dict[int, str] = {}
  for segments in found.values():
    labels |= dict(zip((segments.labels + 1).tolist(), segments.names, strict=True))
  return coco_format(
    {file: segments.map.shape for file, segments in found.items()},
    dict(sorted(labels.items())),
    [(file, keys) for file, segments in found.items() for keys in _annotations(segments)],
  )


def _annotations(found: Segments) -> Iterator[dict[str, Any]]:
  rle = pycocotools_mask()
  for mask, label, score in zip(found.masks, found.labels, found.scores, strict=True):
    encoded = rle.encode(np.asfortranarray(mask, np.uint8))
    yield {
      'category_id': int(label) + 1,
      'segmentation': {'size': list(mask.shape), 'counts': encoded['counts'].decode()},
      'bbox': rle.toBbox(encoded).tolist(),
      'area': int(mask.sum()),
      'score': float(score),
    }


def draw(file: str, found: Segments) -> Image.Image:
  """The image with the pixels of each segment in a color, and its name."""
  pixels = np.asarray(opened(file)).astype(np.float32)
  colors = [np.array(ImageColor.getrgb(COLORS[row % len(COLORS)]), np.float32) for row in range(len(found.masks))]
  for row, color in enumerate(colors):
    own = found.map == row
    pixels[own] = (1 - _OPACITY) * pixels[own] + _OPACITY * color
  image = Image.fromarray(pixels.round().astype(np.uint8))
  pen = ImageDraw.Draw(image)
  for row, name in enumerate(found.names):
    places = np.argwhere(found.map == row)
    if not len(places):  # covered by better ones
      continue
    y, x = places[np.square(places - places.mean(0)).sum(1).argmin()].tolist()  # the pixel nearest to the middle
    pen.rectangle(pen.textbbox((x, y), name, anchor='mm'), fill=COLORS[row % len(COLORS)])
    pen.text((x, y), name, fill='white', anchor='mm')
  return image
