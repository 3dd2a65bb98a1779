"""Pictures from a trained diffusion model: painted anew, from another picture, into a hole, between two texts.

    painter = Painter('runs/painter')
    pictures = painter.generate(['a red heart'] * 4, steps=20, guidance=4.0, seed=0)  # uint8 [4, H, W, 3]

A picture depends on the seed, its place in the request and what it is to show; not on the mesh or on its neighbours.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin
from rich.console import Console
from rich.progress import Progress

from fmcv_jax.data.decode import decode
from fmcv_jax.data.source import BadRecord, Source
from fmcv_jax.data.transforms import ResizeCrop
from fmcv_jax.diffusion.samplers import SOLVERS, Spacing, coefficients, times_of
from fmcv_jax.errors import UserError, nearest
from fmcv_jax.evaluate.painting import Canvas, Manner
from fmcv_jax.experiment import Run
from fmcv_jax.parallel.distributed import is_main

STRENGTH = 0.6  # of an edit


class Painter:
  """The diffusion model of a workdir, opened for use on all devices.

  told       what it has to be told: texts ('tokens'), classes ('label'), or nothing
  steered    whether it has a ControlNet, and so needs pictures to follow
  size       sides of its pictures, in pixels
  batch      pictures that are painted at once, on all devices together; more are painted piece by piece
  overrides  of its config, such as 'mesh.data=1', 'mesh.fsdp=-1' for a model that no one device holds
  """

  def __init__(
    self,
    workdir: str | pathlib.Path,
    *,
    step: int | None = None,
    batch: int = 64,
    overrides: Sequence[str] = (),
  ):
    if batch < 1:
      raise UserError(f'--batch: {batch} pictures at once; give at least 1')
    self.workdir, self._run = workdir, Run.reopen(workdir, overrides)
    self._objective = self._run.experiment.objective
    abstract = self._run.abstract_state
    generator = self._objective.generator(abstract.params, abstract.extra)
    if generator is None:
      raise UserError(f'{workdir}: its objective makes no pictures; give the workdir of a diffusion model')
    self.process, self.told, self.steered = generator.process, generator.told, generator.control is not None
    self._subject, self.step = self._run.restored_subject(step)
    self.size = generator.size
    self._canvas = Canvas(self._objective.generator, self._run.placement, batch)

  @property
  def source(self) -> Source:
    """What the model was trained on."""
    return self._run.experiment.data.source

  def generate(self, prompts: Sequence[str | int], *, seed: int = 0, **options: Any) -> np.ndarray:
    """One picture for each prompt: uint8 [N, H, W, 3].

    prompts    texts, or classes by name or number, as the model was told; only their count for one told nothing
    steps      of the sampler; solver: one of SOLVERS; spacing: of its times (`times_of`)
    guidance   of the prompt (Ho & Salimans 2022), 1 for none, or one for each picture; interval: (low, high) times of
               it; rescale: see `guided`
    negative   a text to move away from, in the place of none
    control    for a model with a ControlNet, pictures uint8 [N, H, W, 3] to follow: it is shown what the model was
               shown of images in training (edges, say) or, with drawn=True, themselves; control_scale: how much
    first      number of the first picture, for a request that is made in pieces
    progress   called with the number of pictures that are ready
    """
    return self._paint(prompts, seed, **options)

  def edit(
    self, images: np.ndarray, prompts: Sequence[str | int], *, strength: float = STRENGTH, seed: int = 0, **options: Any
  ) -> np.ndarray:
    """Pictures uint8 [N, H, W, 3] painted over from a share `strength` of the noise on (Meng et al. 2022, SDEdit)."""
    if not 0 < strength <= 1:
      raise UserError(f'--strength: {strength} is not above 0 and at most 1')
    return self._paint(prompts, seed, images=images, strength=strength, **options)

  def fill(
    self, images: np.ndarray, masks: np.ndarray, prompts: Sequence[str | int], *, seed: int = 0, **options: Any
  ) -> np.ndarray:
    """Pictures uint8 [N, H, W, 3] painted anew where masks bool [N, H, W] are true; the rest stays as it is."""
    if masks.shape != images.shape[:3] or masks.dtype != bool:
      raise UserError(
        f'--mask: {_kind(masks)} for images of {list(images.shape[:3])}; true where they are painted anew'
      )
    return self._paint(prompts, seed, images=images, masks=masks, **options)

  def interpolate(self, first: str, last: str, count: int, *, seed: int = 0, **options: Any) -> np.ndarray:
    """`count` pictures from the same noise, from one text to another: uint8 [count, H, W, 3]."""
    if self.told != ('tokens',):
      raise UserError('--interpolate: needs a model that is told texts')
    return self._paint([first] * count, seed, other=last, **options)

  def check(self, prompts: Sequence[str | int], *, seed: int = 0, **options: Any) -> None:
    """Raises the UserError of `generate`, before anything is painted."""
    self._request(prompts, seed, **options)

  def _paint(
    self,
    prompts: Sequence[str | int],
    seed: int,
    *,
    progress: Callable[[int], Any] = lambda ready: None,
    **options: Any,
  ) -> np.ndarray:
    fields, manner = self._request(prompts, seed, **options)
    subject = self._subject
    return self._canvas.paint(subject.params, subject.extra, fields, manner, seed=seed, progress=progress)

  def _request(
    self,
    prompts: Sequence[str | int],
    seed: int,
    *,
    steps: int = 20,
    guidance: float | Sequence[float] = 4.0,
    solver: str = 'dpm++',
    spacing: Spacing = 'trailing',
    negative: str = '',
    interval: tuple[float, float] | None = None,
    rescale: float = 0.0,
    images: np.ndarray | None = None,
    masks: np.ndarray | None = None,
    strength: float = 1.0,
    other: str | None = None,
    control: np.ndarray | None = None,
    drawn: bool = False,
    control_scale: float = 1.0,
    first: int = 0,
  ) -> tuple[dict[str, np.ndarray], Manner]:
    """What `Canvas.paint` is given."""
    if isinstance(prompts, str):
      raise UserError(f'prompts: {prompts!r} is one text; give a list, one for each picture')
    count = len(prompts)
    if solver not in SOLVERS:
      raise UserError(f'--solver: unknown {solver!r}; {nearest(solver, SOLVERS)}')
    try:
      times = times_of(self.process, steps, spacing)
      times = times[len(times) - max(1, round(strength * len(times))) :]
      coefficients(self.process, SOLVERS[solver], times)
    except ValueError as error:
      raise UserError(f'--{error}') from error
    if not 0 <= seed < 2**31:
      raise UserError(f'--seed: {seed} is not from 0 to 2147483647')
    if interval is not None and not interval[0] <= interval[1]:
      raise UserError(f'--interval: {interval[0]} to {interval[1]}; give the lower time first')
    if not 0 <= rescale <= 1:
      raise UserError(f'--rescale: {rescale} is not from 0 to 1')
    fields = self._fields(prompts)
    strength_of_prompt = np.asarray(guidance, np.float32)
    if strength_of_prompt.shape not in ((), (count,)):
      raise UserError(f'--guidance: {strength_of_prompt.shape[0]} numbers for {count} pictures')
    if not np.isfinite(strength_of_prompt).all() or not np.isfinite(control_scale):
      raise UserError(f'--guidance and --control-scale: {guidance} and {control_scale} have to be finite')
    is_guided = bool(self.told) and bool((strength_of_prompt != 1).any())
    if negative and not (is_guided and 'tokens' in self.told):
      raise UserError('--negative: needs a model that is told texts, and a --guidance other than 1')
    if is_guided:
      fields['guidance'] = np.broadcast_to(strength_of_prompt, count)
      without = self._fields([negative] * count) if 'tokens' in self.told else {}
      fields.update({f'without_{name}': value for name, value in without.items()})
    if other is not None:
      fields['other_tokens'] = self._fields([other] * count)['tokens']
      fields['share'] = np.linspace(0, 1, count, dtype=np.float32)
    if images is not None:
      if images.shape != (count, self.size, self.size, 3) or images.dtype != np.uint8:
        raise UserError(f'images: {_kind(images)}, but {[count, self.size, self.size, 3]} of uint8 are needed')
      fields['image'] = images
    if masks is not None:
      fields['mask'] = masks
    if self.steered != (control is not None):
      wants = 'follows a picture; give one' if self.steered else 'has no ControlNet that could follow a picture'
      raise UserError(f'--control: {self.workdir} {wants}')
    if control is not None:
      if control.shape != (count, self.size, self.size, 3) or control.dtype != np.uint8:
        raise UserError(f'--control: {_kind(control)}, but {[count, self.size, self.size, 3]} of uint8 are needed')
      fields |= {'control': control, 'control_scale': np.full(count, control_scale, np.float32)}
    # Along an interpolation the noise is one.
    fields['number'] = np.zeros(count, np.int32) if other is not None else first + np.arange(count, dtype=np.int32)
    return fields, Manner(solver, tuple(times), is_guided, interval, rescale, drawn)

  def _fields(self, prompts: Sequence[str | int]) -> dict[str, np.ndarray]:
    if 'tokens' in self.told:
      tokenizer = self._subject.tokenizer
      assert tokenizer is not None
      return {'tokens': tokenizer([str(prompt) for prompt in prompts])}
    if 'label' in self.told:
      return {'label': np.array([self._class_of(prompt) for prompt in prompts], np.int32)}
    return {}

  def _class_of(self, prompt: str | int) -> int:
    names = self.source.names
    classes = self._run.experiment.objective.network.classes  # type: ignore[attr-defined]
    if prompt in names:
      return names.index(prompt)
    if str(prompt).isdigit() and int(prompt) < classes:
      return int(prompt)
    raise UserError(
      f'{prompt!r} is no class of this model, by name or by number below {classes}; {nearest(str(prompt), names)}'
    )

  def cut(self, prompt: str) -> str | None:
    """What is left of a text that is too long for the model; None for one that is not."""
    tokenizer = self._subject.tokenizer
    if 'tokens' not in self.told or tokenizer is None:
      return None
    row = tokenizer([prompt])
    if not row[0, -1] or tokenizer.decode(row) == _longer(tokenizer).decode(_longer(tokenizer)([prompt])):
      return None
    return tokenizer.decode(row)[0]


def _kind(array: np.ndarray) -> str:
  return f'{list(array.shape)} of {array.dtype}'


def _longer(tokenizer: Any) -> Any:
  return dataclasses.replace(tokenizer, length=8 * tokenizer.length)


def read_image(file: str, size: int) -> np.ndarray:
  """An image file as uint8 [size, size, 3]: the square in its centre."""
  try:
    return ResizeCrop(size, crop=1.0)(pathlib.Path(file).read_bytes(), np.random.default_rng(0))
  except BadRecord as error:
    raise UserError(f'{file}: {error}') from error


def read_mask(file: str, image: str, size: int) -> np.ndarray:
  """bool [size, size], true where the file is white, cut as `read_image` cuts the image that it belongs to."""
  path = pathlib.Path(file)
  if not path.is_file():
    raise UserError(f'--mask {file}: no such file')
  try:
    pixels, whole = decode(path.read_bytes()), decode(pathlib.Path(image).read_bytes())
  except BadRecord as error:
    raise UserError(f'--mask {file}: {error}') from error
  if pixels.shape != whole.shape:
    raise UserError(f'--mask {file}: {_sides(pixels)} pixels, but the image has {_sides(whole)}')
  return ResizeCrop(size, crop=1.0)(pixels, np.random.default_rng(0)).mean(-1) > 127


def _sides(pixels: np.ndarray) -> str:
  height, width, _ = pixels.shape
  return f'{width} x {height}'


def expanded(image: np.ndarray, margin: float) -> tuple[np.ndarray, np.ndarray]:
  """uint8 [H, W, 3] shrunk into the middle, with a margin of that share on every side, and the mask of the margin."""
  if not 0 < margin < 0.5:
    raise UserError(f'--expand: {margin} is not between 0 and 0.5')
  size = len(image)
  inner = max(1, round(size * (1 - 2 * margin)))
  start = (size - inner) // 2
  canvas, mask = np.full_like(image, 255), np.ones((size, size), bool)
  small = Image.fromarray(image).resize((inner, inner), Image.Resampling.LANCZOS)
  canvas[start : start + inner, start : start + inner] = np.asarray(small)
  mask[start : start + inner, start : start + inner] = False
  return canvas, mask


def grid_of(pictures: np.ndarray, columns: int) -> np.ndarray:
  """uint8 [N, H, W, 3] -> one picture, row by row on white, a pixel or more between them."""
  count, height, width, _ = pictures.shape
  gap = max(1, width // 32)
  rows = -(-count // columns)
  sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
  for index, picture in enumerate(pictures):
    top, left = (
      gap + place * (side + gap) for place, side in zip(divmod(index, columns), (height, width), strict=True)
    )
    sheet[top : top + height, left : left + width] = picture
  return sheet


def save_png(picture: np.ndarray, path: pathlib.Path, about: dict[str, Any]) -> None:
  """Writes uint8 [H, W, 3] with `about` in the file's text chunk 'fmcv', as JSON."""
  info = PngImagePlugin.PngInfo()
  info.add_itxt('fmcv', json.dumps(about, ensure_ascii=False))
  Image.fromarray(picture).save(path, pnginfo=info)


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
    raise UserError('--drawn and --control-scale: need a --control')
  folder, grid = pathlib.Path(output), pathlib.Path(output) / 'grid.png'
  if folder.exists() and not folder.is_dir():
    raise UserError(f'--output {folder}: is a file; give a folder')
  for file in (image, control):
    if file and not pathlib.Path(file).is_file():
      raise UserError(f'{file}: no such image file')
  console, painter = Console(quiet=not is_main()), Painter(model, step=step, batch=batch, overrides=overrides)
  if bool(painter.told) != bool(prompts):
    raise UserError('give at least one prompt' if painter.told else f'{model}: is told nothing; give it no prompt')
  prompts = prompts or ['']
  for prompt in (*prompts, options.get('negative', '')):
    if (left := painter.cut(prompt)) is not None:
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
        given, hole = expanded(given, expand)
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
  save_png(grid_of(pictures, columns), grid, {'prompts': list(prompts), **about})
  console.print(f'{len(pictures)} pictures and {grid}', highlight=False)
  return grid
