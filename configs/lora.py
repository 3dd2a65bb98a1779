"""LoRA (Hu et al. 2022) on a ViT-B/16: fine-tuning of 0.7 % of the parameters on another dataset. Not measured here.

Only the rank-16 matrices of queries and values, and a new head, are trained and have optimizer moments; the network is
loaded from another run, at any image_size. To initialize a later run from the merged network, use
--config.init_from.params.workdir=runs/pets --config.init_from.params.part=whole.

    fmcv train --config configs/lora.py --workdir runs/pets --config.init_from.extra/frozen.workdir=gs://BUCKET/vit_b16
"""

import ml_collections

EXAMPLES = 3_680
BATCH = 128


def get_config():
  c = ml_collections.ConfigDict()
  size = 384
  c.objective = dict(
    name='finetune',
    trainable=('head/.*',),
    lora=dict(rank=16, alpha=32.0, targets=('blocks/attention/(query|value)/kernel',)),
    objective=dict(
      name='classification',
      augment=(dict(name='flip'),),
      network=dict(name='vit', variant='B/16', image_size=size, num_classes=37, dtype='bfloat16', unroll=True),
    ),
  )
  c.init_from = {'extra/frozen': dict(workdir='runs/vit_b16', resize=('position',))}
  pets = dict(name='tfds', builder='oxford_iiit_pet')
  c.data = dict(
    source=dict(pets, split='train'), image=dict(name='random_resized_crop', size=size, scale=(0.25, 1.0)), workers=8
  )
  c.evaluators = dict(
    test=dict(
      name='accuracy',
      every=200,
      batch_size=128,
      data=dict(source=dict(pets, split='test'), image=dict(name='resize_crop', size=size), workers=8),
    )
  )
  c.optimizer = dict(
    rule=dict(name='adamw'),
    schedule=dict(name='cosine', peak_lr=1e-3, warmup_steps=100),
    clip_norm=1.0,
  )
  c.train = dict(steps=40 * EXAMPLES // BATCH, batch_size=BATCH)
  c.checkpoint = dict(every=200, best='test/top1')
  c.topology = 'v5e:2x4'
  return c
