"""Image files in a folder: class subfolders, a table of captions, text files next to the images, or images alone."""

import dataclasses
import functools
import itertools
import os

from typing_extensions import override

from fmcv_jax.data import storage
from fmcv_jax.data.sources import caption_tables, splits, values
from fmcv_jax.data.sources.account import Account, LeftOut, class_counts
from fmcv_jax.data.sources.base import Example, Source
from fmcv_jax.data.sources.folder_index import FILE_NAME, Columns, Index, from_folders, from_tables
from fmcv_jax.errors import UserError, did_you_mean

METADATA = ('metadata.csv', 'metadata.jsonl', 'metadata.parquet')  # as in image folders on the Hugging Face hub


@dataclasses.dataclass(frozen=True)
class ImageFolder(Source):
  """Images in and below the folder `path`, or a URL such as gs://bucket/images, sorted by path, in one of these layouts

  Class folders   path/<class>/**/x.jpg: `label` and the class name as `text`. The names are those of all subfolders in
                  order, including those without images (reported by `account`), as in torchvision.
  Table           `captions` is a .csv, .tsv, .jsonl or .parquet table (path relative to `path`, or absolute) with one
                  row per caption. All texts of an image form one record; rows without a text are skipped and counted.
                  Every `metadata.csv` (.jsonl, .parquet) in and below `path`, as on the Hugging Face hub, is read by
                  default.
  Text files      path/**/x.txt is the caption of x.jpg, read if at least half of the images have one, or if
                  `captions` is '.txt' (or another extension). Images without one are skipped and counted; in class
                  folders their text is the class name.
  Images alone    path/x.jpg without any of these.

  captions        None (see above), a table, or the extension of text files
  image_column    column of image paths relative to `path` (`file_name`: relative to the table); default: the first of
                  'image', 'file_name' and 'filepath' in the table
  caption_column  column of captions; 'column/field' for a field of an object; default: 'caption', 'text' or 'title'
  label_column    column of classes, as names or numbers; None: no labels ('label' for metadata without captions)
  split           subfolder of a split, such as 'train'; required if all subfolders are named after splits; 'all' reads
                  them as classes

  Skipped files are counted by reason in `account`.
  """

  path: str
  captions: str | None = None
  image_column: str | None = None
  caption_column: str | None = None
  label_column: str | None = None
  split: str | None = None

  def __post_init__(self) -> None:
    if self.captions is None or self._extension:
      return
    if caption_tables.suffix(self.captions) not in caption_tables.KINDS:
      known = ', '.join(caption_tables.KINDS)
      raise ValueError(f'captions: {self.captions!r} is not a table of {known}, nor the extension of text files')

  @property
  @override
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
    if self._index.captioned or self._index.names:
      texts = self.texts_of(index)
      if self._index.captioned:
        example['texts'] = texts
      if texts:
        example['text'] = texts[0]
    if self._index.labels:
      example['label'] = self._index.labels[index]
    return example

  @override
  def key_of(self, index: int) -> str:
    return self._index.images[index]

  @override
  def texts_of(self, index: int) -> tuple[str, ...]:
    if self._index.texts:
      return self._index.texts[index]
    if (extension := self._index.extension) and (file := self._index.text_files[index]):
      with storage.open_file(storage.join(self._root, file)) as opened:
        return tuple(text.strip() for text in values.texts(opened.read(), f'its {extension}'))
    return (self.names[self._index.labels[index]],) if self.names else ()

  @override
  def account(self) -> Account:
    index = self._index
    counts = class_counts(index.labels, index.names)
    empty = [name for name, count in zip(index.names, counts or ()) if not count] if index.class_folders else []
    left = [LeftOut('class folders without images', len(empty), tuple(empty[:3]))] if empty else []
    return Account(
      records=len(self),
      fields=index.fields,
      classes=index.names,
      class_counts=counts,
      label_range=(min(index.labels), max(index.labels)) if index.labels else None,
      split=self._split,
      left_out=(*left, *index.left_out),
    )

  @functools.cached_property
  def _extension(self) -> str | None:
    """The extension of text files, if `captions` is one."""
    named = self.captions is not None and self.captions[:1] == '.' and self.captions[1:].isalnum()
    return self.captions if named else None

  @functools.cached_property
  def _split(self) -> str | None:
    """The subfolder that is read; None for the folder itself."""
    if self.split == splits.ALL:
      return None
    path = os.path.expanduser(self.path)
    folders = storage.folders_in(path) if storage.files_below(path, deep=False) is not None else []
    if self.split is not None:
      matches = [name for name in folders if name == self.split] or [
        name for name in folders if splits.named(f'{name}/') == splits.canonical(self.split)
      ]
      if len(matches) != 1:
        raise UserError(
          f'image folder: split {self.split!r}: {path!r} has {len(matches) or "no"} subfolders of it; '
          f'{did_you_mean(self.split, folders)}'
        )
      return matches[0]
    if self.captions is not None or not folders:
      return None
    named = [name for name in folders if splits.named(f'{name}/')]
    if len(named) == len(folders):
      raise UserError(
        f'image folder: the subfolders of {path!r} ({", ".join(folders)}) are splits, not classes; set split to one of '
        f"them, or to 'all' if they are classes"
      )
    # A class may be called train, too, but it has not the same classes inside as the class next to it.
    inner = {name: set(storage.folders_in(storage.join(path, name))) for name in folders} if named else {}
    for name, other in itertools.product(named, sorted(set(folders) - set(named))):
      if len(shared := sorted(inner[name] & inner[other])) > 1:
        raise UserError(
          f'image folder: {name!r} and {other!r} in {path!r} have the same subfolders ({", ".join(shared[:3])}), as '
          f'splits have, but {other!r} is not named after a split; rename or move it, set split to {name!r}, or to '
          f"'all' if both are classes"
        )
    return None

  @functools.cached_property
  def _root(self) -> str:
    path = os.path.expanduser(self.path)
    return storage.join(path, self._split) if self._split else path

  @functools.cached_property
  def _index(self) -> Index:
    found = storage.files_below(self._root)
    if found is None:
      raise UserError(
        f'image folder: no folder {self.path!r} (relative to {os.getcwd()}); set path to the folder of the images'
      )
    columns = Columns(self.image_column, self.caption_column, self.label_column)
    if self.captions is not None and not self._extension:
      return from_tables(self._root, found, [self.captions], columns)
    if self.captions is None and self._split and (outer := self._metadata_outside()):
      raise UserError(
        f'image folder: {outer!r} is next to the folder of the split {self._split!r}, where it is not read; write a '
        f"table into the folder of each split, or set split to 'all' to read all of them as one"
      )
    if self.captions is None and (metadata := self._metadata(found, columns)):
      return from_tables(self._root, found, metadata, dataclasses.replace(columns, metadata=True))
    return from_folders(self._root, found, storage.folders_in(self._root), self._extension)

  def _metadata_outside(self) -> str | None:
    """A metadata table in `path` that names images of the split by their paths from there; None without one."""
    path = os.path.expanduser(self.path)
    for name in storage.files_below(path, deep=False) or ():
      if name in METADATA:
        table = storage.join(path, name)
        rows = (row for _, row in caption_tables.rows(table, 'image folder'))
        if any(str(row.get(FILE_NAME)).startswith(f'{self._split}/') for row in rows):
          return table
    return None

  def _metadata(self, found: list[str], columns: Columns) -> list[str]:
    """Metadata tables in any subfolder that have images and captions or labels."""
    tables = [path for path in found if path.rpartition('/')[2] in METADATA]
    first = (next(iter(caption_tables.rows(storage.join(self._root, path), 'image folder')), None) for path in tables)
    return [path for path, row in zip(tables, first) if row is not None and columns.fit(set(row[1]))]
