"""DINO on ImageNet-1k without labels: Caron et al. 2021, the authors' README and main_dino.py, 300 epochs.

Published for S/16 with these settings (16 GPUs, 300 epochs): 73.3 % k-NN, 76.1 % linear top-1. B/16 takes the same
settings except that the norms of the prototypes are not learned; the released B/16 (76.1 % k-NN, 78.2 % linear) was
trained with other arguments. Not measured here. Compiled for its pod, a step of B/16 takes 5.5 of a chip's 16 GiB.

    fmcv train --config configs/dino.py:S/16 --workdir gs://BUCKET/dino_s16
    fmcv train --config configs/dino.py:B/16 --workdir gs://BUCKET/dino_b16
"""

import ml_collections

from fmcv_jax.dataset_statistics import IMAGENET, IMAGENET_EXAMPLES

BATCH = 1024
EPOCHS = 300
LENGTHS = {'S/16': True, 'S/8': True, 'B/16': False, 'B/8': False}


def get_config(variant='S/16'):
  steps_per_epoch = IMAGENET_EXAMPLES // BATCH
  steps = EPOCHS * steps_per_epoch
  c = ml_collections.ConfigDict()
  jitter = (
    dict(name='flip'),
    dict(name='color_jitter', brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, probability=0.8, grayscale=0.2),
  )
  c.objective = dict(
    name='dino',
    momentum=0.996,
    teacher_temperature=(0.04, 0.07),
    temperature_steps=30 * steps_per_epoch,
    freeze_last_layer_steps=steps_per_epoch,
    global_augments=(
      (*jitter, dict(name='blur', probability=1.0)),
      (*jitter, dict(name='blur', probability=0.1), dict(name='solarize', probability=0.2)),
    ),
    local_augment=(*jitter, dict(name='blur', probability=0.5)),
    normalize=IMAGENET,
    network=dict(
      name='dino',
      learn_prototype_norms=LENGTHS[variant],
      encoder=dict(
        name='vit',
        variant=variant,
        drop_path=0.1,
        dtype='bfloat16',
        unroll=True,  # unrolled layers run a third faster than a scan (docs/plan.md)
        remat='dots' if variant.endswith('/8') else 'none',
      ),
    ),
  )
  imagenet = dict(name='tfds', builder='imagenet2012')
  c.data = dict(
    source=dict(imagenet, split='train'),
    views=dict(
      global_views=dict(count=2, image=dict(name='random_resized_crop', size=224, scale=(0.4, 1.0))),
      local_crops_number=dict(count=8, image=dict(name='random_resized_crop', size=96, scale=(0.05, 0.4))),
    ),
    workers=32,
  )
  whole = dict(image=dict(name='resize_crop', size=224), workers=16)
  evaluation = dict(
    batch_size=1024,
    data=dict(whole, source=dict(imagenet, split='validation')),
    train_data=dict(whole, source=dict(imagenet, split='train')),
  )
  c.evaluators = dict(
    knn=dict(evaluation, name='knn', ks=(10, 20, 100, 200), every=25 * steps_per_epoch),
    probe=dict(evaluation, name='linear_probe', method='logistic'),
  )
  c.optimizer = dict(
    rule=dict(name='adamw'),
    schedule=dict(name='cosine', peak_lr=5e-4 * BATCH / 256, warmup_steps=10 * steps_per_epoch, end=1e-6),
    weight_decay=0.04,
    weight_decay_end=0.4,
    weight_decay_mask=('.*/kernel', '.*/prototypes'),
    clip_norm=3.0,
  )
  c.train = dict(steps=steps, batch_size=BATCH)
  c.checkpoint = dict(every=steps_per_epoch)
  c.mesh = dict(data=-1)  # small enough to be whole on every chip
  c.topology = 'v5e:8x8'
  return c
