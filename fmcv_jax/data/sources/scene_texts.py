"""Sentences about scenes of a few things: captions, and questions with one right answer."""

from typing import Literal, NamedTuple

import numpy as np

QuestionType = Literal['exists', 'count', 'color', 'relation']
QUESTION_TYPES: tuple[QuestionType, ...] = ('exists', 'count', 'color', 'relation')
OPPOSITES = {'left of': 'right of', 'right of': 'left of', 'above': 'below', 'below': 'above'}
_WORDS_OF_COUNTS = {1: 'a', 2: 'two'}


class Group(NamedTuple):
  """`number` things (1 or 2) of one kind and color."""

  thing: str
  color: str
  number: int


class Scene(NamedTuple):
  """Two or three groups of different things; `relations` are those of the first group to each of the others.

  Of two groups, the first is left of or above the second. Of three, the first has the second to its left or right, and
  the third above or below it; nothing is said about the second and the third.
  """

  groups: tuple[Group, ...]
  relations: tuple[str, ...]


class Question(NamedTuple):
  """A question about a thing; `relation` is that of the answer to the thing, '' for questions of other types."""

  type: QuestionType
  thing: str
  relation: str = ''


def caption(scene: Scene) -> str:
  """'two red frogs left of a blue bell', or 'a red frog left of a blue bell and above a green star'."""
  first, *others = (_phrase(group) for group in scene.groups)
  related = (f'{relation} {other}' for relation, other in zip(scene.relations, others, strict=True))
  return f'{first} {" and ".join(related)}'


def question_text(question: Question, scene: Scene) -> str:
  """The question in words; the number of things in the scene decides between singular and plural."""
  thing = question.thing
  if question.type == 'exists':
    return f'is there {_article(thing)} {thing}?'
  if question.type == 'count':
    return f'how many {plural(thing)} are there?'
  if question.type == 'color':
    several = any(group.thing == thing and group.number > 1 for group in scene.groups)
    return f'what color are the {plural(thing)}?' if several else f'what color is the {thing}?'
  return f'what is {question.relation} the {thing}?'


def answer(question: Question, scene: Scene) -> str | None:
  """The right answer; None for a color or a relation of a thing that the scene lacks."""
  group = next((group for group in scene.groups if group.thing == question.thing), None)
  if question.type == 'exists':
    return 'no' if group is None else 'yes'
  if question.type == 'count':
    return str(0 if group is None else group.number)
  if question.type == 'color':
    return None if group is None else group.color
  first = scene.groups[0].thing
  for relation, other in zip(scene.relations, scene.groups[1:], strict=True):
    if (question.thing, question.relation) == (first, OPPOSITES[relation]):
      return other.thing
    if (question.thing, question.relation) == (other.thing, relation):
      return first
  return None


def draw_question(kind: QuestionType, scene: Scene, absent: str, wanted: str, rng: np.random.Generator) -> Question:
  """A question of a type.

  absent   a thing that is not in the scene
  wanted   answer of an 'exists' or 'count' question; a count has to occur in the scene
  """
  if kind in ('exists', 'count'):
    things = [g.thing for g in scene.groups if kind == 'exists' or str(g.number) == wanted]
    return Question(kind, absent if wanted in ('no', '0') else _choice(things, rng))
  if kind == 'color':
    return Question(kind, _choice([group.thing for group in scene.groups], rng))
  return Question(kind, scene.groups[0].thing, OPPOSITES[_choice(scene.relations, rng)])


def plural(thing: str) -> str:
  """The regular plural of a noun."""
  if thing.endswith(('s', 'x', 'z', 'ch', 'sh')):
    return f'{thing}es'
  return f'{thing[:-1]}ies' if thing.endswith('y') and thing[-2:-1] not in 'aeiou' else f'{thing}s'


def _phrase(group: Group) -> str:
  """'a red frog', 'an orange frog', 'two red frogs'."""
  thing = group.thing if group.number == 1 else plural(group.thing)
  number = _article(group.color) if group.number == 1 else _WORDS_OF_COUNTS[group.number]
  return f'{number} {group.color} {thing}'


def _article(word: str) -> str:
  return 'an' if word[0] in 'aeiou' else 'a'


def _choice(options: 'list[str] | tuple[str, ...]', rng: np.random.Generator) -> str:
  return options[int(rng.integers(len(options)))]
