"""Zero-shot classification by names (Radford et al. 2021, section 3.1)."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from typing_extensions import override

from fmcv_jax.bounds import NonNegativeInt, PositiveInt
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.data.tokenizers import Tokenizer
from fmcv_jax.errors import UserError
from fmcv_jax.evaluate.base import EvaluatedModel, Evaluator, Metrics, topk_accuracy
from fmcv_jax.evaluate.labels import check_labels


@dataclasses.dataclass(frozen=True)
class ZeroShot(Evaluator):
  """Names every image by the nearest of the source's class names, each the mean of its `templates`' embeddings.

  templates  sentences with one '{}' for the name

  UserError before the first step for a source without class names, and for a template that leaves no room for a name.
  """

  data: Pipeline
  templates: tuple[str, ...] = ('{}',)
  batch_size: PositiveInt = 256
  every: NonNegativeInt = 0

  def __post_init__(self) -> None:
    check_templates('templates', self.templates)

  @override
  def prepare(self, subject: EvaluatedModel) -> None:
    _check_names(self.data.source.names)
    subject.check_texts()
    subject.check_dataset('embed_image', self.data, self.batch_size, truth=('label',))
    check_label_room(subject.tokenizer, self.data.source.names, self.templates)

  @override
  def __call__(self, subject: EvaluatedModel) -> Metrics:
    texts = class_embeddings(subject, self.data.source.names, self.templates, self.batch_size)
    images, _, truth = subject.map_dataset('embed_image', self.data, self.batch_size, truth=('label',))
    labels, scores = truth['label'], images @ texts.T
    check_labels(labels, len(texts))
    return {'top1': topk_accuracy(scores, labels, 1), 'top5': topk_accuracy(scores, labels, 5)}


def class_embeddings(subject: EvaluatedModel, names: Sequence[str], templates: Sequence[str], batch: int) -> np.ndarray:
  """float32 [classes, E]: the unit-length mean over templates of the text embeddings of each name."""
  _check_names(names)
  check_label_room(subject.tokenizer, names, templates)
  texts = [template.replace('{}', name) for name in names for template in templates]
  embeddings = subject.embed_texts(texts, batch).reshape(len(names), len(templates), -1).mean(axis=1)
  return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


def _check_names(names: Sequence[str]) -> None:
  if not names:
    raise UserError('evaluators: zero-shot classification needs a source with class names')


def check_templates(field: str, templates: Sequence[str]) -> None:
  """Raises ValueError, which names the field, unless there are templates, each with one '{}'."""
  if not templates or (bad := [template for template in templates if template.count('{}') != 1]):
    raise ValueError(f"{field}: each needs one '{{}}' for the name, got {bad[0] if templates else templates!r}")


def check_label_room(tokenizer: Tokenizer | None, names: Sequence[str], templates: Sequence[str]) -> None:
  """Raises UserError for a template that fills the tokenizer's length, so that all names become one text."""
  different = list(dict.fromkeys(names))
  if tokenizer is None or len(different) < 2:
    return
  for template in templates:
    rows = tokenizer([template.replace('{}', name) for name in different])
    if (rows == rows[0]).all():
      raise UserError(
        f'templates: {template!r} leaves no room for a label in the {tokenizer.length} tokens of a text: all '
        f'{len(different)} labels, {different[0]!r} and {different[1]!r} among them, become '
        f'{tokenizer.decode(rows[:1])[0]!r}; use a shorter template, such as {"{}"!r}'
      )
