"""Results of commands that look at image files: lines in the terminal, COCO's JSON, and a drawing of each image."""

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from PIL import Image

from fmcv_jax.console import make_console
from fmcv_jax.data.images.decode import rgb
from fmcv_jax.errors import UserError
from fmcv_jax.inference.image_files import unreadable_line

COLORS = ('#e6194b', '#3cb44b', '#4363d8', '#f58231', '#911eb4', '#008080', '#9a6324', '#808000')

T = TypeVar('T')


def new_folder(to: str | None, file: str) -> pathlib.Path | None:
  """The folder `to`; UserError if it has results, the file `file`, already."""
  folder = None if to is None else pathlib.Path(to)
  if folder is not None and (folder / file).exists():
    raise UserError(f'--to {to}: {file} exists there; give another folder')
  return folder


def print_lines(files: Sequence[str], found: Sequence[T | None], lines_of: Callable[[T], Sequence[str]]) -> None:
  """Prints the lines of each file after its name, and how many files cannot be read, for which `found` has None.

  UserError if none can be read.
  """
  console = make_console(markup=False)
  readable = [(file, own) for file, own in zip(files, found, strict=True) if own is not None]
  for file, own in readable:
    for line in lines_of(own):
      console.print(f'{file}  {line}', highlight=False, soft_wrap=True)
  if len(readable) < len(files):
    make_console(stderr=True, markup=False).print(
      unreadable_line(len(files) - len(readable), len(files)), highlight=False, soft_wrap=True
    )
  if not readable:
    raise UserError(f'none of the {len(files)} images can be read')


def write_results(
  folder: pathlib.Path, name: str, content: Mapping[str, Any], drawings: Mapping[str, Callable[[], Image.Image]]
) -> None:
  """Writes the JSON file `name`, and a PNG for each image file that `drawings` names."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / name).write_text(json.dumps(content, indent=1) + '\n')
  for number, (file, draw) in enumerate(drawings.items()):
    draw().save(folder / f'{number:05d}_{pathlib.Path(file).stem}.png')
  make_console(markup=False).print(f'{folder}: {name} and {len(drawings)} drawings', highlight=False, soft_wrap=True)


def coco_format(
  files: Mapping[str, tuple[int, int]], labels: Mapping[int, str], annotations: Sequence[tuple[str, Mapping[str, Any]]]
) -> dict[str, Any]:
  """COCO's JSON with scores.

  files        (height, width) by file
  labels       names of the categories by id
  annotations  of each object the file and its keys, such as 'category_id', 'bbox', 'area', 'score'
  """
  ids = {file: number for number, file in enumerate(files, 1)}
  return {
    'images': [
      {'id': ids[file], 'file_name': file, 'height': height, 'width': width} for file, (height, width) in files.items()
    ],
    'annotations': [
      {'id': number, 'image_id': ids[file], **keys, 'iscrowd': 0} for number, (file, keys) in enumerate(annotations, 1)
    ],
    'categories': [{'id': number, 'name': name} for number, name in labels.items()],
  }


def opened(file: str) -> Image.Image:
  """The upright image of a file, RGB."""
  with Image.open(file) as image:
    return rgb(image)
