"""Texts to ids: CLIP's published vocabulary, a byte-pair vocabulary trained on the data set's own captions, or files.

CLIP's and our own agree on this: rows are zero-padded, start with one id and end with another, and the end id is the
largest of the vocabulary, so that a text tower may pool at `tokens.argmax(-1)`, as CLIP's does. Those read from others'
files keep the rules of the towers that they belong to, which pool at the last place.
"""

import abc
import dataclasses
import functools
import os
import pathlib
import re
import string
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath
from typing_extensions import override

from fmcv_jax.bounds import PositiveInt
from fmcv_jax.data import clip_vocabulary
from fmcv_jax.data.bpe_training import train_bpe
from fmcv_jax.data.sources.base import UNREADABLE, Source
from fmcv_jax.data.text_cleaning import clip_cleaned, encodable
from fmcv_jax.data.tokenizer_files import existing_file, open_sentencepiece, open_tokenizer_json
from fmcv_jax.errors import UserError


class Tokenizer(abc.ABC):
  """A frozen, picklable function of texts. `length` is that of a row; ids lie in [0, vocab_size)."""

  length: int
  vocab_size: int

  @property
  @abc.abstractmethod
  def pad_id(self) -> int:
    """The id after the end of a text that is shorter than a row."""

  @property
  @abc.abstractmethod
  def start_id(self) -> int | None:
    """The id before every text, if there is one."""

  @property
  @abc.abstractmethod
  def end_id(self) -> int | None:
    """The id after every text, if there is one; it may be the padding id."""

  @abc.abstractmethod
  def __call__(self, texts: Sequence[str]) -> np.ndarray:
    """N texts -> int32 [N, length]: start, ids, end, padding. A long text is cut; its end id stays last."""

  @abc.abstractmethod
  def decode(self, tokens: np.ndarray) -> list[str]:
    """int [N, length] -> N texts, up to the end id; case and white space as the tokenizer left them."""


@dataclasses.dataclass(frozen=True)
class ClipBpe(Tokenizer):
  """The vocabulary of CLIP (Radford et al. 2021) and of nearly all that followed: 49,408 ids, lower case.

  As in the original wrongly decoded UTF-8 is repaired (ftfy), and HTML entities are resolved.

  added  names of further ids, from 49,408 on: words with vectors of their own (textual inversion), found in any case.
         A word of several vectors is there as '<cat>', '<cat>_1', ..., and '<cat>' in a text stands for all
  """

  length: PositiveInt = 77
  added: tuple[str, ...] = ()

  def __post_init__(self) -> None:
    _check_length(self.length)
    names = [name.lower() for name in self.added]
    if wrong := [name for name in names if names.count(name) > 1 or not name.strip()]:
      raise ValueError(f'added: {wrong[0]!r} is empty or there twice')

  @property
  @override
  def vocab_size(self) -> int:  # type: ignore[override]
    return clip_vocabulary.SIZE + len(self.added)

  @property
  @override
  def pad_id(self) -> int:
    return 0

  @property
  @override
  def start_id(self) -> int:
    return clip_vocabulary.SIZE - 2

  @property
  @override
  def end_id(self) -> int:
    return clip_vocabulary.SIZE - 1

  @override
  def __call__(self, texts: Sequence[str]) -> np.ndarray:
    rows = np.full((len(texts), self.length), self.pad_id, np.int32)
    for row, body in zip(rows, self._ids(texts), strict=True):
      ids = [self.start_id, *body[: self.length - 2], self.end_id]
      row[: len(ids)] = ids
    return rows

  def _ids(self, texts: Sequence[str]) -> list[list[int]]:
    if self.added:
      words = clip_vocabulary.added_ids(self.added)
      return [clip_vocabulary.encode(text, words) for text in texts]
    encoded = clip_vocabulary.tokenizer().encode_batch([clip_cleaned(text) for text in texts])
    return [encoding.ids for encoding in encoded]

  @override
  def decode(self, tokens: np.ndarray) -> list[str]:
    words = clip_vocabulary.added_ids(self.added)
    return [clip_vocabulary.decode(row, words) for row in _bodies(tokens, self.end_id)]


