"""`fmcv data --show`: a picture of what a config's model really sees."""

import math
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console

from fmcv_jax.data.loader import TrainLoader
from fmcv_jax.errors import UserError
from fmcv_jax.experiment import load_config, resolve
from fmcv_jax.objectives.network_inputs import masked_patches, network_inputs
from fmcv_jax.run import Run

_LEAST_SIDE = 96  # pixels; smaller images are enlarged by a whole factor
_GAP, _LINE = 3, 16  # between pictures, and for a caption, in pixels
_HIDDEN = 0.85  # how grey a patch becomes that the loss hides


def run(config: str, overrides: Sequence[str] = (), *, count: int, output: str | pathlib.Path = 'data.png') -> None:
  """Draws the first `count` examples of a run: crops of the host, augmentation and masks of the device, and words.

  They are those of the run's first batch; what the device draws depends on the size of the batch, and is another draw.
  """
  if count < 1:
    raise UserError(f'--show {count}: expected at least 1')
  console, shown = Console(), on_any_mesh(config, overrides)
  e = shown.experiment
  with_loader = TrainLoader(e.data, batch=count, seed=e.seed, fields=tuple(shown.batch_shapes), tokenizer=e.tokenizer)
  try:
    batch = next(with_loader)
  finally:
    with_loader.close()
  pictures, words = examples(shown, batch), captions(shown, batch)
  contact_sheet(pictures, words, output)
  sizes = ' + '.join(f'{len(group)} of {group[0].shape[0]}' for group in _alike(pictures[0]))
  console.print(f'{output}: {count} examples, pictures each: {sizes} pixels a side', highlight=False, soft_wrap=True)


def on_any_mesh(config: str, overrides: Sequence[str]) -> Run:
  """The run of a config on the devices that are here: what it reads depends on no mesh."""
  return Run(resolve({**load_config(config, overrides), 'mesh': {}}))


def examples(shown: Run, batch: dict[str, np.ndarray]) -> list[list[np.ndarray]]:
  """For each example its pictures, uint8 [H, W, 3]: those that the network sees, then what else there is to look at."""
  e = shown.experiment
  # That of the first step; see init_state and make_train_step.
  rng = jax.random.fold_in(jax.random.fold_in(jax.random.key(e.seed), 1), 0)
  views = [np.array(images) for images in network_inputs(e.objective, batch, rng)]
  hidden = masked_patches(e.objective, batch, rng)
  if hidden is not None:
    views[0] = _greyed(views[0], np.asarray(hidden))
  known = {'image', *e.data.views} if views else set()
  others = [x for name, x in batch.items() if x.dtype == np.uint8 and x.ndim >= 4 and name not in known]
  whole = [np.round(np.clip(images, 0, 1) * 255).astype(np.uint8) for images in views]
  whole += [x.reshape(len(x), -1, *x.shape[-3:]) for x in others]
  if not whole:
    raise UserError(f'--show: a batch of this config holds no pictures, but {", ".join(batch)}')
  return [[picture for images in whole for picture in images[index]] for index in range(len(whole[0]))]


def captions(shown: Run, batch: dict[str, np.ndarray]) -> list[str]:
  """For each example its text as the tokenizer kept it, and the name of its class."""
  e, count = shown.experiment, len(next(iter(batch.values())))
  words: list[list[str]] = [[] for _ in range(count)]
  if 'label' in batch:
    names = e.data.source.names
    for line, label in zip(words, batch['label'].tolist()):
      line.append(names[label] if label < len(names) else str(label))
  if 'tokens' in batch and e.tokenizer is not None:
    for line, text in zip(words, e.tokenizer.decode(batch['tokens'])):
      line.append(text)
  return [' | '.join(line) for line in words]


def contact_sheet(pictures: Sequence[Sequence[np.ndarray]], words: Sequence[str], path: str | pathlib.Path) -> None:
  """A tile an example: its pictures uint8 [H, W, 3] beside each other, small ones in several rows, its words below."""
  scale = max(1, -(-_LEAST_SIDE // max(picture.shape[0] for picture in pictures[0])))
  places, (width, height) = _places(pictures[0], scale)
  width, height = width + _GAP, height + 2 * _GAP + (_LINE if any(words) else 0)
  columns = min(len(pictures), max(1, round(math.sqrt(1.4 * len(pictures) * height / width))))
  sheet = Image.new('RGB', (columns * width, -(-len(pictures) // columns) * height), 'white')
  draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
  for index, (tile, text) in enumerate(zip(pictures, words, strict=True)):
    left, top = index % columns * width + _GAP, index // columns * height + _GAP
    draw.text((left, top + height - 2 * _GAP - _LINE), _fitting(text, width - 2 * _GAP, font), 'black', font)
    for picture, (x, y) in zip([picture for group in _alike(tile) for picture in group], places):
      large = Image.fromarray(picture).resize((picture.shape[1] * scale, picture.shape[0] * scale), 0)
      sheet.paste(large, (left + x, top + y))
  try:
    sheet.save(path)
  except (OSError, ValueError) as error:
    raise UserError(f'--output {path}: cannot be written ({error})') from error


def _places(tile: Sequence[np.ndarray], scale: int) -> tuple[list[tuple[int, int]], tuple[int, int]]:
  """Where the pictures of a tile lie, one size after the other, and the width and height of all."""
  height, x, places = max(picture.shape[0] for picture in tile) * scale, 0, []
  for group in _alike(tile):
    down, across = (side * scale + _GAP for side in group[0].shape[:2])
    columns = -(-len(group) // max(1, (height + _GAP) // down))
    places += [(x + index % columns * across, index // columns * down) for index in range(len(group))]
    x += columns * across
  return places, (x, height)


def _fitting(text: str, width: int, font) -> str:
  shown = ''.join(c if c.isprintable() else ' ' for c in text)
  while shown and font.getlength(shown) > width:
    shown = shown[:-2].rstrip() + '…' if len(shown) > 2 else ''
  return shown


def _greyed(images: np.ndarray, hidden: np.ndarray) -> np.ndarray:
  """Images [B, V, H, W, 3] with the hidden patches [B, views, rows, columns] of the first views nearly grey."""
  _, views, rows, columns = hidden.shape
  height, width = images.shape[2] // rows, images.shape[3] // columns
  mask = hidden.repeat(height, axis=2).repeat(width, axis=3)[..., None] * _HIDDEN
  first = images[:, :views] * (1 - mask) + 0.5 * mask
  return np.concatenate([first, images[:, views:]], axis=1)


def _alike(pictures: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
  groups: dict[tuple[int, ...], list[np.ndarray]] = {}
  for picture in pictures:
    groups.setdefault(picture.shape, []).append(picture)
  return list(groups.values())
