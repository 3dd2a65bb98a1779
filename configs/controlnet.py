"""A ControlNet for Canny edges on a frozen text-to-image UNet (Zhang et al. 2023).

Published for Canny edges: 3 M pairs, 600 A100 hours on top of Stable Diffusion 1.5, half of the captions dropped; the
model starts to follow the control image suddenly, after a few thousand steps. The UNet and the ControlNet are
initialized from `configs/text_to_image.py:512`; edges are computed on the device. Not measured here.

    fmcv train --config configs/controlnet.py --workdir gs://BUCKET/edges
    fmcv generate 'a bronze statue' --model gs://BUCKET/edges --control photo.jpg --guidance 7.5
"""

import pathlib

import ml_collections

from fmcv_jax.config import load_file


def get_config():
  c = ml_collections.ConfigDict(load_file(f'{pathlib.Path(__file__).with_name("text_to_image.py")}:512'))
  c.objective.image_condition = dict(control=dict(name='edges'))
  c.objective.condition_dropout = 0.5
  base = 'runs/t2i_512'
  c.init_from = {
    **{path: part for path, part in c.init_from.items() if path.startswith('extra/')},
    'extra/network': dict(workdir=base, part='params/network'),
    'params/control/encoder': dict(workdir=base, part='params/network/encoder'),
  }
  c.optimizer.schedule = dict(name='cosine', peak_lr=1e-5, end=1e-5, warmup_steps=500)
  c.train = dict(steps=50_000, batch_size=256, grad_accum_steps=4, ema_decay=0.999)
  c.mesh = dict(data=1, fsdp=-1)
  c.topology = 'v5e:4x4'
  return c
