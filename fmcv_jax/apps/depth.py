"""Depth of image files: PNGs of 16 bits or .npy, a table of their scales, and colored images."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from rich.progress import Progress

from fmcv_jax.apps.image_results import new_folder
from fmcv_jax.console import make_console
from fmcv_jax.data.sources.in_memory import InMemoryImages
from fmcv_jax.errors import UserError
from fmcv_jax.inference.depth import DepthEstimator
from fmcv_jax.inference.image_files import find_images, save_png, unreadable_line
from fmcv_jax.inference.output_files import UNREADABLE, write_row
from fmcv_jax.parallel.distributed import is_main
from fmcv_jax.pretrained import packaged
from fmcv_jax.run import Run

FILE = 'depth.jsonl'
_MILLIMETER = 0.001
_FAR, _MIDDLE, _NEAR = '#000004', '#bb3754', '#fcffa4'


def run(
  paths: Sequence[str], model: str, to: str, *, npy: bool = False, step: int | None = None, batch: int = 8
) -> None:
  """Writes the depth of each image, in its own size, into the folder `to`.

  NUMBER_NAME.png (gray, 16 bits) or .npy (float32), NUMBER_NAME_color.png, in which near is bright, and depth.jsonl.
  It has a row for each image: `file`, `depth`, `color`, `width`, `height`, `output` ('depth' in meters, or
  'inverse_depth' up to a scale and a shift), and `scale`, by which the numbers of the file are multiplied to give it.

  paths  image files, and folders that are read with their subfolders; files that cannot be read are named, counted and
         left out

  Raises UserError if no image can be read, and before the model is read for a folder that has results already.
  """
  if batch < 1:
    raise UserError(f'--batch: expected at least 1, got {batch}')
  if '://' in to:
    raise UserError(f'--to {to}: give a local folder')
  folder = new_folder(to, FILE) or pathlib.Path(to)
  files, job = find_images(paths), Run.reopen(packaged.locate(model))
  subject, _ = job.restored_model(step)
  estimator = DepthEstimator(subject, job.experiment.data.image, batch)
  console, readable = make_console(markup=False, quiet=not is_main()), 0
  rows: list[dict[str, Any]] = [{'file': file, 'error': UNREADABLE} for file in files]
  with Progress(console=console, transient=True) as bar:
    for number, depth in bar.track(estimator.maps(InMemoryImages(files)), total=len(files), description='computing'):
      if depth is not None:
        readable += 1
        if is_main():
          folder.mkdir(parents=True, exist_ok=True)
          rows[number] = _write(folder, number, files[number], depth, estimator.output, npy)
  if not readable:
    raise UserError(f'none of the {len(files)} images can be read')
  if not is_main():
    return
  if readable < len(files):
    make_console(stderr=True, markup=False).print(
      unreadable_line(len(files) - readable, len(files)), highlight=False, soft_wrap=True
    )
  with (folder / FILE).open('x', encoding='utf-8') as output:
    for row in rows:
      write_row(output, row)
  console.print(f'{folder}: {FILE} and the depth of {readable} images', highlight=False, soft_wrap=True)


def _write(folder: pathlib.Path, number: int, file: str, depth: np.ndarray, output: str, npy: bool) -> dict[str, Any]:
  name = f'{number:05d}_{pathlib.Path(file).stem}'
  about = {'file': file, 'output': output}
  values, scale = (depth, 1.0) if npy else sixteen_bits(depth, output)
  own = f'{name}.npy' if npy else f'{name}.png'
  if npy:
    np.save(folder / own, values)
  else:
    save_png(values, folder / own, {**about, 'scale': scale})
  colored(depth, output).save(folder / f'{name}_color.png')
  sides = {'width': depth.shape[1], 'height': depth.shape[0]}
  return {'file': file, 'depth': own, 'color': f'{name}_color.png', **sides, 'output': output, 'scale': scale}


def sixteen_bits(depth: np.ndarray, output: str) -> tuple[np.ndarray, float]:
  """uint16 [H, W], and the scale that gives the values back: a millimeter for depths up to 65.535 meters.

  Cubic interpolation may leave values below 0, which become 0.
  """
  most = float(depth.max())
  scale = _MILLIMETER if output == 'depth' and most <= _MILLIMETER * 65535 else max(most, 1e-9) / 65535
  return np.rint(np.clip(depth / scale, 0, 65535)).astype(np.uint16), scale


def colored(depth: np.ndarray, output: str) -> Image.Image:
  """An image from black (far) over red to yellow (near), of inverse depth between its extremes."""
  inverse = 1 / np.maximum(depth, 1e-3) if output == 'depth' else depth
  low, high = float(inverse.min()), float(inverse.max())
  gray = np.rint((inverse - low) / max(high - low, 1e-9) * 255).astype(np.uint8)
  return ImageOps.colorize(Image.fromarray(gray), _FAR, _NEAR, mid=_MIDDLE)
