"""Index of a folder of images: class folders, tables of captions, text files next to the images."""

import dataclasses
import os
import posixpath
import re
from collections.abc import Sequence

from fmcv_jax.data import storage
from fmcv_jax.data.sources import caption_tables, values
from fmcv_jax.data.sources.account import EXAMPLES, LeftOut, left_out, other_files
from fmcv_jax.data.sources.base import BadRecord
from fmcv_jax.errors import UserError

# File extensions of the formats that `decode` opens.
EXTENSIONS = (
  *('.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.apng', '.webp', '.bmp', '.gif', '.tif', '.tiff'),
  *('.ppm', '.pgm', '.pbm', '.pnm', '.pfm', '.jp2', '.j2k', '.jpc', '.jpf', '.jpx', '.j2c', '.avif', '.avifs'),
)
FILE_NAME = 'file_name'
# Default columns (ours, the Hugging Face hub's and open_clip's); the first that a table has is used.
IMAGE_COLUMNS = ('image', FILE_NAME, 'filepath')
CAPTION_COLUMNS = ('caption', 'text', 'title')
TEXT = '.txt'
LABEL = 'label'
_BOX = re.compile(rb'\d+(\s+[-+\d.e]+){4,}')


@dataclasses.dataclass(frozen=True)
class Index:
  """Contents of a folder. Pickled with the source, so that all processes use the same files.

  Lists have one element per image, or are empty.
  """

  images: Sequence[str]  # paths relative to the folder, '/'-separated
  fields: dict[str, str]
  labels: Sequence[int] = ()
  names: tuple[str, ...] = ()
  texts: Sequence[tuple[str, ...]] = ()
  text_files: Sequence[str] = ()  # '' for none
  extension: str = ''  # of the text files
  class_folders: bool = False
  left_out: tuple[LeftOut, ...] = ()

  @property
  def captioned(self) -> bool:
    """True if images have captions, from a table or from text files."""
    return bool(self.texts or self.extension)


@dataclasses.dataclass(frozen=True)
class Columns:
  """The columns to read; None selects a default name. `metadata`: the table was found, not given by the user."""

  image: str | None
  caption: str | None
  label: str | None
  metadata: bool = False

  def among(self, where: str, row: caption_tables.Row) -> 'Columns':
    """Resolves the columns against the first row of a table; raises UserError if one is missing."""
    image = self.image or next((name for name in IMAGE_COLUMNS if name in row), IMAGE_COLUMNS[0])
    caption = self.caption or next((name for name in CAPTION_COLUMNS if name in row), None)
    label = self.label
    if caption is None and label is None:
      label = LABEL if self.metadata and LABEL in row else None
      caption = None if label else CAPTION_COLUMNS[0]
    wanted = [name for name in (image, caption, label) if name]
    if absent := [name for name in wanted if name not in row and name.split('/')[0] not in row]:
      raise UserError(
        f'image folder: {where} has no column {" and no column ".join(map(repr, absent))}; it has '
        f'{", ".join(map(repr, row)) or "none"}; set image_column, and caption_column or label_column'
      )
    return Columns(image, caption, label)

  def fit(self, names: set[str]) -> bool:
    """True if a table with these columns has images and captions or labels."""
    of_images = {self.caption, self.label, *CAPTION_COLUMNS, LABEL}
    return (self.image or FILE_NAME) in names and bool(of_images & names)

  def image_of(self, row: caption_tables.Row, table: str) -> str | None:
    """The path of the image relative to the folder; `table` is that of the table, '' if it is outside the folder."""
    assert self.image is not None
    image = row.get(self.image)
    if isinstance(image, bytes):
      image = values.decoded(image, self.image)
    if image is None or image == '':
      return None
    if not isinstance(image, str):
      raise BadRecord(f'{self.image!r} is {image!r}, not the path of an image')
    return posixpath.join(posixpath.dirname(table), image) if self.image == FILE_NAME else image

  def texts_of(self, row: caption_tables.Row) -> tuple[str, ...]:
    """Captions in a row; () without a caption column."""
    if self.caption is None:
      return ()
    column, *path = [self.caption] if self.caption in row else self.caption.split('/')
    return values.texts(values.at(row.get(column), path, column), self.caption)


def is_image(name: str) -> bool:
  """True if the file has the extension of an image format that is decoded."""
  return name.lower().endswith(EXTENSIONS)


