"""Errors written for the person at the terminal."""

from collections.abc import Iterable
from typing import Any


class UserError(Exception):
  """Something the user can put right: a config, a path, a file, an image, a mesh.

  The message is one line that says what is wrong, where, and what to do. The command line prints it without
  a traceback and exits with status 2; library callers catch it like any exception.
  """


class BadRecord(Exception):
  """This record cannot be used; the message is one line that says why. The loader skips, counts and reports it."""


def did_you_mean(word: str, known: Iterable[Any], *, limit: int = 8) -> str:
  """Ends a message about an unknown `word`: the nearest of the `known` names, or the list of them."""
  import difflib

  known = sorted(str(name) for name in known)
  close = difflib.get_close_matches(str(word), known, n=1, cutoff=0.6)
  if close:
    return f'did you mean {close[0]!r}?'
  shown = ', '.join(known[:limit]) + (', ...' if len(known) > limit else '')
  return f'known: {shown}' if known else 'none are known here'
