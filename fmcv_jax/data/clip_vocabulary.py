"""CLIP's published vocabulary (Radford et al. 2021): its merges, token ids, and the tokenizer made of them.

`clip_merges.txt.gz` holds the 48,894 merges that CLIP uses of the 262,143 in its `bpe_simple_vocab_16e6.txt.gz`;
CLIP_LICENSE says where they come from.
"""

import functools
import gzip
from pathlib import Path
from typing import Any

START, END = '<|startoftext|>', '<|endoftext|>'
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


def _letters() -> list[str]:
  """The characters that stand for bytes, in the order of their ids (Radford et al. 2019)."""
  printed = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), ord('ÿ') + 1)]
  others = 256 - len(printed)
  return [chr(byte) for byte in printed] + [chr(256 + i) for i in range(others)]
