"""Image-text retrieval: recall at 1, 5 and 10, both ways (Karpathy & Fei-Fei 2015)."""

import dataclasses
from collections.abc import Iterable

import numpy as np
from typing_extensions import override

from fmcv_jax.bounds import NonNegativeInt, PositiveInt
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.data.sources.base import UNREADABLE, Source
from fmcv_jax.errors import UserError
from fmcv_jax.evaluate.base import EvaluatedModel, Evaluator, Metrics, chunks

_CHECKED = 100  # records whose captions are read before the first step


@dataclasses.dataclass(frozen=True)
class Retrieval(Evaluator):
  """Share of queries with a right answer among the k nearest.

  An image may have several captions and several images may share one: any of them is a right answer.
  first_caption_only: only the first caption (the name) of each image takes part, not its further ones.
  """

  data: Pipeline
  first_caption_only: bool = False
  batch_size: PositiveInt = 256
  every: NonNegativeInt = 0

  @override
  def prepare(self, subject: EvaluatedModel) -> None:
    subject.check_texts()
    subject.check_dataset('embed_image', self.data, self.batch_size)
    checked = min(_CHECKED, len(self.data.source))
    if not any(_texts_of(self.data.source, index) for index in range(checked)):
      raise UserError(f'config.evaluators: retrieval: the first {checked} records of its data have no captions')

  @override
  def __call__(self, subject: EvaluatedModel) -> Metrics:
    images, records, _ = subject.map_dataset('embed_image', self.data, self.batch_size)
    texts, truth = captions_of(self.data.source, first_caption_only=self.first_caption_only)
    embeddings = subject.embed_texts(texts, self.batch_size)
    return recalls(images, embeddings, [truth[i] for i in records])


def _texts_of(source: Source, index: int) -> tuple[str, ...]:
  try:
    return source.texts_of(index)
  except UNREADABLE:
    return ()


def captions_of(source: Source, *, first_caption_only: bool = False) -> tuple[list[str], list[tuple[int, ...]]]:
  """(the distinct captions of a source, for each image the indices of its own); first_caption_only: only its `text`."""
  ids: dict[str, int] = {}
  truth = []
  for index in range(len(source)):
    own = source.texts_of(index)[: 1 if first_caption_only else None]
    truth.append(tuple(ids.setdefault(text, len(ids)) for text in own))
  return list(ids), truth


def recalls(
  images: np.ndarray, texts: np.ndarray, truth: list[tuple[int, ...]], ks: Iterable[int] = (1, 5, 10)
) -> dict[str, float]:
  """Recall figures from unit embeddings images [N, E], texts [M, E], and the texts that are right for each image."""
  right = np.zeros((len(images), len(texts)), bool)
  for image, own in enumerate(truth):
    right[image, list(own)] = True
  figures = {}
  for name, queries, answers, correct in (
    ('image_to_text', images, texts, right),
    ('text_to_image', texts, images, right.T),
  ):
    hits = {k: 0 for k in ks}
    for piece in chunks(len(queries), 1024):
      order = np.argsort(-(queries[piece] @ answers.T), axis=1, kind='stable')[:, : max(ks)]
      found = np.take_along_axis(correct[piece], order, axis=1)
      for k in ks:
        hits[k] += int(found[:, :k].any(axis=1).sum())
    figures.update({f'{name}_r{k}': hits[k] / len(queries) for k in ks})
  return figures
