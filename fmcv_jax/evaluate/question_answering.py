"""Answers to questions about images, compared with those of people: VQA accuracy or exact match."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from typing_extensions import override

from fmcv_jax.bounds import NonNegativeInt, PositiveInt
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.data.sources.subset import Subset
from fmcv_jax.decoding.options import DecodingOptions
from fmcv_jax.errors import UserError, did_you_mean
from fmcv_jax.evaluate.annotated import read_annotations, sample_annotations
from fmcv_jax.evaluate.base import EvaluatedModel, Evaluator, Metrics
from fmcv_jax.evaluate.text_generator import QUESTION_TEMPLATE, TextGenerator
from fmcv_jax.evaluate.vqa_accuracy import PEOPLE, stripped, vqa_accuracy

_NAME = 'vqa'
_TYPES = ('answer_type', 'question_type')


class _Record(NamedTuple):
  question: str
  answers: tuple[str, ...]
  types: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class QuestionAnswering(Evaluator):
  """Answers the question of each record: 'accuracy', from 0 to 1, over all records and by their types.

  Of ten answers the VQA accuracy (`fmcv_jax.evaluate.vqa_accuracy`); of one answer exact match, apart from white space
  around it.

  data      records with a `question` and `answers`, ten or one
  template  prompt with a '{}' for the question; default PaliGemma's 'answer en {}'
  answers   closed list, of which the most likely one is the answer; without it `decoding` generates answers
  decoding  search of the answers, as in `fmcv ask`
  by        fields whose values have an accuracy each, such as 'answer_type/number'; default those of 'answer_type' and
            'question_type' that the records have
  blind     also gives all accuracies as 'blind_...' for answers that are generated without the images, from pixels of
            the mean color of the model's normalization: what the questions alone give away
  """

  data: Pipeline
  template: str = QUESTION_TEMPLATE
  answers: tuple[str, ...] = ()
  decoding: DecodingOptions = DecodingOptions()
  by: tuple[str, ...] | None = None
  blind: bool = True
  batch_size: PositiveInt = 256
  every: NonNegativeInt = 0

  def __post_init__(self) -> None:
    if self.template.count('{}') != 1:
      raise ValueError(f"template: needs one '{{}}' for the question, got {self.template!r}")
    if twice := [answer for answer, count in collections.Counter(self.answers).items() if count > 1]:
      raise ValueError(f'answers: {twice[0]!r} is there twice')

  @override
  def prepare(self, subject: EvaluatedModel) -> None:
    generator = TextGenerator(subject, self.batch_size)
    if self.answers:
      generator.answer_rows(self.answers)
    records = sample_annotations(self.data, self._record, _NAME)
    _check_alike(records)
    generator.rows(self._prompts(records))

  @override
  def __call__(self, subject: EvaluatedModel) -> Metrics:
    records = read_annotations(self.data, self._record, _NAME)
    _check_alike(list(records.values()))
    data = dataclasses.replace(self.data, source=Subset(self.data.source, np.array(list(records))))
    prompts, numbers = self._prompts(list(records.values())), list(records)
    metrics: Metrics = {}
    for prefix, withheld in (('', False), ('blind_', True))[: 1 + self.blind]:
      texts = TextGenerator(subject, self.batch_size).texts(
        data, prompts, self.decoding, self.answers, numbers, withhold_images=withheld
      )
      scores = collections.defaultdict(list)
      for number, text, _ in texts:
        if text is not None:
          record = records[number]
          score = _accuracy(text, record.answers)
          for name in ('accuracy', *(f'{field}/{value}' for field, value in record.types.items())):
            scores[name].append(score)
      metrics |= {f'{prefix}{name}': float(np.mean(scores[name])) for name in sorted(scores)}
    return metrics

  def _prompts(self, records: Sequence[_Record]) -> list[str]:
    return [self.template.replace('{}', record.question) for record in records]

  def _record(self, number: int) -> _Record:
    source = self.data.source
    found, where = source.annotations_of(number), f'config.evaluators: {_NAME}: {source.key_of(number)}'
    for field in ('question', 'answers', *(self.by or ())):
      if field not in found:
        raise UserError(f'{where} has no {field!r}; {did_you_mean(field, set(found) - {"key"})}')
    question, answers = found['question'], found['answers']
    if not isinstance(question, str) or not question.strip():
      raise UserError(f'{where}: question is {question!r:.60}, not a text')
    answers = (answers,) if isinstance(answers, str) else answers
    if not isinstance(answers, (list, tuple, np.ndarray)) or not all(isinstance(answer, str) for answer in answers):
      raise UserError(f'{where}: answers are {answers!r:.60}, not texts')
    if len(answers) not in (1, PEOPLE):
      raise UserError(f'{where}: {len(answers)} answers; VQA accuracy is defined for {PEOPLE}, exact match for one')
    types = {field: str(found[field]) for field in (_TYPES if self.by is None else self.by) if field in found}
    return _Record(' '.join(question.split()), tuple(answers), types)


def _accuracy(answer: str, answers: Sequence[str]) -> float:
  if len(answers) == 1:
    return float(stripped(answer) == stripped(answers[0]))
  return vqa_accuracy(answer, answers)


def _check_alike(records: Sequence[_Record]) -> None:
  """Raises UserError if a mean over the records would mix two measures, or lack records of a type."""
  if len({len(record.answers) for record in records}) > 1:
    raise UserError(
      f'config.evaluators: {_NAME}: some records have one answer and others {PEOPLE}; evaluate them apart, by exact '
      f'match and VQA accuracy'
    )
  if len({tuple(record.types) for record in records}) > 1:
    both = sorted({field for record in records for field in record.types})
    raise UserError(f'config.evaluators: {_NAME}: only some records have {", ".join(both)}; set by')
