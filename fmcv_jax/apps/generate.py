"""Images from a trained diffusion model: text-to-image, img2img, inpainting, outpainting, prompt interpolation.

    generator = ImageGenerator('runs/text_to_image')
    images = generator.generate(['a red heart'] * 4, steps=20, guidance=4.0, seed=0)  # uint8 [4, H, W, 3]

An image depends on the seed, its place in the request and its condition; not on the mesh or on the other images.
"""

import contextlib
import dataclasses
import itertools
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rich.progress import Progress

from fmcv_jax.apps.arguments import command_line_errors
from fmcv_jax.console import make_console
from fmcv_jax.diffusion.options import SamplingOptions
from fmcv_jax.errors import UserError
from fmcv_jax.inference.adapters import file_and_scale
from fmcv_jax.inference.generator import ImageGenerator
from fmcv_jax.inference.image_files import make_grid, pad_for_outpainting, read_image, read_mask, save_png
from fmcv_jax.parallel.distributed import is_main


@contextlib.contextmanager
def _folder(path: pathlib.Path) -> Iterator[None]:
  """Makes a folder before images are sampled; UserError if it cannot. It is removed if the request is refused."""
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
  options: SamplingOptions = SamplingOptions(),
  *,
  step: int | None = None,
  batch: int = 64,
  overrides: Sequence[str] = (),
  count: int = 4,
  image: str | None = None,
  mask: str | None = None,
  expand: float | None = None,
  interpolate: bool = False,
  control: str | None = None,
  lora: Sequence[str] = (),
) -> pathlib.Path:
  """`count` images for each prompt; writes them and a grid (a row a prompt, of one prompt a square) to `output`.

  lora  adapter files, 'FILE' or 'FILE:SCALE', to merge into the weights

  Returns the grid's path. Raises UserError for a folder with images of the same names, before the model is read.
  """
  if count < 1:
    raise UserError(f'-n: {count} images; give at least 1')
  if interpolate and (len(prompts) != 2 or image):
    raise UserError('--interpolate: goes from one prompt to a second; give two, and no image')
  if (mask is not None or expand is not None) and not image:
    raise UserError('--mask and --expand: need an --image')
  if mask is not None and expand is not None:
    raise UserError('--mask and --expand: give one of them')
  folder, grid = pathlib.Path(output), pathlib.Path(output) / 'grid.png'
  if folder.exists() and not folder.is_dir():
    raise UserError(f'--output {folder}: is a file; give a folder')
  for file in (image, control):
    if file and not pathlib.Path(file).is_file():
      raise UserError(f'{file}: no such image file')
  total = count if interpolate else count * max(len(prompts), 1)
  images_to_be = [folder / f'{index:04d}.png' for index in range(total)]
  if is_main() and (there := [path.name for path in (*images_to_be, grid) if path.exists()]):
    raise UserError(
      f'--output {folder}: has images of an earlier call ({there[0]}, ...), which would be overwritten; move them, '
      f'or give another folder: --output {_free_name(folder)}'
    )
  console = make_console(quiet=not is_main())
  with command_line_errors():
    adapters = [file_and_scale(given) for given in lora]
    generator = ImageGenerator(model, step=step, batch=batch, overrides=overrides, lora=adapters)
  if generator.takes_prompts != bool(prompts):
    unconditional = f'{model}: is not conditioned on prompts; give none'
    raise UserError('give at least one prompt' if generator.takes_prompts else unconditional)
  prompts = prompts or ['']
  for prompt in (*prompts, options.negative):
    if (left := generator.truncated_prompt(prompt)) is not None:
      console.print(f'prompt too long, truncated to: {left}', highlight=False, markup=False)
  rows = [prompts[0]] * count if interpolate else [prompt for prompt in prompts for _ in range(count)]

  def repeated(x: np.ndarray) -> np.ndarray:
    return np.repeat(x[None], len(rows), axis=0)

  edited = image is not None and mask is None and expand is None
  about = {'model': str(model), 'step': generator.step, **_relevant(options, control, edited)}
  with (
    command_line_errors(),
    _folder(folder),
    Progress(console=console, transient=True) as bar,
  ):
    task = bar.add_task('sampling', total=len(rows))
    keywords: dict[str, Any] = {'progress': lambda ready: bar.advance(task, ready)}
    if control:
      keywords['control'] = repeated(read_image(control, _side(generator)))
    if interpolate:
      images = generator.interpolate(prompts[0], prompts[1], count, options, **keywords)
    elif image is None:
      images = generator.generate(rows, options, **keywords)
    else:
      original, missing = read_image(image, _side(generator)), None
      if mask is not None:
        missing = read_mask(mask, image, _side(generator))
      elif expand is not None:
        original, missing = pad_for_outpainting(original, expand)
      if missing is not None:
        images = generator.fill(repeated(original), repeated(missing), rows, options, **keywords)
      else:
        images = generator.edit(repeated(original), rows, options, **keywords)
  if not is_main():
    return grid
  about |= {'control': control} if control else {}
  about |= {'lora': list(lora)} if lora else {}
  about |= {'image': image, 'mask': mask, 'expand': expand} if image else {}
  for index, (prompt, pixels, path) in enumerate(zip(rows, images, images_to_be, strict=True)):
    shown = list(prompts) if interpolate else prompt
    save_png(pixels, path, {'prompt': shown, 'number': index, **about})
  columns = count if interpolate or len(prompts) > 1 else math.ceil(math.sqrt(count))
  save_png(make_grid(images, columns), grid, {'prompts': list(prompts), **about})
  console.print(f'{len(images)} images and {grid}', highlight=False)
  return grid


def _free_name(folder: pathlib.Path) -> pathlib.Path:
  """The first of folder/2, folder/3, ... that does not exist."""
  return next(path for at in itertools.count(2) if not (path := folder / str(at)).exists())


def _relevant(options: SamplingOptions, control: str | None, edited: bool) -> dict[str, Any]:
  """The options that this request depends on."""
  unused = [] if edited else ['strength']
  unused += [] if control else ['control_scale', 'control_preprocessed']
  return {name: value for name, value in dataclasses.asdict(options).items() if name not in unused}


def _side(generator: ImageGenerator) -> int:
  """The side of the model's images, to which image files are scaled and cut."""
  height, width, *rest = generator.image_shape
  if height != width or len(rest) != 1:
    raise UserError(f'--image and --control: need a model of square images, not of shape {list(generator.image_shape)}')
  return height
