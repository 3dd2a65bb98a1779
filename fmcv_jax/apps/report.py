"""`fmcv report`: loss curve and time breakdown of a run."""

import itertools
import pathlib

from etils import epath
from rich.table import Table

from fmcv_jax.console import make_console
from fmcv_jax.errors import UserError
from fmcv_jax.train import goodput
from fmcv_jax.train.storage import read_metrics

BLOCKS = '▁▂▃▄▅▆▇█'
INPUT_BOUND = 0.1  # fraction of training time waiting for data above which a run is reported as input-bound


def run(workdir: str | pathlib.Path) -> None:
  """Prints the loss curve, the time by cause over all sessions, and the restarts of the run in a workdir."""
  console, folder = make_console(), epath.Path(workdir)
  found = goodput.sessions(folder / goodput.FILE)
  if not found:
    raise UserError(f'{workdir}: no record of a run here ({goodput.FILE}); give the --workdir of a training run')
  rows = read_metrics(folder / 'metrics.jsonl')
  losses = [row['train/loss'] for row in rows if row.get('train/loss') is not None]
  if losses:
    console.print(f'loss {losses[0]:.4f} {curve(losses)} {losses[-1]:.4f} at step {found[-1].last}', highlight=False)

  spent = {cause: sum(session.seconds[cause] for session in found) for cause in goodput.CAUSES}
  gaps = [later.began - earlier.ended for earlier, later in itertools.pairwise(found)]
  again = [max(0, earlier.last - later.first) for earlier, later in itertools.pairwise(found)]
  spent['stopped'] = sum(gaps)
  total = sum(spent.values())
  table = Table(title=f'{workdir}: {_duration(total)} since its start')
  for heading in ('cause', 'time', 'fraction'):
    table.add_column(heading, justify='left' if heading == 'cause' else 'right')
  for cause, seconds in spent.items():
    table.add_row(cause, _duration(seconds), f'{seconds / total:.1%}')
  console.print(table)
  for number, (session, gap, steps) in enumerate(zip(found[1:], gaps, again), 1):
    console.print(
      f'restart {number} at step {session.first}: {_duration(gap)} after the last heartbeat, {steps} steps recomputed',
      highlight=False,
    )
  training = spent['input'] + spent['train']
  if training and spent['input'] / training > INPUT_BOUND:
    console.print(
      f'input-bound: {spent["input"] / training:.0%} of training time is spent waiting for data; increase '
      f'data.workers or store smaller images',
      highlight=False,
    )


def curve(values: list[float], width: int = 60) -> str:
  """Sparkline of the means of `width` equal parts of the values, scaled from the lowest to the highest."""
  count = min(width, len(values))
  parts = [values[i * len(values) // count : (i + 1) * len(values) // count] for i in range(count)]
  means = [sum(part) / len(part) for part in parts]
  low, span = min(means), (max(means) - min(means)) or 1.0
  return ''.join(BLOCKS[round((mean - low) / span * (len(BLOCKS) - 1))] for mean in means)


def _duration(seconds: float) -> str:
  if seconds < 60:
    return f'{seconds:.1f} s'
  if seconds < 3600:
    return f'{seconds / 60:.1f} min'
  return f'{seconds / 3600:.1f} h'
