"""Detects dataset splits from file and folder names, with the rules of the Hugging Face hub."""

import collections
import itertools
import os
import re
from collections.abc import Sequence

from fmcv_jax.data.storage import File
from fmcv_jax.errors import UserError, did_you_mean

ALL = 'all'
_KEYWORDS = {  # as in the `datasets` library
  'train': 'train',
  'training': 'train',
  'validation': 'validation',
  'valid': 'validation',
  'dev': 'validation',
  'val': 'validation',
  'test': 'test',
  'testing': 'test',
  'eval': 'test',
  'evaluation': 'test',
}
_SEPARATORS = re.compile(r'[-._ 0-9=]+')
_SHARD = re.compile(r'(.+)-\d{5}-of-\d{5}\b')


def named(path: str) -> str | None:
  """The split in the name of a folder or file of `path`, the outermost first: 'train', 'validation' or 'test'.

  The word may be delimited by -._ digits, space or = : train-00000.tar, val/0.tar, split=test/part.parquet. In
  NAME-00000-of-00016 any NAME is a split.
  """
  *folders, file = path.split('/')
  for name in (*folders, file):
    if words := [_KEYWORDS[word] for word in _SEPARATORS.split(name.lower()) if word in _KEYWORDS]:
      return words[0]
  shard = _SHARD.match(file)
  return shard[1] if shard else None


def canonical(split: str) -> str:
  """Canonical name of a split: 'val' -> 'validation'."""
  return _KEYWORDS.get(split.lower(), split)


def chosen(files: Sequence[File], split: str | None, what: str) -> tuple[list[File], str | None]:
  """The files of one split, and its name.

  Without `split`, all files must belong to one split or to none: training on a test set by mistake would go unnoticed.
  'all' reads every file. Raises UserError with the prefix `what`.
  """
  parts = [file.path.split('/')[:-1] for file in files]
  shared = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*parts))
  folder = ''.join(f'{names[0]}/' for names in shared)
  found = [named(file.path[len(folder) :]) for file in files]
  if split and not any(found):  # the folder itself is named after a split
    found = [named(f'{os.path.basename(folder.rstrip("/"))}/')] * len(files)
  counts = collections.Counter(name for name in found if name)
  found_splits = ', '.join(f'{name} ({count} files)' for name, count in counts.items())
  if split is None:
    if len(counts) > 1:
      raise UserError(
        f'{what}: {folder!r} contains several splits: {found_splits}; set split to one of them, '
        f'or to {ALL!r} to read all of them'
      )
    return list(files), next(iter(counts), None)
  if split == ALL:
    return list(files), ALL
  taken = [file for file, name in zip(files, found) if name == canonical(split)]
  if not taken:
    known = did_you_mean(split, counts) if counts else 'no file is named after a split'
    raise UserError(f'{what}: split {split!r}: none of the {len(files)} files at {folder!r} belongs to it; {known}')
  return taken, canonical(split)
