"""Class-conditional DiT S, B, L and XL on ImageNet-1k at 256 px, on latents of an f8 autoencoder (Peebles & Xie 2023).

Published after 400,000 steps, FID-50K of 250-step ancestral sampling without guidance: 68.40 (S/2), 43.47 (B/2), 68.38
(B/4), 23.33 (L/2), 19.47 (XL/2); XL/2 after 7 M steps 9.62, with guidance 1.5 2.27. They used Stable Diffusion's
autoencoder; this config takes one trained by `configs/autoencoder.py:kl-f8` (set latent_space.scale to one over its
`latent_std`). Not measured here.

    fmcv train --config configs/dit.py:XL/2 --workdir gs://BUCKET/dit_xl2
    fmcv generate 'golden retriever' --model gs://BUCKET/dit_xl2 --solver ddpm_learned --steps 250 --guidance 1.5
"""

import ml_collections

BATCH = 256


def get_config(variant='XL/2'):
  size = 256
  c = ml_collections.ConfigDict()
  c.objective = dict(
    name='diffusion',
    network=dict(
      name='dit',
      variant=variant,
      image_size=size // 8,
      channels=4,
      out_channels=8,
      num_classes=1000,
      dtype='bfloat16',
      unroll=True,  # unrolled layers read and write half as many bytes as a scan (docs/plan.md)
    ),
    process=dict(schedule='linear', prediction='noise', learned_variance=True),
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
  c.optimizer = dict(rule=dict(name='adamw'), schedule=dict(name='cosine', peak_lr=1e-4, end=1e-4))
  c.train = dict(steps=400_000, batch_size=BATCH, ema_decay=0.9999)
  c.checkpoint = dict(every=5000)
  c.mesh = dict(data=1, fsdp=-1)
  c.topology = 'v5e:4x4'
  return c
