"""Classifies image files with a trained model, and prints the most probable classes by name."""

from collections.abc import Sequence

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
  labels: Sequence[str] = (),
  *,
  step: int | None = None,
  top: int = 3,
  json_file: str | None = None,
) -> None:
  """Prints the `top` classes of each image with their probabilities, and writes them to `json_file`.

  paths   image files, and folders that are read with their subfolders; files that cannot be read are named, counted and
          left out
  labels  texts to choose from, for an image-text model; default the classes that it knows

  Raises UserError if no image can be read.
  """
  if top < 1:
    raise UserError(f'--top: expected at least 1, got {top}')
  files = find_images(paths)
  opened = Model(model, step=step, unreadable='nan')
  if not labels and 'logits' not in opened.outputs and 'embed_text' in opened.outputs and not opened.class_names:
    raise UserError(f'{model}: is an image-text model; give the labels to choose from: --text LABEL LABEL ...')
  predictions = opened.predict(files, labels, count=top)
  if not is_main():
    return
  found = [(file, best) for file, best in zip(files, predictions, strict=True) if best]
  table = Table('image', 'class')
  table.add_column('probability', justify='right')
  for file, best in found:
    for rank, (name, probability) in enumerate(best):
      table.add_row('' if rank else file, name, f'{probability:.3f}', end_section=rank == len(best) - 1)
  make_console(markup=False).print(table)
  if len(found) < len(files):
    make_console(stderr=True, markup=False).print(unreadable_line(len(files) - len(found), len(files)), soft_wrap=True)
  if json_file is not None:
    rows = [
      {'image': file, 'classes': [{'name': name, 'probability': probability} for name, probability in best]}
      for file, best in found
    ]
    write_json(epath.Path(json_file), rows)
