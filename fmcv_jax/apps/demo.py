"""The demo: pretrain a small CLIP on emoji, classify drawings of an artist not in training, and plot the results."""

import pathlib
from collections.abc import Sequence

import numpy as np
from etils import epath
from rich.table import Table

from fmcv_jax import experiment, trainer
from fmcv_jax.apps import figures
from fmcv_jax.console import make_console
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.errors import UserError
from fmcv_jax.evaluate.base import EvaluatedModel, topk_accuracy
from fmcv_jax.evaluate.retrieval import captions_of
from fmcv_jax.evaluate.zero_shot import ZeroShot, class_embeddings
from fmcv_jax.run import Run
from fmcv_jax.train.storage import read_metrics, write_json

CREDITS = 'Drawings: OpenMoji (CC BY-SA 4.0), Noto Emoji (Apache-2.0, OFL), Twemoji (CC BY 4.0)'


def run(config: str, workdir: str | pathlib.Path, overrides: Sequence[str]) -> None:
  """Trains `config` in `workdir` (resuming if it exists) and writes plots and figures.json to workdir/demo."""
  console, workdir = make_console(), pathlib.Path(workdir)
  resolved = experiment.load_config(config, overrides)
  kinds = {name: evaluator['name'] for name, evaluator in resolved['evaluators'].items()}
  if (kinds.get('seen'), kinds.get('held_out')) != ('zero_shot', 'zero_shot'):
    raise UserError(f"{config}: the demo needs zero_shot evaluators named 'seen' and 'held_out'")
  trainer.train(resolved, workdir, console)

  trained = Run.reopen(workdir)
  subject, step = trained.restored_model()
  folder = workdir / 'demo'
  folder.mkdir(exist_ok=True)
  figures.loss_curve(workdir / 'metrics.jsonl', folder / 'loss.png')

  table = Table(title=f'Zero-shot classification of drawings by an artist not in training (step {step})')
  for heading in ('', 'names', 'top-1', 'top-5', 'random', 'nearest by pixels'):
    table.add_column(heading, justify='left' if not heading else 'right')
  written: dict[str, float] = {'step': step}
  for name, text in (('seen', 'concepts of the training set'), ('held_out', 'concepts held out of training')):
    evaluator = trained.experiment.evaluators[name]
    assert isinstance(evaluator, ZeroShot)
    accuracies = _zero_shot(subject, evaluator, folder / f'zero_shot_{name}.png', text)
    count = len(evaluator.data.source.names)
    written |= {f'{name}/top1': accuracies[0], f'{name}/top5': accuracies[1], f'{name}/names': count}
    if name == 'seen':
      by_pixels = written[f'{name}/nearest_by_pixels'] = nearest_by_pixels(trained.experiment.data, evaluator.data)
      pixels = f'{by_pixels:.3f}'
      _draw_retrieval(subject, evaluator, folder / 'retrieval.png')
    else:
      pixels = 'not applicable'
    table.add_row(text, str(count), *(f'{value:.3f}' for value in accuracies), f'{1 / count:.4f}', pixels)
  console.print(table)
  last = read_metrics(epath.Path(workdir / 'metrics.jsonl'))[-1]
  retrieval = {name: value for name, value in last.items() if name.startswith('retrieval/')}
  write_json(epath.Path(folder / 'figures.json'), written | retrieval)
  console.print('  '.join(f'{name} {value:.3f}' for name, value in retrieval.items()), highlight=False)
  console.print(f'figures: {folder}/   metrics: {workdir / "metrics.jsonl"}\n{CREDITS}', highlight=False)


def _zero_shot(subject: EvaluatedModel, evaluator: ZeroShot, path: pathlib.Path, text: str) -> list[float]:
  """Top-1 and top-5 among the evaluator's names; plots 24 random images."""
  outputs = subject.map_dataset('embed_image', evaluator.data, evaluator.batch_size, truth=('label',))
  labels, names = outputs.truth['label'], evaluator.data.source.names
  scores = outputs.values @ class_embeddings(subject, names, evaluator.templates, evaluator.batch_size).T
  accuracies = [topk_accuracy(scores, labels, k) for k in (1, 5)]
  chosen = np.random.default_rng(0).choice(len(scores), size=24, replace=False)
  figures.zero_shot_sheet(
    _images(evaluator.data, outputs.indices[chosen]),
    names,
    labels[chosen],
    scores[chosen],
    path,
    title=f'{text}, drawn by an artist not in training: top 5 of {len(names)} names (correct: green)\n'
    f'top-1 {accuracies[0]:.3f}, top-5 {accuracies[1]:.3f}. {CREDITS}',
  )
  return accuracies


def _draw_retrieval(subject: EvaluatedModel, evaluator: ZeroShot, path: pathlib.Path) -> None:
  """Plots ten random names, each with the five nearest drawings."""
  outputs = subject.map_dataset('embed_image', evaluator.data, evaluator.batch_size)
  texts, truth = captions_of(evaluator.data.source, first_caption_only=True)
  queries = np.random.default_rng(1).choice(len(texts), size=10, replace=False)
  embeddings = subject.embed_texts([texts[query] for query in queries], evaluator.batch_size)
  found = outputs.indices[np.argsort(-embeddings @ outputs.values.T, axis=1)[:, :5]]
  figures.retrieval_sheet(
    [texts[query] for query in queries],
    [_images(evaluator.data, row) for row in found],
    [[query in truth[record] for record in row] for query, row in zip(queries, found, strict=True)],
    path,
    title=f'Text to image: the five nearest of {len(outputs.indices)} drawings\n{CREDITS}',
  )


def _images(pipeline: Pipeline, records: np.ndarray) -> np.ndarray:
  return np.stack([pipeline.source[int(record)]['image'] for record in records])


def nearest_by_pixels(train: Pipeline, test: Pipeline, side: int = 16) -> float:
  """Top-1 accuracy of a nearest-neighbour classifier on side x side pixels (squared distance).

  A baseline for learned representations: it uses no text, but its training set has a drawing of every concept.
  """

  def pixels(pipeline: Pipeline) -> tuple[np.ndarray, list[str]]:
    examples = [pipeline.source[index] for index in range(len(pipeline.source))]
    images = np.stack([example['image'] for example in examples]).astype(np.float32) / 255
    block = images.shape[1] // side
    small = images[:, : block * side, : block * side].reshape(len(images), side, block, side, block, 3).mean((2, 4))
    return small.reshape(len(images), -1), [example['text'] for example in examples]

  bank, bank_names = pixels(train)
  queries, names = pixels(test)
  distance = (queries**2).sum(1)[:, None] - 2 * queries @ bank.T + (bank**2).sum(1)
  return float(np.mean([bank_names[i] == name for i, name in zip(distance.argmin(1), names, strict=True)]))
