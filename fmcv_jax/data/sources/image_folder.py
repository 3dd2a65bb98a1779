"""Image files in a folder: class subfolders, a table of captions, or images alone."""

import csv
import dataclasses
import functools
import io
import json
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from fmcv_jax.data import storage
from fmcv_jax.data.sources.base import Example, Source
from fmcv_jax.errors import UserError

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.gif', '.tif', '.tiff', '.ppm', '.jp2', '.avif')
TABLES = ('.csv', '.tsv', '.jsonl', '.parquet')


@dataclasses.dataclass(frozen=True)
class ImageFolder(Source):
  """Images below the folder `path`, or a URL such as gs://bucket/images, in one of three shapes, sorted by path.

  Class folders   path/<class>/**/x.jpg: `label` and the class name as `text`. The names are those of all subfolders in
                  order, also of empty ones: give every split the same subfolders.
  Captions        `captions` is a .csv, .tsv, .jsonl or .parquet table (its path from `path`, or absolute), a row for
                  each caption: `image_column` holds an image's path from `path`, `caption_column` a text (or, in .jsonl
                  and .parquet, a list of texts). All texts of one image are one record.
  Images alone    path/x.jpg without subfolders of images.
  """

  path: str
  captions: str | None = None
  image_column: str = 'image'
  caption_column: str = 'caption'

  def __post_init__(self) -> None:
    if self.captions is not None and _suffix(self.captions) not in TABLES:
      raise ValueError(f'captions: {self.captions!r} is not a table of {", ".join(TABLES)}')

  @property
  def names(self) -> tuple[str, ...]:
    return self._index.names

  def __len__(self) -> int:
    return len(self._index.images)

  def __getitem__(self, index: int) -> Example:
    if not 0 <= index < len(self):
      raise IndexError(f'{index} of {len(self)}')
    image = self._index.images[index]
    with storage.open_file(storage.join(self._root, image)) as file:
      example: Example = {'image': file.read(), 'key': image}
    if texts := self.texts_of(index):
      example['text'] = texts[0]
    if self.captions is not None:
      example['texts'] = texts
    elif self.names:
      example['label'] = self._index.labels[index]
    return example

  def key_of(self, index: int) -> str:
    return self._index.images[index]

  def texts_of(self, index: int) -> tuple[str, ...]:
    if self.captions is not None:
      return self._index.texts[index]
    return (self.names[self._index.labels[index]],) if self.names else ()

  @functools.cached_property
  def _root(self) -> str:
    return os.path.expanduser(self.path)

  @functools.cached_property
  def _index(self) -> '_Index':
    found = storage.files_below(self._root)
    if found is None:
      raise UserError(
        f'image folder: no folder {self.path!r} (seen from {os.getcwd()}); set path to where the images are'
      )
    if self.captions is not None:
      return _captioned(self, self._root, found)
    return _class_folders(self._root, found, storage.folders_in(self._root))


@dataclasses.dataclass(frozen=True)
class _Index:
  """What a folder holds; it travels with the source to other processes, which thereby see the same files."""

  images: list[str]  # paths from the folder, '/' between their parts
  labels: list[int] = dataclasses.field(default_factory=list)
  texts: list[tuple[str, ...]] = dataclasses.field(default_factory=list)
  names: tuple[str, ...] = ()


def _class_folders(root: str, found: list[str], folders: list[str]) -> _Index:
  images = [path for path in found if _is_image(path)]
  loose = [path for path in images if '/' not in path]
  if not images:
    raise UserError(f'image folder: no images in {root!r} or its subfolders; known are {" ".join(EXTENSIONS)}')
  if len(loose) == len(images):
    return _Index(loose)
  if loose:
    raise UserError(
      f'image folder: {len(loose)} images ({loose[0]}, ...) lie beside the class folders ({folders[0]}, ...) of '
      f'{root!r}; move them into one, or give the class folders a folder of their own'
    )
  label = {folder: label for label, folder in enumerate(folders)}
  labels, paths = zip(*sorted((label[path.split('/')[0]], path) for path in images))
  return _Index(list(paths), list(labels), names=tuple(folders))


def _is_image(name: str) -> bool:
  return name.lower().endswith(EXTENSIONS)


