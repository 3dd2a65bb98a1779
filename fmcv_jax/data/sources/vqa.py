"""VQA (Antol et al. 2015; v2: Goyal et al. 2017) in the official files, and any data set in their layout."""

import collections
import dataclasses
import functools
import os
import string
from typing import NamedTuple

from typing_extensions import override

from fmcv_jax.data import storage
from fmcv_jax.data.sources import annotation_json
from fmcv_jax.data.sources.account import Account
from fmcv_jax.data.sources.base import Example, Source
from fmcv_jax.errors import UserError

_WHAT = 'vqa'


class _Question(NamedTuple):
  number: int | str
  file: str
  question: str
  answers: tuple[str, ...]
  types: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Vqa(Source):
  """One record per question: `question`, `answers` (a tuple of all that people gave), 'question_type', 'answer_type'.

  questions    the file of questions, such as 'v2_OpenEnded_mscoco_val2014_questions.json': a list 'questions'
               (question_id, image_id, question)
  annotations  the file of answers, such as 'v2_mscoco_val2014_annotations.json': a list 'annotations' (question_id,
               image_id, answers: a list of objects with 'answer', and question_type and answer_type if it has them)
  images       the folder or URL of the images, such as 'val2014'
  image_name   name of an image's file, of {id} and the file's {data_subtype}; COCO's of 2017 are '{id:012d}.jpg'

  Texts are 'question\\nanswer', one for each of the answers, the most frequent first: with the tokenizer `prompted` and
  the caption template 'answer en {}', training draws an answer as often as people gave it. White space in questions and
  answers becomes single blanks. A blank question, one without answers, and answers of another image are errors; a blank
  answer is one of `answers`, but not a text.
  """

  questions: str
  annotations: str
  images: str
  image_name: str = 'COCO_{data_subtype}_{id:012d}.jpg'

  def __post_init__(self) -> None:
    try:
      names = {name for _, name, _, _ in string.Formatter().parse(self.image_name) if name is not None}
    except ValueError as error:
      raise ValueError(f'image_name: {self.image_name!r}: {error}') from error
    if 'id' not in names or names - {'id', 'data_subtype'}:
      raise ValueError(f'image_name: expected {{id}} and, if wanted, {{data_subtype}} in it, got {self.image_name!r}')

  def __len__(self) -> int:
    return len(self._index)

  def __getitem__(self, index: int) -> Example:
    if not 0 <= index < len(self):
      raise IndexError(f'{index} of {len(self)}')
    with storage.open_file(storage.join(os.path.expanduser(self.images), self._index[index].file)) as file:
      return {'image': file.read(), **self.annotations_of(index)}

  @override
  def annotations_of(self, index: int) -> Example:
    found = self._index[index]
    answered = {'question': found.question, 'answers': found.answers, **found.types}
    return {'texts': self.texts_of(index), **answered, 'key': self.key_of(index)}

  @override
  def texts_of(self, index: int) -> tuple[str, ...]:
    found = self._index[index]
    counts = collections.Counter(filter(None, found.answers))
    return tuple(f'{found.question}\n{answer}' for answer, count in counts.most_common() for _ in range(count))

  @override
  def key_of(self, index: int) -> str:
    return f'question {self._index[index].number}'

  @override
  def account(self) -> Account:
    counts = [len(found.answers) for found in self._index]
    images = len({found.file for found in self._index})
    answers = f'{min(counts)} to {max(counts)}' if min(counts) < max(counts) else f'{counts[0]}'
    fields = {'image': f'{self.images}: {images} images', 'question': 'question', 'answers': f'{answers} of a question'}
    return Account(records=len(self), fields=fields)

  @functools.cached_property
  def _index(self) -> tuple[_Question, ...]:
    asked, answered = f'{_WHAT}: {self.questions}', f'{_WHAT}: {self.annotations}'
    content = annotation_json.read(self.questions, _WHAT)
    identity = {'question_id': (int, str), 'image_id': (int, str)}
    questions = annotation_json.by_id(
      annotation_json.rows(content, 'questions', {**identity, 'question': str}, asked), 'question_id', asked
    )
    annotations = annotation_json.by_id(
      annotation_json.rows(
        annotation_json.read(self.annotations, _WHAT), 'annotations', {**identity, 'answers': list}, answered
      ),
      'question_id',
      answered,
    )
    for ids, others, where in ((questions, annotations, answered), (annotations, questions, asked)):
      if missing := [number for number in ids if number not in others]:
        raise UserError(f'{where}: question {missing[0]} is missing, and {len(missing) - 1} others of the other file')
    if not questions:
      raise UserError(f'{asked}: has no questions')
    subtype = str(content.get('data_subtype', ''))
    if '{data_subtype' in self.image_name and not subtype:
      raise UserError(f"{asked}: has no 'data_subtype' for the names of images; set image_name, such as '{{id}}.jpg'")
    found = []
    for number, question in questions.items():
      annotation = annotations[number]
      if annotation['image_id'] != question['image_id']:
        raise UserError(
          f'{answered}: question {number} is about image {annotation["image_id"]}, but {question["image_id"]} in '
          f'{self.questions}'
        )
      if not question['question'].strip():
        raise UserError(f'{asked}: question {number} is blank')
      answers = annotation_json.rows(annotation, 'answers', {'answer': str}, f'{answered}: question {number}')
      if not answers:
        raise UserError(f'{answered}: question {number} has no answers')
      try:
        file = self.image_name.format(id=question['image_id'], data_subtype=subtype)
      except ValueError as error:
        raise UserError(
          f'{_WHAT}: image_name: {self.image_name!r} for image {question["image_id"]!r}: {error}'
        ) from error
      types = {name: str(annotation[name]) for name in ('question_type', 'answer_type') if name in annotation}
      texts = tuple(' '.join(row['answer'].split()) for row in answers)
      found.append(_Question(number, file, ' '.join(question['question'].split()), texts, types))  # type: ignore[arg-type]
    annotation_json.check_folder(self.images, found[0].file, _WHAT)
    return tuple(found)
