"""A small CLIP on emoji, in minutes on two CPU cores."""

import ml_collections


def get_config():
  c = ml_collections.ConfigDict()
  size, embedding, length = 32, 192, 16
  c.objective = dict(
    name='contrastive',
    network=dict(
      name='dual_encoder',
      image=dict(name='vit', variant='mu/8', image_size=size, outputs=embedding, outputs_bias=False),
      text=dict(name='text_transformer', vocab_size=1024, length=length, width=64, depth=1, heads=2, outputs=embedding),
    ),
  )
  c.tokenizer = dict(name='bpe', vocab_size=1024, length=length, corpus=dict(name='emoji', image_size=size))
  c.data = dict(source=dict(name='emoji', artists=('openmoji', 'noto'), image_size=size))
  new_hand = dict(name='emoji', artists=('twemoji',), image_size=size)
  c.evaluators = dict(
    seen=dict(name='zero_shot', data=dict(source=dict(new_hand, split='seen'))),
    held_out=dict(name='zero_shot', data=dict(source=dict(new_hand, split='held_out'))),
    retrieval=dict(name='retrieval', data=dict(source=dict(new_hand, split='seen')), canonical=True),
  )
  c.optimizer = dict(schedule=dict(name='cosine', peak=1e-3, warmup_steps=10), weight_decay=0.1, clip_norm=1.0)
  c.train = dict(steps=60, batch=64, ema=0.99)
  c.log = dict(every=10)
  return c
