"""The demo of words: train a model of captions and answers about scenes of emoji, and compare it with baselines."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from rich.console import Console
from rich.table import Table

from fmcv_jax import experiment, trainer
from fmcv_jax.apps import figures
from fmcv_jax.apps.demo import CREDITS
from fmcv_jax.apps.words_scores import (
  MEASURES,
  SLOTS,
  Row,
  caption_slots,
  first_scenes,
  metrics_of,
  nearest_image,
  question_prior,
  row_of,
)
from fmcv_jax.console import make_console
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.data.sources.emoji_scenes import EmojiScenes
from fmcv_jax.data.sources.subset import Subset
from fmcv_jax.errors import UserError
from fmcv_jax.evaluate.base import EvaluatedModel, Evaluator
from fmcv_jax.evaluate.captioning import Captioning
from fmcv_jax.evaluate.feature_extractor import FeatureExtractor
from fmcv_jax.evaluate.question_answering import QuestionAnswering
from fmcv_jax.evaluate.text_generator import CAPTION_PROMPT, QUESTION_TEMPLATE, TextGenerator
from fmcv_jax.pretrained import packaged
from fmcv_jax.run import Run
from fmcv_jax.train.storage import read_metrics, write_json

SPLITS = {
  'held_out': 'pairs of things that are never together in training',
  'seen': 'pairs that are together in training, new scenes',
  'new_artist': 'likewise, drawn by an artist not in training',
}
PRIOR_SCENES, NEAREST_SCENES, SHEET = 20_000, 8_192, 16


def run(config: str, workdir: str | pathlib.Path, overrides: Sequence[str]) -> None:
  """Trains `config` in `workdir` and `config`:blind in workdir/blind; writes figures to workdir/demo."""
  console, workdir = make_console(), pathlib.Path(workdir)
  if ':' in pathlib.Path(config).name:
    raise UserError(f'{config}: the demo trains the config and its variant :blind; give the file alone')
  resolved = experiment.load_config(config, overrides)
  _check(resolved, config)
  configs = {workdir: resolved, workdir / 'blind': experiment.load_config(f'{config}:blind', overrides)}
  for path, fields in configs.items():
    trainer.train(fields, path, console)

  trained = Run.reopen(workdir)
  folder = workdir / 'demo'
  folder.mkdir(exist_ok=True)
  plotted = [name for split in SPLITS for name in metrics_of(split).values()]
  figures.loss_curve(workdir / 'metrics.jsonl', folder / 'loss.png', plotted)
  source = trained.experiment.data.source
  assert isinstance(source, EmojiScenes)
  subject, step = trained.restored_model()
  held_out = _Split(subject, trained.experiment.evaluators, 'held_out')
  own, blind = (read_metrics(epath.Path(path / 'metrics.jsonl'))[-1] for path in configs)
  extractor = FeatureExtractor(subject, packaged.locate('demo'), held_out.captions.batch_size)
  rows: dict[str, Row] = {
    'model': row_of(own, 'held_out'),
    'model, image withheld': row_of(own, 'held_out', 'blind_'),
    'trained without images': row_of(blind, 'held_out'),
    'most frequent answer': question_prior(first_scenes(source, PRIOR_SCENES), held_out.source),
    'nearest training image': nearest_image(
      first_scenes(source, NEAREST_SCENES), held_out.source, lambda scenes: extractor.of_records(Pipeline(scenes))
    ),
  }
  others = {split: row_of(own, split) for split in SPLITS if split != 'held_out'}
  described = held_out.describe(range(len(held_out.source)))
  slots = caption_slots(described, held_out.source)
  report(console, rows, others, slots, things=len(source.things), scenes=len(held_out.source), step=step)
  held_out.draw_sheet(described, folder / 'held_out.png')
  written: dict[str, float] = {'step': step, 'things': len(source.things)}
  for name, row in rows.items():
    written |= {f'held_out/{name}/{measure}': row[measure] for measure in MEASURES}
  for split, row in others.items():
    written |= {f'{split}/model/{measure}': row[measure] for measure in MEASURES}
  written |= {f'held_out/model/caption_{slot}': share for slot, share in slots.items()}
  write_json(epath.Path(folder / 'figures.json'), written)
  console.print(f'figures: {folder}/   metrics: {workdir / "metrics.jsonl"}\n{CREDITS}', highlight=False)


def _check(resolved: Mapping[str, Any], config: str) -> None:
  """Raises UserError for a config without the data and the evaluators of the demo."""
  if resolved['data']['source']['name'] != 'emoji_scenes':
    raise UserError(f'{config}: the demo needs data.source.name emoji_scenes')
  kinds = {name: evaluator['name'] for name, evaluator in resolved['evaluators'].items()}
  for suffix, kind in (('captions', 'captioning'), ('questions', 'vqa')):
    if missing := [f'{split}_{suffix}' for split in SPLITS if kinds.get(f'{split}_{suffix}') != kind]:
      raise UserError(f'{config}: the demo needs {kind} evaluators named {", ".join(missing)}')


def report(
  console: Console,
  rows: Mapping[str, Row],
  others: Mapping[str, Row],
  slots: Mapping[str, float],
  *,
  things: int,
  scenes: int,
  step: int,
) -> None:
  """Prints the table.

  rows    measures on the held-out pairs by method, the first of which is the trained model
  others  measures of the trained model by split
  slots   fractions of captions on the held-out pairs, by SLOTS
  """
  table = Table(title=f'Exact match: {things} things, {scenes} scenes of held-out pairs (step {step})')
  table.add_column('')
  for measure in MEASURES:
    table.add_column('whole caption' if measure == 'caption' else measure, justify='right')
  for section, named in (
    (SPLITS['held_out'], rows),
    *((SPLITS[split], {'model': row}) for split, row in others.items()),
  ):
    table.add_section()
    table.add_row(f'[italic]{section}')
    for name, row in named.items():
      table.add_row(f'  {name}', *(f'{row[measure]:.3f}' for measure in MEASURES))
  console.print(table)
  parts = ', '.join(f'{slot} {slots[slot]:.3f}' for slot in SLOTS)
  console.print(f'captions of held-out pairs, all right and in order: {parts}', highlight=False)


class _Split:
  """The evaluation data of a split, and the texts of a model about it."""

  def __init__(self, subject: EvaluatedModel, evaluators: Mapping[str, Evaluator], name: str):
    captions, questions = evaluators[f'{name}_captions'], evaluators[f'{name}_questions']
    assert isinstance(captions, Captioning)
    assert isinstance(questions, QuestionAnswering)
    assert isinstance(captions.data.source, EmojiScenes)
    self.captions, self.questions, self.source = captions, questions, captions.data.source
    self._subject = subject

  def describe(self, numbers: Sequence[int]) -> list[str]:
    """Captions of records."""
    return self._texts(self.captions, numbers, [CAPTION_PROMPT])

  def answer(self, numbers: Sequence[int]) -> list[str]:
    """Answers to the questions of records."""
    asked = [self.source.annotations_of(number)['question'] for number in numbers]
    return self._texts(self.questions, numbers, [QUESTION_TEMPLATE.replace('{}', question) for question in asked])

  def _texts(
    self, evaluator: Captioning | QuestionAnswering, numbers: Sequence[int], prompts: Sequence[str]
  ) -> list[str]:
    data = dataclasses.replace(evaluator.data, source=Subset(self.source, np.array(numbers)), max_bad=0.0)
    texts = TextGenerator(self._subject, evaluator.batch_size).texts(data, prompts, evaluator.decoding)
    return [text.text or '' for text in texts]

  def draw_sheet(self, described: Sequence[str], path: pathlib.Path) -> None:
    """Plots random records with true and predicted captions and answers."""
    chosen = np.sort(np.random.default_rng(0).choice(len(self.source), SHEET, replace=False))
    records = [self.source[int(number)] for number in chosen]
    lines = []
    for record, number, answered in zip(records, chosen, self.answer(chosen.tolist()), strict=True):
      (truth,) = record['answers']
      text = described[number]
      lines.append(
        [
          (text, text == record['caption']),
          *([] if text == record['caption'] else [(f'truth: {record["caption"]}', None)]),
          (f'{record["question"]} {answered}', answered == truth),
          *([] if answered == truth else [(f'truth: {truth}', None)]),
        ]
      )
    figures.text_sheet(
      np.stack([record['image'] for record in records]),
      lines,
      path,
      title=f'Captions and answers about {SPLITS["held_out"]},\ndrawn at random (right: green, wrong: red). {CREDITS}',
    )
