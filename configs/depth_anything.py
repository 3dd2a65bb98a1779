"""Depth Anything V2 in meters, as its authors fine-tune it for rooms (Yang et al. 2024).

The loss (variance focus 0.5), rates (5e-6, ten times as much for the new head), weight decay and max_depth are those of
their code for Hypersim, which begins with the encoder of the relative model and trains 40 epochs. Its loss is over all
pixels of a batch, this one the mean of those of its images. Not measured and not compiled here.

    fmcv import depth-anything-v2-base-hf --to runs/depth_anything
    fmcv train --config configs/depth_anything.py:B --workdir runs/depth
    fmcv depth photo.jpg --model runs/depth --to depth
"""

import ml_collections

from fmcv_jax.dataset_statistics import IMAGENET


def get_config(variant='B'):
  c = ml_collections.ConfigDict()
  network = dict(name='depth_anything', variant=variant, max_depth=20.0, dtype='bfloat16', remat='dots')
  c.objective = dict(name='depth', network=network, augment=(dict(name='flip'),), normalize=IMAGENET)
  c.init_from = {'params/encoder': dict(workdir='runs/depth_anything', part='params/encoder')}
  source = dict(name='depth_folder', scale=0.001)
  c.data = dict(
    source=dict(source, images='data/rooms/train/rgb', depths='data/rooms/train/depth'),
    image=dict(name='random_resized_crop', size=518, scale=(0.5, 1.0)),
    workers=32,
  )
  c.evaluators = dict(
    val=dict(
      name='depth',
      max_depth=10.0,
      every=5_000,
      data=dict(
        source=dict(source, images='data/rooms/val/rgb', depths='data/rooms/val/depth'),
        image=dict(name='resize_to_multiple', size=518),
        workers=32,
      ),
    )
  )
  c.optimizer = dict(
    rule=dict(name='adamw'),
    weight_decay=0.01,
    schedule=dict(name='linear', peak_lr=5e-6),
    lr_multipliers=(('(reassemble|fusion|depth_).*', 10.0),),
    clip_norm=1.0,
  )
  c.train = dict(steps=100_000, batch_size=32)
  c.checkpoint = dict(every=5_000)
  c.mesh = dict(data=1, fsdp=-1, max_fsdp=16)
  c.topology = 'v5e:4x4'
  return c
