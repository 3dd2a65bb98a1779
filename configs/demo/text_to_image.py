"""A small diffusion transformer that generates emoji from their names, in minutes on two CPU cores.

It generates latents of `configs/demo/autoencoder.py`, conditioned on the text encoder of `configs/demo/clip.py`; both
are frozen. `make demo-generate` trains the three in turn and saves a grid of samples.

    fmcv train --config configs/demo/text_to_image.py --workdir runs/text_to_image --cpu-devices 8

'text_to_image.py:repa' also aligns the second block with the image encoder of the CLIP (REPA, Yu et al. 2025).
"""

import pathlib

import ml_collections

from fmcv_jax.config import load_file

# Some kinds of things, many of them in several colors: 'blue heart' and 'green circle' are among the names held out.
THINGS = r'\b(face|heart|circle|square|diamond|moon|star|cat|apple|book|ball)\b'


def get_config(kind=''):
  here = pathlib.Path(__file__)
  clip = ml_collections.ConfigDict(load_file(str(here.with_name('clip.py'))))
  coder = ml_collections.ConfigDict(load_file(str(here.with_name('autoencoder.py'))))
  c = ml_collections.ConfigDict()
  c.objective = dict(
    name='diffusion',
    network=dict(
      name='dit',
      variant='S/4',
      image_size=16,
      channels=4,
      width=192,
      depth=6,
      num_heads=3,
      cross_attention=True,
      pooled_text=True,
    ),
    process=dict(schedule='flow', prediction='flow'),
    timestep_sampling='logit_normal',
    latent_space=dict(
      autoencoder=coder.objective.network,
      scale=0.42,  # one over the standard deviation of the latents
    ),
    text_condition=dict(encoder=clip.objective.network.text),
  )
  c.init_from = {
    'extra/autoencoder': dict(workdir='runs/autoencoder', part='params/autoencoder'),
    'extra/text': dict(workdir='runs/demo', part='params/text'),
  }
  if kind == 'repa':
    looks = clip.objective
    c.objective.repa = dict(teacher=looks.network.image, normalize=looks.normalize, layer=2, hidden=256)
    c.init_from['extra/teacher'] = dict(workdir='runs/demo', part='params/image')
  emoji = dict(name='emoji', artists=('openmoji', 'noto'), image_size=32, aliases=False, name_filter=THINGS)
  c.tokenizer = clip.tokenizer
  c.data = dict(source=emoji)
  error = dict(name='denoising', every=500, batch_size=64)
  c.evaluators = dict(
    new_hand=dict(error, data=dict(source=dict(emoji, artists=('twemoji',)))),
    held_out=dict(error, data=dict(source=dict(emoji, split='held_out'))),
  )
  c.optimizer = dict(
    rule=dict(name='adamw', b2=0.99),
    schedule=dict(name='cosine', peak_lr=1e-3, warmup_steps=50),
    weight_decay=0.01,
    clip_norm=1.0,
  )
  c.train = dict(steps=1500, batch_size=64, ema_decay=0.995)
  c.mesh = dict(data=1, fsdp=-1)  # the optimizer's work is shared by the emulated devices, not repeated in each
  c.log = dict(every=50)
  return c
