"""Prompts that are drawn from masks, losses in closed form, and a few steps of training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fmcv_jax.models.backbones.vit import vit
from fmcv_jax.models.dense.sam import FOREGROUND, NO_POINT, Masks, Prompts, sam
from fmcv_jax.objectives.prompted_segmentation import (
  PromptedSegmentation,
  area_mean,
  box_of,
  corrected,
  dice_loss,
  intersection_over_union,
  random_point,
)

NETWORK = sam('mu', image_size=64, patch_size=8, channels=16, depth=4, decoder_mlp_dim=32)
SIDE = 32  # of the masks


def squares(count=4):
  """Masks [1, count, 64, 64] of squares of 16 pixels at different places, the last one empty."""
  masks = np.zeros((1, count, 64, 64), np.uint8)
  for number in range(count - 1):
    masks[0, number, 8 * number : 8 * number + 16, 40 - 8 * number : 56 - 8 * number] = 1
  return masks


def test_points_lie_in_their_masks_and_all_pixels_are_drawn():
  mask = jnp.zeros((5, 7), bool).at[1:3, 2:5].set(True)
  points = np.asarray(jax.vmap(lambda key: random_point(mask, key))(jax.random.split(jax.random.key(0), 300)))
  assert {tuple(point) for point in points} == {(x + 0.5, y + 0.5) for x in (2, 3, 4) for y in (1, 2)}


def test_boxes_are_those_of_the_pixels():
  masks = jnp.zeros((2, 6, 8), bool).at[0, 1:4, 2:7].set(True)
  np.testing.assert_array_equal(box_of(masks), [[2, 1, 7, 4], [0, 0, 0, 0]])


def test_shares_of_pixels_are_means():
  masks = squares() > 0
  expected = masks.reshape(1, 4, 32, 2, 32, 2).mean((3, 5))
  np.testing.assert_allclose(area_mean(jnp.array(masks), 32), expected)


@pytest.mark.parametrize('share', [0.0, 1.0])
def test_first_prompts_are_a_point_or_the_box_of_an_object(share):
  objective = PromptedSegmentation(NETWORK, max_objects=4, box_share=share, box_noise=0.0)
  target = area_mean(jnp.array(squares() > 0), SIDE) > 0.5
  prompts = objective.first_prompts(target, 2.0, jax.random.key(0))
  for number in range(3):
    left, top, right, bottom = 40 - 8 * number, 8 * number, 56 - 8 * number, 8 * number + 16
    if share:
      assert prompts.labels[0, number].tolist() == [2, 3]
      np.testing.assert_allclose(prompts.points[0, number], [[left, top], [right, bottom]])
    else:
      assert prompts.labels[0, number].tolist() == [FOREGROUND, NO_POINT]
      x, y = prompts.points[0, number, 0]
      assert left <= x < right
      assert top <= y < bottom


def test_a_correction_lies_where_the_masks_differ_and_has_the_label_of_the_truth():
  target = jnp.zeros((1, 3, 8, 8), bool).at[0, :, 2:6, 2:6].set(True)
  logits = jnp.where(target, 1.0, -1.0)
  logits = logits.at[0, 0, 3, 4].set(-1.0).at[0, 1, 7, 0].set(1.0)  # one too few, one too many, and the third is right
  before = Prompts(jnp.zeros((1, 3, 2, 2)), jnp.ones((1, 3, 2), jnp.int32))
  prompts = corrected(before, logits, target, 4.0, jax.random.key(0))
  assert prompts.labels[0, :, 2].tolist() == [1, 0, 1]
  np.testing.assert_allclose(prompts.points[0, 0, 2], [4.5 * 4 - 0.5, 3.5 * 4 - 0.5])
  np.testing.assert_allclose(prompts.points[0, 1, 2], [0.5 * 4 - 0.5, 7.5 * 4 - 0.5])
  x, y = (prompts.points[0, 2, 2] + 0.5) / 4
  assert target[0, 2, int(y), int(x)]
  assert prompts.masks is logits


def test_losses_are_those_of_their_equations_for_the_best_of_three_masks():
  rng = np.random.default_rng(0)
  logits, iou = rng.normal(size=(1, 2, 3, 6, 6)).astype(np.float32), rng.uniform(size=(1, 2, 3)).astype(np.float32)
  target = rng.uniform(size=(1, 2, 6, 6)) < 0.5
  found, true_iou = PromptedSegmentation(NETWORK).losses(Masks(jnp.array(logits), jnp.array(iou)), jnp.array(target))
  for number in range(2):
    t = target[0, number].astype(np.float64)
    of_masks, overlaps = [], []
    for x in logits[0, number].astype(np.float64):
      p = 1 / (1 + np.exp(-x))
      right = np.where(t > 0, p, 1 - p)
      focal = (np.where(t > 0, 0.25, 0.75) * (1 - right) ** 2 * -np.log(right)).mean()
      dice = 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
      of_masks.append(20 * focal + dice)
      overlaps.append(((x > 0) & (t > 0)).sum() / ((x > 0) | (t > 0)).sum())
    np.testing.assert_allclose(true_iou[0, number], overlaps, rtol=1e-5)
    expected = min(of_masks) + np.mean((iou[0, number] - overlaps) ** 2)
    assert float(found[0, number]) == pytest.approx(expected, rel=1e-5)


def test_a_perfect_mask_has_no_dice_loss_and_an_iou_of_one():
  target = jnp.zeros((4, 4), bool).at[1:3].set(True)
  assert float(dice_loss(jnp.where(target, 50.0, -50.0), target)) == pytest.approx(0, abs=1e-6)
  assert float(intersection_over_union(target, target)) == 1
  assert float(intersection_over_union(~target, target)) == 0


def batch_of_squares():
  masks = squares()
  image = np.where(masks.any(1)[..., None], 200, 30).astype(np.uint8).repeat(3, -1)
  return {'image': image, 'masks': masks}


def test_empty_rows_have_no_weight_and_gradients_reach_every_part():
  objective = PromptedSegmentation(NETWORK, max_objects=4, corrections=1)
  params, _ = jax.jit(objective.init)(jax.random.key(0))

  @jax.jit
  def step(params, batch):
    def value(params):
      loss = objective.loss(params, batch, jax.random.key(0), {})
      return loss.value, loss

    return jax.grad(value, has_aux=True)(params)

  batch = batch_of_squares()
  gradients, loss = step(params, batch)
  assert float(loss.weight) == 3
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))
  assert not np.asarray(gradients['prompt']['frequencies']).any()
  assert np.asarray(gradients['prompt']['mask_embedding']['conv1']['kernel']).any()
  assert np.asarray(gradients['encoder']['group1']['whole']['attention']['relative_rows']).any()
  gradients, nothing = step(params, {**batch, 'masks': batch['masks'] * 0})
  assert float(nothing.weight) == float(nothing.total) == 0
  assert not any(np.asarray(x).any() for x in jax.tree.leaves(gradients))


@pytest.mark.slow
def test_training_finds_squares_by_a_point_or_box_and_better_after_a_correction():
  network = sam('mu', image_size=64, patch_size=8, channels=32, depth=4, decoder_mlp_dim=64)
  objective = PromptedSegmentation(network, max_objects=4, corrections=1)
  params, _ = jax.jit(objective.init)(jax.random.key(0))
  tx, batch = optax.adam(3e-3), batch_of_squares()

  def step(carry, key):
    params, state = carry

    def value(params):
      loss = objective.loss(params, batch, key, {})
      return loss.value, loss.metrics

    (_, metrics), gradients = jax.value_and_grad(value, has_aux=True)(params)
    updates, state = tx.update(gradients, state)
    return (optax.apply_updates(params, updates), state), (metrics['iou0'].value, metrics['iou1'].value)

  keys = jax.random.split(jax.random.key(1), 500)
  _, (first, second) = jax.jit(lambda carry: jax.lax.scan(step, carry, keys))((params, tx.init(params)))
  assert max(first[:10].mean(), second[:10].mean()) < 0.3
  assert first[-50:].mean() > 0.7
  assert second[-50:].mean() > 0.8


def test_networks_of_other_kinds_are_refused():
  with pytest.raises(ValueError, match='needs network'):
    PromptedSegmentation(vit('mu/8', image_size=16))
  with pytest.raises(ValueError, match='depth: 6 is not divisible by 4'):
    sam('mu', depth=6)
