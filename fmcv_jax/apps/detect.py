"""Finds objects in image files by texts or by example images: lines, COCO's JSON, and drawings."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw

from fmcv_jax.console import make_console
from fmcv_jax.data.images.decode import rgb
from fmcv_jax.errors import UserError
from fmcv_jax.inference.detector import DetectedObject
from fmcv_jax.inference.image_files import find_images, unreadable_line
from fmcv_jax.inference.model import Model
from fmcv_jax.parallel.distributed import is_main

_COLORS = ('#e6194b', '#3cb44b', '#4363d8', '#f58231', '#911eb4', '#008080', '#9a6324', '#808000')
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
  folder = None if to is None else pathlib.Path(to)
  if folder is not None and (folder / FILE).exists():
    raise UserError(f'--to {to}: {FILE} exists there; give another folder')
  files = find_images(paths)
  labels = [*texts, *like]
  found = Model(model, step=step, unreadable='nan').detect(files, texts, like=like, threshold=threshold)
  if not is_main():
    return
  console, readable = make_console(markup=False), 0
  for file, objects in zip(files, found, strict=True):
    readable += objects is not None
    for thing in objects or ():
      box = ' '.join(f'{edge:.0f}' for edge in thing.box)
      console.print(f'{file}  {thing.label}  {thing.score:.3f}  {box}', highlight=False, soft_wrap=True)
  if readable < len(files):
    make_console(stderr=True, markup=False).print(
      unreadable_line(len(files) - readable, len(files)), highlight=False, soft_wrap=True
    )
  if not readable:
    raise UserError(f'none of the {len(files)} images can be read')
  if folder is not None:
    folder.mkdir(parents=True, exist_ok=True)
    read = [(file, objects) for file, objects in zip(files, found, strict=True) if objects is not None]
    (folder / FILE).write_text(json.dumps(in_coco_format(read, labels), indent=1) + '\n')
    for number, (file, objects) in enumerate(read):
      draw(file, objects, labels).save(folder / f'{number:05d}_{pathlib.Path(file).stem}.png')
    console.print(f'{folder}: {FILE} and {len(read)} drawings', highlight=False, soft_wrap=True)


def in_coco_format(found: Sequence[tuple[str, Sequence[DetectedObject]]], labels: Sequence[str]) -> dict[str, Any]:
  """COCO's JSON with scores: images, categories (the labels, from id 1), annotations with x, y, width, height."""
  whole: dict[str, Any] = {'images': [], 'annotations': []}
  whole['categories'] = [{'id': number, 'name': label} for number, label in enumerate(labels, 1)]
  for image_id, (file, objects) in enumerate(found, 1):
    width, height = _opened(file).size
    whole['images'].append({'id': image_id, 'file_name': file, 'height': height, 'width': width})
    for thing in objects:
      left, top, right, bottom = thing.box
      whole['annotations'].append(
        {
          'id': len(whole['annotations']) + 1,
          'image_id': image_id,
          'category_id': labels.index(thing.label) + 1,
          'bbox': [left, top, right - left, bottom - top],
          'area': (right - left) * (bottom - top),
          'iscrowd': 0,
          'score': thing.score,
        }
      )
  return whole


def draw(file: str, objects: Sequence[DetectedObject], labels: Sequence[str]) -> Image.Image:
  """The image with a box, the label and the score of each object, the best on top."""
  image = _opened(file)
  pen, line = ImageDraw.Draw(image), max(1, round(min(image.size) / 200))
  for thing in reversed(objects):
    color, (left, top, right, bottom) = _COLORS[labels.index(thing.label) % len(_COLORS)], thing.box
    pen.rectangle((left, top, right, bottom), outline=color, width=line)
    text = f'{thing.label} {thing.score:.2f}'
    place = pen.textbbox((left + line, top + line), text)
    pen.rectangle(place, fill=color)
    pen.text((left + line, top + line), text, fill='white')
  return image


def _opened(file: str) -> Image.Image:
  with Image.open(file) as image:
    return rgb(image)
