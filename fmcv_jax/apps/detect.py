"""Finds objects in image files by texts or by example images: lines, COCO's JSON, and drawings."""

import functools
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw

from fmcv_jax.apps.image_results import COLORS, coco_format, new_folder, opened, print_lines, write_results
from fmcv_jax.inference.detector import DetectedObject
from fmcv_jax.inference.image_files import find_images
from fmcv_jax.inference.model import Model
from fmcv_jax.parallel.distributed import is_main

FILE = 'detections.json'


def run(
  paths: Sequence[str],
  model: str,
  texts: Sequence[str] = (),
  *,
  like: Sequence[str] = (),
  threshold: float = 0.2,
  step: int | None = None,
  to: str | None = None,
) -> None:
  """Prints a line for each object, and writes into the folder `to` detections.json and a drawing of each image.

  paths  image files, and folders that are read with their subfolders; files that cannot be read are named, counted and
         left out
  texts  texts to find; `like`: image files that each show an example

  Raises UserError if no image can be read, and before the model is read for a folder that has results already.
  """
  folder = new_folder(to, FILE)
  files = find_images(paths)
  labels = [*texts, *like]
  found = Model(model, step=step, unreadable='nan').detect(files, texts, like=like, threshold=threshold)
  if not is_main():
    return
  print_lines(files, found, lambda objects: [_line(thing) for thing in objects])
  if folder is not None:
    read = {file: objects for file, objects in zip(files, found, strict=True) if objects is not None}
    drawings = {file: functools.partial(draw, file, objects, labels) for file, objects in read.items()}
    write_results(folder, FILE, in_coco_format(list(read.items()), labels), drawings)


def _line(thing: DetectedObject) -> str:
  box = ' '.join(f'{edge:.0f}' for edge in thing.box)
  return f'{thing.label}  {thing.score:.3f}  {box}'


def in_coco_format(found: Sequence[tuple[str, Sequence[DetectedObject]]], labels: Sequence[str]) -> dict[str, Any]:
  """COCO's JSON with scores: images, categories (the labels, from id 1), annotations with x, y, width, height."""
  annotations = []
  for file, objects in found:
    for thing in objects:
      left, top, right, bottom = thing.box
      keys = {
        'category_id': labels.index(thing.label) + 1,
        'bbox': [left, top, right - left, bottom - top],
        'area': (right - left) * (bottom - top),
        'score': thing.score,
      }
      annotations.append((file, keys))
  return coco_format({file: opened(file).size[::-1] for file, _ in found}, dict(enumerate(labels, 1)), annotations)


def draw(file: str, objects: Sequence[DetectedObject], labels: Sequence[str]) -> Image.Image:
  """The image with a box, the label and the score of each object, the best on top."""
  image = opened(file)
  pen, line = ImageDraw.Draw(image), max(1, round(min(image.size) / 200))
  for thing in reversed(objects):
    color, (left, top, right, bottom) = COLORS[labels.index(thing.label) % len(COLORS)], thing.box
    pen.rectangle((left, top, right, bottom), outline=color, width=line)
    text = f'{thing.label} {thing.score:.2f}'
    place = pen.textbbox((left + line, top + line), text)
    pen.rectangle(place, fill=color)
    pen.text((left + line, top + line), text, fill='white')
  return image
