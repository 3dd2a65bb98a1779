"""CLIP's published vocabulary as the tables that transformers reads: ids of its 49,408 tokens, and the merges."""

import functools
import importlib.util
from pathlib import Path

from fmcv_jax.errors import UserError

START, END = '<|startoftext|>', '<|endoftext|>'
_MERGES = 49_408 - 512 - 2  # all but bytes, alone and at the end of a word, and two special tokens
_HEAD = '#version: 0.2\n'


@functools.cache
def tables() -> tuple[dict[str, int], str]:
  """({token: id}, the text of merges.txt). The package of the tokenizer holds the text inside its library."""
  merges = _embedded()
  letters = _letters()
  tokens = [*letters, *(f'{letter}</w>' for letter in letters)]
  tokens += [line.replace(' ', '') for line in merges] + [START, END]
  return {token: i for i, token in enumerate(tokens)}, _HEAD + '\n'.join(merges) + '\n'


def _embedded() -> list[str]:
  found = importlib.util.find_spec('instant_clip_tokenizer')
  for file in Path(found.origin).parent.glob('*.so') if found and found.origin else ():
    data = file.read_bytes()
    if (start := data.find(_HEAD.encode())) >= 0:
      lines = data[start + len(_HEAD) :].split(b'\n', _MERGES)[:_MERGES]
      return [line.decode() for line in lines]
  raise UserError("CLIP's vocabulary: pip install instant-clip-tokenizer (on Python 3.11 or 3.12), which holds it")


def _letters() -> list[str]:
  """The characters that stand for bytes, in the order of their ids (Radford et al. 2019)."""
  printed = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), ord('ÿ') + 1)]
  others = 256 - len(printed)
  return [chr(byte) for byte in printed] + [chr(256 + i) for i in range(others)]
