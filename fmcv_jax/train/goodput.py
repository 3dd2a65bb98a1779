"""Goodput: the time of a run by cause, over all of its restarts."""

import contextlib
import json
import time
from collections.abc import Iterator
from typing import NamedTuple

from etils import epath

from fmcv_jax.train.storage import append_line, read_metrics

FILE = 'goodput.jsonl'

# In the order of reports. 'start' is the time before the first batch: imports, restoring, tokenizers.
CAUSES = ('start', 'compile', 'input', 'train', 'evaluate', 'save')


class GoodputTimer:
  """Seconds of one session by cause; `write` stores them in the workdir (`path` None disables it)."""

  def __init__(self, path: epath.Path | None):
    self._path, self._began, self._step = path, time.time(), 0
    self.seconds = dict.fromkeys(CAUSES, 0.0)

  def begin(self, step: int) -> None:
    """Starts the timer, when the first batch is requested at `step`."""
    self.seconds['start'] = time.time() - self._began
    self._step = step

  @contextlib.contextmanager
  def during(self, cause: str) -> Iterator[None]:
    """Adds the seconds of a `with` block to a cause."""
    since = time.monotonic()
    try:
      yield
    finally:
      self.seconds[cause] += time.monotonic() - since

  def write(self, step: int) -> None:
    """Appends the times up to `step`; the last line of a session counts."""
    if self._path is not None:
      row = {'session': self._began, 'time': time.time(), 'from': self._step, 'step': step, **self.seconds}
      append_line(self._path, json.dumps({k: round(v, 3) for k, v in row.items()}) + '\n')


class Session(NamedTuple):
  """One start of a run: times of start and last heartbeat, first and last step, and seconds by cause."""

  began: float
  ended: float
  first: int
  last: int
  seconds: dict[str, float]


def sessions(path: epath.Path) -> list[Session]:
  """All sessions of a goodput.jsonl, in order."""
  latest = {row['session']: row for row in read_metrics(path)}
  return [
    Session(row['session'], row['time'], row['from'], row['step'], {cause: row[cause] for cause in CAUSES})
    for row in latest.values()
  ]