def from_folders(root: str, found: list[str], folders: list[str], extension: str | None) -> Index:
  """Indexes class folders or images alone, with captions from text files of the same names."""
  images = [path for path in found if is_image(path)]
  rest = [path for path in found if not is_image(path)]
  loose = [path for path in images if '/' not in path]
  if not images:
    others = '; '.join(map(str, other_files(rest))) or 'nothing'
    raise UserError(
      f'image folder: no images in {root!r} or its subfolders, which contain {others}; supported: '
      f'{" ".join(EXTENSIONS)}; convert others, such as .heic, to .jpg'
    )
  texts = _text_files(root, images, rest, extension)
  if loose and len(loose) < len(images) and not texts:
    raise UserError(
      f'image folder: {len(loose)} images ({loose[0]}, ...) are next to the class folders ({folders[0]}, ...) of '
      f'{root!r}; move them into a class folder, or move the class folders to another folder'
    )
  names = () if loose else tuple(folders)
  number = {name: label for label, name in enumerate(names)}
  if names:
    images.sort(key=lambda path: (number[path.split('/')[0]], path))
  lost = [('images without a text file', path) for path in images if texts and path not in texts and not names]
  images = [path for path in images if not texts or path in texts or names]
  fields = {'image': _formats(images)}
  if names:
    fields |= {'label': _class_folders(images), 'text': 'the name of the class folder'}
  if texts:
    fields['text'] = f'{len(texts)} files {extension or TEXT}' + (', elsewhere the class name' if names else '')
  read = set(texts.values())
  return Index(
    images,
    fields,
    labels=[number[path.split('/')[0]] for path in images] if names else (),
    names=names,
    text_files=[texts.get(path, '') for path in images] if texts else (),
    extension=(extension or TEXT) if texts else '',
    class_folders=bool(names),
    left_out=(*left_out(lost), *other_files(path for path in rest if path not in read)),
  )


def _text_files(root: str, images: list[str], rest: list[str], extension: str | None) -> dict[str, str]:
  """Image -> its text file; empty if too few images have one for the files to be captions."""
  by_stem = {os.path.splitext(path)[0]: path for path in rest if path.lower().endswith(extension or TEXT)}
  texts = {path: by_stem[stem] for path in images if (stem := os.path.splitext(path)[0]) in by_stem}
  if extension and not texts:
    raise UserError(
      f'image folder: no {extension} file has the name of an image in {root!r}; captions is the extension of text files'
    )
  if extension or (
    2 * len(texts) >= len(images) and not all(_are_boxes(root, texts[image]) for image in list(texts)[:3])
  ):
    return texts
  return {}


def _are_boxes(root: str, file: str) -> bool:
  """True if a text file holds YOLO annotations: lines of a class and at least four numbers."""
  with storage.open_file(storage.join(root, file)) as opened:
    lines = opened.read().split(b'\n')
  return any(lines) and all(_BOX.fullmatch(line.strip()) for line in lines if line.strip())


def _class_folders(images: Sequence[str]) -> str:
  """Origin of the class names, with the folders inside class folders, whose names are not read."""
  inner = sorted({'/'.join(path.split('/')[:2]) for path in images if path.count('/') > 1})
  more = ', ...' if len(inner) > EXAMPLES else ''
  note = f' (folders inside them are not classes: {", ".join(inner[:EXAMPLES])}{more})' if inner else ''
  return f'the names of class folders{note}'


def _formats(images: Sequence[str]) -> str:
  extensions = [os.path.splitext(path)[1].lower() for path in images]
  return ', '.join(f'{extensions.count(extension)} {extension}' for extension in sorted(set(extensions)))


@dataclasses.dataclass
class _Named:
  """Captions and classes from tables, by image path relative to the folder."""

  texts: dict[str, list[str]] = dataclasses.field(default_factory=dict)
  labels: dict[str, tuple[object, str]] = dataclasses.field(default_factory=dict)  # (class, row)
  skipped: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # (reason, row)
  columns: dict[str, None] = dataclasses.field(default_factory=dict)  # of all rows, in order


