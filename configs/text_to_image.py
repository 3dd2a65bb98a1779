"""Text to image by the UNet of Stable Diffusion 1, 860 M parameters, in two stages: at 256 px, then at 512 px.

Published (the model card of v1-1): 237,000 steps at 256 px on LAION-2B-en, then 194,000 at 512 px on its images of at
least 1024 px, with batch 2048 and AdamW at 1e-4 on 256 A100; no quality metric is given for v1-1. As there, autoencoder
and text encoder (CLIP L/14, which `configs/clip.py:L/14` trains) are frozen. Not measured here.

    fmcv train --config configs/text_to_image.py:256 --workdir gs://BUCKET/t2i_256
    fmcv train --config configs/text_to_image.py:512 --workdir gs://BUCKET/t2i_512 \\
        --config.init_from.params.workdir=gs://BUCKET/t2i_256
    fmcv generate 'a watercolour of a fox' --model gs://BUCKET/t2i_512 --guidance 7.5
"""

import ml_collections

BATCH = 2048
STEPS = {256: 237_000, 512: 194_000}
PODS = {256: 'v5e:16x16', 512: 'v5p:4x4x8'}


def get_config(size='256'):
  size = int(size)
  c = ml_collections.ConfigDict()
  c.objective = dict(
    name='diffusion',
    network=dict(name='unet', variant='sd1', image_size=size // 8, dtype='bfloat16', remat='dots'),
    process=dict(schedule='scaled_linear', prediction='noise'),
    latent_space=dict(
      autoencoder=dict(name='autoencoder', variant='kl-f8', image_size=size, dtype='bfloat16'), scale=0.18215
    ),
    text_condition=dict(
      encoder=dict(
        name='text_transformer',
        vocab_size=49_408,
        length=77,
        width=768,
        depth=12,
        num_heads=12,
        num_classes=768,
        dtype='bfloat16',
      )
    ),
    condition_dropout=0.1,
    augment=(dict(name='flip'),),
  )
  c.init_from = {
    'extra/autoencoder': dict(workdir='runs/kl-f8', part='params/autoencoder'),
    'extra/text': dict(workdir='runs/clip_l14', part='params/text'),
  }
  if size > 256:
    c.init_from['params'] = dict(workdir='runs/t2i_256')
  c.tokenizer = dict(name='clip_bpe', length=77)
  pairs = dict(name='array_record', path='data/pairs/train')
  crop = dict(name='resize_crop', size=size, crop=1.0)
  c.data = dict(source=pairs, image=crop, workers=32)
  c.evaluators = dict(
    val=dict(
      name='denoising', every=10_000, data=dict(source=dict(pairs, path='data/pairs/val'), image=crop, workers=32)
    )
  )
  c.optimizer = dict(
    rule=dict(name='adamw'),
    schedule=dict(name='cosine', peak_lr=1e-4, end=1e-4, warmup_steps=10_000),
    weight_decay=0.01,
  )
  c.train = dict(steps=STEPS[size], batch_size=BATCH, ema_decay=0.9999)
  c.checkpoint = dict(every=2_000)
  c.mesh = dict(data=-1, fsdp=16)
  c.topology = PODS[size]
  return c
