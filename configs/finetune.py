"""Fine-tuning of any image model on your own images: class folders, a table of captions or labels, or shards.

The number of classes, the held-out split, the batch size, steps and warm-up follow from the data, unless they are set;
the network, its image size and normalization from the model. Every choice is printed (docs/finetune.md).

    fmcv finetune my_images --model runs/vit_b16 --workdir runs/own
    fmcv train --config configs/finetune.py --workdir runs/own --config.data.source.path=my_images \
        --config.init_from.params.workdir=runs/vit_b16
"""

import ml_collections

from fmcv_jax.apps import finetune_plan


def get_config():
  c = ml_collections.ConfigDict()
  c.data = dict(source=dict(name='image_folder'))
  c.optimizer = dict(
    rule=dict(name='adamw'),
    schedule=dict(name='cosine'),
    weight_decay=0.05,
    clip_norm=1.0,
  )
  return c


def complete(config):
  return finetune_plan.completed(config)
