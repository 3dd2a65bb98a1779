"""Labels of one data set in the numbering of another: classes are joined by name."""

from collections.abc import Sequence

import numpy as np

from fmcv_jax.errors import UserError, did_you_mean


def align_labels(labels: np.ndarray, names: Sequence[str], reference: Sequence[str], owner: str) -> np.ndarray:
  """Labels int [N] of the classes `names` as indices into the class names `reference` of `owner`.

  Without names on either side the numbers are taken as they are. Raises UserError for a class that occurs and is not in
  `reference`, or is there twice.
  """
  names, reference = tuple(names), tuple(reference)
  if not names or not reference or names == reference:
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


def check_labels(labels: np.ndarray, classes: int) -> None:
  """Raises UserError for labels [N] that are not numbers of `classes` classes: they would count as mistakes."""
  outside = labels[(labels < 0) | (labels >= classes)]
  if len(outside):
    raise UserError(
      f'evaluators: label {outside[0]} of the evaluation data is not one of the {classes} classes, 0 to {classes - 1}'
    )
