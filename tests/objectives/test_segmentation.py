import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmcv_jax.augment.color import ColorJitter
from fmcv_jax.augment.geometry import Flip
from fmcv_jax.augment.randaugment import RandAugment
from fmcv_jax.augment.three_augment import ThreeAugment
from fmcv_jax.models.backbones.swin import swin
from fmcv_jax.models.backbones.vit import vit
from fmcv_jax.models.dense.segmenter import segmenter
from fmcv_jax.objectives.segmentation import Segmentation

ENCODER = vit('mu/8', image_size=16, pool='cls', registers=1, depth=1)
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3)).astype(np.uint8)
SEGMENTS = np.random.default_rng(1).integers(0, 3, (4, 16, 16)).astype(np.uint8)


def test_loss_by_hand_ignores_unknown_pixels():
  """The linear layer, the interpolation and the mean in numpy float64."""
  objective = Segmentation(segmenter(ENCODER, 3))
  params, _ = jax.jit(objective.init)(jax.random.key(0))
  params['head'] = {'kernel': np.random.default_rng(2).normal(size=(32, 3)) / 4, 'bias': np.arange(3.0)}
  segments = SEGMENTS.copy()
  segments[:2, :5] = 255
  batch = {'image': IMAGES, 'segments': segments}
  loss = jax.jit(objective.loss)(params, batch, jax.random.key(1), {})

  images = objective.normalize(jnp.asarray(IMAGES, jnp.float32) / 255)
  tokens = np.asarray(ENCODER.apply({'params': params['encoder']}, images).tokens[:, 2:], np.float64)
  logits = (tokens @ params['head']['kernel'] + params['head']['bias']).reshape(4, 2, 2, 3)
  place = np.clip((np.arange(16) + 0.5) / 8 - 0.5, 0, 1)  # of each pixel between the two patches
  weight = np.stack([1 - place, place], -1)
  logits = np.einsum('yi,xj,bijc->byxc', weight, weight, logits)
  known = segments != 255
  probability = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  expected = -np.log(probability[known, segments[known]]).mean()
  assert float(loss.value) == pytest.approx(expected, rel=1e-5)
  assert float(loss.metrics['accuracy'].value) == pytest.approx((logits.argmax(-1) == segments)[known].mean())


def test_a_flip_moves_the_segments_with_the_image():
  plain = Segmentation(segmenter(ENCODER, 3))
  params, _ = jax.jit(plain.init)(jax.random.key(0))
  params['head']['kernel'] = jax.random.normal(jax.random.key(1), (32, 3))

  def losses(objective, images, segments):
    return jax.jit(lambda seed: objective.loss(params, batch(images, segments), jax.random.key(seed), {}).value)

  def batch(images, segments):
    return {'image': images, 'segments': segments}

  flipping = losses(dataclasses.replace(plain, augment=(Flip(),)), IMAGES[:1], SEGMENTS[:1])
  either = [
    float(losses(plain, images, segments)(0))
    for images, segments in ((IMAGES[:1], SEGMENTS[:1]), (IMAGES[:1, :, ::-1], SEGMENTS[:1, :, ::-1]))
  ]
  sides = [min(range(2), key=lambda side: abs(either[side] - float(flipping(seed)))) for seed in range(8)]
  for seed, side in enumerate(sides):
    assert float(flipping(seed)) == pytest.approx(either[side], rel=1e-6)
  assert set(sides) == {0, 1}


def test_what_cannot_be_segmented_is_refused():
  with pytest.raises(ValueError, match='RandAugment moves the pixels of the image, but not segments'):
    Segmentation(segmenter(ENCODER, 3), augment=(ColorJitter(), RandAugment()))
  Segmentation(segmenter(ENCODER, 3), augment=(ThreeAugment(), RandAugment(operations=('color', 'contrast'))))
  with pytest.raises(ValueError, match='outputs has no use here'):
    segmenter(vit('mu/8', image_size=16, num_classes=3), 3)
  assert segmenter(swin('mu', image_size=32), 3).image_size == 32