def _captioned(source: ImageFolder, root: str, found: list[str]) -> _Index:
  assert source.captions is not None
  table = storage.join(root, source.captions)
  texts: dict[str, list[str]] = {}
  try:
    for line, row in _rows(table, (source.image_column, source.caption_column)):
      image, caption = row[source.image_column], row[source.caption_column]
      captions = [caption] if isinstance(caption, str) else caption
      if not isinstance(image, str) or not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
        raise UserError(
          f'image folder: {table}:{line}: expected an image path and a text, got {image!r} and {caption!r}'
        )
      texts.setdefault(image, []).extend(captions)
  except (FileNotFoundError, IsADirectoryError) as error:
    raise UserError(f'image folder: no captions at {table!r}; captions is a path from {root!r}, or absolute') from error
  if not texts:
    raise UserError(f'image folder: the captions {table!r} have no rows')
  below = set(found)
  if missing := [image for image in texts if image not in below and not _exists(root, image)]:
    raise UserError(
      f'image folder: {len(missing)} of the {len(texts)} images in {table!r} do not exist, first '
      f'{storage.join(root, missing[0])!r}; write their paths as seen from {root!r}, or take their rows out'
    )
  images = sorted(texts)
  return _Index(images, texts=[tuple(texts[image]) for image in images])


def _exists(root: str, image: str) -> bool:
  """Of a path that is not among those listed: it is hidden, written in another way than they are, or not there."""
  odd = os.path.normpath(image) != image or any(part.startswith('.') for part in image.split('/')) or image[:1] == '/'
  return odd and os.path.exists(storage.join(root, image))


def _rows(table: str, columns: tuple[str, str]) -> Iterator[tuple[int, dict[str, Any]]]:
  """(line, row) of any kind of table; raises UserError if it cannot be read or lacks one of the columns."""
  read = {'.csv': _read_csv, '.tsv': _read_csv, '.jsonl': _read_jsonl, '.parquet': _read_parquet}[_suffix(table)]
  line = 0
  try:
    for line, row in read(table):
      if absent := [column for column in columns if column not in row]:
        raise UserError(
          f'image folder: {table}:{line} has no column {" and no column ".join(map(repr, absent))}; it has '
          f'{", ".join(map(repr, row)) or "none"}; set image_column and caption_column'
        )
      yield line, row
  except (FileNotFoundError, IsADirectoryError):
    raise
  except (ValueError, OSError, csv.Error) as error:  # JSON, UTF-8 and Arrow errors are ValueErrors
    raise UserError(f'image folder: {table} is damaged after line {line}: {" ".join(str(error).split())}') from error


def _suffix(table: str) -> str:
  return os.path.splitext(table)[1].lower()


def _text(table: str, **options: Any) -> TextIO:
  return io.TextIOWrapper(storage.open_file(table), encoding='utf-8-sig', **options)


def _read_csv(table: str) -> Iterator[tuple[int, dict[str, Any]]]:
  csv.field_size_limit(sys.maxsize)
  # A tab-separated file is plain text: a quotation mark in it is one of the caption's own characters.
  style: dict[str, Any] = {'delimiter': '\t', 'quoting': csv.QUOTE_NONE} if _suffix(table) == '.tsv' else {}
  with _text(table, newline='') as file:
    reader = csv.DictReader(file, **style)
    for row in reader:
      yield reader.line_num, row


def _read_jsonl(table: str) -> Iterator[tuple[int, dict[str, Any]]]:
  with _text(table) as file:
    for line, text in enumerate(file, 1):
      if text.strip():
        row = json.loads(text)
        if not isinstance(row, dict):
          raise ValueError(f'line {line} is no object')
        yield line, row


def _read_parquet(table: str) -> Iterator[tuple[int, dict[str, Any]]]:
  try:
    import pyarrow.parquet
  except ImportError as error:
    raise UserError(f'image folder: {table} needs pyarrow: pip install pyarrow') from error
  line = 0
  with storage.open_file(table) as opened, pyarrow.parquet.ParquetFile(opened) as file:
    for batch in file.iter_batches():
      for row in batch.to_pylist():
        line += 1
        yield line, row
