"""Metric writers: JSON lines, TensorBoard, and a progress line at the terminal."""

import dataclasses
import json
import math
import time
from collections.abc import Mapping
from typing import Any

from etils import epath
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fmcv_jax.bounds import PositiveFloat, PositiveInt
from fmcv_jax.train.storage import append_line, read_metrics

# Dense bf16 peak of one device, FLOP/s, by a part of jax's device_kind (vendors' data sheets).
PEAK_FLOPS: dict[str, float] = {
  'TPU v5 lite': 197e12,
  'TPU v5e': 197e12,
  'TPU v5p': 459e12,
  'TPU v5': 459e12,
  'TPU v6': 918e12,
  'TPU v4': 275e12,
  'A100': 312e12,
  'H100': 989e12,
  'H200': 989e12,
}


METRICS_FILE = 'metrics.jsonl'


@dataclasses.dataclass(frozen=True)
class Log:
  """Reporting interval and reference peak.

  every        steps between reports; each waits for the devices, so that throughput counts finished steps
  peak_flops   peak FLOP/s of one device for the MFU; None takes the bf16 peak of the data sheet, and reports no MFU on
               devices without one
  """

  every: PositiveInt = 50
  tensorboard: bool = True
  peak_flops: PositiveFloat | None = None


def peak_of(device_kind: str) -> float | None:
  """Peak bf16 FLOP/s of one device by the data sheet; None if unknown."""
  return next((peak for part, peak in PEAK_FLOPS.items() if part in device_kind), None)


class Writer:
  """Appends metrics to metrics.jsonl (and TensorBoard) of a workdir and shows progress; for process 0 only."""

  def __init__(self, workdir: epath.Path, *, total: int, start: int, tensorboard: bool, console: Console):
    self.path = workdir / METRICS_FILE
    _drop_after(self.path, start)
    self._board = None
    if tensorboard:
      from tensorboardX import SummaryWriter

      self._board = SummaryWriter(str(workdir / 'tensorboard'), purge_step=start + 1 if start else None)
    self.console = console
    self._progress = Progress(
      TextColumn('step'),
      MofNCompleteColumn(),
      BarColumn(bar_width=20),
      TextColumn('{task.fields[line]}'),
      TextColumn('eta'),
      TimeRemainingColumn(),
      console=console,
      disable=not console.is_terminal,
    )
    self._task = self._progress.add_task('train', total=total, completed=start, line='')
    self._progress.start()

  def train(self, step: int, figures: Mapping[str, float]) -> None:
    """Writes the metrics of the training steps up to `step`."""
    shown = [f'loss {figures["loss"]:.4f}', f'{figures["images_per_second"]:.0f} img/s']
    if 'utilization' in figures:
      shown.append(f'mfu {figures["utilization"]:.1%}')
    shown.append(f'wait {figures["data_wait_fraction"]:.0%}')
    if figures['skipped']:
      shown.append(f'skipped {figures["skipped"]:.0f}')
    line = '  '.join(shown)
    self._progress.update(self._task, completed=step, line=line)
    if not self.console.is_terminal:
      self.console.print(f'step {step}  {line}', highlight=False)
    self._write(step, {f'train/{name}': value for name, value in figures.items()})

  def note(self, text: str) -> None:
    """Prints a message."""
    self.console.print(text, highlight=False)

  def evaluation(self, step: int, figures: Mapping[str, float]) -> None:
    """Writes the metrics of the evaluators, named evaluator/metric."""
    shown = '  '.join(f'{name} {value:.4f}' for name, value in figures.items())
    self.console.print(f'step {step}  {shown}', highlight=False)
    self._write(step, figures)

  def _write(self, step: int, figures: Mapping[str, float]) -> None:
    # JSON has no NaN: non-finite values are written as null, so that every parser can read the line.
    row: dict[str, Any] = {'step': step, 'time': round(time.time(), 3)}
    row.update({name: float(value) if math.isfinite(value) else None for name, value in figures.items()})
    append_line(self.path, json.dumps(row) + '\n')
    if self._board is not None:
      for name, value in figures.items():
        self._board.add_scalar(name, value, step)

  def close(self) -> None:
    """Ends the progress bar and closes the TensorBoard file."""
    self._progress.stop()
    if self._board is not None:
      try:
        self._board.close()
      except OSError:  # a full disk, already reported for metrics.jsonl or a checkpoint
        self._board.file_writer.event_writer._closed = True  # or tensorboardX tries once more as Python ends


def _drop_after(path: epath.Path, step: int) -> None:
  """Drops rows after the step that a run resumes from: they will be written again."""
  rows = [row for row in read_metrics(path) if row['step'] <= step]
  temporary = path.with_suffix('.tmp')
  temporary.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  temporary.replace(path)
