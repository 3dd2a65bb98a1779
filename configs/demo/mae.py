"""A small masked autoencoder on emoji without their names, in minutes on two CPU cores.

Measured after 60 steps of this recipe (seed 0, warm-up 10, 70 seconds on 2 cores): k-NN 0.133 (untrained 0.122, raw
pixels 0.378), linear probe 0.177 (untrained 0.161, pixels 0.198), 5-way 1-shot on held-out concepts 0.533 (untrained
0.455).

fmcv train --config configs/demo/mae.py --workdir runs/mae
fmcv explain an_emoji.png --model runs/mae
"""

import ml_collections

from fmcv_jax.dataset_statistics import EMOJI


def get_config():
  c = ml_collections.ConfigDict()
  size = 32
  c.objective = dict(
    name='mae',
    mask_ratio=0.75,
    augment=(
      dict(name='affine', scale=(0.7, 1.4), ratio=(0.8, 1.25), rotation=10.0, translate=0.08, shear=0.12),
      dict(name='flip'),
    ),
    normalize=EMOJI,
    network=dict(
      name='mae',
      width=64,
      depth=2,
      num_heads=4,
      # The network of the other demos; float32, unrolled and with the cheapest activation is what is fastest on a CPU.
      encoder=dict(
        name='vit',
        variant='mu/4',
        image_size=size,
        width=128,
        depth=4,
        num_heads=4,
        mlp_dim=512,
        pos_embed='sincos2d',
        activation='quick_gelu',
        unroll=4,
      ),
    ),
  )
  emoji = dict(name='emoji', artists=('openmoji', 'noto'), image_size=size, aliases=False)
  c.data = dict(source=emoji)
  # Named by the drawings of two artists, asked for the third's: names are used for nothing else.
  asked = dict(data=dict(source=dict(emoji, artists=('twemoji',), split='seen')), train_data=dict(source=emoji))
  c.evaluators = dict(
    knn=dict(asked, name='knn', ks=(1, 5)),
    probe=dict(asked, name='linear_probe'),
    pixels_knn=dict(asked, name='knn', ks=(1, 5), features='pixels'),  # what features have to beat
    pixels_probe=dict(asked, name='linear_probe', features='pixels'),
    few_shot=dict(
      name='few_shot',
      shots=(1, 2),
      data=dict(source=dict(emoji, artists=('openmoji', 'noto', 'twemoji'), split='held_out')),
    ),
  )
  c.optimizer = dict(
    rule=dict(name='muon'),
    schedule=dict(name='cosine', peak_lr=6e-3, warmup_steps=50),
    weight_decay=0.05,
    clip_norm=1.0,
  )
  c.train = dict(steps=600, batch_size=256)
  c.log = dict(every=20)
  return c
