"""Swin T, S and B on ImageNet-1k at 224 px: Liu et al. 2021, appendix A2.1, and the authors' code, 300 epochs.

Published top-1: T 81.3 %, S 83.0 %, B 83.5 % (81.2, 83.2 and 83.5 % in the authors' README). Not measured here.

    fmcv train --config configs/swin.py:T --workdir gs://BUCKET/swin_t
    fmcv train --config configs/swin.py:S --workdir gs://BUCKET/swin_s
    fmcv train --config configs/swin.py:B --workdir gs://BUCKET/swin_b
"""

import ml_collections

from fmcv_jax.dataset_statistics import IMAGENET, IMAGENET_EXAMPLES

BATCH = 1024
DROP_PATH = {'T': 0.2, 'S': 0.3, 'B': 0.5}


def get_config(variant='T'):
  steps_per_epoch = IMAGENET_EXAMPLES // BATCH
  c = ml_collections.ConfigDict()
  c.objective = dict(
    name='classification',
    label_smoothing=0.1,
    mixup=0.8,
    cutmix=1.0,
    augment=(
      dict(name='flip'),
      dict(name='rand_augment', recipe='timm', layers=2, magnitude=9, magnitude_std=0.5, probability=0.5),
      dict(name='random_erasing', probability=0.25),
    ),
    normalize=IMAGENET,
    network=dict(
      name='swin', variant=variant, num_classes=1000, drop_path=DROP_PATH[variant], dtype='bfloat16', remat='dots'
    ),
  )
  imagenet = dict(name='tfds', builder='imagenet2012')
  c.data = dict(source=dict(imagenet, split='train'), image=dict(name='random_resized_crop', size=224), workers=16)
  c.evaluators = dict(
    val=dict(
      name='accuracy',
      every=10 * steps_per_epoch,
      batch_size=1024,
      data=dict(source=dict(imagenet, split='validation'), image=dict(name='resize_crop', size=224), workers=16),
    )
  )
  c.optimizer = dict(
    rule=dict(name='adamw'),
    schedule=dict(name='cosine', peak_lr=1e-3, warmup_steps=20 * steps_per_epoch, end=1e-5),
    weight_decay=0.05,
    clip_norm=5.0,
  )
  c.train = dict(steps=300 * steps_per_epoch, batch_size=BATCH)
  c.checkpoint = dict(every=steps_per_epoch, best='val/top1')
  c.mesh = dict(data=-1)  # small enough to be whole on every chip
  c.topology = 'v5e:8x8'
  return c
