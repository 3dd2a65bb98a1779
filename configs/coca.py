"""CoCa ViT-B/32 and L/14 at 224 px on your own image-text pairs (Yu et al. 2022, as OpenCLIP trains it).

Zero-shot ImageNet-1k top-1 that OpenCLIP reports on LAION-2B: 63.6 (B/32), 75.5 (L/14), after 13 B pairs in batches of
90 k. Not measured and not compiled here. The weights of both losses are OpenCLIP's; the learning rate, its warm-up and
the weight decay of that run are not published with the weights: these are those of configs/clip.py.

    fmcv train --config configs/coca.py:B/32 --workdir gs://BUCKET/coca_b32

Fine-tuning for captions, from imported weights, with OpenCLIP's settings (batches of 128 per GPU, 1 epoch):

    fmcv train --config configs/coca.py:L/14 --workdir runs/coca_captions \
        --config.init_from="{'params': {'workdir': 'runs/coca'}}" --config.objective.contrastive_weight=0 \
        --config.objective.caption_weight=1 --config.optimizer.schedule.peak_lr=1e-5 \
        --config.optimizer.schedule.warmup_steps=1000 --config.optimizer.weight_decay=0.1
"""

import ml_collections

from fmcv_jax.dataset_statistics import CLIP

PAIRS = 13_000_000_000
BATCH = 90_112
PODS = {'B/32': 'v5e:16x16', 'L/14': 'v5p:4x4x8'}


def get_config(variant='B/32'):
  size, length = 224, 76
  c = ml_collections.ConfigDict()
  c.objective = dict(
    name='contrastive_captioning',
    contrastive_weight=1.0,
    caption_weight=2.0,
    network=dict(name='coca', variant=variant, image_size=size, length=length, dtype='bfloat16', remat='full'),
    normalize=CLIP,
  )
  c.tokenizer = dict(name='clip_bpe', length=length)
  c.data = dict(
    source=dict(name='array_record', path='data/pairs/train'),
    image=dict(name='random_resized_crop', size=size, scale=(0.9, 1.0)),
    workers=32,
  )
  c.evaluators = dict(
    val=dict(
      name='retrieval',
      every=10_000,
      batch_size=4096,
      data=dict(
        source=dict(name='array_record', path='data/pairs/val'),
        image=dict(name='resize_crop', size=size, crop=1.0),
        workers=32,
      ),
    )
  )
  c.optimizer = dict(
    rule=dict(name='adamw', b1=0.9, b2=0.98, eps=1e-6),
    schedule=dict(name='cosine', peak_lr=5e-4, warmup_steps=2_000),
    weight_decay=0.2,
    weight_decay_mask=('.*/kernel', '.*/embedding'),
  )
  c.train = dict(steps=PAIRS // BATCH, batch_size=BATCH)
  c.checkpoint = dict(every=2_000)
  c.mesh = dict(data=1, fsdp=-1, max_fsdp=16)
  c.topology = PODS[variant]
  return c
