"""WebDataset shards, the tar files of LAION and img2dataset, with random access and without streaming.

A sample is a run of members that share their name up to the first dot: `000000012.jpg`, `000000012.txt`,
`000000012.json`. Where each begins is found once, from the tar headers alone, and kept in an index file; from then on a
sample is one read at its place, and order, epochs and resuming are as exact as for any other source.
"""

import dataclasses
import functools
import json
from typing import Any, Literal

from typing_extensions import override

from fmcv_jax.data import storage
from fmcv_jax.data.sources import splits, values
from fmcv_jax.data.sources.account import Account, other_files
from fmcv_jax.data.sources.base import BadRecord, Example, Source
from fmcv_jax.data.sources.webdataset_index import IMAGES, Index, Sample, is_image, open_index
from fmcv_jax.errors import UserError, did_you_mean

_FIRST = ('jpg', 'png', 'jpeg', 'webp')  # of several images in a sample, as open_clip reads them
_TEXT, _LABEL = 'txt', 'cls'


@dataclasses.dataclass(frozen=True)
class WebDataset(Source):
  """Tar shards: `path` is their folder, a pattern such as 'laion/{00000..00999}.tar' or 'gs://bucket/*.tar', or a file.

  image        the member that holds the image, such as 'jpg' or 'input.jpg' of x.input.jpg; by default a sample's jpg,
               png, jpeg, webp or other image, in this order, or the only member whose name ends so
  text         the member that holds the caption, 'txt', or a field of a JSON member, 'json/caption'; None for none
  label        the member or field that holds the class as a number, or as one of class_names; None for none
  class_names  names of the classes by label
  index        the folder of the index; by default that of the shards, or where it cannot be written $FMCV_CACHE
  on_truncated 'error' stops at a shard that is truncated or empty; 'skip_tail' takes its whole samples, and says so
  split        'train', 'validation' or 'test' of a folder that holds several, by the names of files and folders; 'all'
               reads them as one

  Members are named in lower case, whatever case they have in the shard. Samples without an image are left out and
  counted; a sample whose caption is missing, null or blank is a record without a text, one whose class is missing a bad
  record. The index is made again when a shard's size or time of change differs. Hosts may be more than shards: rows of
  the global order are divided among them, never shards.
  """

  path: str
  text: str | None = _TEXT
  label: str | None = _LABEL
  class_names: tuple[str, ...] = ()
  index: str | None = None
  on_truncated: Literal['error', 'skip_tail'] = 'error'
  image: str | None = None
  split: str | None = None

  def __post_init__(self) -> None:
    if self.on_truncated not in ('error', 'skip_tail'):
      raise ValueError(f"on_truncated: {self.on_truncated!r} is not 'error' or 'skip_tail'")

  @property
  @override
  def names(self) -> tuple[str, ...]:
    return self.class_names

  def __len__(self) -> int:
    return self._index.ends[-1]

  def __getitem__(self, index: int) -> Example:
    if not 0 <= index < len(self):
      raise IndexError(f'{index} of {len(self)}')
    sample = self._index.read(index)
    image = next((member for member in self._fields['image'] if member in sample.members), None)
    if image is None:
      raise BadRecord(f'has no image {", ".join(self._fields["image"])}, only {", ".join(sample.members)}')
    example: Example = {'image': sample.members[image], 'key': sample.key}
    if text := self._fields['text']:
      example['texts'] = values.texts(_value(sample, text), '/'.join(text))
      if example['texts']:
        example['text'] = example['texts'][0]
    if label := self._fields['label']:
      example['label'] = self._classes.number(_value(sample, label), f'{"/".join(label)}')
    return example

  @property
  def members(self) -> tuple[str, ...]:
    """The members that samples have, such as ('cls', 'jpg'); read from the tar headers."""
    return tuple(self._index.members)

  def value_of(self, index: int, field: str) -> Any:
    """A member of sample `index` as text, or a field of a JSON member, 'json/label'; None where the sample has none.

    Raises BadRecord for a member that is not text or JSON.
    """
    member, *path = field.split('/')
    return _value(self._index.read(index), (member.lower().lstrip('.'), *path))

  @override
  def key_of(self, index: int) -> str:
    shard, row = self._index.locate(index)
    return f'{self._index.shards[shard]}[{row}]'

  @override
  def account(self) -> Account:
    index, counts = self._index, self._index.counts
    fields = {'image': ', '.join(f'{counts[member]} .{member}' for member in self._fields['image'])}
    missing = {}
    for field in ('text', 'label'):
      if member := self._fields[field][:1]:
        fields[field] = '/'.join(self._fields[field])
        missing[field] = len(self) - counts[member[0]]
    return Account(
      records=len(self),
      fields=fields,
      classes=self.names,
      split=self._shards[1],
      missing=missing,
      left_out=(*index.left_out, *other_files(storage.others(self.path, index.shards))),
    )

  @functools.cached_property
  def _classes(self) -> values.Classes:
    return values.Classes(self.class_names)

  @functools.cached_property
  def _shards(self) -> tuple[list[storage.File], str | None]:
    return splits.chosen(storage.find(self.path, '.tar', 'webdataset', below=True), self.split, 'webdataset')

  @functools.cached_property
  def _index(self) -> Index:
    return open_index(self._shards[0], self.index, self.on_truncated)

  @functools.cached_property
  def _fields(self) -> dict[str, tuple[str, ...]]:
    """The members that may be the image, in order; the member of text and label and the path of the field in it, ()
    where there is none."""
    return {
      'image': self._image_members(),
      'text': self._path('text', self.text, _TEXT),
      'label': self._path('label', self.label, _LABEL),
    }

  def _image_members(self) -> tuple[str, ...]:
    members = self._index.members
    if self.image is not None:
      if (image := self.image.lower().lstrip('.')) not in members:
        raise UserError(f'webdataset: no sample has a member {self.image!r}, set image; {did_you_mean(image, members)}')
      return (image,)
    if plain := [member for member in dict.fromkeys((*_FIRST, *IMAGES)) if member in members]:
      return tuple(plain)
    images = [member for member in members if is_image(member)]
    if len(images) > 1:
      raise UserError(f'webdataset: samples have several images ({", ".join(images)}); set image to the one to read')
    return tuple(images)

  def _path(self, field: str, spec: str | None, default: str) -> tuple[str, ...]:
    if spec is None:
      return ()
    member, *path = spec.split('/')
    if (member := member.lower().lstrip('.')) in self._index.members:
      return (member, *path)
    if spec == default:  # which nobody has asked for
      return ()
    raise UserError(
      f'webdataset: no sample has a member {member!r}, set {field} (None reads none); '
      f'{did_you_mean(member, self._index.members)}'
    )


def _value(sample: Sample, field: tuple[str, ...]) -> Any:
  """The member, or the field of a JSON member; None where the sample has none."""
  member, *path = field
  if member not in sample.members:
    return None
  text = values.decoded(sample.members[member], f'its .{member}')
  if not path and member.rpartition('.')[2] != 'json':
    return text
  try:
    value = json.loads(text)
  except ValueError as error:
    raise BadRecord(f'its .{member} is not JSON ({error})') from error
  return values.at(value, path, f'its .{member}')
