"""ViT-S/16 on ImageNet-1k at 224 px, the plain baseline of Beyer et al. 2022 (arXiv:2205.01580).

Published: 76.5 % top-1 on the validation set after 90 epochs, in 6 to 7 hours on a TPU v3-8 (big_vision's README).
Not measured here. Their weight decay of 1e-4 is not multiplied by the peak learning rate of 1e-3 (big_vision/optax.py);
that of optax is, so it is 0.1 here. The argument sets the epochs:

    fmcv train --config configs/vit_s16_i1k.py --workdir gs://BUCKET/vit_s16
    fmcv train --config configs/vit_s16_i1k.py:300 --workdir gs://BUCKET/vit_s16_300
"""

import ml_collections

from fmcv_jax.dataset_statistics import IMAGENET_EXAMPLES

BATCH = 1024


def get_config(epochs='90'):
  c = ml_collections.ConfigDict()
  c.objective = dict(
    name='classification',
    mixup=0.2,
    augment=(dict(name='flip'), dict(name='rand_augment', layers=2, magnitude=10)),
    network=dict(
      name='vit',
      variant='S/16',
      num_classes=1000,
      pool='gap',
      pos_embed='sincos2d',
      activation='gelu_tanh',
      dtype='bfloat16',
      unroll=True,
    ),
  )
  imagenet = dict(name='tfds', builder='imagenet2012')
  c.data = dict(
    source=dict(imagenet, split='train'),
    image=dict(name='random_resized_crop', size=224, scale=(0.05, 1.0)),
    workers=16,
  )
  c.evaluators = dict(
    val=dict(
      name='accuracy',
      every=5_000,
      batch_size=1024,
      data=dict(source=dict(imagenet, split='validation'), image=dict(name='resize_crop', size=224), workers=16),
    )
  )
  c.optimizer = dict(
    rule=dict(name='adamw', mu_dtype='bfloat16'),
    schedule=dict(name='cosine', peak_lr=1e-3, warmup_steps=10_000),
    weight_decay=0.1,
    clip_norm=1.0,
  )
  c.train = dict(steps=int(epochs) * IMAGENET_EXAMPLES // BATCH, batch_size=BATCH)
  c.checkpoint = dict(every=1_000, best='val/top1')
  c.topology = 'v5e:4x4'
  return c