def from_tables(root: str, found: list[str], tables: Sequence[str], wanted: Columns) -> Index:
  """Indexes the images listed in tables, with their captions and classes."""
  below, named = set(found), _Named()
  columns: Columns | None = None
  for table in tables:
    columns = _read_table(root, table, below, wanted, named) or columns
  shown = storage.join(root, tables[0])
  if not named.texts:
    left = '; '.join(map(str, left_out(named.skipped)))
    more = f' that can be used: {left}' if left else ' below line 1, which names the columns'
    raise UserError(f'image folder: the captions {shown!r} have no rows{more}')
  assert columns is not None
  if missing := [image for image in named.texts if image not in below and not _exists(root, image)]:
    alike = next((path for path in found if path.lower() == missing[0].lower()), None)
    raise UserError(
      f'image folder: {len(missing)} of the {len(named.texts)} images in {shown!r} do not exist, first '
      f'{storage.join(root, missing[0])!r}{f" (there is {alike!r})" if alike else ""}; write paths relative to '
      f'{root!r}, or remove the rows'
    )
  images = sorted(named.texts)
  numbers, names = _numbered([named.labels[image] for image in images]) if columns.label else ([], ())
  fields = {'image': f'column {columns.image!r}: {_formats(images)}'}
  fields |= {'text': f'column {columns.caption!r}'} if columns.caption else {}
  fields |= {'label': f'column {columns.label!r}'} if columns.label else {}
  read = {name.split('/')[0] for name in (columns.image, columns.caption, columns.label) if name}
  unread = [('columns that are not read', name) for name in named.columns if name not in read and name]
  unnamed = [('images that no table names', path) for path in found if is_image(path) and path not in named.texts]
  rest = (path for path in found if not is_image(path) and path not in tables)
  return Index(
    images,
    fields,
    labels=numbers,
    names=names,
    texts=[tuple(named.texts[image]) for image in images] if columns.caption else (),
    left_out=(*left_out(named.skipped), *left_out(unread), *left_out(unnamed), *other_files(rest)),
  )


def _read_table(root: str, name: str, below: set[str], wanted: Columns, named: _Named) -> Columns | None:
  """Adds the rows of a table to `named`; returns its columns, or None if it has no rows."""
  table, columns = storage.join(root, name), None
  inside = '' if os.path.isabs(name) or storage.is_remote(name) else name
  try:
    for line, row in caption_tables.rows(table, 'image folder'):
      where = f'{table}:{line}'
      named.columns |= dict.fromkeys(row)
      columns = columns or wanted.among(where, row)
      try:
        image, texts = columns.image_of(row, inside), columns.texts_of(row)
      except BadRecord as error:
        raise UserError(f'image folder: {where}: {error}') from error
      label = row.get(columns.label) if columns.label else None
      lacking = {columns.image: image, columns.caption: texts or None, columns.label: label}
      if absent := [column for column, value in lacking.items() if column and value is None]:
        named.skipped.append((f'rows without {absent[0]!r}', f'{name}:{line}'))
        continue
      if swallowed := _swallowed(row, below):
        raise UserError(
          f'image folder: {where}: the text contains the line {swallowed[:80]!r}, which looks like a row; close the '
          f'quotation mark in this row'
        )
      assert image is not None
      image = _spelled(image, below)
      named.texts.setdefault(image, []).extend(texts)
      before, row_before = named.labels.setdefault(image, (label, where))
      if before != label:
        raise UserError(
          f'image folder: {where}: {image!r} is of class {label!r}, but of {before!r} in {row_before}; an image has '
          f'one class'
        )
  except (FileNotFoundError, IsADirectoryError) as error:
    raise UserError(f'image folder: no captions at {table!r}; captions is a path from {root!r}, or absolute') from error
  return columns


def _spelled(image: str, below: set[str]) -> str:
  """Normalizes a path such as './x.png', or with Windows separators, to the spelling of the folder listing."""
  for path in (image, posixpath.normpath(image), posixpath.normpath(image.replace('\\', '/'))):
    if path in below:
      return path
  return image


def _swallowed(row: caption_tables.Row, below: set[str]) -> str | None:
  """A line inside a text that has an image of the folder as a cell, like a row; None if there is none."""
  for text in row.values():
    if isinstance(text, str) and '\n' in text:
      for line in text.splitlines()[1:]:
        if any(cell.strip('"') in below for cell in line.replace('\t', ',').split(',')):
          return line
  return None


def _exists(root: str, image: str) -> bool:
  """True if an unlisted path exists: it may be hidden or spelled differently."""
  odd = os.path.normpath(image) != image or any(part.startswith('.') for part in image.split('/')) or image[:1] == '/'
  return odd and os.path.exists(storage.join(root, image))


def _numbered(labels: Sequence[tuple[object, str]]) -> tuple[list[int], tuple[str, ...]]:
  """Class indices, and the sorted class names if classes are given by name."""
  numbers, names = [], values.names_among(label for label, _ in labels)
  classes = values.Classes(names)
  for label, where in labels:
    try:
      numbers.append(classes.number(label, 'label'))
    except BadRecord as error:
      raise UserError(f'image folder: {where}: {error}') from error
  return numbers, names
