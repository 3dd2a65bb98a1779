"""Images from a trained diffusion model: painted anew, from another picture, into a hole, between two texts.

    painter = ImageGenerator('runs/painter')
    pictures = painter.generate(['a red heart'] * 4, steps=20, guidance=4.0, seed=0)  # uint8 [4, H, W, 3]

A picture depends on the seed, its place in the request and what it is to show; not on the mesh or on its neighbours.
"""

import contextlib
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from fmcv_jax.errors import UserError
from fmcv_jax.inference.generator import STRENGTH, ImageGenerator
from fmcv_jax.inference.image_files import make_grid, pad_for_outpainting, read_image, read_mask, save_png
from fmcv_jax.parallel.distributed import is_main


@contextlib.contextmanager
def _folder(path: pathlib.Path) -> Iterator[None]:
  """Makes a folder for pictures before they are painted; UserError where none can be. It goes if they are refused."""
  if not is_main():
    yield
    return
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f'--output {path}: cannot be written ({error.strerror})') from error
  try:
    yield
  except UserError:
    with contextlib.suppress(OSError):  # others have put something there
      path.rmdir()
    raise


def run(
  prompts: Sequence[str],
  model: str,
  output: str | pathlib.Path = 'generated',
  *,
  step: int | None = None,
  batch: int = 64,
  overrides: Sequence[str] = (),
  count: int = 4,
  seed: int = 0,
  image: str | None = None,
  mask: str | None = None,
  expand: float | None = None,
  strength: float | None = None,
  interpolate: bool = False,
  control: str | None = None,
  drawn: bool = False,
  control_scale: float | None = None,
  **options: Any,
) -> pathlib.Path:
  """`count` pictures for each prompt; writes them and a grid (a row a prompt, of one prompt a square) to `output`.

  Returns the grid's path.
  """
  if count < 1:
    raise UserError(f'-n: {count} pictures; give at least 1')
  if interpolate and (len(prompts) != 2 or image):
    raise UserError('--interpolate: goes from one prompt to a second; give two, and no image')
  if (mask is not None or expand is not None) and not image:
    raise UserError('--mask and --expand: need an --image')
  if mask is not None and expand is not None:
    raise UserError('--mask and --expand: give one of them')
  if strength is not None and (not image or mask is not None or expand is not None):
    raise UserError('--strength: is for an --image that is painted over as a whole')
  if not control and (drawn or control_scale is not None):
    raise UserError('--control-preprocessed and --control-scale: need a --control')
  folder, grid = pathlib.Path(output), pathlib.Path(output) / 'grid.png'
  if folder.exists() and not folder.is_dir():
    raise UserError(f'--output {folder}: is a file; give a folder')
  for file in (image, control):
    if file and not pathlib.Path(file).is_file():
      raise UserError(f'{file}: no such image file')
  console, painter = Console(quiet=not is_main()), ImageGenerator(model, step=step, batch=batch, overrides=overrides)
  if bool(painter.told) != bool(prompts):
    raise UserError('give at least one prompt' if painter.told else f'{model}: is told nothing; give it no prompt')
  prompts = prompts or ['']
  for prompt in (*prompts, options.get('negative', '')):
    if (left := painter.truncated_prompt(prompt)) is not None:
      console.print(f'prompt too long, cut to: {left}', highlight=False, markup=False)
  rows = [prompts[0]] * count if interpolate else [prompt for prompt in prompts for _ in range(count)]

  def repeated(x):
    return np.repeat(x[None], len(rows), axis=0)

  about = {'model': str(model), 'step': painter.step, 'seed': seed, **options}
  if control:
    followed = {'drawn': drawn, 'control_scale': 1.0 if control_scale is None else control_scale}
    options |= {'control': repeated(read_image(control, painter.size)), **followed}
    about |= {'control': control, **followed}
  with _folder(folder), Progress(console=console, transient=True) as bar:
    task = bar.add_task('painting', total=len(rows))
    options['progress'] = lambda ready: bar.advance(task, ready)
    if interpolate:
      pictures = painter.interpolate(prompts[0], prompts[1], count, seed=seed, **options)
    elif image is None:
      pictures = painter.generate(rows, seed=seed, **options)
    else:
      given, hole = read_image(image, painter.size), None
      if mask is not None:
        hole = read_mask(mask, image, painter.size)
      elif expand is not None:
        given, hole = pad_for_outpainting(given, expand)
      if hole is not None:
        pictures = painter.fill(repeated(given), repeated(hole), rows, seed=seed, **options)
      else:
        about['strength'] = STRENGTH if strength is None else strength
        pictures = painter.edit(repeated(given), rows, strength=about['strength'], seed=seed, **options)
  if not is_main():
    return grid
  about |= {'image': image, 'mask': mask, 'expand': expand} if image else {}
  for index, (prompt, picture) in enumerate(zip(rows, pictures, strict=True)):
    said = list(prompts) if interpolate else prompt
    save_png(picture, folder / f'{index:04d}.png', {'prompt': said, 'number': index, **about})
  columns = count if interpolate or len(prompts) > 1 else math.ceil(math.sqrt(count))
  save_png(make_grid(pictures, columns), grid, {'prompts': list(prompts), **about})
  console.print(f'{len(pictures)} pictures and {grid}', highlight=False)
  return grid
