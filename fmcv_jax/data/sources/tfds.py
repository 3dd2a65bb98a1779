"""Data sets that TensorFlow Datasets has prepared, read at random and without TensorFlow."""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import override

from fmcv_jax.data.sources import values
from fmcv_jax.data.sources.account import Account
from fmcv_jax.data.sources.base import BadRecord, Example, Source
from fmcv_jax.errors import UserError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Tfds(Source):
  """A split of a prepared data set, as encoded bytes: ImageNet is `Tfds('imagenet2012', 'train')`.

  builder    'name', 'name/config', 'name:version' or 'name/config:version'
  split      in the language of TFDS: 'train', 'validation[:5000]', 'train[10%:]+test'
  data_dir   where it was prepared; without it the directories that TFDS knows, TFDS_DATA_DIR among them
  *_key      the features to read, with '/' into nested ones ('captions/text'); None for none

  Only data sets prepared as ArrayRecord (or Parquet) have random access; TFDS itself prepares TFRecord by default.
  """

  builder: str
  split: str = 'train'
  data_dir: str | None = None
  image_key: str | None = 'image'
  label_key: str | None = 'label'
  text_key: str | None = None

  @property
  @override
  def names(self) -> tuple[str, ...]:
    return tuple(getattr(self._feature('label_key'), 'names', None) or ()) if self.label_key else ()

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> Example:
    if not 0 <= index < len(self):
      raise IndexError(f'{index} of {len(self)}')
    try:
      record = self._records[index]
    except RuntimeError as error:  # ArrayRecord's checksum does not hold
      raise BadRecord(_line(error)) from error
    example: Example = {'key': self.key_of(index)}
    if self.image_key:
      example['image'] = _at(record, self.image_key)
    if self.label_key:
      example['label'] = self._classes.number(_at(record, self.label_key), self.label_key)
    if self.text_key:
      example['texts'] = values.texts(_at(record, self.text_key), self.text_key)
      if example['texts']:
        example['text'] = example['texts'][0]
    return example

  @override
  def key_of(self, index: int) -> str:
    return f'{self.builder}/{self.split}[{index}]'

  @override
  def account(self) -> Account:
    keys = {'image': self.image_key, 'label': self.label_key, 'text': self.text_key}
    return Account(
      records=len(self),
      fields={field: f'feature {key!r}' for field, key in keys.items() if key},
      classes=self.names,
      split=self.split,
    )

  @functools.cached_property
  def _classes(self) -> values.Classes:
    return values.Classes(self.names)

  def __getstate__(self) -> dict[str, Any]:
    # Every process opens the files for itself.
    return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

  @functools.cached_property
  def _records(self) -> Sequence[Mapping[str, Any]]:
    import tensorflow_datasets as tfds

    builder = self._builder
    for key in ('image_key', 'label_key', 'text_key'):
      if getattr(self, key):
        self._feature(key)
    decoders: Any = None
    if self.image_key and isinstance(self._feature('image_key'), tfds.features.Image):
      decoders = tfds.decode.SkipDecoding()  # the transforms decode; and TFDS decodes with TensorFlow
      for part in reversed(self.image_key.split('/')):
        decoders = {part: decoders}
    try:
      return builder.as_data_source(split=self.split, decoders=decoders)
    except NotImplementedError as error:
      raise UserError(
        f'tfds: {self.builder!r} at {builder.data_path} is prepared as {builder.info.file_format.value}, which has no '
        f'random access; {self._how_to_prepare(builder)}'
      ) from error
    except ValueError as error:
      splits = ', '.join(builder.info.splits) or 'none'
      raise UserError(
        f'tfds: cannot read split {self.split!r} of {self.builder!r} ({splits}): {_line(error)}'
      ) from error

  @functools.cached_property
  def _builder(self) -> Any:
    import tensorflow_datasets as tfds  # here, since it is slow to import
    from tensorflow_datasets.core.utils import file_utils

    searched = ', '.join(str(path) for path in file_utils.list_data_dirs(self.data_dir))
    if not self.data_dir:
      searched += f' (TFDS_DATA_DIR is {os.environ.get("TFDS_DATA_DIR", "not set")})'
    try:
      builder = tfds.builder(self.builder, data_dir=self.data_dir)
    except tfds.core.DatasetNotFoundError as error:
      known = tfds.list_builders(with_community_datasets=False)
      hint = did_you_mean(self.builder.split('/')[0].split(':')[0], known)
      raise UserError(
        f'tfds: no data set {self.builder!r}, neither prepared in {searched} nor known; {hint}'
      ) from error
    except (ValueError, AssertionError, RuntimeError) as error:  # its configs, its versions
      raise UserError(f'tfds: cannot open {self.builder!r}, searched in {searched}: {_line(error)}') from error
    if not builder.data_path.exists():
      raise UserError(
        f'tfds: {self.builder!r} is not prepared; searched in {searched}; {self._how_to_prepare(builder)}'
      )
    return builder

  def _how_to_prepare(self, builder: Any) -> str:
    root = self.data_dir or 'DIR'
    hint = f'run `tfds build {self.builder} --file_format=array_record --data_dir={root}` where TensorFlow is installed'
    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
      hint += f', after downloading its archives by hand into {root}/downloads/manual'
    return hint

  def _feature(self, field: str) -> Any:
    feature, key = self._builder.info.features, getattr(self, field)
    for part in key.split('/'):
      feature = getattr(feature, 'feature', feature)  # into the elements of a Sequence
      if part not in (known := list(feature.keys()) if hasattr(feature, 'keys') else []):
        raise UserError(f'tfds: {self.builder!r} has no {field} {key!r} (None reads none); {did_you_mean(part, known)}')
      feature = feature[part]
    return feature


def _at(record: Any, key: str) -> Any:
  for part in key.split('/'):
    record = record[part]
  return record


def _line(error: Exception) -> str:
  return ' '.join(str(error).split())[:300]
