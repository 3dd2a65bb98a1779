"""A small CLIP on emoji, in minutes on two CPU cores."""

import ml_collections


def get_config():
  c = ml_collections.ConfigDict()
  size, embedding, length = 32, 128, 8
  c.objective = dict(
    name='contrastive',
    augment=(dict(name='demo_aug:Spike'),),
    normalize=dict(mean=(0.75, 0.75, 0.75), std=(0.33, 0.33, 0.33)),
    network=dict(
      name='dual_encoder',
      initial_scale=14.0,
      image=dict(
        name='vit',
        variant='mu/8',
        image_size=size,
        width=128,
        depth=4,
        heads=2,
        mlp_dim=512,
        pool='gap',
        activation='quick_gelu',
        unroll=4,
        outputs=embedding,
        outputs_bias=False,
      ),
      text=dict(
        name='text_transformer',
        vocab_size=1024,
        length=length,
        width=128,
        depth=1,
        heads=2,
        causal=False,
        attend_padding=False,
        pool='mean',
        activation='quick_gelu',
        outputs=embedding,
      ),
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
  c.optimizer = dict(
    rule=dict(name='muon'),
    schedule=dict(name='cosine', peak=6e-3, warmup_steps=100),
    weight_decay=0.1,
    clip_norm=1.0,
  )
  c.train = dict(steps=1000, batch=256, ema=0.99)
  c.log = dict(every=50)
  return c
