"""DDPM on CIFAR-10: a UNet of 35.7 M parameters in pixels (Ho et al. 2020).

Published after 800,000 steps: FID-50K 3.17 against the training set, of 1000-step ancestral sampling from the moving
average (from the weights themselves it is far worse). Not measured here.

    fmcv train --config configs/ddpm.py --workdir runs/ddpm
    fmcv generate --model runs/ddpm -n 64 --solver ddpm --steps 1000
"""

import ml_collections

BATCH = 128


def get_config():
  c = ml_collections.ConfigDict()
  c.objective = dict(
    name='diffusion',
    network=dict(name='unet', variant='ddpm-32', dropout=0.1, dtype='bfloat16'),
    process=dict(schedule='linear', prediction='noise'),
    augment=(dict(name='flip'),),
  )
  cifar = dict(name='tfds', builder='cifar10')
  image = dict(name='resize', size=32)
  c.data = dict(source=dict(cifar, split='train'), image=image, workers=8)
  c.evaluators = dict(
    val=dict(name='denoising', every=20_000, data=dict(source=dict(cifar, split='test'), image=image, workers=8))
  )
  c.optimizer = dict(
    rule=dict(name='adamw'),
    schedule=dict(name='cosine', peak_lr=2e-4, end=2e-4, warmup_steps=5000),
    clip_norm=1.0,
  )
  c.train = dict(steps=800_000, batch_size=BATCH, ema_decay=0.9999)
  c.checkpoint = dict(every=5000)
  c.topology = 'v5e:2x2'
  return c
