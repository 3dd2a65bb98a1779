"""Rows of a prefix language model: a prompt, a newline, and the text that answers it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from typing_extensions import override

from fmcv_jax.bounds import PositiveInt
from fmcv_jax.data.tokenizers import Tokenizer
from fmcv_jax.errors import UserError

SEPARATOR = '\n'


@dataclasses.dataclass(frozen=True)
class Prompted(Tokenizer):
  r"""Texts 'prompt\nanswer' to rows: start, prompt, newline, answer, end, padding, as PaliGemma's processor has them.

  The prompt ends at the first newline of a text; a text without one is an answer to an empty prompt. Both parts have
  the ids that they have alone.

  words    the vocabulary: `bpe` or `tokenizer_json`
  length   int, default 128. Ids of a row; a long answer is cut and keeps its end, a prompt that leaves no room for one
           is an error
  start    token that opens every row, default that of the vocabulary
  end      token that ends every row, default that of the vocabulary
  """

  words: Tokenizer
  length: PositiveInt = 128
  start: str | None = None
  end: str | None = None

  def __post_init__(self) -> None:
    if not hasattr(self.words, 'encode_bodies'):
      raise ValueError('words: the vocabulary of prompts is bpe or tokenizer_json, which have a newline')
    if (self.start or self.end) and not hasattr(self.words, 'token_id'):
      raise ValueError('start and end: only a tokenizer_json has tokens with names; leave them out')
    if self.length < 4:
      raise ValueError(f'length: expected at least 4 (start, newline, one id, end), got {self.length}')

  @property
  @override
  def vocab_size(self) -> int:  # type: ignore[override]
    return self.words.vocab_size

  @property
  @override
  def pad_id(self) -> int:
    return self.words.pad_id

  @property
  @override
  def start_id(self) -> int:
    return self._special(self.start, self.words.start_id, 'start')

  @property
  @override
  def end_id(self) -> int:
    return self._special(self.end, self.words.end_id, 'end')

  @property
  def separator_id(self) -> int:
    """The id of the newline between prompt and answer."""
    if hasattr(self._words, 'newline_id'):
      return self._words.newline_id
    ids = self._words.encode_bodies([SEPARATOR])[0]
    if len(ids) != 1:
      raise UserError(f'tokenizer.words: a newline has {len(ids)} ids in this vocabulary, but needs one')
    return ids[0]

  @override
  def __call__(self, texts: Sequence[str]) -> np.ndarray:
    parts = [text.rpartition(SEPARATOR) if SEPARATOR not in text else text.partition(SEPARATOR) for text in texts]
    prefixes = self._prefixes([prompt for prompt, _, _ in parts], room=1)
    answers = self._words.encode_bodies([answer for _, _, answer in parts])
    rows = np.full((len(texts), self.length), self.pad_id, np.int32)
    for row, prefix, answer in zip(rows, prefixes, answers, strict=True):
      ids = [*prefix, *answer[: self.length - len(prefix) - 1], self.end_id]
      row[: len(ids)] = ids
    return rows

  def prompts(self, prompts: Sequence[str]) -> np.ndarray:
    """N prompts -> int32 [N, length]: start, prompt, newline, padding.

    UserError for a prompt that does not fit, or that holds a newline, at which a prompt would end.
    """
    rows = np.full((len(prompts), self.length), self.pad_id, np.int32)
    for row, ids in zip(rows, self._prefixes(prompts, room=0), strict=True):
      row[: len(ids)] = ids
    return rows

  def answers(self, texts: Sequence[str]) -> np.ndarray:
    """N answers -> int32 [N, T] without a start: ids, end, padding, for the T of the longest."""
    bodies = self._words.encode_bodies(texts)
    rows = np.full((len(texts), max(map(len, bodies), default=0) + 1), self.pad_id, np.int32)
    for row, body in zip(rows, bodies, strict=True):
      row[: len(body) + 1] = [*body, self.end_id]
    return rows

  @override
  def decode(self, tokens: np.ndarray) -> list[str]:
    """int [N, T] -> N texts: whole rows as 'prompt\\nanswer', generated ones as the answer alone, up to the end."""
    texts = []
    for row in np.asarray(tokens):
      ids = [int(i) for i in row[: int(np.argmax(np.append(row, self.end_id) == self.end_id))] if i != self.pad_id]
      ids = ids[1:] if ids[:1] == [self.start_id] else ids
      newline = ids.index(self.separator_id) if self.separator_id in ids else None
      parts = [ids] if newline is None else [ids[:newline], ids[newline + 1 :]]
      texts.append(SEPARATOR.join(self._words.decode_body(part) for part in parts))
    return texts

  def _prefixes(self, prompts: Sequence[str], room: int) -> list[list[int]]:
    separator, start = self.separator_id, self.start_id
    found = []
    for prompt, ids in zip(prompts, self._words.encode_bodies(prompts), strict=True):
      if SEPARATOR in prompt:
        raise UserError(f'prompt: {prompt[:60]!r} holds a newline, which ends a prompt; leave it out')
      if len(ids) + 2 + room > self.length:
        raise UserError(
          f'prompt: {prompt[:60]!r} has {len(ids)} tokens, more than the {self.length - 2 - room} that rows of '
          f'{self.length} tokens have room for; shorten it, or raise tokenizer.length'
        )
      found.append([start, *ids, separator])
    return found

  def _special(self, token: str | None, own: int | None, field: str) -> int:
    if token is not None:
      return self._words.token_id(token)
    if own is None:
      raise UserError(f'tokenizer.{field}: the vocabulary has no such token of its own; name one')
    return own

  @property
  def _words(self) -> Any:
    return self.words
