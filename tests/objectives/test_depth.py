"""Losses of depth in closed form: invariance to scale and shift, invalid pixels, and weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmcv_jax.augment.color import ColorJitter
from fmcv_jax.augment.geometry import Flip
from fmcv_jax.augment.randaugment import RandAugment
from fmcv_jax.models.backbones.swin import swin
from fmcv_jax.models.backbones.vit import vit
from fmcv_jax.models.dense.dpt import dpt
from fmcv_jax.objectives.depth import DepthEstimation
from fmcv_jax.objectives.depth_losses import (
  gradient_difference,
  least_squares,
  masked_median,
  normalized,
  scale_shift_invariant,
  silog,
)

RNG = np.random.default_rng(0)
PREDICTION = RNG.uniform(0.1, 2, (3, 12, 16)).astype(np.float32)
TARGET = RNG.uniform(0.1, 2, (3, 12, 16)).astype(np.float32)
VALID = RNG.uniform(size=(3, 12, 16)) < 0.7
VALID[2, 1:] = False  # a single row
OPTIONS = {'gradient_weight': 0.5, 'scales': 3}


def network(**options):
  return dpt(vit('mu/8', image_size=16, depth=4), (1, 2, 3, 4), (4, 4, 8, 8), 8, hidden=4, **options)


def expected_loss(x, y, valid, alignment):
  """Of one image, in numpy float64."""
  x, y = x.astype(np.float64), y.astype(np.float64)
  if alignment == 'median':
    both = []
    for values in (x, y):
      center = np.median(values[valid])
      both.append((values - center) / np.abs(values - center)[valid].mean())
    difference, power = both[0] - both[1], 1
  else:
    (scale, shift), *_ = np.linalg.lstsq(np.stack([x[valid], np.ones(valid.sum())], 1), y[valid], rcond=None)
    difference, power = scale * x + shift - y, 2
  loss = (np.abs(difference[valid]) ** power).mean() / 2
  for step in (1, 2, 4):
    r, known = difference[::step, ::step], valid[::step, ::step]
    total = 0.0
    for row in range(r.shape[0]):
      for column in range(r.shape[1]):
        for below, right in ((1, 0), (0, 1)):
          other = row + below, column + right
          if other[0] < r.shape[0] and other[1] < r.shape[1] and known[row, column] and known[other]:
            total += abs(r[other] - r[row, column])
    loss += 0.5 * total / max(known.sum(), 1)
  return loss


@pytest.mark.parametrize('alignment', ['median', 'least_squares'])
def test_the_invariant_loss_is_that_of_its_equations(alignment):
  found = scale_shift_invariant(
    jnp.array(PREDICTION), jnp.array(TARGET), jnp.array(VALID), alignment=alignment, **OPTIONS
  )
  expected = [expected_loss(x, y, v, alignment) for x, y, v in zip(PREDICTION, TARGET, VALID, strict=True)]
  np.testing.assert_allclose(found, expected, rtol=2e-5)


@pytest.mark.parametrize('alignment', ['median', 'least_squares'])
def test_a_scale_and_a_shift_of_the_prediction_change_nothing(alignment):
  loss = lambda x: scale_shift_invariant(  # noqa: E731
    x, jnp.array(TARGET), jnp.array(VALID), alignment=alignment, **OPTIONS
  )
  np.testing.assert_allclose(loss(3 * PREDICTION + 5), loss(jnp.array(PREDICTION)), rtol=1e-4)
  np.testing.assert_allclose(loss(jnp.array(2 * TARGET + 1)), 0, atol=1e-5)


@pytest.mark.parametrize('alignment', ['median', 'least_squares'])
def test_invalid_pixels_have_no_part_and_no_gradient(alignment):
  def loss(x, y):
    return scale_shift_invariant(x, y, jnp.array(VALID), alignment=alignment, **OPTIONS).sum()

  hidden = np.where(VALID, PREDICTION, 1e4).astype(np.float32), np.where(VALID, TARGET, -1e4).astype(np.float32)
  assert float(loss(*map(jnp.array, hidden))) == pytest.approx(float(loss(PREDICTION, TARGET)), rel=1e-6)
  gradient = np.asarray(jax.grad(loss)(jnp.array(PREDICTION), jnp.array(TARGET)))
  assert np.isfinite(gradient).all()
  assert not gradient[~VALID].any()
  assert np.abs(gradient[VALID]).mean() > 1e-5


@pytest.mark.parametrize('empty', [np.zeros_like(VALID), np.arange(3 * 12 * 16).reshape(3, 12, 16) % 192 == 5])
def test_images_with_no_or_one_valid_pixel_have_finite_losses_and_gradients(empty):
  for alignment in ('median', 'least_squares'):
    call = lambda x, a=alignment: scale_shift_invariant(  # noqa: E731
      x, jnp.array(TARGET), jnp.array(empty), alignment=a, **OPTIONS
    ).sum()
    assert float(call(jnp.array(PREDICTION))) == pytest.approx(0, abs=1e-5)
    assert np.isfinite(jax.grad(call)(jnp.array(PREDICTION))).all()
  call = lambda x: silog(x, jnp.array(TARGET), jnp.array(empty), variance_focus=0.5).sum()  # noqa: E731
  assert np.isfinite(jax.grad(call)(jnp.array(PREDICTION))).all()


def test_medians_are_those_of_numpy():
  expected = [np.median(x[v]) for x, v in zip(PREDICTION, VALID, strict=True)]
  np.testing.assert_allclose(masked_median(jnp.array(PREDICTION), jnp.array(VALID)), expected, rtol=1e-6)
  assert float(masked_median(jnp.array(PREDICTION[:1]), jnp.zeros((1, 12, 16), bool))[0]) == 0
  unit = np.abs(np.asarray(normalized(jnp.array(PREDICTION), jnp.array(VALID))))
  np.testing.assert_allclose([x[v].mean() for x, v in zip(unit, VALID, strict=True)], 1, rtol=1e-5)


def test_the_alignment_is_the_least_squares_solution():
  scale, shift = least_squares(jnp.array(PREDICTION), jnp.array(TARGET), jnp.array(VALID))
  for image in range(3):
    x, y = PREDICTION[image][VALID[image]], TARGET[image][VALID[image]]
    expected = np.polyfit(x.astype(np.float64), y.astype(np.float64), 1)
    np.testing.assert_allclose([scale[image], shift[image]], expected, rtol=1e-4)


def test_a_ramp_has_the_difference_of_its_slopes():
  """1 a column, 2 a row, over 4 x 4 pixels: 12 pairs each way, then 2 each way at twice the distance."""
  ramp = jnp.arange(4.0)[None] + 2 * jnp.arange(4.0)[:, None]
  found = gradient_difference(ramp[None], jnp.ones((1, 4, 4), bool), scales=2)
  assert float(found[0]) == pytest.approx((12 * 2 + 12 * 1) / 16 + (2 * 4 + 2 * 2) / 4)


@pytest.mark.parametrize('focus', [0.0, 0.5, 1.0])
def test_silog_is_that_of_its_equation(focus):
  found = silog(jnp.array(PREDICTION), jnp.array(TARGET), jnp.array(VALID), variance_focus=focus)
  for image in range(3):
    d = np.log(PREDICTION[image][VALID[image]].astype(np.float64) / TARGET[image][VALID[image]])
    assert float(found[image]) == pytest.approx(np.sqrt((d**2).mean() - focus * d.mean() ** 2), rel=1e-4)


def batch_of(count):
  images = np.random.default_rng(1).integers(0, 256, (count, 16, 16, 3)).astype(np.uint8)
  depth = np.random.default_rng(2).uniform(0.5, 12, (count, 16, 16)).astype(np.float32)
  depth[0] = 0  # nothing is known
  depth[1, :3] = np.nan
  return {'image': images, 'depth': depth}


@pytest.mark.parametrize('max_depth', [None, 10.0])
def test_the_loss_is_the_mean_over_the_images_that_have_depth(max_depth):
  objective = DepthEstimation(network(max_depth=max_depth))
  params, _ = jax.jit(objective.init)(jax.random.key(0))
  loss = jax.jit(objective.loss)
  batch = batch_of(4)
  found = loss(params, batch, jax.random.key(1), {})
  assert float(found.weight) == 3
  parts = [loss(params, {name: x[i : i + 1] for name, x in batch.items()}, jax.random.key(1), {}) for i in range(4)]
  assert float(parts[0].total) == float(parts[0].weight) == 0
  assert float(found.value) == pytest.approx(sum(float(part.total) for part in parts) / 3, rel=1e-5)
  prediction = np.asarray(objective.network.apply({'params': params}, objective.normalize(batch['image'] / 255.0)))
  depth = batch['depth'][2]
  if max_depth is None:
    target, valid = 1 / depth, np.ones_like(depth, bool)
    objective = dataclasses.replace(objective, gradient_scales=3)
    part = jax.jit(objective.loss)(params, {k: x[2:3] for k, x in batch.items()}, jax.random.key(1), {})
    assert float(part.value) == pytest.approx(expected_loss(prediction[2], target, valid, 'median'), rel=1e-4)
  else:
    d = np.log(prediction[2] / depth)[depth <= max_depth]
    assert (depth > max_depth).any()
    assert float(parts[2].value) == pytest.approx(np.sqrt((d**2).mean() - 0.5 * d.mean() ** 2), rel=1e-4)
    assert (prediction < max_depth).all()


def test_a_flip_moves_the_depth_with_the_image():
  plain = DepthEstimation(network(max_depth=10.0))
  params, _ = jax.jit(plain.init)(jax.random.key(0))
  batch = {name: x[2:3] for name, x in batch_of(4).items()}
  mirrored = {name: x[:, :, ::-1] for name, x in batch.items()}
  either = [float(plain.loss(params, one, jax.random.key(0), {}).value) for one in (batch, mirrored)]
  flipping = jax.jit(dataclasses.replace(plain, augment=(Flip(),)).loss)
  found = [float(flipping(params, batch, jax.random.key(seed), {}).value) for seed in range(6)]
  assert all(min(abs(x - side) for side in either) < 1e-5 for x in found)
  assert {min(range(2), key=lambda side: abs(either[side] - x)) for x in found} == {0, 1}


def test_what_cannot_predict_depth_is_refused():
  with pytest.raises(ValueError, match='RandAugment moves the pixels of the image, but not depth'):
    DepthEstimation(network(), augment=(ColorJitter(), RandAugment()))
  with pytest.raises(ValueError, match='encoder: expected vit'):
    dpt(swin('mu', image_size=32))
  with pytest.raises(
    ValueError, match=r'taps: expected four increasing numbers of blocks from 1 to 4, got \(1, 2, 3, 5\)'
  ):
    dpt(vit('mu/8', image_size=16, depth=4), (1, 2, 3, 5))
  with pytest.raises(ValueError, match='network: depth needs'):
    DepthEstimation(vit('mu/8', image_size=16))
