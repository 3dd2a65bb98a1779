import json

import pytest
from etils import epath

from fmcv_jax import __main__ as cli
from fmcv_jax import trainer
from fmcv_jax.apps.report import curve
from fmcv_jax.train import goodput
from tests import runs


def test_a_resumed_run_is_reported(tmp_path, capsys):
  folder, workdir = runs.image_folder(tmp_path / 'images'), tmp_path / 'run'
  trainer.train(runs.classification(folder, train__steps=4, evaluators={}), workdir)
  (session,) = goodput.sessions(epath.Path(workdir / goodput.FILE))
  assert (session.first, session.last) == (0, 4)
  assert all(session.seconds[cause] > 0 for cause in ('start', 'compile', 'input', 'train', 'save'))
  assert sum(session.seconds.values()) == pytest.approx(session.ended - session.began, rel=0.2)

  # A session that had come further when it was killed, a minute before another began.
  path = workdir / goodput.FILE
  row = json.loads(path.read_text().splitlines()[-1])
  later = {**row, 'session': row['time'] + 60, 'time': row['time'] + 160, 'from': 3, 'step': 8, 'input': 80.0}
  path.write_text(f'{json.dumps(row)}\n{json.dumps(later)}\n{{"half')
  capsys.readouterr()
  assert cli.main(['report', '--workdir', str(workdir)]) == 0
  printed = capsys.readouterr().out
  assert 'restart 1 at step 3: 1.0 min after the last heartbeat, 1 steps recomputed' in printed
  assert 'input-bound' in printed
  assert 'loss ' in printed


def test_a_folder_without_a_run_is_one_line(tmp_path, capsys):
  assert cli.main(['report', '--workdir', str(tmp_path)]) == 2
  assert 'no record of a run here' in capsys.readouterr().err


def test_curve_goes_from_the_lowest_to_the_highest():
  assert curve([8, 7, 6, 5, 4, 3, 2, 1]) == '█▇▆▅▄▃▂▁'
  assert curve([1.0] * 200) == '▁' * 60
