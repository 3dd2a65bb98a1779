"""A small autoencoder on emoji: 32 x 32 pixels into 16 x 16 latents of 4 channels, in minutes on two CPU cores.

`configs/demo/text_to_image.py` generates these latents. Reached in one run (seed 0, 900 steps): a PSNR of 26.3 dB and
an SSIM of 0.886 on held-out concepts by an artist not in the training data.

    fmcv train --config configs/demo/autoencoder.py --workdir runs/autoencoder --cpu-devices 8
"""

import ml_collections


def get_config():
  c = ml_collections.ConfigDict()
  size = 32
  c.objective = dict(
    name='autoencoding',
    kl=1e-5,
    adversarial=0.0,  # at this size a discriminator costs more time than it gives sharpness
    network=dict(
      name='autoencoder',
      variant='kl-f4',
      image_size=size,
      channels=(16, 32),
      layers=1,
      latent_channels=4,
      middle_attention=False,
    ),
    augment=(dict(name='flip'), dict(name='affine', scale=(0.9, 1.3), rotation=10.0, translate=0.06)),
  )
  emoji = dict(name='emoji', artists=('openmoji', 'noto'), image_size=size, aliases=False)
  c.data = dict(source=emoji)
  c.evaluators = dict(
    new_hand=dict(
      name='reconstruction',
      every=300,
      data=dict(source=dict(emoji, artists=('twemoji',), split='held_out')),
      batch_size=64,
    )
  )
  c.optimizer = dict(
    rule=dict(name='adamw', b2=0.99), schedule=dict(name='cosine', peak_lr=2e-3, warmup_steps=20), clip_norm=1.0
  )
  c.train = dict(steps=900, batch_size=64, ema_decay=0.98)
  c.log = dict(every=50)
  return c
