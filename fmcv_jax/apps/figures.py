"""Matplotlib figures: loss curve, zero-shot predictions, retrieval, captions, maps over images."""

import pathlib
import textwrap
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from fmcv_jax.errors import UserError
from fmcv_jax.train.storage import read_metrics


def _pyplot() -> Any:
  try:
    import matplotlib
  except ImportError as error:
    raise UserError('figures need matplotlib; pip install fmcv-jax[demo]') from error
  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  return plt


def loss_curve(metrics_file: pathlib.Path, path: pathlib.Path, metrics: Collection[str] | None = None) -> None:
  """Plots the training loss and metrics of the evaluators (None: all) over steps, from a metrics.jsonl."""
  plt = _pyplot()
  rows = read_metrics(epath.Path(metrics_file))
  evaluated = sorted({name for row in rows for name in row if '/' in name and not name.startswith('train/')})
  if metrics is not None:
    evaluated = [name for name in evaluated if name in metrics]
  figure, axes = plt.subplots(1, 2 if evaluated else 1, figsize=(12 if evaluated else 6, 4), squeeze=False)
  train = [(row['step'], row['train/loss']) for row in rows if row.get('train/loss') is not None]
  axes[0, 0].plot(*zip(*train, strict=True))
  axes[0, 0].set(xlabel='step', ylabel='training loss')
  for name in evaluated:
    points = [(row['step'], row[name]) for row in rows if row.get(name) is not None]
    axes[0, 1].plot(*zip(*points, strict=True), marker='.', label=name)
  if evaluated:
    axes[0, 1].set(xlabel='step', ylabel='metric', ylim=(0, None))
    axes[0, 1].legend(fontsize=7, loc='upper left', bbox_to_anchor=(1.02, 1))
  for axis in axes.flat:
    axis.grid(alpha=0.3)
  figure.tight_layout()
  _save(figure, path)


