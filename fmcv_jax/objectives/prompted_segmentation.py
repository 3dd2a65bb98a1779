"""Masks of what points and boxes indicate, learned with simulated corrections (Kirillov et al. 2023, appendix A)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from typing_extensions import override

from fmcv_jax.augment.apply import augment_fields, check_augments
from fmcv_jax.augment.base import Augment
from fmcv_jax.augment.normalize import Normalize
from fmcv_jax.bounds import Fraction, NonNegativeFloat, NonNegativeInt, PositiveInt
from fmcv_jax.fields import FIELDS
from fmcv_jax.models.dense.sam import BACKGROUND, BOTTOM_RIGHT, FOREGROUND, NO_POINT, TOP_LEFT, Masks, Prompts, Sam
from fmcv_jax.objectives.base import Loss, Mean, Objective, image_field
from fmcv_jax.objectives.outputs import Batch, Output, Params
from fmcv_jax.objectives.set_prediction import focal_loss

MASKS = {'masks': FIELDS['masks']}
ALPHA, GAMMA = 0.25, 2.0  # of the focal loss


@dataclasses.dataclass(frozen=True)
class PromptedSegmentation(Objective):
  """Focal and dice loss of the best of three masks, and squared error of the predicted IoU; per object of the batch.

  Each object is first indicated by a random point in it or by its box. Then points in what the last mask has too much
  or too little are added, with that mask itself, whose logits are not differentiated; these prompts have one mask.

  max_objects   rows of `masks` uint8 [B, N, S, S] of an image; rows without a pixel are no object
  corrections   points that are added, one after the other
  box_share     of the objects that a box indicates at first
  box_noise     standard deviation of the edges of boxes, as a fraction of their sides, at most 20 pixels
  focal_weight, dice_weight, iou_weight  of the losses
  """

  network: nn.Module
  max_objects: PositiveInt = 16
  corrections: NonNegativeInt = 2
  box_share: Fraction = 0.5
  box_noise: NonNegativeFloat = 0.1
  focal_weight: NonNegativeFloat = 20.0
  dice_weight: NonNegativeFloat = 1.0
  iou_weight: NonNegativeFloat = 1.0
  augment: tuple[Augment, ...] = ()
  normalize: Normalize = Normalize()

  def __post_init__(self) -> None:
    if not isinstance(self.network, Sam):
      raise ValueError('network: prompted_segmentation needs network.name=sam')
    check_augments(self.augment, MASKS)

  @property
  @override
  def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
    image = image_field(self.network)
    return {'image': image, 'masks': jax.ShapeDtypeStruct((self.max_objects, *image.shape[:2]), jnp.uint8)}

  @override
  def init(self, rng: jax.Array) -> tuple[Params, Any]:
    images = jnp.zeros((1, *self.network.input_shape))  # type: ignore[attr-defined]
    prompts = Prompts(jnp.zeros((1, 1, 1, 2)), jnp.ones((1, 1, 1), jnp.int32))
    return self.network.init(rng, images, prompts)['params'], {}

  @override
  def loss(self, params: Params, batch: Batch, rng: jax.Array, extra: Any) -> Loss:
    network: Any = self.network
    augment_rng, prompt_rng = jax.random.split(rng)
    batch = augment_fields(batch, MASKS, self.augment, augment_rng)
    images, masks = self.normalize(batch['image']), batch['masks'] > 0
    side = 4 * network.encoder.side
    target = area_mean(masks, side) > 0.5
    real = target.any((-2, -1))
    count = real.sum(dtype=jnp.float32)
    embeddings = network.apply({'params': params}, images, method='encode')
    prompts = self.first_prompts(target, network.image_size / side, prompt_rng)
    total, metrics = jnp.zeros(target.shape[:2]), {}
    for step in range(1 + self.corrections):
      found: Masks = network.apply({'params': params}, embeddings, prompts, method='decode')
      own = slice(1, None) if step == 0 else slice(1)  # one point may mean the whole or a part
      chosen = Masks(found.logits[:, :, own], found.iou[:, :, own])
      losses, iou = self.losses(chosen, target)
      total += losses / (1 + self.corrections)
      best = jnp.argmax(chosen.iou, -1)[..., None]
      metrics[f'iou{step}'] = Mean(jnp.sum(jnp.take_along_axis(iou, best, -1)[..., 0], where=real), count)
      if step < self.corrections:
        logits = jnp.take_along_axis(chosen.logits, best[..., None, None], 2)[:, :, 0]
        point_rng = jax.random.fold_in(prompt_rng, 1 + step)
        prompts = corrected(prompts, jax.lax.stop_gradient(logits), target, network.image_size / side, point_rng)
    return Loss(jnp.sum(total, where=real), count, metrics, {})

  def first_prompts(self, target: jax.Array, pixels: float, rng: jax.Array) -> Prompts:
    """A point in each mask of `target` bool [B, N, G, G], or its box; one of its pixels is `pixels` of the input."""
    kind_rng, point_rng, noise_rng = jax.random.split(rng, 3)
    point = random_point(target, point_rng) * pixels - 0.5  # the network adds it
    edges = box_of(target) * pixels
    lengths = jnp.tile(edges[..., 2:] - edges[..., :2], 2)
    noise = jnp.clip(jax.random.normal(noise_rng, edges.shape) * self.box_noise * lengths, -20, 20)
    corners = jnp.clip(edges + noise, 0, pixels * target.shape[-1]).reshape(*edges.shape[:2], 2, 2)
    single = jnp.stack([point, jnp.zeros_like(point)], 2)
    boxed = jax.random.bernoulli(kind_rng, self.box_share, target.shape[:2])
    points = jnp.where(boxed[..., None, None], corners, single)
    labels = jnp.where(boxed[..., None], jnp.array([TOP_LEFT, BOTTOM_RIGHT]), jnp.array([FOREGROUND, NO_POINT]))
    return Prompts(points, labels)

  def losses(self, found: Masks, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The loss of the best of M masks of each object [B, N], and the true IoU of all of them [B, N, M]."""
    true = jnp.broadcast_to(target[:, :, None], found.logits.shape)
    focal = focal_loss(found.logits, true, ALPHA, GAMMA).mean((-2, -1))
    of_masks = self.focal_weight * focal + self.dice_weight * dice_loss(found.logits, true)
    best = jnp.argmin(of_masks, -1)[..., None]
    iou = intersection_over_union(found.logits > 0, true)
    loss = jnp.take_along_axis(of_masks, best, -1)[..., 0] + self.iou_weight * jnp.mean((found.iou - iou) ** 2, -1)
    return loss, iou

  @override
  def outputs(self) -> Mapping[str, Output]:
    network: Any = self.network

    def image_embedding(params: Params, extra: Any, batch: Batch) -> jax.Array:
      images = self.normalize(batch['image'].astype(jnp.float32) / 255)
      left, top, right, bottom, height, width = (x[:, None] for x in batch['geometry'].T)
      inside = [
        jnp.arange(size) < jnp.round(side * size / (end - start))
        for size, start, end, side in ((images.shape[1], top, bottom, height), (images.shape[2], left, right, width))
      ]
      images = images * (inside[0][:, :, None] & inside[1][:, None])[..., None]  # padded with zeros, as published
      return network.apply({'params': params}, images, method='encode')

    def prompted_masks(params: Params, extra: Any, batch: Batch) -> dict[str, jax.Array]:
      prompts = Prompts(batch['points'], batch['point_labels'])
      found = network.apply({'params': params}, batch['image_embedding'], prompts, method='decode')
      return found._asdict()

    return {
      'image_embedding': Output(image_embedding, 'map', ('image', 'geometry')),
      'prompted_masks': Output(prompted_masks, 'array', ('image_embedding', 'points', 'point_labels')),
    }


