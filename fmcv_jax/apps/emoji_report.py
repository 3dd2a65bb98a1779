"""What a text-to-image model can paint: a sheet of prompts, and figures by another model's eyes."""

import functools
import pathlib
import re

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fmcv_jax.apps import figures
from fmcv_jax.data.loader import Pipeline
from fmcv_jax.data.sources.base import Source
from fmcv_jax.data.sources.in_memory import InMemoryImages
from fmcv_jax.errors import UserError
from fmcv_jax.evaluate.base import EvaluatedModel, topk_accuracy
from fmcv_jax.evaluate.distances import cmmd, fid
from fmcv_jax.evaluate.zero_shot import ZeroShot
from fmcv_jax.inference.generator import ImageGenerator
from fmcv_jax.run import Run
from fmcv_jax.train.storage import write_json

ROWS, COLUMNS = 8, 6


def run(model: str, judge: str, *, steps: int = 20, guidance: float = 4.0, seed: int = 0) -> None:
  """Paints every name that the model was trained on, and the judge's held-out names of the same things.

  model   workdir of a model that was trained on images with names, told texts
  judge   workdir of a `fmcv demo`: its zero-shot evaluators give the names and the real pictures, by another hand

  Writes images and figures.json to model/gallery.
  """
  console, painter = Console(), ImageGenerator(model)
  reopened = Run.reopen(judge)
  subject, _ = reopened.restored_model()
  seen, held_out = (reopened.experiment.evaluators.get(name) for name in ('seen', 'held_out'))
  if not isinstance(seen, ZeroShot) or not isinstance(held_out, ZeroShot) or painter.condition_fields != ('tokens',):
    raise UserError(
      f'--feature-extractor {judge}: needs zero_shot evaluators named seen and held_out, and a text-conditional model'
    )
  things = re.compile(getattr(painter.source, 'name_filter', ''))
  folder = pathlib.Path(model) / 'gallery'
  folder.mkdir(exist_ok=True)
  table = Table(title=f'{model}: what {judge} sees in {steps}-step pictures of its prompts')
  for heading in ('', 'prompts', 'named right', 'among 5', 'CMMD', 'FID'):
    table.add_column(heading, justify='left' if not heading else 'right')
  scores = {}
  for kind, evaluator in (('training', seen), ('held_out', held_out)):
    names = evaluator.data.source.names
    labels = sorted({int(label) for label in _labels(evaluator.data.source) if things.search(names[label])})
    prompts = [names[label] for label in labels]
    with Progress(console=console, transient=True) as bar:
      task = bar.add_task(f'painting {kind}', total=COLUMNS * len(prompts))
      pictures = painter.generate(
        [prompt for prompt in prompts for _ in range(COLUMNS)],
        steps=steps,
        guidance=guidance,
        seed=seed,
        progress=functools.partial(bar.advance, task),
      )
    chosen = np.random.default_rng(seed).permutation(len(prompts))[:ROWS]
    grouped = pictures.reshape(len(prompts), COLUMNS, *pictures.shape[1:])
    figures.retrieval_sheet(
      [prompts[i] for i in chosen],
      [grouped[i] for i in chosen],
      [[False] * COLUMNS] * len(chosen),
      folder / f'{kind}.png',
      title=f'{"Prompts of the training set" if kind == "training" else "Prompts never seen in training"}, drawn at '
      f'random; guidance {guidance:g}, {steps} steps, seed {seed}',
    )
    real = np.stack([x['image'] for x in _of(evaluator.data.source, set(labels))])
    truth = np.repeat(labels, COLUMNS)
    texts = subject.embed_texts(names, evaluator.batch_size)
    generator = np.random.default_rng(0)
    rivals = {
      'painted': pictures,
      'nearest of another name': _nearest(painter.source, prompts, subject, evaluator.batch_size),
      'noise': generator.integers(0, 256, pictures.shape, np.uint8),
    }
    real_features = _embedded(subject, real, evaluator.batch_size)
    for rival, images in rivals.items():
      features = _embedded(subject, images, evaluator.batch_size)
      similarity = features @ texts.T
      values = {
        'top1': topk_accuracy(similarity, truth[: len(images)], 1),
        'top5': topk_accuracy(similarity, truth[: len(images)], 5),
        'cmmd': cmmd(features, real_features),
        'fid': fid(features, real_features),
      }
      scores.update({f'{kind}/{rival}/{name}': value for name, value in values.items()})
      table.add_row(f'{kind}: {rival}', str(len(prompts)), *(f'{value:.3f}' for value in values.values()))
  console.print(table)
  write_json(folder / 'figures.json', scores)
  console.print(f'images and figures: {folder}/', highlight=False)


def _labels(source: Source):
  return (source[index]['label'] for index in range(len(source)))


def _of(source: Source, labels: set[int]):
  examples = (source[index] for index in range(len(source)))
  return [example for example in examples if example['label'] in labels]


def _nearest(source: Source, prompts: list[str], subject: EvaluatedModel, batch: int) -> np.ndarray:
  """For each prompt COLUMNS drawings of `source`, of the names that the judge finds nearest, but never its own."""
  examples = [source[index] for index in range(len(source))]
  names = [example['text'] for example in examples]
  known = sorted(set(names))
  likeness = subject.embed_texts(prompts, batch) @ subject.embed_texts(known, batch).T
  drawn = []
  for prompt, row in zip(prompts, likeness, strict=True):
    of = dict(zip(known, row, strict=True)) | {prompt: -np.inf}
    order = sorted(range(len(names)), key=lambda i: -of[names[i]])
    drawn += [examples[i]['image'] for i in order[:COLUMNS]]
  return np.stack(drawn)


def _embedded(subject: EvaluatedModel, images: np.ndarray, batch: int) -> np.ndarray:
  return subject.map_dataset('embed_image', Pipeline(InMemoryImages(images)), batch).values
