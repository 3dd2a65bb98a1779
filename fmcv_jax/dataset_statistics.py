"""Sizes and channel statistics of data sets, for configs, image processors and families of published checkpoints.

Statistics are keyword arguments of `fmcv_jax.augment.normalize.Normalize`: mean and standard deviation of R, G and B in
[0, 1].
"""

IMAGENET_EXAMPLES = 1_281_167  # training images of ILSVRC 2012

IMAGENET = {'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225)}  # torchvision's; of most published networks
CLIP = {'mean': (0.48145466, 0.4578275, 0.40821073), 'std': (0.26862954, 0.26130258, 0.27577711)}  # Radford et al. 2021
HALF = {'mean': (0.5, 0.5, 0.5), 'std': (0.5, 0.5, 0.5)}  # [0, 1] becomes [-1, 1]

# Rounded statistics of the demo's data sets: most of an emoji drawing is white, most of a scene of digits is black.
EMOJI = {'mean': (0.75, 0.75, 0.75), 'std': (0.33, 0.33, 0.33)}
SCATTERED_DIGITS = {'mean': (0.15, 0.15, 0.15), 'std': (0.3, 0.3, 0.3)}
