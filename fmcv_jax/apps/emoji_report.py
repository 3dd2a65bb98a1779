"""Report on a text-to-image model of emoji: a grid of samples, and metrics by an independent CLIP."""

import functools
import pathlib
import re
from collections.abc import Iterator

import numpy as np
from rich.progress import Progress
from rich.table import Table

from fmcv_jax.apps import figures
from fmcv_jax.console import make_console
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.data.sources.base import Example, Source
from fmcv_jax.data.sources.in_memory import InMemoryImages
from fmcv_jax.errors import UserError
from fmcv_jax.evaluate.base import EvaluatedModel, topk_accuracy
from fmcv_jax.evaluate.distances import cmmd, fid
from fmcv_jax.evaluate.zero_shot import ZeroShot
from fmcv_jax.inference.generator import ImageGenerator
from fmcv_jax.pretrained import packaged
from fmcv_jax.run import Run
from fmcv_jax.train.storage import write_json

ROWS, COLUMNS = 8, 6


def run(model: str, extractor: str, *, steps: int = 20, guidance: float = 4.0, seed: int = 0) -> None:
  """Generates images of the training names of a model and of held-out names, and scores them by a CLIP.

  model      workdir of a text-conditional model that was trained on emoji
  extractor  workdir of `fmcv demo`, the feature extractor; its zero-shot evaluators provide names and real drawings by
             an artist not in training

  Writes images and figures.json to model/gallery.
  """
  console, generator = make_console(), ImageGenerator(model)
  reopened = Run.reopen(packaged.locate(extractor))
  subject, _ = reopened.restored_model()
  training, held_out = (reopened.experiment.evaluators.get(name) for name in ('seen', 'held_out'))
  if (
    not isinstance(training, ZeroShot)
    or not isinstance(held_out, ZeroShot)
    or generator.condition_fields != ('tokens',)
  ):
    raise UserError(
      f"--feature-extractor {extractor}: needs zero_shot evaluators named 'seen' and 'held_out', "
      'and a text-conditional model'
    )
  name_filter = re.compile(getattr(generator.source, 'name_filter', ''))
  folder = pathlib.Path(model) / 'gallery'
  folder.mkdir(parents=True, exist_ok=True)
  table = Table(title=f'{model}: {steps}-step samples scored by {extractor}')
  for heading in ('', 'prompts', 'top-1', 'top-5', 'CMMD', 'FID'):
    table.add_column(heading, justify='left' if not heading else 'right')
  scores = {}
  for kind, evaluator in (('training', training), ('held_out', held_out)):
    names = evaluator.data.source.names
    labels = sorted({int(label) for label in _labels(evaluator.data.source) if name_filter.search(names[label])})
    prompts = [names[label] for label in labels]
    with Progress(console=console, transient=True) as bar:
      task = bar.add_task(f'sampling {kind}', total=COLUMNS * len(prompts))
      generated = generator.generate(
        [prompt for prompt in prompts for _ in range(COLUMNS)],
        steps=steps,
        guidance=guidance,
        seed=seed,
        progress=functools.partial(bar.advance, task),
      )
    chosen = np.random.default_rng(seed).permutation(len(prompts))[:ROWS]
    grouped = generated.reshape(len(prompts), COLUMNS, *generated.shape[1:])
    figures.retrieval_sheet(
      [prompts[i] for i in chosen],
      [grouped[i] for i in chosen],
      [[False] * COLUMNS] * len(chosen),
      folder / f'{kind}.png',
      title=f'{"Prompts of the training set" if kind == "training" else "Prompts held out of training"}, drawn at '
      f'random; guidance {guidance:g}, {steps} steps, seed {seed}',
    )
    real = np.stack([x['image'] for x in _with_labels(evaluator.data.source, set(labels))])
    truth = np.repeat(labels, COLUMNS)
    texts = subject.embed_texts(names, evaluator.batch_size)
    rng = np.random.default_rng(0)
    compared = {
      'generated': generated,
      'nearest neighbor (other class)': _nearest(generator.source, prompts, subject, evaluator.batch_size),
      'noise': rng.integers(0, 256, generated.shape, np.uint8),
    }
    real_features = _embedded(subject, real, evaluator.batch_size)
    for method, images in compared.items():
      features = _embedded(subject, images, evaluator.batch_size)
      similarity = features @ texts.T
      values = {
        'top1': topk_accuracy(similarity, truth[: len(images)], 1),
        'top5': topk_accuracy(similarity, truth[: len(images)], 5),
        'cmmd': cmmd(features, real_features),
        'fid': fid(features, real_features),
      }
      scores.update({f'{kind}/{method}/{name}': value for name, value in values.items()})
      table.add_row(f'{kind}: {method}', str(len(prompts)), *(f'{value:.3f}' for value in values.values()))
  console.print(table)
  write_json(folder / 'figures.json', scores)
  console.print(f'images and figures: {folder}/', highlight=False)


def _labels(source: Source) -> Iterator[int]:
  return (source[index]['label'] for index in range(len(source)))


def _with_labels(source: Source, labels: set[int]) -> list[Example]:
  examples = (source[index] for index in range(len(source)))
  return [example for example in examples if example['label'] in labels]


def _nearest(source: Source, prompts: list[str], subject: EvaluatedModel, batch: int) -> np.ndarray:
  """Baseline: COLUMNS drawings of `source` per prompt, of the nearest other class names in text embedding space."""
  examples = [source[index] for index in range(len(source))]
  names = [example['text'] for example in examples]
  known = sorted(set(names))
  similarity = subject.embed_texts(prompts, batch) @ subject.embed_texts(known, batch).T
  nearest = []
  for prompt, row in zip(prompts, similarity, strict=True):
    scores = dict(zip(known, row, strict=True)) | {prompt: -np.inf}
    order = sorted(range(len(names)), key=lambda i: -scores[names[i]])
    nearest += [examples[i]['image'] for i in order[:COLUMNS]]
  return np.stack(nearest)


def _embedded(subject: EvaluatedModel, images: np.ndarray, batch: int) -> np.ndarray:
  return subject.map_dataset('embed_image', Pipeline(InMemoryImages(images)), batch).values
