"""Latent diffusion of ImageNet-1k's classes at 256 px: LDM-8's UNet of 395 M parameters (Rombach et al. 2022).

Published (their repository) for LDM-8 on a VQ autoencoder: FID 15.82, with a classifier's guidance 7.77. This config
takes the kl-f8 latents of `configs/autoencoder.py` (set latent_space.scale to one over its `latent_std`) and reads a
text of one word for each class, as theirs does. For a transformer on the same latents: `configs/dit.py:B/4`. Not
measured here.

    fmcv train --config configs/ldm.py --workdir gs://BUCKET/ldm
    fmcv generate 'golden retriever' --model gs://BUCKET/ldm --steps 50 --guidance 3
"""

import ml_collections

BATCH = 512


def get_config():
  size = 256
  c = ml_collections.ConfigDict()
  c.objective = dict(
    name='diffusion',
    network=dict(name='unet', variant='ldm8-classes', num_classes=1000, dtype='bfloat16', remat='dots'),
    process=dict(schedule='scaled_linear', prediction='noise'),
    latent_space=dict(
      autoencoder=dict(name='autoencoder', variant='kl-f8', image_size=size, dtype='bfloat16'), scale=0.18215
    ),
    condition_dropout=0.1,
    augment=(dict(name='flip'),),
  )
  c.init_from = {'extra/autoencoder': dict(workdir='runs/kl-f8', part='params/autoencoder')}
  imagenet = dict(name='tfds', builder='imagenet2012')
  crop = dict(name='resize_crop', size=size, crop=1.0)
  c.data = dict(source=dict(imagenet, split='train'), image=crop, workers=16)
  c.evaluators = dict(
    val=dict(
      name='denoising',
      every=20_000,
      data=dict(source=dict(imagenet, split='validation[:2000]'), image=crop, workers=16),
    )
  )
  c.optimizer = dict(rule=dict(name='adamw'), schedule=dict(name='cosine', peak_lr=1e-4, end=1e-4, warmup_steps=5000))
  c.train = dict(steps=400_000, batch_size=BATCH, ema_decay=0.9999)
  c.checkpoint = dict(every=5000)
  c.mesh = dict(data=1, fsdp=-1)
  c.topology = 'v5e:4x4'
  return c
