"""COCO Captions (Chen et al. 2015) in the official files, and any data set in their layout."""

import dataclasses
import functools
import os
from typing import NamedTuple

from typing_extensions import override

from fmcv_jax.data import storage
from fmcv_jax.data.sources import annotation_json
from fmcv_jax.data.sources.account import Account, LeftOut, left_out
from fmcv_jax.data.sources.base import Example, Source
from fmcv_jax.errors import UserError

_WHAT = 'coco captions'


class _Index(NamedTuple):
  """File name and captions of each record, and what is left out."""

  files: tuple[str, ...]
  texts: tuple[tuple[str, ...], ...]
  left_out: tuple[LeftOut, ...]


@dataclasses.dataclass(frozen=True)
class CocoCaptions(Source):
  """One record per image, with all of its captions, in the order of the file's images.

  annotations  the file, such as 'annotations/captions_val2017.json': lists 'images' (id, file_name) and 'annotations'
               (image_id, caption)
  images       the folder or URL of the images, such as 'val2017'

  White space in a caption becomes single blanks. Images without a caption, and blank captions, are left out and
  counted. A caption of an unknown image, and an image that is listed twice, are errors.
  """

  annotations: str
  images: str

  def __len__(self) -> int:
    return len(self._index.files)

  def __getitem__(self, index: int) -> Example:
    if not 0 <= index < len(self):
      raise IndexError(f'{index} of {len(self)}')
    with storage.open_file(storage.join(os.path.expanduser(self.images), self._index.files[index])) as file:
      return {'image': file.read(), **self.annotations_of(index)}

  @override
  def annotations_of(self, index: int) -> Example:
    texts = self._index.texts[index]
    return {'text': texts[0], 'texts': texts, 'key': self._index.files[index]}

  @override
  def texts_of(self, index: int) -> tuple[str, ...]:
    return self._index.texts[index]

  @override
  def key_of(self, index: int) -> str:
    return self._index.files[index]

  @override
  def account(self) -> Account:
    counts = [len(texts) for texts in self._index.texts]
    fields = {'image': self.images, 'text': f'{sum(counts)} captions, {min(counts)} to {max(counts)} of an image'}
    return Account(records=len(self), fields=fields, left_out=self._index.left_out)

  @functools.cached_property
  def _index(self) -> _Index:
    where = f'{_WHAT}: {self.annotations}'
    content = annotation_json.read(self.annotations, _WHAT)
    images = annotation_json.rows(content, 'images', {'id': (int, str), 'file_name': str}, where)
    found = annotation_json.by_id(images, 'id', f'{where}: images')
    captions: dict[object, list[str]] = {number: [] for number in found}
    blank = []
    for row in annotation_json.rows(content, 'annotations', {'image_id': (int, str), 'caption': str}, where):
      if row['image_id'] not in captions:
        raise UserError(f'{where}: caption {row["caption"]!r:.60} is of image {row["image_id"]!r}, which is not listed')
      if text := ' '.join(row['caption'].split()):
        captions[row['image_id']].append(text)
      else:
        blank.append(('blank captions', str(row['image_id'])))
    without = [('images without a caption', found[number]['file_name']) for number in found if not captions[number]]
    kept = [number for number in found if captions[number]]
    if not kept:
      raise UserError(f'{where}: no image has a caption')
    files = tuple(found[number]['file_name'] for number in kept)
    annotation_json.check_folder(self.images, files[0], _WHAT)
    return _Index(files, tuple(tuple(captions[number]) for number in kept), left_out([*without, *blank]))
