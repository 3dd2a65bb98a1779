"""`fmcv caption` and `fmcv ask`: texts about image files as JSON lines."""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import IO, Any

import jax
from rich.progress import Progress

from fmcv_jax.console import make_console
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.data.sources.in_memory import InMemoryImages
from fmcv_jax.decoding.options import DecodingOptions
from fmcv_jax.errors import UserError
from fmcv_jax.evaluate.text_generator import Text, TextGenerator, caption_prompt
from fmcv_jax.inference.image_files import find_images
from fmcv_jax.inference.output_files import UNREADABLE, write_row
from fmcv_jax.pretrained import packaged
from fmcv_jax.run import Run


def run(
  files: Sequence[str],
  model: str,
  prompt: str | None = None,
  *,
  answers: Sequence[str] = (),
  to: str | None = None,
  options: DecodingOptions = DecodingOptions(),
  step: int | None = None,
  batch: int = 64,
  overrides: Sequence[str] = (),
) -> None:
  """Writes one JSON object per image: file, text and log_likelihood, or file and error for one that cannot be read.

  files    image files, and folders whose images are taken, with their sub-folders, in the order of their names
  prompt   text before the answer; None for the default of captions
  answers  closed list, of which the most likely is taken
  to       .jsonl file; run again, it is completed: files that it has are left out. Default: standard output

  Each row also has what its text depends on: prompt, model, step, and the answers or the options that are not the
  defaults. All processes compute; the first one writes. Raises UserError for a file of other texts, which would be
  mixed.
  """
  if batch < 1:
    raise UserError(f'batch: expected at least 1, got {batch}')
  found, job = find_images(files), Run.reopen(packaged.locate(model), overrides)
  prompt = caption_prompt(job.experiment.tokenizer) if prompt is None else prompt
  step = job.resolve_step(step)
  about = {'prompt': prompt, 'model': str(model), 'step': step, **_choices(answers, options)}
  done = _written(to, about) if to is not None else set()
  left = [number for number, file in enumerate(found) if file not in done]
  if not left:
    return
  ways = job.placement.mesh.size
  size = -(-min(batch, len(left)) // ways) * ways
  subject, _ = job.restored_model(step)
  first = jax.process_index() == 0
  images = Pipeline(InMemoryImages([found[number] for number in left]), subject.image, max_bad=1.0)
  texts = TextGenerator(subject, size).texts(images, [prompt], options, answers, left)
  with Progress(console=make_console(stderr=True), transient=True, disable=not first) as bar:
    task = bar.add_task('generating', total=len(found), completed=len(found) - len(left))
    output = _opened(to) if first else None
    try:
      for text in texts:
        bar.advance(task)
        if output is not None:
          _write(output, {'file': found[text.number], **about}, text)
    finally:
      if output is not None and output is not sys.stdout:
        output.close()


def _choices(answers: Sequence[str], options: DecodingOptions) -> dict[str, Any]:
  """The closed list, or the options that are not the defaults."""
  if answers:
    return {'answers': list(answers)}
  usual = dataclasses.asdict(DecodingOptions())
  return {'options': {name: value for name, value in dataclasses.asdict(options).items() if value != usual[name]}}


def _opened(to: str | None) -> IO[str]:
  if to is None:
    return sys.stdout
  try:
    return open(to, 'a', encoding='utf-8')
  except OSError as error:
    raise UserError(f'--to {to}: cannot be written ({error.strerror})') from error


def _write(output: IO[str], about: dict[str, Any], found: Text) -> None:
  read = {'text': found.text, 'log_likelihood': round(found.log_likelihood, 4)}
  write_row(output, about | ({'error': UNREADABLE} if found.text is None else read))


def _written(to: str, about: dict[str, Any]) -> set[str]:
  """Files that an earlier run with the same prompt, model, step and choices has written; removes a last line that it
  did not complete."""
  path = pathlib.Path(to)
  if path.is_dir():
    raise UserError(f'--to {to}: is a folder; give a .jsonl file')
  if not path.exists():
    return set()
  content = path.read_bytes()
  whole = content[: content.rfind(b'\n') + 1]
  files = set()
  for number, line in enumerate(whole.splitlines(), 1):
    try:
      row = json.loads(line)
      files.add(row['file'])
      there = {name: row[name] for name in ('prompt', 'model', 'step')} | {
        name: row[name] for name in ('answers', 'options') if name in row
      }
    except (ValueError, KeyError, TypeError) as error:
      raise UserError(f'--to {to}: line {number} was not written by this command; choose another file') from error
    for name in sorted({*there, *about}, key=list({**about, **there}).index):
      if there.get(name) != about.get(name):
        raise UserError(
          f'--to {to}: holds texts of the {name} {there.get(name)!r}, not {about.get(name)!r}; choose another file'
        )
  if whole != content and jax.process_index() == 0:
    path.write_bytes(whole)
  return files
