"""Semantic segmentation of scattered digits: a small ViT and one linear layer, in minutes on two CPU cores.

Measured (seed 0, 3 CPU minutes): mean IoU 0.615 over the background and ten digits, pixel accuracy 0.949, on scenes of
held-out digits.

fmcv train --config configs/demo/segmentation.py --workdir runs/segmentation
"""

import ml_collections

from fmcv_jax.dataset_statistics import SCATTERED_DIGITS


def get_config():
  c = ml_collections.ConfigDict()
  size = 24
  c.objective = dict(
    name='segmentation',
    normalize=SCATTERED_DIGITS,
    network=dict(
      name='segmenter',
      num_classes=11,  # the ground and ten digits
      encoder=dict(
        name='vit',
        variant='mu/4',
        image_size=size,
        width=64,
        depth=4,
        num_heads=4,
        mlp_dim=256,
        pool='gap',
        pos_embed='sincos2d',
        activation='quick_gelu',
        unroll=4,
      ),
    ),
  )
  scenes = dict(name='scattered', size=size, clutter=1)
  c.data = dict(source=dict(scenes, copies=64))
  c.evaluators = dict(val=dict(name='mean_iou', data=dict(source=dict(scenes, split='test', copies=2))))
  c.optimizer = dict(
    rule=dict(name='muon'),
    schedule=dict(name='cosine', peak_lr=6e-3, warmup_steps=30),
    weight_decay=0.05,
    clip_norm=1.0,
  )
  c.train = dict(steps=600, batch_size=64)
  c.log = dict(every=50)
  return c
