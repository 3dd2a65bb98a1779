"""Inpainting with a UNet conditioned on the masked image: 5 extra input channels, the mask and the masked latent.

Published (the model card of Stable Diffusion inpainting): 440,000 steps of batch 2048 at 512 px from v1.2, with the
extra channels of the first convolution zero-initialized, random masks, a full mask for a quarter of the images, and a
tenth of the captions dropped. Initialized from `configs/text_to_image.py:512`. Not measured here.

    fmcv train --config configs/inpainting.py --workdir gs://BUCKET/fill
    fmcv generate 'a bench in a park' --model gs://BUCKET/fill --image photo.jpg --mask mask.png --guidance 7.5
    fmcv generate 'a bench in a park' --model gs://BUCKET/fill --image photo.jpg --expand 0.25
"""

import pathlib

import ml_collections

from fmcv_jax.config import load_file


def get_config():
  c = ml_collections.ConfigDict(load_file(f'{pathlib.Path(__file__).with_name("text_to_image.py")}:512'))
  c.objective.network.extra_in_channels = 5
  c.objective.image_condition = dict(inpainting=dict(full_mask_probability=0.25))
  c.init_from['params'] = dict(workdir='runs/t2i_512', widen=('network/encoder/conv_in/kernel',))
  c.train.steps = 440_000
  return c
