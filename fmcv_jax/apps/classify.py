"""Classifies image files with a trained model, and prints the most probable classes by name."""

from collections.abc import Sequence

from fmcv_jax.console import make_console
from fmcv_jax.errors import UserError
from fmcv_jax.inference.model import Model
from fmcv_jax.parallel.distributed import is_main


def run(files: Sequence[str], model: str, labels: Sequence[str] = (), *, step: int | None = None, top: int = 3) -> None:
  """Prints the `top` classes of each file with their probabilities.

  labels  texts to choose from, for an image-text model; otherwise the model's own classes
  """
  if top < 1:
    raise UserError(f'--top: expected at least 1, got {top}')
  opened = Model(model, step=step)
  if not labels and 'logits' not in opened.outputs and 'embed_text' in opened.outputs:
    raise UserError(f'{model}: is an image-text model; give the labels to choose from: --text LABEL LABEL ...')
  found = opened.predict(list(files), labels, count=top)
  console = make_console(quiet=not is_main())
  for file, best in zip(files, found, strict=True):
    shown = ', '.join(f'{name} {probability:.3f}' for name, probability in best)
    console.print(f'{file}: {shown}', highlight=False, soft_wrap=True, markup=False)
