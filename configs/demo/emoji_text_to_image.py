"""Emoji of 64 x 64 pixels from their names, without an autoencoder, from the text encoder of emoji_clip.py.

3,000 steps (--config.train.steps=3000) took 77 minutes on one CPU core. Of images generated with guidance 4, the
packaged CLIP names 0.40 (top-1) and 0.77 (top-5) of 60 training concepts among 1,774, and 0.63 and 0.94 of the 100
held-out ones among these. Colors and simple shapes are right (hearts, faces, flags), even areas are still speckled and
most objects are not recognizable, so that these weights do not come with the package.

    fmcv train --config configs/demo/emoji_text_to_image.py --workdir runs/emoji_text_to_image
    fmcv export runs/emoji_text_to_image --format fmcv --to emoji_text_to_image
"""

import pathlib

import ml_collections

from fmcv_jax.config import load_file

SIZE = 64


def get_config():
  clip = ml_collections.ConfigDict(load_file(str(pathlib.Path(__file__).with_name('emoji_clip.py'))))
  c = ml_collections.ConfigDict()
  c.objective = dict(
    name='diffusion',
    network=dict(
      name='dit',
      variant='S/8',
      image_size=SIZE,
      channels=3,
      width=192,
      depth=6,
      num_heads=3,
      pooled_text=True,
      detail_features=12,
      activation='relu',  # on a CPU, GELUs take half of a step
      unroll=True,
    ),
    # As JiT (Li & He 2025): the network predicts the image, and the loss is that of the velocity. Times are shifted to
    # more noise: in a smooth drawing of many pixels, little noise hides nothing that a text would have to supply.
    process=dict(schedule='flow', prediction='image', shift=3.0),
    weighting='flow',
    weighting_gamma=0.2,
    timestep_sampling='logit_normal',
    timestep_std=1.2,
    text_condition=dict(encoder=clip.objective.network.text, train=True),
  )
  c.init_from = {'params/text': dict(workdir='runs/emoji_clip', part='params/text')}
  # One artist, so that a text has one image: edges are sharp after fewer steps.
  emoji = dict(name='emoji', artists=('noto',), image_size=SIZE, aliases=False)
  recolored = dict(emoji, name='recolored_emoji')
  c.tokenizer = clip.tokenizer
  c.data = dict(
    source=dict(
      name='mixture',
      sources=dict(drawn=emoji, recolored=recolored),
      weights=dict(drawn=0.8, recolored=0.2),
    ),
    caption_templates=('{}', '{}', '{}', 'a {}'),
  )
  c.evaluators = dict(
    trained=dict(name='denoising', data=dict(source=emoji), batch_size=64),
    held_out=dict(name='denoising', data=dict(source=dict(emoji, split='held_out')), batch_size=64),
  )
  c.optimizer = dict(
    rule=dict(name='muon'),
    schedule=dict(name='cosine', peak_lr=3e-3, end=5e-5, warmup_steps=40),
    weight_decay=0.01,
    clip_norm=1.0,
  )
  c.train = dict(steps=5000, batch_size=32, ema_decay=0.99)
  c.checkpoint = dict(every=200, keep=1)
  c.log = dict(every=25)
  return c
