"""OWL-ViT B/32, B/16 and L/14 on COCO's boxes, from a CLIP (Minderer et al. 2022).

Learning rates, warm-up, losses and batches are the paper's, which trained on Objects365 and Visual Genome with mosaics
and stochastic depth; zero-shot AP on LVIS 19.3 (B/32), 20.8 (B/16), 34.6 (L/14). Its losses are normalized for each
image, these by the objects of the batch. Not measured and not compiled here.

    fmcv import clip-vit-base-patch16 --to runs/clip
    fmcv train --config configs/owl.py:B/16 --workdir runs/owl
    fmcv detect photo.jpg --model runs/owl --text 'a red apple' 'a dog'
"""

import ml_collections

from fmcv_jax.dataset_statistics import CLIP

SIZES = {'B/32': 768, 'B/16': 768, 'L/14': 840}
TEMPLATES = ('{}', 'a photo of a {}', 'a photo of the {}', 'a {} in the scene', 'a close-up photo of a {}')


def get_config(variant='B/16'):
  size = SIZES[variant]
  c = ml_collections.ConfigDict()
  c.objective = dict(
    name='detection',
    network=dict(name='owl', variant=variant, image_size=size, objectness=False, dtype='bfloat16', remat='dots'),
    max_boxes=100,
    num_queries=80,
    augment=(dict(name='flip'),),
    normalize=CLIP,
  )
  c.init_from = {
    'params/towers/image': dict(workdir='runs/clip', part='params/image', resize=('position',)),
    'params/towers/text': dict(workdir='runs/clip', part='params/text', skip=('position',)),  # 77 places there, 16 here
  }
  c.tokenizer = dict(name='clip_bpe', length=16)
  coco = dict(name='coco')
  pad = dict(size=size, fill=(128, 128, 128), interpolation='bilinear')
  c.data = dict(
    source=dict(coco, annotations='data/coco/annotations/instances_train2017.json', images='data/coco/train2017'),
    image=dict(name='scale_jitter', scale=(0.5, 1.5), **pad),
    queries=dict(count=80, templates=TEMPLATES),
    workers=32,
  )
  c.evaluators = dict(
    val=dict(
      name='average_precision',
      templates=('a photo of a {}',),
      every=10_000,
      data=dict(
        source=dict(coco, annotations='data/coco/annotations/instances_val2017.json', images='data/coco/val2017'),
        image=dict(name='resize_pad', **pad),
        workers=32,
      ),
    )
  )
  c.optimizer = dict(
    rule=dict(name='adamw'),
    schedule=dict(name='cosine', peak_lr=5e-5, warmup_steps=1_000),
    lr_multipliers=(('towers/text/.*', 0.04),),  # 2e-6
    clip_norm=1.0,
  )
  c.train = dict(steps=140_000, batch_size=256)
  c.checkpoint = dict(every=2_000)
  c.mesh = dict(data=1, fsdp=-1, max_fsdp=16)
  c.topology = 'v5e:8x8'
  return c
