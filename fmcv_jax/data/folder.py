"""Image files in a folder: class subfolders, a table of captions, or images alone."""

import csv
import dataclasses
import functools
import json
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from fmcv_jax.data.source import Example, Source
from fmcv_jax.errors import UserError

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.gif', '.tif', '.tiff', '.ppm', '.jp2', '.avif')
TABLES = ('.csv', '.tsv', '.jsonl', '.parquet')


@dataclasses.dataclass(frozen=True)
class ImageFolder(Source):
  """Images below the folder `path`, in one of three shapes, sorted by path.

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
    if self.captions is not None and pathlib.Path(self.captions).suffix.lower() not in TABLES:
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
    with open(self._folder + image, 'rb') as file:
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

  @property
  def _root(self) -> pathlib.Path:
    return pathlib.Path(self.path).expanduser()

  @functools.cached_property
  def _folder(self) -> str:
    return os.path.join(self._root, '')

  @functools.cached_property
  def _index(self) -> '_Index':
    root = self._root
    if not root.is_dir():
      raise UserError(
        f'image folder: no folder {self.path!r} (seen from {os.getcwd()}); set path to where the images are'
      )
    return _captioned(self, root) if self.captions is not None else _class_folders(root)


@dataclasses.dataclass(frozen=True)
class _Index:
  """What a folder holds; it travels with the source to other processes, which thereby see the same files."""

  images: list[str]  # paths from the folder, '/' between their parts
  labels: list[int] = dataclasses.field(default_factory=list)
  texts: list[tuple[str, ...]] = dataclasses.field(default_factory=list)
  names: tuple[str, ...] = ()


def _class_folders(root: pathlib.Path) -> _Index:
  folders = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith('.'))
  loose = sorted(p.name for p in root.iterdir() if p.is_file() and _is_image(p.name))
  found = [(image, label) for label, folder in enumerate(folders) for image in _images_below(root, folder)]
  if not found and not loose:
    raise UserError(f'image folder: no images in {str(root)!r} or its subfolders; known are {" ".join(EXTENSIONS)}')
  if not found:
    return _Index(loose)
  if loose:
    raise UserError(
      f'image folder: {len(loose)} images ({loose[0]}, ...) lie beside the class folders ({folders[0]}, ...) of '
      f'{str(root)!r}; move them into one, or give the class folders a folder of their own'
    )
  images, labels = zip(*found)
  return _Index(list(images), list(labels), names=tuple(folders))


def _images_below(root: pathlib.Path, folder: str) -> list[str]:
  images = []
  for where, folders, files in os.walk(root / folder, followlinks=True):
    folders[:] = [name for name in folders if not name.startswith('.')]
    images += [(pathlib.Path(where) / name).relative_to(root).as_posix() for name in files if _is_image(name)]
  return sorted(images)


def _is_image(name: str) -> bool:
  return name.lower().endswith(EXTENSIONS) and not name.startswith('.')


def _captioned(source: ImageFolder, root: pathlib.Path) -> _Index:
  assert source.captions is not None
  table = root / source.captions
  if not table.is_file():
    raise UserError(f'image folder: no captions at {str(table)!r}; captions is a path from {str(root)!r}, or absolute')
  texts: dict[str, list[str]] = {}
  for line, row in _rows(table, (source.image_column, source.caption_column)):
    image, caption = row[source.image_column], row[source.caption_column]
    captions = [caption] if isinstance(caption, str) else caption
    if not isinstance(image, str) or not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
      raise UserError(f'image folder: {table}:{line}: expected an image path and a text, got {image!r} and {caption!r}')
    texts.setdefault(image, []).extend(captions)
  if not texts:
    raise UserError(f'image folder: the captions {str(table)!r} have no rows')
  if missing := _missing(root, texts):
    raise UserError(
      f'image folder: {len(missing)} of the {len(texts)} images in {str(table)!r} do not exist, first '
      f'{str(root / missing[0])!r}; write their paths as seen from {str(root)!r}, or take their rows out'
    )
  images = sorted(texts)
  return _Index(images, texts=[tuple(texts[image]) for image in images])


def _missing(root: pathlib.Path, images: dict[str, Any]) -> list[str]:
  """Those that do not exist. Folders are listed; asking for the files one by one is slow on network storage."""

  @functools.cache
  def listing(folder: str) -> frozenset[str]:
    try:
      return frozenset(os.listdir(folder))
    except OSError:
      return frozenset()

  split = {image: os.path.split(os.path.join(root, image)) for image in images}
  return [image for image, (folder, name) in split.items() if name not in listing(folder)]


def _rows(table: pathlib.Path, columns: tuple[str, str]) -> Iterator[tuple[int, dict[str, Any]]]:
  """(line, row) of any kind of table; raises UserError if it cannot be read or lacks one of the columns."""
  read = {'.csv': _read_csv, '.tsv': _read_csv, '.jsonl': _read_jsonl, '.parquet': _read_parquet}[table.suffix.lower()]
  line = 0
  try:
    for line, row in read(table):
      if absent := [column for column in columns if column not in row]:
        raise UserError(
          f'image folder: {table}:{line} has no column {" and no column ".join(map(repr, absent))}; it has '
          f'{", ".join(map(repr, row)) or "none"}; set image_column and caption_column'
        )
      yield line, row
  except (ValueError, OSError, csv.Error) as error:  # JSON, UTF-8 and Arrow errors are ValueErrors
    raise UserError(f'image folder: {table} is damaged after line {line}: {" ".join(str(error).split())}') from error


def _read_csv(table: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
  csv.field_size_limit(sys.maxsize)
  # A tab-separated file is plain text: a quotation mark in it is one of the caption's own characters.
  style: dict[str, Any] = {'delimiter': '\t', 'quoting': csv.QUOTE_NONE} if table.suffix.lower() == '.tsv' else {}
  with table.open(encoding='utf-8-sig', newline='') as file:
    reader = csv.DictReader(file, **style)
    for row in reader:
      yield reader.line_num, row


def _read_jsonl(table: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
  with table.open(encoding='utf-8-sig') as file:
    for line, text in enumerate(file, 1):
      if text.strip():
        row = json.loads(text)
        if not isinstance(row, dict):
          raise ValueError(f'line {line} is no object')
        yield line, row


def _read_parquet(table: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
  try:
    import pyarrow.parquet
  except ImportError as error:
    raise UserError(f'image folder: {table} needs pyarrow: pip install pyarrow') from error
  line = 0
  with pyarrow.parquet.ParquetFile(table) as file:
    for batch in file.iter_batches():
      for row in batch.to_pylist():
        line += 1
        yield line, row
