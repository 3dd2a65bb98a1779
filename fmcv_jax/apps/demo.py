"""The demo: pretrain a small CLIP on emoji, name drawings by an artist it never saw, and draw what it learnt."""

import pathlib
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from fmcv_jax import experiment
from fmcv_jax.apps import sheets
from fmcv_jax.data.loader import Pipeline
from fmcv_jax.errors import UserError
from fmcv_jax.evaluate.base import topk_hits
from fmcv_jax.evaluate.retrieval import captions_of
from fmcv_jax.evaluate.zero_shot import ZeroShot, class_embeddings
from fmcv_jax.train import metrics

CREDITS = 'Drawings: OpenMoji (CC BY-SA 4.0), Noto Emoji (Apache-2.0, OFL), Twemoji (CC BY 4.0)'


def run(config: str, workdir: pathlib.Path, overrides: Sequence[str]) -> None:
  """Trains `config` in `workdir` (going on where it stands) and writes figures and pictures to workdir/demo."""
  console = Console()
  resolved = experiment.load_config(config, overrides)
  wanted = {'seen', 'held_out'}
  if not wanted <= set(resolved['evaluators']):
    raise UserError(f'{config}: the demo needs zero_shot evaluators named {" and ".join(sorted(wanted))}')
  experiment.train(resolved, workdir, console)

  trained = experiment.Run.reopen(workdir)
  subject, step = trained.restored_subject()
  folder = workdir / 'demo'
  folder.mkdir(exist_ok=True)
  sheets.loss_curve(workdir / 'metrics.jsonl', folder / 'loss.png')

  evaluators = {name: trained.experiment.evaluators[name] for name in ('seen', 'held_out')}
  figures, scores = {}, {}
  for name, evaluator in evaluators.items():
    assert isinstance(evaluator, ZeroShot)
    images, _, labels = subject.over('embed_image', evaluator.data, evaluator.batch)
    names = evaluator.data.source.names
    scores[name] = images @ class_embeddings(subject, names, evaluator.templates, evaluator.batch).T
    figures[name] = [topk_hits(scores[name], labels, k) for k in (1, 5)]
    _draw_zero_shot(evaluator.data, labels, scores[name], folder / f'zero_shot_{name}.png', name, figures[name])
  _draw_retrieval(subject, evaluators['seen'], folder / 'retrieval.png')

  seen = evaluators['seen'].data
  table = Table(title=f'Names of drawings by an artist never seen in training (step {step})')
  for heading in ('', 'names', 'top-1', 'top-5', 'chance', 'nearest by pixels'):
    table.add_column(heading, justify='left' if not heading else 'right')
  for name, text in (('seen', 'concepts of the training set'), ('held_out', 'concepts held out of training')):
    count = len(evaluators[name].data.source.names)
    pixels = f'{nearest_by_pixels(trained.experiment.data, seen):.3f}' if name == 'seen' else 'cannot name them'
    table.add_row(text, str(count), *(f'{value:.3f}' for value in figures[name]), f'{1 / count:.4f}', pixels)
  console.print(table)
  last = metrics.read(workdir / 'metrics.jsonl')[-1]
  retrieval = {name: value for name, value in last.items() if name.startswith('retrieval/')}
  console.print('  '.join(f'{name} {value:.3f}' for name, value in retrieval.items()), highlight=False)
  console.print(f'figures and pictures: {folder}/   metrics: {workdir / "metrics.jsonl"}\n{CREDITS}', highlight=False)


def nearest_by_pixels(train: Pipeline, test: Pipeline, side: int = 16) -> float:
  """Top-1 accuracy of naming each test image as its nearest training image, by squared distance of side x side pixels.

  The baseline that a learnt representation has to beat: it knows no words, but it has seen every concept drawn.
  """

  def pixels(pipeline):
    examples = [pipeline.source[index] for index in range(len(pipeline.source))]
    images = np.stack([example['image'] for example in examples]).astype(np.float32) / 255
    block = images.shape[1] // side
    small = images[:, : block * side, : block * side].reshape(len(images), side, block, side, block, 3).mean((2, 4))
    return small.reshape(len(images), -1), [example['text'] for example in examples]

  bank, bank_names = pixels(train)
  queries, names = pixels(test)
  distance = (queries**2).sum(1)[:, None] - 2 * queries @ bank.T + (bank**2).sum(1)
  return float(np.mean([bank_names[i] == name for i, name in zip(distance.argmin(1), names, strict=True)]))


def _pictures(pipeline: Pipeline, indices: Sequence[int]) -> list[np.ndarray]:
  return [pipeline.source[int(index)]['image'] for index in indices]


def _draw_zero_shot(data, labels, scores, path, name, figures) -> None:
  chosen = np.random.default_rng(0).choice(len(labels), size=24, replace=False)
  what = 'concepts never seen in training' if name == 'held_out' else 'an artist never seen in training'
  sheets.zero_shot_sheet(
    np.stack(_pictures(data, chosen)),
    data.source.names,
    labels[chosen],
    scores[chosen],
    path,
    title=f'Five most likely of {scores.shape[1]} names; {what}; top-1 {figures[0]:.3f}, top-5 {figures[1]:.3f}\n{CREDITS}',
  )


def _draw_retrieval(subject, evaluator: ZeroShot, path) -> None:
  images, _, _ = subject.over('embed_image', evaluator.data, evaluator.batch)
  texts, truth = captions_of(evaluator.data.source, canonical=True)
  queries = [texts[i] for i in np.random.default_rng(1).choice(len(texts), size=10, replace=False)]
  found = np.argsort(-subject.over_texts(queries, evaluator.batch) @ images.T, axis=1)[:, :5]
  sheets.retrieval_sheet(
    queries,
    [np.stack(_pictures(evaluator.data, row)) for row in found],
    [[texts[truth[i][0]] == query for i in row] for query, row in zip(queries, found, strict=True)],
    path,
    title=f'Text to image: the five nearest of {len(images)} drawings\n{CREDITS}',
  )
