"""SigLIP B/16 at 224 px on your own image-text pairs (Zhai et al. 2023, arXiv:2303.15343).

Published: 76.0 % zero-shot ImageNet-1k top-1 after 40 B pairs of WebLI, which is not public. Not measured here. The
published model reads a 32 k SentencePiece vocabulary; this recipe trains from scratch with CLIP's byte-pair one.
Their weight decay of 1e-4 is not multiplied by the peak learning rate of 1e-3 (big_vision/optax.py); that of optax is,
so it is 0.1 here.

    fmcv train --config configs/siglip_b16.py --workdir gs://BUCKET/siglip_b16
"""

import ml_collections

TOTAL_EXAMPLES = 9_000_000_000
BATCH = 16_384


def get_config():
  size, length = 224, 64
  c = ml_collections.ConfigDict()
  c.objective = dict(
    name='contrastive',
    loss_name='sigmoid',
    network=dict(
      name='siglip',
      variant='B/16',
      image_size=size,
      vocab_size=49_408,
      length=length,
      dtype='bfloat16',
      remat='full',
    ),
  )
  c.tokenizer = dict(name='clip_bpe', length=length)
  pairs = dict(name='array_record', path='data/pairs/train')
  c.data = dict(source=pairs, image=dict(name='resize', size=size), workers=32)
  c.evaluators = dict(
    val=dict(
      name='retrieval',
      every=10_000,
      batch_size=4096,
      data=dict(source=dict(pairs, path='data/pairs/val'), image=dict(name='resize', size=size), workers=32),
    )
  )
  c.optimizer = dict(
    rule=dict(name='adafactor'),
    schedule=dict(name='cosine', peak_lr=1e-3, warmup_steps=10_000),
    weight_decay=0.1,
    clip_norm=1.0,
  )
  c.train = dict(steps=TOTAL_EXAMPLES // BATCH, batch_size=BATCH)
  c.checkpoint = dict(every=2_000)
  c.topology = 'v5e:4x4'
  return c
