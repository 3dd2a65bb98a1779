"""Autoencoders kl-f4, f8 and f16 at 256 px on ImageNet-1k images, for latent diffusion (Rombach et al. 2022).

Published (their table 8, OpenImages, reconstruction FID on ImageNet's validation images): 0.27 (f4), 0.90 (f8 of 4
channels), 0.87 (f16 of 16). Theirs has a learned LPIPS term, which stands here only with features of your own
(`objective.features`); the discriminator begins after 50,000 steps, as theirs does. Not measured here.

    fmcv train --config configs/autoencoder.py:kl-f8 --workdir runs/kl-f8
"""

import ml_collections

BATCH = 256


def get_config(variant='kl-f8'):
  size = 256
  c = ml_collections.ConfigDict()
  c.objective = dict(
    name='autoencoding',
    network=dict(name='autoencoder', variant=variant, image_size=size, dtype='bfloat16', remat='dots'),
    kl=1e-6,
    adversarial=0.5,
    adversarial_start=50_000,
    augment=(dict(name='flip'),),
  )
  imagenet = dict(name='tfds', builder='imagenet2012')
  c.data = dict(source=dict(imagenet, split='train'), image=dict(name='random_resized_crop', size=size), workers=16)
  c.evaluators = dict(
    val=dict(
      name='reconstruction',
      every=20_000,
      data=dict(
        source=dict(imagenet, split='validation[:2000]'), image=dict(name='resize_crop', size=size), workers=16
      ),
    )
  )
  c.optimizer = dict(
    rule=dict(name='adamw', b1=0.5, b2=0.9), schedule=dict(name='cosine', peak_lr=1e-4, end=1e-4, warmup_steps=1000)
  )
  c.train = dict(steps=250_000, batch_size=BATCH, ema_decay=0.999)
  c.checkpoint = dict(every=5000)
  c.topology = 'v5e:4x4'
  return c
