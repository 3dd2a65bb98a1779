"""Classifies image files with a trained model, and prints the most probable classes by name."""

from collections.abc import Sequence

from etils import epath
from rich.table import Table

from fmcv_jax.console import make_console
from fmcv_jax.errors import UserError
from fmcv_jax.inference.model import Model
from fmcv_jax.parallel.distributed import is_main
from fmcv_jax.train.storage import write_json


def run(
  files: Sequence[str],
  model: str,
  labels: Sequence[str] = (),
  *,
  step: int | None = None,
  top: int = 3,
  json_file: str | None = None,
) -> None:
  """Prints the `top` classes of each file with their probabilities, and writes them to `json_file`.

  labels  texts to choose from, for an image-text model; default the classes that it knows
  """
  if top < 1:
    raise UserError(f'--top: expected at least 1, got {top}')
  opened = Model(model, step=step)
  if not labels and 'logits' not in opened.outputs and 'embed_text' in opened.outputs and not opened.class_names:
    raise UserError(f'{model}: is an image-text model; give the labels to choose from: --text LABEL LABEL ...')
  found = opened.predict(list(files), labels, count=top)
  if not is_main():
    return
  table = Table('image', 'class')
  table.add_column('probability', justify='right')
  for file, best in zip(files, found, strict=True):
    for rank, (name, probability) in enumerate(best):
      table.add_row('' if rank else file, name, f'{probability:.3f}', end_section=rank == len(best) - 1)
  make_console(markup=False).print(table)
  if json_file is not None:
    classes = ([{'name': name, 'probability': probability} for name, probability in best] for best in found)
    rows = [{'image': file, 'classes': of_file} for file, of_file in zip(files, classes, strict=True)]
    write_json(epath.Path(json_file), rows)
