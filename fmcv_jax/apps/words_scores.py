"""Scores of captions and answers about scenes of emoji, and baselines that do not look at the image or do not learn."""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from fmcv_jax.data.sources.emoji_scenes import EmojiScenes
from fmcv_jax.data.sources.scene_texts import OPPOSITES, QUESTION_TYPES, answer, caption, plural

CAPTION = 'caption'
MEASURES = ('relation', 'exists', 'count', 'color', CAPTION)  # columns of the table
SLOTS = ('things', 'colors', 'numbers', 'relations')
Row = Mapping[str, float]  # a fraction for each of MEASURES


def metrics_of(split: str, prefix: str = '') -> dict[str, str]:
  """The name of each measure of a split in the metrics of a run; prefix 'blind_' names those without the images."""
  names: dict[str, str] = {kind: f'{split}_questions/{prefix}question_type/{kind}' for kind in QUESTION_TYPES}
  return {**names, CAPTION: f'{split}_captions/{prefix}exact_match'}


def row_of(metrics: Mapping[str, float], split: str, prefix: str = '') -> dict[str, float]:
  """The measures of a split from the metrics of a run."""
  return {measure: metrics[name] for measure, name in metrics_of(split, prefix).items()}


def question_prior(train: EmojiScenes, test: EmojiScenes) -> dict[str, float]:
  """Answers each question with the most frequent training answer to the same question, or else to its type.

  The caption is the most frequent one of training.
  """
  by_text: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
  by_type: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
  captions: collections.Counter[str] = collections.Counter()
  for record in (train.annotations_of(index) for index in range(len(train))):
    by_text[record['question']][record['answers'][0]] += 1
    by_type[record['question_type']][record['answers'][0]] += 1
    captions[record['caption']] += 1

  def predict(index: int) -> tuple[str, str]:
    record = test.annotations_of(index)
    known = by_text.get(record['question']) or by_type[record['question_type']]
    return known.most_common(1)[0][0], captions.most_common(1)[0][0]

  return _scored(test, predict)


def nearest_image(
  train: EmojiScenes, test: EmojiScenes, embed: Callable[[EmojiScenes], np.ndarray]
) -> dict[str, float]:
  """Captions each image as its nearest training image, and answers what is true of that one.

  embed   features of all images of a source, float [N, D], compared by their cosine

  A question about a thing that the nearest image lacks, which has no answer there, is answered wrongly.
  """
  bank, queries = (_normalized(embed(source)) for source in (train, test))
  nearest = np.argmax(queries @ bank.T, axis=1)

  def predict(index: int) -> tuple[str | None, str]:
    scene = train.scene_of(int(nearest[index]))
    return answer(test.question_of(index), scene), caption(scene)

  return _scored(test, predict)


def caption_slots(captions: Sequence[str], source: EmojiScenes) -> dict[str, float]:
  """Fractions of captions whose things, colors, numbers or relations are all right and in the right order.

  captions   of the first records of the source
  """
  words: dict[str, Mapping[str, str]] = {
    'things': {form: thing for thing in source.things for form in (thing, plural(thing))},
    'colors': {color: color for color in source.colors},
    'numbers': {'a': 'one', 'an': 'one', 'two': 'two'},
    'relations': {relation.split()[0]: relation for relation in OPPOSITES},
  }
  right = collections.Counter[str]()
  for index, text in enumerate(captions):
    truth = caption(source.scene_of(index))
    for slot in SLOTS:
      right[slot] += _in_order(text, words[slot]) == _in_order(truth, words[slot])
  return {slot: right[slot] / len(captions) for slot in SLOTS}


def first_scenes(source: EmojiScenes, count: int) -> EmojiScenes:
  """A source of the first `count` records of another."""
  return dataclasses.replace(source, scenes=min(count, len(source)))


def _scored(test: EmojiScenes, predict: Callable[[int], tuple[str | None, str]]) -> dict[str, float]:
  """Exact match of the answer and the caption of each record, by type of question."""
  scores: dict[str, list[bool]] = collections.defaultdict(list)
  for index in range(len(test)):
    answered, described = predict(index)
    question, scene = test.question_of(index), test.scene_of(index)
    scores[question.type].append(answered == answer(question, scene))
    scores[CAPTION].append(described == caption(scene))
  return {measure: float(np.mean(scores[measure])) for measure in MEASURES}


def _normalized(features: np.ndarray) -> np.ndarray:
  return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def _in_order(text: str, words: Mapping[str, str]) -> list[str]:
  return [words[word] for word in text.split() if word in words]
