"""What every data set looks like from above: a random-access sequence of example dicts."""

import abc
import dataclasses
from typing import Any

from fmcv_jax.data.order import Order, RunOrder
from fmcv_jax.data.sources.account import Account
from fmcv_jax.errors import BadRecord, UserError

Example = dict[str, Any]


# Exceptions of reading a record that is at fault; any other is a bug.
UNREADABLE = (BadRecord, OSError, ValueError)


def reason_of(error: Exception) -> str:
  """One line that says why a record cannot be read."""
  return ('' if isinstance(error, BadRecord) else f'{type(error).__name__}: ') + ' '.join(str(error).split())


class Source(abc.ABC):
  """A data set with random access: frozen, picklable, cheap to construct, opened lazily.

  An example holds some of
    image   encoded bytes (JPEG, PNG, WebP, ...) or a uint8 array [height, width, 3]
    label   int, an index into `names`
    segments uint8 [height, width]: the class of each pixel of an image that is an array, 255 for unknown
    text    str: the caption or the name
    texts   tuple of str: every caption; transforms pick one
    key     str that names the record in messages (a path, a record number)

  A record that cannot be read raises `BadRecord`, `OSError` or `ValueError` from `__getitem__`; the loader skips,
  counts and reports it by `key_of`. Any other exception is a bug and stops the run.
  """

  @abc.abstractmethod
  def __len__(self) -> int: ...

  @abc.abstractmethod
  def __getitem__(self, index: int) -> Example: ...

  @property
  def names(self) -> tuple[str, ...]:
    """Names of the classes by label; empty where the source has none."""
    return ()

  def key_of(self, index: int) -> str:
    """A name for record `index` that is known even where the record itself cannot be read."""
    return f'{type(self).__name__.lower()}[{index}]'

  def texts_of(self, index: int) -> tuple[str, ...]:
    """Every text of record `index`. A source overrides this where it can answer without reading the image."""
    example = self[index]
    return tuple(example.get('texts') or ((example['text'],) if 'text' in example else ()))

  def account(self) -> Account:
    """Contents of the source, as far as they are known without decoding an image; it may open files.

    A source overrides this to say where fields come from, what is left out, and how many records its classes have.
    """
    return Account(records=len(self), classes=self.names)

  def order(self, seed: int, shuffle: bool) -> RunOrder:
    """The order of a training run: by default every record once an epoch, each epoch anew if `shuffle`."""
    return Order(len(self), seed, shuffle)

  @property
  def order_name(self) -> str:
    """What, besides seed and shuffle, determines which record stands at which position."""
    return f'{type(self).__name__} records={len(self)}'


@dataclasses.dataclass(frozen=True)
class NoData(Source):
  """What a config reads that names no data, such as that of a model that was imported."""

  def __len__(self) -> int:
    raise UserError('config.data.source: this config names no data; set it')

  def __getitem__(self, index: int) -> Example:
    raise UserError('config.data.source: this config names no data; set it')
