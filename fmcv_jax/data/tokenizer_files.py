"""Opens the tokenizer files of other libraries, each once."""

import functools
import os
from typing import Any

from fmcv_jax.errors import UserError


def existing_file(file: str) -> str:
  """The path of a tokenizer file; UserError if there is none."""
  if not os.path.isfile(file):
    raise UserError(f'tokenizer: no file {file!r} (relative to {os.getcwd()})')
  return file


@functools.cache
def open_tokenizer_json(file: str, special_as_text: bool = False) -> Any:
  """A tokenizer.json of the package tokenizers, without its own padding and truncation; UserError if unreadable.

  special_as_text: special tokens in a text, such as '<eos>', are text.
  """
  import tokenizers

  try:
    tokenizer = tokenizers.Tokenizer.from_file(file)
  except Exception as error:  # the package raises bare Exceptions
    raise UserError(f'tokenizer: {file!r} is not a valid tokenizer file: {error}') from error
  tokenizer.no_padding()
  tokenizer.no_truncation()
  tokenizer.encode_special_tokens = special_as_text
  return tokenizer


@functools.cache
def open_sentencepiece(file: str) -> Any:
  """A SentencePiece model file; UserError if unreadable, or without the package sentencepiece."""
  try:
    import sentencepiece
  except ImportError as error:
    raise UserError(f'tokenizer: {file!r} needs the package sentencepiece: pip install sentencepiece') from error
  try:
    return sentencepiece.SentencePieceProcessor(model_file=file)
  except (RuntimeError, OSError) as error:
    raise UserError(f'tokenizer: {file!r} is not a SentencePiece model: {error}') from error
