"""CapPa B/16 at 224 px on your own image-text pairs (Tschannen et al. 2023, arXiv:2306.07915); `:cap` for Cap.

The published models were trained on WebLI, which is not public, with the settings below (big_vision's configuration
proj/cappa/pretrain.py): batches of 8192, 366,500 steps, 3 of 4 captions predicted in parallel. Not measured and not
compiled here. They read a SentencePiece vocabulary of 32 k; this recipe has CLIP's byte-pair one. Their weight decay of
1e-4 is not multiplied by the peak learning rate of 1e-3 (big_vision/optax.py); that of optax is, so it is 0.1 here.

    fmcv train --config configs/cappa.py --workdir gs://BUCKET/cappa_b16
"""

import ml_collections


def get_config(variant='cappa'):
  size, length = 224, 64
  if variant not in ('cap', 'cappa'):
    raise ValueError(f'unknown variant {variant!r}; use cap or cappa')
  in_parallel = variant == 'cappa'
  c = ml_collections.ConfigDict()
  c.objective = dict(
    name='language',
    parallel_fraction=0.75 if in_parallel else 0.0,
    network=dict(
      name='cappa',
      variant='B/16',
      image_size=size,
      vocab_size=49_408,
      length=length,
      mask_token=in_parallel,
      dtype='bfloat16',
      remat='full',
    ),
  )
  c.tokenizer = dict(name='clip_bpe', length=length)
  c.data = dict(
    source=dict(name='array_record', path='data/pairs/train'),
    image=dict(name='resize', size=size),
    workers=32,
  )
  c.optimizer = dict(
    rule=dict(name='adafactor'),
    schedule=dict(name='cosine', peak_lr=1e-3, warmup_steps=10_000),
    weight_decay=0.1,
    clip_norm=1.0,
  )
  c.train = dict(steps=366_500, batch_size=8_192)
  c.checkpoint = dict(every=1_000)
  c.topology = 'v5e:8x8'
  return c
