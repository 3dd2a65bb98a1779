"""A labeled synthetic data set from a diffusion model."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Sequence

from rich.progress import Progress

from fmcv_jax.apps.arguments import command_line_errors
from fmcv_jax.console import make_console
from fmcv_jax.data.packing import PackingPlan, open_on_all_processes
from fmcv_jax.diffusion.options import SamplingOptions
from fmcv_jax.errors import UserError
from fmcv_jax.inference.generator import ImageGenerator
from fmcv_jax.parallel.distributed import is_main

# The options that the images depend on, kept with the data set.
_ORIGIN = ('seed', 'steps', 'guidance', 'solver', 'spacing', 'interval', 'rescale')


def run(
  model: str,
  to: str | pathlib.Path,
  options: SamplingOptions = SamplingOptions(),
  *,
  per_prompt: int,
  prompts: str | None = None,
  step: int | None = None,
  batch: int = 64,
  overrides: Sequence[str] = (),
  shard_size: int = 1024,
) -> None:
  """Samples `per_prompt` images of each prompt into ArrayRecord shards at `to`; run again, it resumes.

  prompts: a file with one a line; by default the names of the data that the model was trained on. A record has the
  image, its prompt as `text`, and the prompt's index as `label`; the prompts alternate.
  """
  if per_prompt < 1:
    raise UserError(f'-n: {per_prompt} images of each prompt; give at least 1')
  console = make_console(quiet=not is_main())
  with command_line_errors():
    generator = ImageGenerator(model, step=step, batch=batch, overrides=overrides)
  names = generator.source.names if prompts is None else _lines(prompts)
  if not names:
    raise UserError(f'{model}: its data has no names to sample; give a file of --prompts')
  with command_line_errors():
    generator.check(names, options)
  cut = [name for name in names if generator.truncated_prompt(name) is not None]
  if cut:
    console.print(
      f'{len(cut)} prompts too long, such as {cut[0]!r}, truncated to: {generator.truncated_prompt(cut[0])}',
      highlight=False,
      markup=False,
    )
  count = per_prompt * len(names)
  sampling = {name: getattr(options, name) for name in _ORIGIN}
  origin = {'model': str(model), 'step': generator.step, **sampling}
  plan = PackingPlan(count, -(-count // shard_size), tuple(names), origin)
  with contextlib.ExitStack() as stack:
    begun, shards, missing = open_on_all_processes(to, plan, stack)
    plan = dataclasses.replace(plan, shards=shards)
    bar = stack.enter_context(Progress(console=console, transient=True))
    task = bar.add_task('sampling', total=count, completed=count - sum(len(plan.rows(shard)) for shard in missing))
    for shard in missing:
      rows = plan.rows(shard)
      labels = [row % len(names) for row in rows]
      images = generator.generate(
        [names[label] for label in labels],
        options,
        first=rows.start,
        progress=lambda ready: bar.advance(task, ready),
      )
      if begun is not None:
        pairs = zip(images, labels, strict=True)
        begun.write(shard, ({'image': image, 'label': label, 'text': names[label]} for image, label in pairs))
    if begun is not None:
      begun.finish()
  console.print(f'{count} images of {len(names)} prompts in {to}: data.source.name=array_record', highlight=False)


def _lines(file: str) -> Sequence[str]:
  path = pathlib.Path(file)
  if not path.is_file():
    raise UserError(f'--prompts {file}: no such file')
  try:
    lines = [line.strip() for line in path.read_text(encoding='utf-8').splitlines() if line.strip()]
  except UnicodeDecodeError as error:
    raise UserError(f'--prompts {file}: is not text in UTF-8') from error
  if not lines:
    raise UserError(f'--prompts {file}: has no prompt')
  return lines
