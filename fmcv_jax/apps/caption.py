"""`fmcv caption` and `fmcv ask`: texts about image files as JSON lines."""

import json
import pathlib
import sys
from collections.abc import Sequence
from typing import IO

import jax
from rich.progress import Progress

from fmcv_jax.console import make_console
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.data.sources.in_memory import InMemoryImages
from fmcv_jax.decoding.options import DecodingOptions
from fmcv_jax.errors import UserError
from fmcv_jax.evaluate.text_generator import TextGenerator, caption_prompt
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

  All processes compute; the first one writes.
  """
  if batch < 1:
    raise UserError(f'batch: expected at least 1, got {batch}')
  found, job = find_images(files), Run.reopen(packaged.locate(model), overrides)
  prompt = caption_prompt(job.experiment.tokenizer) if prompt is None else prompt
  done = _written(to, prompt) if to is not None else set()
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
          _write(output, found[text.number], prompt, text.text, text.log_likelihood)
    finally:
      if output is not None and output is not sys.stdout:
        output.close()


def _opened(to: str | None) -> IO[str]:
  if to is None:
    return sys.stdout
  try:
    return open(to, 'a', encoding='utf-8')
  except OSError as error:
    raise UserError(f'--to {to}: cannot be written ({error.strerror})') from error


def _write(output: IO[str], file: str, prompt: str, text: str | None, log_likelihood: float) -> None:
  read = {'error': UNREADABLE} if text is None else {'text': text, 'log_likelihood': round(log_likelihood, 4)}
  write_row(output, {'file': file, 'prompt': prompt, **read})


def _written(to: str, prompt: str) -> set[str]:
  """Files that an earlier run has written; removes a last line that it did not complete."""
  path = pathlib.Path(to)
  if not path.exists():
    return set()
  content = path.read_bytes()
  whole = content[: content.rfind(b'\n') + 1]
  rows = []
  for number, line in enumerate(whole.splitlines(), 1):
    try:
      row = json.loads(line)
      rows.append((row['file'], row['prompt']))
    except (ValueError, KeyError, TypeError) as error:
      raise UserError(f'--to {to}: line {number} was not written by this command; choose another file') from error
  if other := next((old for _, old in rows if old != prompt), None):
    raise UserError(f'--to {to}: holds texts of the prompt {other!r}, not {prompt!r}; choose another file')
  if whole != content and jax.process_index() == 0:
    path.write_bytes(whole)
  return {file for file, _ in rows}
