"""The demo end to end, for a few steps: it writes metrics, and plots that are not empty."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from fmcv_jax.apps import demo
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.data.sources.base import Source
from fmcv_jax.errors import UserError
from fmcv_jax.train.storage import read_metrics


def test_demo_writes_metrics_and_plots(tmp_path, capsys):
  overrides = ['train.steps=4', 'train.batch_size=64', 'optimizer.schedule.warmup_steps=1', 'log.every=2']
  overrides += ['objective.network.image.depth=1', 'objective.network.image.unroll=1', 'optimizer.rule.name=adamw']
  demo.run('configs/demo/clip.py', tmp_path, overrides)
  for name in ('loss.png', 'zero_shot_seen.png', 'zero_shot_held_out.png', 'retrieval.png'):
    plot = np.asarray(Image.open(tmp_path / 'demo' / name).convert('RGB'))
    assert min(plot.shape[:2]) > 300
    assert plot.std() > 10
  last = read_metrics(tmp_path / 'metrics.jsonl')[-1]
  assert {'seen/top1', 'held_out/top5', 'retrieval/text_to_image_r1'} <= last.keys()
  figures = json.loads((tmp_path / 'demo' / 'figures.json').read_text())
  assert figures['step'] == 4
  for name in ('seen/top1', 'held_out/top5', 'retrieval/text_to_image_r1'):
    assert figures[name] == pytest.approx(last[name], abs=1e-6)
  out = capsys.readouterr().out
  assert f'{last["seen/top1"]:.3f}' in out
  assert str(tmp_path / 'demo') in out.replace('\n', '')


def test_a_config_without_the_demos_evaluators_is_refused(tmp_path):
  with pytest.raises(UserError, match="needs zero_shot evaluators named 'seen' and 'held_out'"):
    demo.run('configs/siglip_b16.py', tmp_path, [])


@dataclasses.dataclass(frozen=True)
class Shades(Source):
  """One shade of gray for each name."""

  shades: tuple[int, ...]

  def __len__(self):
    return len(self.shades)

  def __getitem__(self, index):
    return {'image': np.full((32, 32, 3), self.shades[index], np.uint8), 'text': 'abc'[index]}


def test_nearest_by_pixels_names_the_closest_shade():
  train = Pipeline(Shades((0, 100, 200)))
  assert demo.nearest_by_pixels(train, Pipeline(Shades((10, 90, 160)))) == 1.0
  assert demo.nearest_by_pixels(train, Pipeline(Shades((10, 190, 160)))) == pytest.approx(2 / 3)
