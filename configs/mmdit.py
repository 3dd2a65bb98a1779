"""Text to image by rectified flow and MMDiT, 2 B parameters, at 256 px, then 512 px (Esser et al. 2024).

Published for the 8 B model (`d38/2`) at 1024 px with two CLIP text encoders and T5: GenEval 0.74 after DPO. This config
has one text encoder, that of `configs/clip.py:L/14`, and latents of 16 channels (`configs/autoencoder.py:f8-16ch`; set
latent_space.scale to one over its `latent_std`, latent_space.shift to its mean). Timesteps are sampled as in section
3.1 of the paper and, at 512 px, shifted towards noise as in section 5.3.2. Not measured here.

    fmcv train --config configs/mmdit.py:256 --workdir gs://BUCKET/mmdit_256
    fmcv train --config configs/mmdit.py:512 --workdir gs://BUCKET/mmdit_512 \\
        --config.init_from.params.workdir=gs://BUCKET/mmdit_256
"""

import pathlib

import ml_collections

from fmcv_jax.config import load_file

STEPS = {256: 500_000, 512: 250_000}


def get_config(size='256'):
  c = ml_collections.ConfigDict(load_file(f'{pathlib.Path(__file__).with_name("text_to_image.py")}:{size}'))
  size = int(size)
  c.objective.network = dict(
    name='mmdit',
    variant='d24/2',
    image_size=size // 8,
    positions=(64, 192),
    dtype='bfloat16',
    remat='dots',
  )
  c.objective.process = dict(schedule='flow', prediction='flow', shift=1.0 if size == 256 else 2.0)
  c.objective.timestep_sampling = 'logit_normal'
  c.objective.latent_space.autoencoder.variant = 'f8-16ch'
  c.objective.latent_space.scale = 1.5305
  c.objective.latent_space.shift = 0.0609
  c.init_from['extra/autoencoder'].workdir = 'runs/f8-16ch'
  if size > 256:
    c.init_from['params'].workdir = 'runs/mmdit_256'
  c.train.steps = STEPS[size]
  c.train.batch_size = 1024
  c.mesh = dict(data=1, fsdp=-1)
  c.topology = 'v5p:4x4x4'
  return c
