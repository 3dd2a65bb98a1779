"""The demo's CLIP, wider and trained longer.

Not yet measured to its end.

    fmcv demo --config configs/demo/clip_long.py --workdir runs/demo_long --cpu-devices 8
"""

import pathlib

import ml_collections

from fmcv_jax.config import load_file


def get_config():
  c = ml_collections.ConfigDict(load_file(str(pathlib.Path(__file__).with_name('clip.py'))))
  c.objective.network.image.update(width=192, heads=3, mlp_dim=768)
  c.train.steps = 900
  c.optimizer.schedule.update(peak=4e-3, end=1e-3)
  return c
