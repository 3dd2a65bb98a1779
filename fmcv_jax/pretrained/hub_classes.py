"""Class names in config.json: timm's `label_names`, and `id2label` of transformers."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

_GENERIC = re.compile(r'LABEL_\d+')  # what transformers writes where nobody has named the classes


def with_names(config: Mapping[str, Any], format: str, names: Sequence[str]) -> dict[str, Any]:
  """The config.json of a classifier in `format`, 'timm' or 'transformers', with the names of its classes by label."""
  if format == 'timm':
    return {**config, 'label_names': list(names)}
  by_label = {str(label): name for label, name in enumerate(names)}
  by_name = {name: label for label, name in enumerate(names)}
  return {**config, 'id2label': by_label} | ({'label2id': by_name} if len(by_name) == len(names) else {})


def names_in(config: Mapping[str, Any]) -> tuple[str, ...]:
  """The names of the classes by label; () where config.json has none, generic ones, or not one for every label."""
  found = config.get('label_names') or config.get('id2label') or ()
  if isinstance(found, Mapping):
    found = [found.get(str(label)) for label in range(len(found))]
  if not isinstance(found, (list, tuple)) or not all(isinstance(name, str) for name in found):
    return ()
  return () if all(_GENERIC.fullmatch(name) for name in found) else tuple(found)