def area_mean(masks: jax.Array, side: int) -> jax.Array:
  """Masks [B, N, S, S] as the shares of their pixels in each of [B, N, side, side]; S is a multiple of `side`."""
  batch, count, size, _ = masks.shape
  factor = size // side
  return masks.reshape(batch, count, side, factor, side, factor).mean((3, 5), dtype=jnp.float32)


def random_point(masks: jax.Array, rng: jax.Array) -> jax.Array:
  """A pixel of each mask bool [..., H, W] at random, as x and y of its center [..., 2]; any pixel of an empty one."""
  width = masks.shape[-1]
  noise = jax.random.uniform(rng, masks.shape)
  flat = jnp.where(masks, 1 + noise, noise).reshape(*masks.shape[:-2], -1)
  place = jnp.argmax(flat, -1)
  return jnp.stack([place % width, place // width], -1) + 0.5


def box_of(masks: jax.Array) -> jax.Array:
  """left, top, right and bottom [..., 4] of masks bool [..., H, W], in pixels; zeros of an empty one."""
  edges = []
  for axis in (-2, -1):  # columns, then rows
    any_of = masks.any(axis)
    size = any_of.shape[-1]
    first = jnp.argmax(any_of, -1)
    last = size - jnp.argmax(any_of[..., ::-1], -1)
    edges.append((first, jnp.where(any_of.any(-1), last, 0)))
  return jnp.stack([edges[0][0], edges[1][0], edges[0][1], edges[1][1]], -1).astype(jnp.float32)


def corrected(prompts: Prompts, logits: jax.Array, target: jax.Array, pixels: float, rng: jax.Array) -> Prompts:
  """Prompts with the mask that was found, and a point where it differs from the target, labeled by the target.

  Of an object that is found exactly, the point is one of its own.
  """
  wrong = (logits > 0) != target
  region = jnp.where(wrong.any((-2, -1), keepdims=True), wrong, target)
  point = random_point(region, rng)
  column, row = (jnp.floor(point[..., axis]).astype(jnp.int32) for axis in (0, 1))
  flat = target.reshape(*target.shape[:2], -1)
  inside = jnp.take_along_axis(flat, (row * target.shape[-1] + column)[..., None], -1)
  assert prompts.points is not None
  assert prompts.labels is not None
  points = jnp.concatenate([prompts.points, point[:, :, None] * pixels - 0.5], 2)
  labels = jnp.concatenate([prompts.labels, jnp.where(inside, FOREGROUND, BACKGROUND)], 2)
  return Prompts(points, labels, logits)


def dice_loss(logits: jax.Array, target: jax.Array) -> jax.Array:
  """1 - (2 |p t| + 1) / (|p| + |t| + 1) over the last two axes (Milletari et al. 2016)."""
  p = jax.nn.sigmoid(logits)
  both = jnp.sum(p, (-2, -1), where=target)
  return 1 - (2 * both + 1) / (p.sum((-2, -1)) + target.sum((-2, -1)) + 1)


def intersection_over_union(found: jax.Array, target: jax.Array) -> jax.Array:
  """Of masks bool over the last two axes; 1 where both are empty."""
  union = (found | target).sum((-2, -1))
  return jnp.where(union > 0, (found & target).sum((-2, -1)) / jnp.maximum(union, 1), 1.0)
