"""Masks of what points or a box indicate in image files: lines, PNGs and drawings."""

import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageColor

from fmcv_jax.apps.image_results import COLORS, new_folder, opened
from fmcv_jax.console import make_console
from fmcv_jax.data.sources.in_memory import InMemoryImages
from fmcv_jax.errors import UserError
from fmcv_jax.inference.image_files import find_images, save_png, unreadable_line
from fmcv_jax.inference.model import image_pipeline
from fmcv_jax.inference.output_files import write_row
from fmcv_jax.inference.prompted_segmenter import PromptedMask, PromptedSegmenter
from fmcv_jax.parallel.distributed import is_main
from fmcv_jax.pretrained import packaged
from fmcv_jax.run import Run

FILE = 'masks.jsonl'
_OPACITY = 0.5


def run(
  paths: Sequence[str],
  model: str,
  points: Sequence[str] = (),
  box: str | None = None,
  *,
  multimask: bool = True,
  step: int | None = None,
  to: str | None = None,
) -> None:
  """Prints a line for each mask, best first: file, score, pixels.

  The folder `to` gets NUMBER_NAME_0.png (8 bits, 255 inside) and so on, NUMBER_NAME.png, a drawing of the best, and
  masks.jsonl with a row for each mask: `file`, `mask`, `score`, `pixels`.

  paths   image files, and folders that are read with their subfolders; files that cannot be read are named, counted and
          left out. All get the same prompt
  points  'x,y' in pixels, inside of the object, or 'x,y,0', outside of it
  box     'left,top,right,bottom' in pixels

  Raises UserError if no image can be read, and before the model is read for a folder that has results already.
  """
  given = [_numbers('points', text, (2, 3)) for text in points]
  labels = [point[2] if len(point) == 3 else 1 for point in given]
  edges = () if box is None else _numbers('box', box, (4,))
  if not given and not edges:
    raise UserError('--points, --box: give at least a point or a box')
  folder = new_folder(to, FILE)
  files, job = find_images(paths), Run.reopen(packaged.locate(model))
  segmenter = PromptedSegmenter(job.restored_model(step)[0])
  encoded = segmenter.encode(image_pipeline(job, InMemoryImages(files), max_bad=1.0))
  console = make_console(markup=False, quiet=not is_main())
  rows, lost = [], 0
  for number, (file, image) in enumerate(zip(files, encoded, strict=True)):
    if image is None:
      lost += 1
      continue
    masks = image.segment(
      points=[point[:2] for point in given], point_labels=labels or None, boxes=edges, multimask=multimask
    )
    for mask in masks:
      console.print(f'{file}  {mask.score:.3f}  {mask.mask.sum()} pixels', highlight=False, soft_wrap=True)
    if folder is not None and is_main():
      rows += _write(folder, f'{number:05d}_{pathlib.Path(file).stem}', file, masks)
  if lost == len(files):
    raise UserError(f'none of the {lost} images can be read')
  if lost and is_main():
    make_console(stderr=True, markup=False).print(unreadable_line(lost, len(files)), highlight=False, soft_wrap=True)
  if folder is not None and is_main():
    with (folder / FILE).open('x', encoding='utf-8') as output:
      for row in rows:
        write_row(output, row)
    console.print(f'{folder}: {FILE} and {len(rows)} masks', highlight=False, soft_wrap=True)


def _numbers(argument: str, text: str, counts: tuple[int, ...]) -> list[float]:
  try:
    found = [float(part) for part in text.split(',')]
  except ValueError:
    found = []
  if len(found) not in counts:
    raise UserError(f'--{argument}: {text!r} is not {" or ".join(map(str, counts))} numbers, separated by commas')
  return found


def _write(
  folder: pathlib.Path, name: str, file: str, masks: Sequence[PromptedMask]
) -> list[dict[str, str | float | int]]:
  folder.mkdir(parents=True, exist_ok=True)
  rows: list[dict[str, str | float | int]] = []
  for place, found in enumerate(masks):
    own = f'{name}_{place}.png'
    save_png(found.mask.astype(np.uint8) * 255, folder / own, {'file': file, 'score': found.score})
    rows.append({'file': file, 'mask': own, 'score': found.score, 'pixels': int(found.mask.sum())})
  pixels = np.asarray(opened(file), np.float32)
  drawn = np.where(
    masks[0].mask[..., None], (1 - _OPACITY) * pixels + _OPACITY * np.array(ImageColor.getrgb(COLORS[0])), pixels
  )
  Image.fromarray(np.rint(drawn).astype(np.uint8)).save(folder / f'{name}.png')
  return rows
