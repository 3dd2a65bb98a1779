"""CLIP's published vocabulary (Radford et al. 2021): its merges, token ids, and the tokenizer made of them.

`clip_merges.txt.gz` holds the 48,894 merges that CLIP uses of the 262,143 in its `bpe_simple_vocab_16e6.txt.gz`;
CLIP_LICENSE says where they come from.
"""

import functools
import gzip
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fmcv_jax.data.text_cleaning import clip_cleaned

START, END = '<|startoftext|>', '<|endoftext|>'
SIZE = 49_408
WORD_END = '</w>'
# English contractions, letters, a single digit, and runs of all else. The case is ignored here too, as in the original.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


@functools.cache
def merges() -> tuple[str, ...]:
  """The pairs of tokens that merge, 'left right', by rank."""
  packed = Path(__file__).with_name('clip_merges.txt.gz').read_bytes()
  return tuple(gzip.decompress(packed).decode().splitlines())


@functools.cache
def token_ids() -> dict[str, int]:
  """{token: id} of all 49,408: bytes, bytes at the end of a word, merges, and the two special tokens."""
  letters = _letters()
  words = (line.replace(' ', '') for line in merges())
  tokens = [*letters, *(f'{letter}{WORD_END}' for letter in letters), *words, START, END]
  return {token: i for i, token in enumerate(tokens)}


@functools.cache
def tokenizer() -> Any:
  """A `tokenizers.Tokenizer` of clean, lower-case texts, which adds no special tokens and takes none for itself."""
  from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

  pairs = [(left, right) for left, right in (line.split(' ') for line in merges())]
  bpe = Tokenizer(models.BPE(token_ids(), pairs, end_of_word_suffix=WORD_END))
  split = pre_tokenizers.Split(Regex(_WORDS), 'removed', invert=True)
  bpe.pre_tokenizer = pre_tokenizers.Sequence(
    [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
  )
  bpe.decoder = decoders.Sequence([decoders.Replace(WORD_END, 'Ġ'), decoders.ByteLevel()])  # 'Ġ' stands for a blank
  return bpe


def added_ids(names: Iterable[str]) -> dict[str, list[int]]:
  """The ids of each word, lower case, that `names` add behind the vocabulary.

  A word of several vectors is named once and then numbered: '<cat>', '<cat>_1', '<cat>_2' (as in diffusers).
  """
  words: dict[str, list[int]] = {}
  for number, name in enumerate(names, SIZE):
    word, _, place = name.lower().rpartition('_')
    if place == str(len(words.get(word, ()))):
      words[word].append(number)
    else:
      words[name.lower()] = [number]
  return words


def encode(text: str, added: Mapping[str, list[int]]) -> list[int]:
  """Ids of a text in which words of `added` stand for their ids."""
  pattern = '|'.join(re.escape(word) for word in sorted(added, key=len, reverse=True))
  ids: list[int] = []
  for piece in re.split(f'({pattern})', text, flags=re.IGNORECASE):
    ids += added.get(piece.lower()) or tokenizer().encode(clip_cleaned(piece)).ids
  return ids


def decode(ids: Iterable[int], added: Mapping[str, list[int]]) -> str:
  """The text of ids without the special ones."""
  words = {numbers[0]: word for word, numbers in added.items()}
  pieces: list[str] = []
  run: list[int] = []
  for number in (*ids, None):  # None ends the last run
    if number is not None and number < SIZE:
      run.append(number)
      continue
    pieces += [tokenizer().decode(run).strip()] if run else []
    pieces += [words[number]] if number in words else []
    run = []
  return ' '.join(pieces)


def _letters() -> list[str]:
  """The characters that stand for bytes, in the order of their ids (Radford et al. 2019)."""
  printed = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), ord('ÿ') + 1)]
  others = 256 - len(printed)
  return [chr(byte) for byte in printed] + [chr(256 + i) for i in range(others)]
