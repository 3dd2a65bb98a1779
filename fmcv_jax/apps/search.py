"""Finds the images of folders that are nearest to a text or to another image, by a trained model."""

import pathlib
from collections.abc import Sequence

import numpy as np
from etils import epath
from rich.table import Table

from fmcv_jax.console import make_console
from fmcv_jax.errors import UserError
from fmcv_jax.inference.image_files import find_images, unreadable_line
from fmcv_jax.inference.model import Model
from fmcv_jax.parallel.distributed import is_main
from fmcv_jax.train.storage import write_json


def run(
  paths: Sequence[str],
  model: str,
  *,
  text: str | None = None,
  image: str | None = None,
  step: int | None = None,
  top: int = 10,
  json_file: str | None = None,
) -> None:
  """Prints the `top` images with their cosine similarity to `text` or `image`, highest first.

  paths  image files, and folders that are read with their subfolders; files that cannot be read are named, counted and
         left out

  Raises UserError if none can be read.
  """
  if (text is None) == (image is None):
    raise UserError('give one of --text and --image')
  if top < 1:
    raise UserError(f'--top: expected at least 1, got {top}')
  if text is not None and not text.strip():
    raise UserError('--text: is empty; describe what to find')
  if image is not None and not pathlib.Path(image).is_file():
    raise UserError(f'--image {image}: no such file')
  files = find_images(paths)
  opened = Model(model, step=step, unreadable='nan')
  query = opened.encode_text(text) if text is not None else opened.encode_image(str(image))
  images = opened.encode_image(files)
  scores = _unit(images) @ _unit(query)
  if not is_main():
    return
  readable = ~np.isnan(images).any(axis=1)
  order = np.argsort(-scores, kind='stable')[: min(top, readable.sum())]  # NaN is last
  table = Table(f'nearest of {readable.sum()} images')
  table.add_column('similarity', justify='right')
  for index in order:
    table.add_row(files[index], f'{scores[index]:.3f}')
  make_console(markup=False).print(table)
  if not readable.all():
    make_console(stderr=True, markup=False).print(unreadable_line(int((~readable).sum()), len(files)), soft_wrap=True)
  if json_file is not None:
    write_json(epath.Path(json_file), [{'image': files[i], 'similarity': float(scores[i])} for i in order])


def _unit(x: np.ndarray) -> np.ndarray:
  return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), np.finfo(x.dtype).tiny)