def zero_shot_sheet(
  images: np.ndarray,
  names: Sequence[str],
  labels: np.ndarray,
  scores: np.ndarray,
  path: pathlib.Path,
  *,
  title: str,
  columns: int = 6,
  best: int = 5,
) -> None:
  """Plots each image (uint8 [N, H, W, 3]) above its `best` top names by scores [N, names]; the correct one is green."""
  plt = _pyplot()
  rows = -(-len(images) // columns)
  figure, axes = plt.subplots(rows, columns, figsize=(2.1 * columns, 2.5 * rows), squeeze=False)
  for axis in axes.flat:
    axis.axis('off')
  for axis, image, label, row in zip(axes.flat, images, labels, scores):
    axis.imshow(image)
    for place, index in enumerate(np.argsort(-row)[:best]):
      right = index == label
      style = dict(color='#0a7d2c', weight='bold') if right else dict(color='#444444')
      axis.text(0.5, -0.06 - 0.115 * place, _short(names[index]), transform=axis.transAxes, ha='center', va='top',
                fontsize=7.5, **style)  # fmt: skip
  figure.suptitle(title, fontsize=10)
  figure.subplots_adjust(hspace=0.72, top=0.93, bottom=0.1, left=0.02, right=0.98)
  _save(figure, path)


def retrieval_sheet(
  queries: Sequence[str],
  images: Sequence[np.ndarray],
  marks: Sequence[Sequence[bool]],
  path: pathlib.Path,
  *,
  title: str,
) -> None:
  """Plots one row per query: text, then images (uint8 [k, H, W, 3]), best first; correct ones have a green frame."""
  plt = _pyplot()
  best = len(images[0])
  figure, axes = plt.subplots(len(queries), best + 1, figsize=(1.25 * (best + 2.2), 1.3 * len(queries)), squeeze=False,
                              width_ratios=[2.2] + [1] * best)  # fmt: skip
  for row, query, found, right in zip(axes, queries, images, marks, strict=True):
    row[0].axis('off')
    row[0].text(0.98, 0.5, _short(query, 34), transform=row[0].transAxes, ha='right', va='center', fontsize=9)
    for axis, image, mark in zip(row[1:], found, right, strict=True):
      axis.imshow(image)
      axis.set(xticks=[], yticks=[])
      for spine in axis.spines.values():
        spine.set(color='#0a7d2c' if mark else '#dddddd', linewidth=2.5 if mark else 0.8)
  figure.suptitle(title, fontsize=10)
  figure.tight_layout()
  _save(figure, path)


def text_sheet(
  images: np.ndarray,
  lines: Sequence[Sequence[tuple[str, bool | None]]],
  path: pathlib.Path,
  *,
  title: str,
  columns: int = 4,
) -> None:
  """Plots each image (uint8 [N, H, W, 3]) above its lines of text: True is green, False red, None gray."""
  plt = _pyplot()
  rows = -(-len(images) // columns)
  side, below, above = 2.65, 1.25, 0.6  # inches: of an image, of its text, of the title
  height = above + rows * (side + below)
  figure, axes = plt.subplots(rows, columns, figsize=(3.1 * columns, height), squeeze=False)
  for axis in axes.flat:
    axis.set(xticks=[], yticks=[])
    axis.axis('off')
  colors = {True: '#0a7d2c', False: '#b3261e', None: '#444444'}
  for axis, image, own in zip(axes.flat, images, lines):
    axis.axis('on')
    axis.imshow(image)
    place = 0
    for text, right in own:
      for piece in textwrap.wrap(text, 44):
        axis.text(0.5, -0.04 - 0.075 * place, piece, transform=axis.transAxes, ha='center', va='top', fontsize=8,
                  color=colors[right])  # fmt: skip
        place += 1
  figure.suptitle(title, fontsize=10)
  figure.subplots_adjust(hspace=below / side, top=1 - above / height, bottom=below / height, left=0.03, right=0.97)
  _save(figure, path)


def overlay_sheet(
  images: np.ndarray, maps: Mapping[str, np.ndarray], path: pathlib.Path, *, title: str, shared: bool = False
) -> None:
  """Plots one row per image (uint8 [N, H, W, 3]): the image, then each map.

  A map float [N, rows, columns] is overlaid on the image, with a color scale of its own or, if `shared`, one per row.
  A map [N, rows, columns, 3] in [0, 1] is shown as an RGB image.
  """
  plt = _pyplot()
  figure, axes = plt.subplots(
    len(images), 1 + len(maps), figsize=(2.2 * (1 + len(maps)), 2.35 * len(images) + 0.5), squeeze=False
  )
  for index, (row, image) in enumerate(zip(axes, images, strict=True)):
    height, width = image.shape[:2]
    heats = [values[index] for values in maps.values() if values.ndim == 3]
    limits = (min(h.min() for h in heats), max(h.max() for h in heats)) if shared and heats else (None, None)
    row[0].imshow(image)
    for axis, values in zip(row[1:], maps.values(), strict=True):
      if values.ndim == 3:
        axis.imshow(np.repeat(image.mean(-1, keepdims=True).astype(np.uint8), 3, -1))
        axis.imshow(values[index], extent=(-0.5, width - 0.5, height - 0.5, -0.5), cmap='inferno', alpha=0.65,
                    interpolation='bilinear', vmin=limits[0], vmax=limits[1])  # fmt: skip
      else:
        axis.imshow(values[index], interpolation='nearest')
  for axis, name in zip(axes[0], ['input', *maps], strict=True):
    axis.set_title(_short(name), fontsize=8)
  for axis in axes.flat:
    axis.axis('off')
  figure.suptitle(title, fontsize=9)
  figure.tight_layout()
  _save(figure, path)


def _short(text: str, limit: int = 26) -> str:
  return text if len(text) <= limit else text[: limit - 1] + '…'


def _save(figure: Any, path: pathlib.Path) -> None:
  figure.savefig(path, dpi=110)
  _pyplot().close(figure)
