"""Index of a folder of images: class folders, tables of captions, text files next to the images."""

import dataclasses
import os
import posixpath
import re
from collections.abc import Sequence

from fmcv_jax.data import storage
from fmcv_jax.data.sources import caption_tables, values
from fmcv_jax.data.sources.account import LeftOut, left_out, other_files
from fmcv_jax.data.sources.base import BadRecord
from fmcv_jax.errors import UserError

# The file names of the formats that `decode` opens.
EXTENSIONS = (
  *('.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.apng', '.webp', '.bmp', '.gif', '.tif', '.tiff'),
  *('.ppm', '.pgm', '.pbm', '.pnm', '.pfm', '.jp2', '.j2k', '.jpc', '.jpf', '.jpx', '.j2c', '.avif', '.avifs'),
)
FILE_NAME = 'file_name'
# Columns where none is named: ours, the hub's and open_clip's; the first that a table has.
IMAGE_COLUMNS = ('image', FILE_NAME, 'filepath')
CAPTION_COLUMNS = ('caption', 'text', 'title')
TEXT = '.txt'
LABEL = 'label'
_BOX = re.compile(rb'\d+(\s+[-+\d.e]+){4,}')


@dataclasses.dataclass(frozen=True)
class Index:
  """Contents of a folder; they travel with the source to other processes, which thereby see the same files.

  Lists have an element for each image, or none.
  """

  images: Sequence[str]  # paths from the folder, '/' between their parts
  fields: dict[str, str]
  labels: Sequence[int] = ()
  names: tuple[str, ...] = ()
  texts: Sequence[tuple[str, ...]] = ()
  text_files: Sequence[str] = ()  # '' for none
  extension: str = ''  # that of the text files
  class_folders: bool = False
  left_out: tuple[LeftOut, ...] = ()

  @property
  def captioned(self) -> bool:
    return bool(self.texts or self.extension)


@dataclasses.dataclass(frozen=True)
class Columns:
  """The columns to read; None for what is to be found by its usual name. `metadata`: a table that nobody has named."""

  image: str | None
  caption: str | None
  label: str | None
  metadata: bool = False

  def among(self, where: str, row: caption_tables.Row) -> 'Columns':
    """With the names that a table's first row has; raises UserError if it lacks one."""
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
        f'{", ".join(map(repr, row)) or "none"}; set image_column and caption_column'
      )
    return Columns(image, caption, label)

  def fit(self, names: set[str]) -> bool:
    """Whether a table with these columns names images and something of them."""
    of_images = {self.caption, self.label, *CAPTION_COLUMNS, LABEL}
    return (self.image or FILE_NAME) in names and bool(of_images & names)

  def image_of(self, row: caption_tables.Row, table: str) -> str | None:
    """The image's path from the folder; `table` is that of the table, '' for one that lies elsewhere."""
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
    if self.caption is None:
      return ()
    column, *path = [self.caption] if self.caption in row else self.caption.split('/')
    return values.texts(values.at(row.get(column), path, column), self.caption)


def is_image(name: str) -> bool:
  return name.lower().endswith(EXTENSIONS)


def from_folders(root: str, found: list[str], folders: list[str], extension: str | None) -> Index:
  """Class folders or images alone, with the texts of files of the same names."""
  images = [path for path in found if is_image(path)]
  rest = [path for path in found if not is_image(path)]
  loose = [path for path in images if '/' not in path]
  if not images:
    held = '; '.join(map(str, other_files(rest))) or 'nothing'
    raise UserError(
      f'image folder: no images in {root!r} or its subfolders, which hold {held}; known are {" ".join(EXTENSIONS)}; '
      f'convert others, such as .heic, to .jpg'
    )
  texts = _text_files(root, images, rest, extension)
  if loose and len(loose) < len(images) and not texts:
    raise UserError(
      f'image folder: {len(loose)} images ({loose[0]}, ...) lie beside the class folders ({folders[0]}, ...) of '
      f'{root!r}; move them into one, or give the class folders a folder of their own'
    )
  names = () if loose else tuple(folders)
  number = {name: label for label, name in enumerate(names)}
  if names:
    images.sort(key=lambda path: (number[path.split('/')[0]], path))
  lost = [('images without a text file', path) for path in images if texts and path not in texts and not names]
  images = [path for path in images if not texts or path in texts or names]
  fields = {'image': _formats(images)}
  if names:
    fields |= {'label': 'the names of class folders', 'text': 'the name of the class folder'}
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
  """Image -> the file with its text; none where too few have one for them to be meant as captions."""
  by_stem = {os.path.splitext(path)[0]: path for path in rest if path.lower().endswith(extension or TEXT)}
  texts = {path: by_stem[stem] for path in images if (stem := os.path.splitext(path)[0]) in by_stem}
  if extension and not texts:
    raise UserError(f'image folder: no {extension} of the name of an image in {root!r}; captions is their extension')
  if extension or (
    2 * len(texts) >= len(images) and not all(_are_boxes(root, texts[image]) for image in list(texts)[:3])
  ):
    return texts
  return {}


