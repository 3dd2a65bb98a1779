"""A small CLIP on emoji: trained on OpenMoji and Noto, evaluated on Twemoji, in minutes on two CPU cores.

Reached in one run (seed 0, 480 steps): 0.384 top-1 and 0.590 top-5 among 1,774 names (the nearest neighbor in pixels:
0.378; random 0.0006), 0.340 top-1 of 100 names on held-out concepts (random 0.01).

    fmcv demo --workdir runs/demo --cpu-devices 8
"""

import ml_collections

from fmcv_jax.dataset_statistics import EMOJI


def get_config():
  c = ml_collections.ConfigDict()
  size, embedding, length, vocabulary = 32, 128, 8, 1024
  c.objective = dict(
    name='contrastive',
    augment=(
      dict(name='affine', scale=(0.8, 1.25), ratio=(0.8, 1.25), rotation=8.0, translate=0.04, shear=0.12),
      dict(name='color_jitter', brightness=0.2, contrast=0.35, saturation=0.35, hue=0.08, grayscale=0.1),
      dict(name='blur', probability=0.2, sigma=(0.3, 0.8)),
    ),
    normalize=EMOJI,
    network=dict(
      name='dual_encoder',
      # Float32, unrolled and with the cheapest activation is what is fastest on a CPU.
      image=dict(
        name='vit',
        variant='mu/8',
        image_size=size,
        width=128,
        depth=4,
        num_heads=2,
        mlp_dim=512,
        pool='gap',
        activation='quick_gelu',
        unroll=4,
        num_classes=embedding,
        head_bias=False,
      ),
      text=dict(
        name='text_transformer',
        vocab_size=vocabulary,
        length=length,
        width=128,
        depth=1,
        num_heads=2,
        causal=False,
        attend_padding=False,
        pool='mean',
        activation='quick_gelu',
        num_classes=embedding,
      ),
    ),
  )
  emoji = dict(name='emoji', artists=('openmoji', 'noto'), image_size=size, aliases=False)
  c.tokenizer = dict(name='bpe', vocab_size=vocabulary, length=length, corpus=emoji)
  c.data = dict(source=emoji)
  new_hand = dict(emoji, artists=('twemoji',))
  c.evaluators = dict(
    seen=dict(name='zero_shot', every=100, data=dict(source=dict(new_hand, split='seen'))),
    held_out=dict(name='zero_shot', every=100, data=dict(source=dict(new_hand, split='held_out'))),
    retrieval=dict(name='retrieval', data=dict(source=dict(new_hand, split='seen')), first_caption_only=True),
  )
  c.optimizer = dict(
    rule=dict(name='muon'),
    schedule=dict(name='cosine', peak_lr=6e-3, end=3e-3, warmup_steps=50),
    weight_decay=0.1,
    clip_norm=1.0,
  )
  c.train = dict(steps=480, batch_size=512, ema_decay=0.99)
  c.log = dict(every=20)
  return c
