"""A labelled data set that a diffusion model paints, for training others on."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import Progress

from fmcv_jax.data.packing import PackingPlan, open_on_all_processes
from fmcv_jax.errors import UserError
from fmcv_jax.inference.generator import ImageGenerator
from fmcv_jax.parallel.distributed import is_main


def run(
  model: str,
  to: str | pathlib.Path,
  *,
  per_prompt: int,
  prompts: str | None = None,
  step: int | None = None,
  batch: int = 64,
  overrides: Sequence[str] = (),
  shard_size: int = 1024,
  seed: int = 0,
  **options: Any,
) -> None:
  """Paints `per_prompt` pictures of each prompt into ArrayRecord shards at `to`; run again, it goes on from there.

  prompts: a file with one a line; by default the names of the data that the model was trained on. A record has the
  picture, its prompt as `text`, and as `label` the prompt's number; its neighbours have other prompts.
  """
  if per_prompt < 1:
    raise UserError(f'-n: {per_prompt} pictures of each prompt; give at least 1')
  console, painter = Console(quiet=not is_main()), ImageGenerator(model, step=step, batch=batch, overrides=overrides)
  names = painter.source.names if prompts is None else _lines(prompts)
  if not names:
    raise UserError(f'{model}: its data has no names to paint; give a file of --prompts')
  painter.check(names, seed=seed, **options)
  cut = [name for name in names if painter.truncated_prompt(name) is not None]
  if cut:
    console.print(
      f'{len(cut)} prompts too long, such as {cut[0]!r}, cut to: {painter.truncated_prompt(cut[0])}',
      highlight=False,
      markup=False,
    )
  count = per_prompt * len(names)
  origin = {'model': str(model), 'step': painter.step, 'seed': seed, **options}
  plan = PackingPlan(count, -(-count // shard_size), tuple(names), origin)
  with contextlib.ExitStack() as stack:
    begun, shards, missing = open_on_all_processes(to, plan, stack)
    plan = dataclasses.replace(plan, shards=shards)
    bar = stack.enter_context(Progress(console=console, transient=True))
    task = bar.add_task('painting', total=count, completed=count - sum(len(plan.rows(shard)) for shard in missing))
    for shard in missing:
      rows = plan.rows(shard)
      labels = [row % len(names) for row in rows]
      pictures = painter.generate(
        [names[label] for label in labels],
        seed=seed,
        first=rows.start,
        progress=lambda ready: bar.advance(task, ready),
        **options,
      )
      if begun is not None:
        painted = zip(pictures, labels, strict=True)
        begun.write(shard, ({'image': picture, 'label': label, 'text': names[label]} for picture, label in painted))
    if begun is not None:
      begun.finish()
  console.print(f'{count} pictures of {len(names)} prompts in {to}: data.source.name=array_record', highlight=False)


def _lines(file: str) -> Sequence[str]:
  path = pathlib.Path(file)
  if not path.is_file():
    raise UserError(f'--prompts {file}: no such file')
  try:
    lines = [line.strip() for line in path.read_text(encoding='utf-8').splitlines() if line.strip()]
  except UnicodeDecodeError as error:
    raise UserError(f'--prompts {file}: is no text in UTF-8') from error
  if not lines:
    raise UserError(f'--prompts {file}: has no prompt')
  return lines