def _are_boxes(root: str, file: str) -> bool:
  """Whether a text file holds a detector's boxes, a class and four numbers a line, as YOLO has them beside images."""
  with storage.open_file(storage.join(root, file)) as opened:
    lines = opened.read().split(b'\n')
  return any(lines) and all(_BOX.fullmatch(line.strip()) for line in lines if line.strip())


def _formats(images: Sequence[str]) -> str:
  extensions = [os.path.splitext(path)[1].lower() for path in images]
  return ', '.join(f'{extensions.count(extension)} {extension}' for extension in sorted(set(extensions)))


@dataclasses.dataclass
class _Named:
  """Texts and classes that tables give to images, by the images' paths from the folder."""

  texts: dict[str, list[str]] = dataclasses.field(default_factory=dict)
  labels: dict[str, tuple[object, str]] = dataclasses.field(default_factory=dict)  # a class, and in which row
  skipped: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # why, and which row


def from_tables(root: str, found: list[str], tables: Sequence[str], wanted: Columns) -> Index:
  """The images that tables name, with their texts and classes."""
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
      f'{storage.join(root, missing[0])!r}{f" (there is {alike!r})" if alike else ""}; write their paths as seen from '
      f'{root!r}, or take their rows out'
    )
  images = sorted(named.texts)
  numbers, names = _numbered([named.labels[image] for image in images]) if columns.label else ([], ())
  fields = {'image': f'column {columns.image!r}: {_formats(images)}'}
  fields |= {'text': f'column {columns.caption!r}'} if columns.caption else {}
  fields |= {'label': f'column {columns.label!r}'} if columns.label else {}
  unnamed = [('images that no table names', path) for path in found if is_image(path) and path not in named.texts]
  rest = (path for path in found if not is_image(path) and path not in tables)
  return Index(
    images,
    fields,
    labels=numbers,
    names=names,
    texts=[tuple(named.texts[image]) for image in images] if columns.caption else (),
    left_out=(*left_out(named.skipped), *left_out(unnamed), *other_files(rest)),
  )


def _read_table(root: str, name: str, below: set[str], wanted: Columns, named: _Named) -> Columns | None:
  """Adds the rows of a table; returns its columns, None where it has no rows."""
  table, columns = storage.join(root, name), None
  inside = '' if os.path.isabs(name) or storage.is_remote(name) else name
  try:
    for line, row in caption_tables.rows(table, 'image folder'):
      where = f'{table}:{line}'
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
          f'image folder: {where}: the text holds the line {swallowed[:80]!r}, which is a row of its own; a quotation '
          f'mark is not closed in this row'
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
  """The path as the folder lists it, of one that is written as './x.png' or with the separators of Windows."""
  for path in (image, posixpath.normpath(image), posixpath.normpath(image.replace('\\', '/'))):
    if path in below:
      return path
  return image


def _swallowed(row: caption_tables.Row, below: set[str]) -> str | None:
  """A line inside a text that begins or ends as a row does, with an image of the folder."""
  for text in row.values():
    if isinstance(text, str) and '\n' in text:
      for line in text.splitlines()[1:]:
        if any(cell.strip('"') in below for cell in line.replace('\t', ',').split(',')):
          return line
  return None


def _exists(root: str, image: str) -> bool:
  """Of a path that is not among those listed: it is hidden, written in another way than they are, or not there."""
  odd = os.path.normpath(image) != image or any(part.startswith('.') for part in image.split('/')) or image[:1] == '/'
  return odd and os.path.exists(storage.join(root, image))


def _numbered(labels: Sequence[tuple[object, str]]) -> tuple[list[int], tuple[str, ...]]:
  """Class numbers, and names where the classes are given by name: those that occur, in order."""
  numbers, names = [], values.names_among(label for label, _ in labels)
  classes = values.Classes(names)
  for label, where in labels:
    try:
      numbers.append(classes.number(label, 'label'))
    except BadRecord as error:
      raise UserError(f'image folder: {where}: {error}') from error
  return numbers, names
