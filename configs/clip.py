"""CLIP ViT-B/32, B/16 and L/14 at 224 px on your own image-text pairs (Radford et al. 2021; OpenCLIP's settings).

Zero-shot ImageNet-1k top-1 that others report: OpenAI's 400 M private pairs 63.3 (B/32), 68.3 (B/16), 75.5 (L/14);
OpenCLIP on LAION-400M, 32 epochs, 62.9, 67.1, 72.8 (its README; B/32 took 128 A100 36 hours). Not measured here.

Pairs are ArrayRecord shards below data/pairs/train and data/pairs/val; any other source is one override away:

    fmcv train --config configs/clip.py:B/16 --workdir gs://BUCKET/clip_b16
    fmcv train --config configs/clip.py:B/32 --workdir runs/own \
        --config.data.source="{'name': 'image_folder', 'path': 'my_images', 'captions': 'captions.csv'}"
"""

import ml_collections

from fmcv_jax.dataset_statistics import CLIP

PAIRS = 400_000_000
EPOCHS = 32
BATCH = 32_768
PODS = {'B/32': 'v5e:16x16', 'B/16': 'v5e:16x16', 'L/14': 'v5p:4x4x8'}


def get_config(variant='B/32'):
  size = 224
  c = ml_collections.ConfigDict()
  c.objective = dict(
    name='contrastive',
    network=dict(name='clip', variant=variant, image_size=size, dtype='bfloat16', remat='dots'),
    normalize=CLIP,
  )
  c.tokenizer = dict(name='clip_bpe', length=77)
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
  c.train = dict(steps=EPOCHS * PAIRS // BATCH, batch_size=BATCH)
  c.checkpoint = dict(every=2_000)
  c.mesh = dict(data=1, fsdp=-1, max_fsdp=16)
  c.topology = PODS[variant]
  return c
