"""Imports adapters (LoRA and its relatives, textual inversions) onto a model."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from fmcv_jax import config as config_lib
from fmcv_jax.apps.conversion import check_new, untrained_state, write_run
from fmcv_jax.console import make_console
from fmcv_jax.data.tokenizers import ClipBpe
from fmcv_jax.errors import UserError
from fmcv_jax.evaluate.base import EvaluatedModel
from fmcv_jax.inference.adapters import add_adapters, file_and_scale
from fmcv_jax.pretrained import packaged
from fmcv_jax.pretrained.tensors import open_tensors
from fmcv_jax.pretrained.textual_inversion import is_inversion, read_inversion, token_names
from fmcv_jax.run import CLASSES, Run, use_saved_tokenizer


def import_adapters(files: Sequence[str], onto: str, to: str, overrides: Sequence[str] = ()) -> Run:
  """Merges adapters into the weights of the workdir `onto`, and writes the result to the new workdir `to`.

  files  'FILE' or 'FILE:SCALE' each, in the order in which they are merged. A textual inversion adds its words to the
         tokenizer and their vectors to the token embedding

  Raises UserError, and writes nothing, for a file of another network and for one that is not understood as a whole.
  """
  console = make_console(stderr=True)
  check_new(to)
  given = [file_and_scale(file) for file in files]
  base = Run.reopen(packaged.locate(onto), overrides)
  subject, _ = base.restored_model()
  inversions = [(file, scale) for file, scale in given if is_inversion(file)]
  add_adapters(base, subject, [one for one in given if one not in inversions])
  config = use_saved_tokenizer(config_lib.to_plain_dict(base.config), base.workdir)
  for file, scale in inversions:
    if scale != 1:
      raise UserError(f'{file}:{scale:g}: a textual inversion is a word, which has no scale')
    config, words = _with_words(config, base, subject, file)
    console.print(f'{file}: {", ".join(words)} in prompts', highlight=False, soft_wrap=True, markup=False)
  run = Run(config, to)
  tree, shardings = {'params': subject.params, 'extra': subject.extra}, run.shardings
  placed = jax.tree.map(jax.device_put, tree, {'params': shardings.params, 'extra': shardings.extra})
  state = untrained_state(run, jax.tree.leaves(placed))
  try:
    write_run(run, state, {'onto': onto, 'adapters': [list(one) for one in given]})
    if (names := base.workdir / CLASSES).exists():
      names.copy(run.workdir / CLASSES)
  except UserError:
    run.workdir.rmtree(missing_ok=True)
    raise
  merged = ', '.join(f'{file} x {scale:g}' for file, scale in given)
  console.print(f'{merged} merged into {onto}: {to}', highlight=False, soft_wrap=True, markup=False)
  return run


def _with_words(
  config: dict[str, Any], base: Run, subject: EvaluatedModel, file: str
) -> tuple[dict[str, Any], list[str]]:
  """Adds the vectors of a file to the token embedding; returns the config with its words, and these."""
  condition: Any = getattr(base.experiment.objective, 'text_condition', None)
  if condition is None or condition.encoder is None or not isinstance(base.experiment.tokenizer, ClipBpe):
    raise UserError(f"{file}: is a textual inversion, for a diffusion model with a text tower and CLIP's tokenizer")
  tokenizer = base.experiment.tokenizer
  tokens = (subject.params if 'text' in subject.params else subject.extra)['text']['tokens']
  table = tokens['embedding']
  vectors = read_inversion(open_tensors(file), file, table.shape[1])
  names = [name for word, x in vectors.items() for name in token_names(word, len(x))]
  before = list(config['tokenizer'].get('added') or ())
  if known := [name for name in names if name in before]:
    raise UserError(f'{file}: {known[0]} is a word of this model already')
  if len(table) != tokenizer.vocab_size - len(tokenizer.added) + len(before):
    raise UserError(f'{file}: the token embedding has {len(table)} rows, not one for each id of the tokenizer')
  tokens['embedding'] = np.concatenate([np.asarray(table), *vectors.values()]).astype(table.dtype)
  path = 'objective.text_condition.encoder'
  changes = [f'{path}.vocab_size={table.shape[0] + len(names)}', f'{path}.end_id={tokenizer.end_id}']
  config = config_lib.override(config, changes)
  return {**config, 'tokenizer': {**config['tokenizer'], 'added': [*before, *names]}}, list(vectors)
