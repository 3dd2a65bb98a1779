"""Labels of one data set in the numbering of another: classes are joined by name."""

import re
from collections.abc import Sequence

import numpy as np

from fmcv_jax.errors import UserError, did_you_mean

_WORDNET_ID = re.compile(r'n\d{8}')


def align_labels(labels: np.ndarray, names: Sequence[str], reference: Sequence[str], owner: str) -> np.ndarray:
  """Labels int [N] of the classes `names` as indices into the class names `reference` of `owner`.

  Without names on either side the numbers are taken as they are, and so are those of ImageNet-1k where one side has its
  WordNet ids and the other its names. Raises UserError for a class that occurs and is not in
  `reference`, or is there twice.
  """
  names, reference = tuple(names), tuple(reference)
  if not names or not reference or names == reference or same_by_wordnet(names, reference):
    return labels
  check_labels(labels, len(names))
  number = {name: index for index, name in enumerate(reference)}
  table = np.full(len(names), -1)
  for label in np.unique(labels):
    name = names[label]
    if reference.count(name) != 1 or names.count(name) != 1:
      wrong = f'is not a class of {owner}; {did_you_mean(name, reference)}'
      raise UserError(
        f'evaluators: class {name!r} of the evaluation data {wrong if name not in number else "occurs twice by name"}'
      )
    table[label] = number[name]
  return table[labels]


def same_by_wordnet(names: Sequence[str], others: Sequence[str]) -> bool:
  """True if one side is the WordNet ids of ImageNet-1k (ILSVRC 2012) in order, and the other its names in that order.

  Folders and TFDS have 'n01440764', published classifiers 'tench, Tinca tinca'; the names of some classes are equal.
  """
  ids, words = (names, others) if _WORDNET_ID.fullmatch(names[0]) else (others, names)
  return (
    len(ids) == len(words) == 1000
    and list(ids) == sorted(ids)
    and all(map(_WORDNET_ID.fullmatch, ids))
    and (ids[0], ids[-1]) == ('n01440764', 'n15075141')
    and words[0].lower().startswith('tench')
    and words[-1].lower().startswith('toilet')
  )


def check_labels(labels: np.ndarray, classes: int) -> None:
  """Raises UserError for labels [N] that are not numbers of `classes` classes: they would count as mistakes."""
  outside = labels[(labels < 0) | (labels >= classes)]
  if len(outside):
    raise UserError(
      f'evaluators: label {outside[0]} of the evaluation data is not one of the {classes} classes, 0 to {classes - 1}'
    )