@dataclasses.dataclass(frozen=True)
class Bpe(Tokenizer):
  """Byte-pair encoding (Sennrich et al. 2016) over bytes, so that no text is unknown.

  It is trained on the texts of `corpus` when it is first used, to the same vocabulary every time, or read from `file`,
  which `save` wrote; exactly one of the two is given. A small corpus may not fill the vocabulary: the ids left over are
  never produced, and `vocab_size` holds.

  vocab_size   the embedding table's size: 256 bytes, padding, start, end, and learned merges
  lowercase    lowercases texts; a `file` keeps the choice it was trained with
  """

  vocab_size: PositiveInt
  length: PositiveInt
  corpus: Source | None = None
  file: str | None = None
  lowercase: bool = True

  def __post_init__(self) -> None:
    _check_length(self.length)
    if self.vocab_size < 259:
      raise ValueError(f'vocab_size: expected at least 259 (256 bytes, padding, start, end), got {self.vocab_size}')
    if (self.corpus is None) == (self.file is None):
      raise ValueError('give exactly one of corpus and file')

  @property
  @override
  def pad_id(self) -> int:
    return 0

  @property
  @override
  def start_id(self) -> int:
    return 1

  @property
  @override
  def end_id(self) -> int:
    return self.vocab_size - 1

  @override
  def __call__(self, texts: Sequence[str]) -> np.ndarray:
    rows = np.full((len(texts), self.length), self.pad_id, np.int32)
    for row, body in zip(rows, self.encode_bodies(texts)):
      ids = [self.start_id, *body[: self.length - 2], self.end_id]
      row[: len(ids)] = ids
    return rows

  @override
  def decode(self, tokens: np.ndarray) -> list[str]:
    return [self.decode_body(row) for row in _bodies(tokens, self.end_id)]

  def encode_bodies(self, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text alone, without start, end and limit."""
    cleaned = [encodable(text) for text in texts]
    return [encoding.ids for encoding in self._bpe.encode_batch(cleaned, add_special_tokens=False)]

  def decode_body(self, ids: Sequence[int]) -> str:
    """The text of ids without start and end."""
    return self._bpe.decode(list(ids)).strip()

  @property
  def newline_id(self) -> int:
    """The id of a newline, which is in no body: white space in a text is one blank."""
    return self._bpe.token_to_id('Ċ')

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes a file (local or gs://) for `file=`, in the format of Hugging Face's `tokenizers`."""
    target = epath.Path(path)
    partial = target.parent / f'.{target.name}.{os.getpid()}.partial'
    partial.write_text(self._json, encoding='utf-8')
    partial.replace(target)

  @property
  def _bpe(self) -> Any:
    return _open(self._json)

  @functools.cached_property
  def _json(self) -> str:
    """The whole tokenizer; once made it travels with the instance, so that other processes need not train it again."""
    if self.file is None:
      return train_bpe(self._texts(), self.vocab_size, self.lowercase)
    if not os.path.isfile(self.file):
      raise UserError(f'tokenizer: no file {self.file!r} (relative to {os.getcwd()}); give the path that save() wrote')
    text = pathlib.Path(self.file).read_text(encoding='utf-8', errors='replace')
    try:
      size = _open(text).get_vocab_size()
    except Exception as error:  # the package raises bare Exceptions
      raise UserError(f'tokenizer: {self.file!r} is not a valid tokenizer file: {error}') from error
    if size != self.vocab_size:
      raise UserError(f'tokenizer: {self.file!r} has {size} ids, but vocab_size is {self.vocab_size}')
    return text

  def _texts(self) -> Iterator[str]:
    assert self.corpus is not None
    found = False
    for index in range(len(self.corpus)):
      try:
        texts = self.corpus.texts_of(index)
      except UNREADABLE:  # the loader counts and reports it
        continue
      for text in texts:
        found = True
        yield encodable(text)
    if not found:
      raise UserError(f'tokenizer: the corpus {type(self.corpus).__name__} has no texts to learn a vocabulary from')


@dataclasses.dataclass(frozen=True)
class SentencePiece(Tokenizer):
  """A vocabulary of SentencePiece (Kudo & Richardson 2018) in its own file, as SigLIP has; rows are ids and ends.

  Texts lose their case and ASCII punctuation, and white space is one blank, as SigLIP's were in training.
  """

  file: str
  length: PositiveInt = 64

  def __post_init__(self) -> None:
    _check_length(self.length)

  @property
  @override
  def vocab_size(self) -> int:  # type: ignore[override]
    return self._model.vocab_size()

  @property
  @override
  def pad_id(self) -> int:
    return self.end_id

  @property
  @override
  def start_id(self) -> None:
    return None

  @property
  @override
  def end_id(self) -> int:
    return self._model.eos_id()

  @override
  def __call__(self, texts: Sequence[str]) -> np.ndarray:
    rows = np.full((len(texts), self.length), self.pad_id, np.int32)
    for row, ids in zip(rows, self._model.encode([_canonical(encodable(text)) for text in texts])):
      row[: len(ids[: self.length - 1])] = ids[: self.length - 1]
    return rows

  @override
  def decode(self, tokens: np.ndarray) -> list[str]:
    rows = (row[: int(np.argmax(np.append(row, self.end_id) == self.end_id))] for row in np.asarray(tokens))
    return [self._model.decode([int(i) for i in row]) for row in rows]

  @property
  def _model(self) -> Any:
    return open_sentencepiece(existing_file(self.file))


_PUNCTUATION = str.maketrans('', '', string.punctuation)


def _canonical(text: str) -> str:
  return re.sub(r'\s+', ' ', text.lower().translate(_PUNCTUATION)).strip()


@dataclasses.dataclass(frozen=True)
class TokenizerJson(Tokenizer):
  """A tokenizer.json of Hugging Face, with the special ids that its own rules give a text.

  padding     its token for the places after a text
  end         a token that closes every text whether the file's rules do so or not; a cut text keeps it
  lowercase   as SigLIP 2 (Tschannen et al. 2025) wants it, whose file does not say so
  """

  file: str
  length: PositiveInt = 64
  padding: str = '<pad>'
  end: str | None = None
  lowercase: bool = False

  def __post_init__(self) -> None:
    _check_length(self.length)

  @property
  @override
  def vocab_size(self) -> int:  # type: ignore[override]
    return self._model.get_vocab_size()

  @property
  @override
  def pad_id(self) -> int:
    return self.token_id(self.padding)

  @property
  @override
  def start_id(self) -> int | None:
    return self._wrapping[0]

  @property
  @override
  def end_id(self) -> int | None:
    return self._wrapping[1] if self.end is None else self.token_id(self.end)

  @property
  def _wrapping(self) -> tuple[int | None, int | None]:
    """The ids that the file's own rules put before and after a text."""
    text = self._model.encode('a', add_special_tokens=False).ids
    ids = self._model.encode('a').ids
    first = next(i for i in range(len(ids)) if ids[i : i + len(text)] == text)
    after = ids[first + len(text) :]
    return ids[0] if first else None, after[-1] if after else None

  @override
  def __call__(self, texts: Sequence[str]) -> np.ndarray:
    end = () if self.end is None else (self.token_id(self.end),)
    rows = np.full((len(texts), self.length), self.pad_id, np.int32)
    cleaned = [encodable(text.lower() if self.lowercase else text) for text in texts]
    for row, encoding in zip(rows, self._model.encode_batch(cleaned)):
      ids = encoding.ids[:-1] if end and encoding.ids[-1:] == list(end) else encoding.ids
      ids = [*ids[: self.length - len(end)], *end]
      row[: len(ids)] = ids
    return rows

  @override
  def decode(self, tokens: np.ndarray) -> list[str]:
    return [self.decode_body(row) for row in np.asarray(tokens)]

  def encode_bodies(self, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text alone, in which special tokens such as '<eos>' are text."""
    model = open_tokenizer_json(existing_file(self.file), special_as_text=True)
    return [encoding.ids for encoding in model.encode_batch(list(texts), add_special_tokens=False)]

  def decode_body(self, ids: Sequence[int]) -> str:
    """The text of ids, without special tokens."""
    return self._model.decode([int(i) for i in ids])

  def token_id(self, token: str) -> int:
    """The id of a token; UserError for a token that the file does not have."""
    found = self._model.token_to_id(token)
    if found is None:
      raise UserError(f'tokenizer: {self.file!r} has no token {token!r}')
    return found

  @property
  def _model(self) -> Any:
    return open_tokenizer_json(existing_file(self.file))


@functools.cache
def _open(text: str) -> Any:
  import tokenizers

  bpe = tokenizers.Tokenizer.from_str(text)
  bpe.encode_special_tokens = True  # '<end>' in a caption is text; this switch is not part of the file
  return bpe


def _bodies(tokens: np.ndarray, end: int) -> list[list[int]]:
  """The ids between the start id and the first end id of each row."""
  rows = []
  for row in np.asarray(tokens):
    ends = np.flatnonzero(row == end)
    rows.append([int(i) for i in row[1 : ends[0] if len(ends) else None]])
  return rows


def _check_length(length: int) -> None:
  if length < 3:
    raise ValueError(f'length: expected at least 3 (start, one id, end), got {length}')


def truncated_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> dict[str, str]:
  """The texts that are too long for the tokenizer, with what is left of each."""
  longer: Any = dataclasses.replace(tokenizer, length=8 * tokenizer.length)  # type: ignore[type-var]
  left, whole = (t.decode(t(texts)) for t in (tokenizer, longer))
  return {text: a for text, a, b in zip(texts, left, whole, strict=True) if a != b}


# File name of each tokenizer in a workdir.
KEPT = {'bpe': 'tokenizer.json', 'sentencepiece': 'tokenizer.model', 'tokenizer_json': 'tokenizer.json'}
