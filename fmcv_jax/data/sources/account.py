"""Contents of a data source, as far as they are known without decoding an image: for the start of a run, for people."""

import collections
import dataclasses
import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

_MOST_COUNTED = 1_000_000  # labels
EXAMPLES = 3  # names kept of what is left out, for one reason


@dataclasses.dataclass(frozen=True)
class LeftOut:
  """Files, rows or samples that are not records: how many for one `reason`, and the names of the first."""

  reason: str
  count: int
  examples: tuple[str, ...] = ()

  def __str__(self) -> str:
    more = ', ...' if self.count > len(self.examples) else ''
    return f'{self.reason}: {self.count}' + (f' ({", ".join(self.examples)}{more})' if self.examples else '')


@dataclasses.dataclass(frozen=True)
class Account:
  """The contents of a source.

  records       number of records
  fields        field of an example ('image', 'label', 'text') -> where it is stored and as what
  classes       class names by label; empty where the source has none
  class_counts  records by label; None where counting would mean to read the records, and for a label of a million or
                more
  label_range   the smallest and the largest label, both inclusive; None where it is not known
  split         the split that was chosen, by name or because there is no other; None where nothing names one
  missing       field -> number of records without it, where that is known. They are records: a loader skips and counts
                them where the field is wanted
  left_out      what was found but is not a record, or not read, by reason
  """

  records: int
  fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
  classes: tuple[str, ...] = ()
  class_counts: tuple[int, ...] | None = None
  label_range: tuple[int, int] | None = None
  split: str | None = None
  missing: Mapping[str, int] = dataclasses.field(default_factory=dict)
  left_out: tuple[LeftOut, ...] = ()

  def lines(self) -> list[str]:
    """The account for people, a line for each fact, most important first."""
    lines = [f'{self.records} records' + (f' of split {self.split!r}' if self.split else '')]
    lines += [f'{field}: {origin}' for field, origin in self.fields.items()]
    if self.classes:
      shown = ', '.join(self.classes[:EXAMPLES]) + (', ...' if len(self.classes) > EXAMPLES else '')
      lines.append(f'{len(self.classes)} classes: {shown}')
    if self.class_counts and self.classes:
      count, least = min((count, name) for count, name in zip(self.class_counts, self.classes))
      lines.append(f'records of a class: {count} ({least}) to {max(self.class_counts)}')
    if self.label_range:
      lines.append(f'labels: {self.label_range[0]} to {self.label_range[1]}')
    lines += self.doubts()
    lines += [f'{count} records have no {field}' for field, count in self.missing.items() if count]
    return lines + [f'left out: {left}' for left in self.left_out]

  def doubts(self) -> list[str]:
    """Lines about classes that are probably not meant: numbers without a record, or names that differ in case only."""
    lines = []
    counts = () if self.classes else self.class_counts or ()
    if empty := [str(label) for label, count in enumerate(counts) if not count]:
      more = ', ...' if len(empty) > EXAMPLES else ''
      lines.append(f'{len(empty)} of {len(counts)} classes have no record ({", ".join(empty[:EXAMPLES])}{more})')
    alike: dict[str, list[str]] = collections.defaultdict(list)
    for name in self.classes:
      alike[' '.join(unicodedata.normalize('NFKC', name).casefold().split())].append(name)
    lines += [
      f'classes {" and ".join(map(repr, names))} are taken as different' for names in alike.values() if len(names) > 1
    ][:EXAMPLES]
    return lines


def class_counts(labels: Sequence[int] | np.ndarray, names: Sequence[str]) -> tuple[int, ...] | None:
  """Records by label, at least one number per name; None without labels, and for a label of a million or more."""
  if not len(labels) and not names:
    return None
  if len(labels) and max(labels) >= _MOST_COUNTED:
    return None
  return tuple(np.bincount(np.asarray(labels, int), minlength=len(names)).tolist())


def left_out(reasons: Iterable[tuple[str, str]]) -> tuple[LeftOut, ...]:
  """Pairs of (reason, name) grouped by reason, the most frequent first."""
  names: dict[str, list[str]] = collections.defaultdict(list)
  for reason, name in reasons:
    names[reason].append(name)
  grouped = [LeftOut(reason, len(found), tuple(found[:EXAMPLES])) for reason, found in names.items()]
  return tuple(sorted(grouped, key=lambda left: (-left.count, left.reason)))


def other_files(paths: Iterable[str]) -> tuple[LeftOut, ...]:
  """Files that a source does not read, by extension."""
  return left_out((f'files {_extension(path)}', path) for path in paths)


def merged(parts: Mapping[str, Account], classes: tuple[str, ...], labels: Mapping[str, Sequence[int]]) -> Account:
  """The account of several named sources read as one; `labels` are each source's own labels in the joint numbering."""
  fields: dict[str, str] = {}
  for field in dict.fromkeys(field for part in parts.values() for field in part.fields):
    origins = {name: part.fields[field] for name, part in parts.items() if field in part.fields}
    fields[field] = '; '.join(f'{name}: {origin}' for name, origin in origins.items())
  counts = [0] * len(classes)
  known = bool(classes) and all(part.class_counts is not None for part in parts.values())
  for name, part in parts.items():
    for label, count in zip(labels[name], (part.class_counts or ()) if known else ()):
      counts[label] += count
  missing = collections.Counter({field: 0 for part in parts.values() for field in part.missing})
  for part in parts.values():
    missing.update(part.missing)
  return Account(
    records=sum(part.records for part in parts.values()),
    fields=fields,
    classes=classes,
    class_counts=tuple(counts) if known else None,
    missing=dict(missing),
    left_out=tuple(
      dataclasses.replace(left, reason=f'{left.reason} of {name}')
      for name, part in parts.items()
      for left in part.left_out
    ),
  )


def _extension(path: str) -> str:
  return os.path.splitext(path)[1].lower() or 'without an extension'
