"""`fmcv data --show`: a contact sheet of the inputs that a config's network receives."""

import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fmcv_jax.console import make_console
from fmcv_jax.data.loader import TrainLoader
from fmcv_jax.errors import UserError
from fmcv_jax.experiment import load_config, resolve
from fmcv_jax.objectives.network_inputs import masked_patches, network_inputs
from fmcv_jax.run import Run

_LEAST_SIDE = 96  # pixels; smaller images are enlarged by a whole factor
_GAP, _LINE = 3, 16  # pixels between images, and for a caption
_MASK_OPACITY = 0.85  # of the gray over masked patches


def run(config: str, overrides: Sequence[str] = (), *, count: int, output: str | pathlib.Path = 'data.png') -> None:
  """Draws the first `count` examples of a run with host crops, device augmentations, masks and captions.

  Records and crops equal those of the first batch of the run. Random values drawn on the device depend on the batch
  size and therefore differ.
  """
  if count < 1:
    raise UserError(f'--show {count}: expected at least 1')
  console, shown = make_console(), on_any_mesh(config, overrides)
  e = shown.experiment
  with_loader = TrainLoader(e.data, batch=count, seed=e.seed, fields=tuple(shown.batch_shapes), tokenizer=e.tokenizer)
  try:
    batch = next(with_loader)
  finally:
    with_loader.close()
  images, words = examples(shown, batch), captions(shown, batch)
  contact_sheet(images, words, output)
  sizes = ' + '.join(f'{len(group)} of {group[0].shape[0]}' for group in _alike(images[0]))
  console.print(
    f'{output}: {count} examples, images per example: {sizes} pixels a side', highlight=False, soft_wrap=True
  )


def on_any_mesh(config: str, overrides: Sequence[str]) -> Run:
  """The run of a config on the local devices; its data does not depend on the mesh."""
  return Run(resolve({**load_config(config, overrides), 'mesh': {}}))


def examples(shown: Run, batch: dict[str, np.ndarray]) -> list[list[np.ndarray]]:
  """Images uint8 [H, W, 3] per example: the network inputs first, then the other image fields of the batch."""
  e = shown.experiment
  # The rng of the first step; see init_state and make_train_step.
  rng = jax.random.fold_in(jax.random.fold_in(jax.random.key(e.seed), 1), 0)
  views = [np.array(images) for images in network_inputs(e.objective, batch, rng)]
  masked = masked_patches(e.objective, batch, rng)
  if masked is not None:
    views[0] = _greyed(views[0], np.asarray(masked))
  known = {'image', *e.data.views} if views else set()
  others = [x for name, x in batch.items() if x.dtype == np.uint8 and x.ndim >= 4 and name not in known]
  whole = [np.round(np.clip(images, 0, 1) * 255).astype(np.uint8) for images in views]
  whole += [x.reshape(len(x), -1, *x.shape[-3:]) for x in others]
  if not whole:
    raise UserError(f'--show: a batch of this config has no images, only {", ".join(batch)}')
  return [[image for images in whole for image in images[index]] for index in range(len(whole[0]))]


def captions(shown: Run, batch: dict[str, np.ndarray]) -> list[str]:
  """One caption per example: class name and tokenized text, decoded."""
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


def contact_sheet(images: Sequence[Sequence[np.ndarray]], words: Sequence[str], path: str | pathlib.Path) -> None:
  """Writes one tile per example: its images uint8 [H, W, 3] in a row, small ones stacked, and the caption below."""
  scale = max(1, -(-_LEAST_SIDE // max(image.shape[0] for image in images[0])))
  places, (width, height) = _places(images[0], scale)
  width, height = width + _GAP, height + 2 * _GAP + (_LINE if any(words) else 0)
  columns = min(len(images), max(1, round(math.sqrt(1.4 * len(images) * height / width))))
  sheet = Image.new('RGB', (columns * width, -(-len(images) // columns) * height), 'white')
  draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
  for index, (tile, text) in enumerate(zip(images, words, strict=True)):
    left, top = index % columns * width + _GAP, index // columns * height + _GAP
    draw.text((left, top + height - 2 * _GAP - _LINE), _fitting(text, width - 2 * _GAP, font), 'black', font)
    for image, (x, y) in zip([image for group in _alike(tile) for image in group], places):
      large = Image.fromarray(image).resize((image.shape[1] * scale, image.shape[0] * scale), 0)
      sheet.paste(large, (left + x, top + y))
  try:
    sheet.save(path)
  except (OSError, ValueError) as error:
    raise UserError(f'--output {path}: cannot be written ({error}); give an image file, such as data.png') from error


def _places(tile: Sequence[np.ndarray], scale: int) -> tuple[list[tuple[int, int]], tuple[int, int]]:
  """Positions (x, y) of the images of a tile, grouped by size, and the (width, height) of the tile in pixels."""
  height, x, places = max(image.shape[0] for image in tile) * scale, 0, []
  for group in _alike(tile):
    down, across = (side * scale + _GAP for side in group[0].shape[:2])
    columns = -(-len(group) // max(1, (height + _GAP) // down))
    places += [(x + index % columns * across, index // columns * down) for index in range(len(group))]
    x += columns * across
  return places, (x, height)


def _fitting(text: str, width: int, font: Any) -> str:
  shown = ''.join(c if c.isprintable() else ' ' for c in text)
  while shown and font.getlength(shown) > width:
    shown = shown[:-2].rstrip() + '…' if len(shown) > 2 else ''
  return shown


def _greyed(images: np.ndarray, masked: np.ndarray) -> np.ndarray:
  """Images [B, V, H, W, 3] with the masked patches, bool [B, views, rows, columns], of the first views grayed out."""
  _, views, rows, columns = masked.shape
  height, width = images.shape[2] // rows, images.shape[3] // columns
  mask = masked.repeat(height, axis=2).repeat(width, axis=3)[..., None] * _MASK_OPACITY
  first = images[:, :views] * (1 - mask) + 0.5 * mask
  return np.concatenate([first, images[:, views:]], axis=1)


def _alike(images: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
  groups: dict[tuple[int, ...], list[np.ndarray]] = {}
  for image in images:
    groups.setdefault(image.shape, []).append(image)
  return list(groups.values())
