"""The Source interface: a random-access sequence of example dicts."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

from fmcv_jax.data.order import Order, RunOrder
from fmcv_jax.data.sources.account import Account
from fmcv_jax.errors import BadRecord, UserError
from fmcv_jax.fields import Field

Example = dict[str, Any]


# Exceptions caused by an unreadable record; any other is a bug.
UNREADABLE = (BadRecord, OSError, ValueError)


def reason_of(error: Exception) -> str:
  """One-line reason why a record is unreadable."""
  return ('' if isinstance(error, BadRecord) else f'{type(error).__name__}: ') + ' '.join(str(error).split())


class Source(abc.ABC):
  """A dataset with random access: frozen, picklable, cheap to construct, opened lazily.

  An example has some of the fields
    image     encoded bytes (JPEG, PNG, WebP, ...) or uint8 [height, width, channels]
    clip      uint8 [frames, height, width, channels], or a tuple of encoded frames
    label     int, an index into `names`
    segments  integers [height, width]: the class of each pixel; 255: ignore
    depth     float32 [height, width]: the distance of each pixel in meters; 0: not known
    boxes     float [N, 4]: left, top, right, bottom in pixels of the image
    classes   int [N], the class of each box; masks bool [N, height, width], the pixels of each object
    points    float [..., 2]: x, y in pixels
    text      str: the caption or the name
    texts     tuple of str: every caption; transforms pick one
    question  str, and answers tuple of str: a question about the image, and the answers that people gave
    key       str that identifies the record in messages (a path, a record number)
  and arrays of other names, whose meaning `fields` states.

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

  @property
  def fields(self) -> Mapping[str, Field]:
    """The meaning of fields whose name alone does not tell it (see fmcv_jax/fields.py)."""
    return {}

  def key_of(self, index: int) -> str:
    """A name of record `index`, available even if the record is unreadable."""
    return f'{type(self).__name__.lower()}[{index}]'

  def texts_of(self, index: int) -> tuple[str, ...]:
    """All texts of record `index`. Sources override this if they need not read the image."""
    example = self[index]
    return tuple(example.get('texts') or ((example['text'],) if 'text' in example else ()))

  def annotations_of(self, index: int) -> Example:
    """The fields of record `index` without its pixels. Sources override this if they need not read the image."""
    return {name: value for name, value in self[index].items() if name not in ('image', 'clip')}

  def account(self) -> Account:
    """Summary of the contents of the source, without decoding an image; may open files.

    Sources override this to report where fields come from, what is skipped, and the number of records per class.
    """
    return Account(records=len(self), classes=self.names)

  def order(self, seed: int, shuffle: bool) -> RunOrder:
    """The order of a training run: by default every record once per epoch, in a new order per epoch if `shuffle`."""
    return Order(len(self), seed, shuffle)

  @property
  def order_name(self) -> str:
    """A string of everything that determines the order of records, except seed and shuffle."""
    return f'{type(self).__name__} records={len(self)}'


@dataclasses.dataclass(frozen=True)
class NoData(Source):
  """Placeholder source of a config without data, such as that of an imported model."""

  def __len__(self) -> int:
    raise UserError('config.data.source is not set')

  def __getitem__(self, index: int) -> Example:
    raise UserError('config.data.source is not set')
