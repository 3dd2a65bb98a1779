"""Output of all commands: whole lines in a file or a pipe, and no messages that are not addressed to users."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console

_WIDTH = 10_000  # columns; rich would break lines at 80 where it finds no terminal


def make_console(*, stderr: bool = False, quiet: bool = False, markup: bool = True) -> Console:
  """A console of standard output, or error, that folds lines and tables at a terminal only."""
  console = Console(stderr=stderr, quiet=quiet, markup=markup)
  if not console.is_terminal:
    console.width = _WIDTH
  return console


@contextlib.contextmanager
def suppress_shutdown_errors() -> Iterator[None]:
  """Silences 'Event loop is closed', which every tensorstore thread reports after a failed write."""
  usual = sys.unraisablehook

  def hook(unraisable: Any) -> None:
    if unraisable.exc_type is not RuntimeError or str(unraisable.exc_value) != 'Event loop is closed':
      usual(unraisable)

  sys.unraisablehook = hook
  try:
    yield
  finally:
    sys.unraisablehook = usual
