"""`fmcv compute`: writes a named output of a model for image files, as its kind is read."""

import pathlib
from collections.abc import Sequence

from rich.progress import Progress

from fmcv_jax.console import make_console
from fmcv_jax.data.sources.in_memory import InMemoryImages
from fmcv_jax.errors import UserError, did_you_mean
from fmcv_jax.fields import height_width
from fmcv_jax.inference.class_names import class_names_of
from fmcv_jax.inference.image_files import find_images
from fmcv_jax.inference.model import image_pipeline
from fmcv_jax.inference.output_files import check_free, write_output
from fmcv_jax.objectives.outputs import Outputs, listed
from fmcv_jax.parallel.distributed import is_main
from fmcv_jax.pretrained import packaged
from fmcv_jax.run import Run


def run(
  name: str,
  paths: Sequence[str],
  model: str,
  to: str,
  *,
  step: int | None = None,
  batch: int = 64,
  overrides: Sequence[str] = (),
) -> None:
  """Writes the output `name` of each image into the folder `to`, see `write_output`.

  paths  image files, and folders that are read with their subfolders

  An image that cannot be read is named, left out and counted. Raises UserError for an output that the model does not
  have, or that reads something else than images, and for files in `to` that would be overwritten (before the model is
  read).
  """
  if batch < 1:
    raise UserError(f'--batch: expected at least 1, got {batch}')
  if '://' in to:
    raise UserError(f'--to {to}: give a local folder')
  check_free(pathlib.Path(to), name)
  files, job = find_images(paths), Run.reopen(packaged.locate(model), overrides)
  check_reads_images(name, job.experiment.objective.outputs(), model)
  subject, step = job.restored_model(step)
  ways = job.placement.mesh.size
  size = -(-min(batch, len(files)) // ways) * ways
  pipeline = image_pipeline(job, InMemoryImages(files), max_bad=1.0)
  input_size = getattr(pipeline.image, 'size', None)
  console = make_console(quiet=not is_main())
  with Progress(console=console, transient=True) as bar:
    found = bar.track(subject.map_records((name,), pipeline, size), total=len(files), description='computing')
    values = (None if record is None else record[name] for record in found)
    written, left_out = write_output(
      name,
      subject.outputs[name].kind,
      zip(files, values, strict=True),
      to,
      class_names=class_names_of(job),
      tokenizer=subject.tokenizer,
      input_size=None if input_size is None else height_width(input_size),
      about={'model': str(model), 'step': step, 'output': name},
    )
  console.print(f'{name} of {written} images in {to}; {left_out} were skipped', highlight=False, soft_wrap=True)


def check_reads_images(name: str, outputs: Outputs, model: str) -> None:
  """Raises UserError if a model has no output of that name, or one that reads something else than images."""
  of_images = {name: output for name, output in outputs.items() if set(output.reads) == {'image'}}
  if name not in outputs:
    raise UserError(
      f'{name!r} is not an output of {model}; outputs of images: {listed(of_images)}. {did_you_mean(name, of_images)}'
    )
  if name not in of_images:
    others = ', '.join(field for field in outputs[name].reads if field != 'image')
    why = f'reads {others}, which image files do not have' if others else 'does not depend on images'
    raise UserError(f'{name!r} of {model} {why}; outputs of images: {listed(of_images)}')
