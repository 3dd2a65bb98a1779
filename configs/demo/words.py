"""Captions and answers about scenes of emoji: a prefix language model with the image tower of `--model demo`.

    make demo-words
    fmcv train --config configs/demo/words.py --workdir runs/words
    fmcv train --config configs/demo/words.py:blind --workdir runs/words/blind

`:blind` trains the same network without images: it is shown one white patch, and learns what the texts alone give away.
Measured (docs/demos.md): 0.43 of the captions of held-out pairs are right as a whole, and 0.52 of the relations;
whether there is a thing is not learned in this time.
"""

import ml_collections

from fmcv_jax.dataset_statistics import EMOJI
from fmcv_jax.pretrained import packaged

SIZE, PATCH = 64, 8


def get_config(variant='images'):
  if variant not in ('images', 'blind'):
    raise ValueError(f'unknown variant {variant!r}; use images or blind')
  blind = variant == 'blind'
  size, vocabulary, length = PATCH if blind else SIZE, 512, 20
  c = ml_collections.ConfigDict()
  c.objective = dict(
    name='language',
    max_tokens=length,
    augment=(dict(name='color_jitter', brightness=0.15, contrast=0.15, saturation=0.15),),
    normalize=EMOJI,
    network=dict(
      name='prefix_lm',
      image=dict(
        name='vit',
        variant=f'mu/{PATCH}',
        image_size=size,
        width=128,
        depth=4,
        num_heads=2,
        mlp_dim=512,
        pool='gap',
        activation='quick_gelu',
        unroll=4,
      ),
      text=dict(
        name='text_decoder',
        vocab_size=vocabulary,
        length=length,
        width=128,
        depth=3,
        num_heads=4,
        mlp_dim=256,
        activation='relu',
        unroll=3,
      ),
    ),
  )
  c.init_from = {
    'params/image': dict(workdir=packaged.locate('demo'), part='params/image', resize=('position',)),
  }
  scenes = dict(name='emoji_scenes', image_size=size, blank=blind)
  templates = dict(caption_template='caption en\n{}', question_template='answer en {}')  # as the evaluators ask
  train = dict(scenes, caption_fraction=0.5, **templates)
  c.tokenizer = dict(
    name='prompted',
    length=length,
    words=dict(name='bpe', vocab_size=vocabulary, length=length, corpus=dict(train, scenes=3000)),
  )
  c.data = dict(source=train)
  splits = dict(held_out=dict(scenes=1024, split='held_out'))
  if not blind:
    splits.update(
      seen=dict(scenes=512, split='seen'),
      new_artist=dict(scenes=512, split='seen', artists=('twemoji',)),
    )
  c.evaluators = {}
  for split, fields in splits.items():
    shared = dict(data=dict(source=dict(scenes, **fields)), blind=split == 'held_out' and not blind)
    c.evaluators[f'{split}_captions'] = dict(shared, name='captioning', decoding=dict(max_tokens=length))
    c.evaluators[f'{split}_questions'] = dict(shared, name='vqa', decoding=dict(max_tokens=4))
  c.optimizer = dict(
    rule=dict(name='muon'),
    schedule=dict(name='cosine', peak_lr=4e-3, warmup_steps=50),
    weight_decay=0.05,
    clip_norm=1.0,
  )
  c.train = dict(steps=1000, batch_size=64, ema_decay=0.99)
  c.checkpoint = dict(every=100, keep=1)
  c.log = dict(every=25)
  return c
