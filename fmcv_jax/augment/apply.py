"""A sequence of augmentations for a batch: its images, and what belongs to positions in them."""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from fmcv_jax.augment.base import Augment, GeometricAugment
from fmcv_jax.fields import Field
from fmcv_jax.shapes import AnyArray, Bool, Float, Shaped


def apply_augments(
  images: Shaped[AnyArray, ' batch *frames height width channels'], augments: Sequence[Augment], rng: jax.Array
) -> Float[jax.Array, ' batch *frames height width channels']:
  """uint8 [B, H, W, C] or clips [B, T, H, W, C] -> float32 in [0, 1], after every augmentation in order.

  All frames of a clip are changed alike: the random numbers are drawn once for each example.
  """
  return augment_fields({'image': images}, {}, augments, rng)['image']


def augment_fields(
  batch: Mapping[str, AnyArray], fields: Mapping[str, Field], augments: Sequence[Augment], rng: jax.Array
) -> dict[str, AnyArray]:
  """The batch after every augmentation in order: images as `apply_augments` gives them, the rest moved along.

  batch   'image' uint8 [B, H, W, C] or [B, T, H, W, C], and further fields [B, ...]
  fields  the meaning of the further fields; those that are not listed stay unchanged. Boxes float32 [B, N, 4] become
          the boxes around their moved corners, cut at the border; a row that leaves the image gets `pad_value` in all
          fields of its group. Points outside of the image keep their coordinates, or become invisible.
  """
  images = jnp.asarray(batch['image'], jnp.float32) / 255
  height, width = images.shape[-3:-1]
  out = dict(batch)
  for index, augment in enumerate(augments):
    own = jax.random.fold_in(rng, index)
    call: Callable[[jax.Array], jax.Array] = functools.partial(augment, rng=own)
    if isinstance(augment, GeometricAugment):
      matrix = augment.draw(len(images), height, width, own)
      call = functools.partial(augment.images, matrix=matrix)
      out |= _moved(augment, matrix, out, fields, (height, width))
    images = _each_frame(call, images)
  return {**out, 'image': images}


def check_augments(augments: Sequence[Augment], fields: Mapping[str, Field]) -> None:
  """Raises ValueError for an augmentation that moves pixels but cannot move these fields along."""
  others = ', '.join(name for name, field in fields.items() if field.spatial)
  for augment in augments:
    if others and augment.moves and not isinstance(augment, GeometricAugment):
      raise ValueError(
        f'augment: {type(augment).__name__} moves the pixels of the image, but not {others}; use affine and flip, '
        f'which move both, or operations that move nothing'
      )


def _each_frame(call: Callable[[jax.Array], jax.Array], images: AnyArray) -> jax.Array:
  for _ in range(images.ndim - 4):
    call = jax.vmap(call, in_axes=1, out_axes=1)
  return call(images)


def _moved(
  augment: GeometricAugment,
  matrix: jax.Array,
  batch: Mapping[str, AnyArray],
  fields: Mapping[str, Field],
  sides: tuple[int, int],
) -> dict[str, jax.Array]:
  """The spatial fields of the batch after one change of geometry, and the rows of their groups."""
  out: dict[str, jax.Array] = {}
  kept: dict[str, jax.Array] = {}
  for name, field in fields.items():
    x = batch[name]
    if field.kind == 'map':
      out[name] = augment.maps(x, matrix, field.fill)
    elif field.kind == 'masks':
      out[name] = jnp.moveaxis(augment.maps(jnp.moveaxis(x, 1, -1), matrix, field.fill), -1, 1)
    elif field.kind == 'boxes':
      out[name], inside = move_boxes(x, matrix, sides)
      kept[str(field.group)] = inside & (x != field.pad_value).any(-1)  # padded rows stay as they are
    elif field.kind == 'points':
      out[name] = move_points(x, matrix, sides)
    elif field.kind in ('image', 'clip'):
      out[name] = _move_pixels(augment, matrix, x)
  for name, field in fields.items():
    if field.kind == 'masks' and field.group is not None and field.group not in kept:  # of objects without boxes
      kept[field.group] = (out[name] > 0).any((-2, -1))
  for name, field in fields.items():
    if field.group in kept:
      x = out.get(name, batch[name])
      inside = kept[field.group].reshape(*kept[field.group].shape, *(1,) * (x.ndim - 2))
      out[name] = jnp.where(inside, x, jnp.asarray(field.pad_value, x.dtype))
  return out


def _move_pixels(augment: GeometricAugment, matrix: jax.Array, pixels: AnyArray) -> jax.Array:
  """Further images or clips, in the dtype that they have: uint8, or floats in [0, 1]."""
  if not jnp.issubdtype(pixels.dtype, jnp.integer):
    return _each_frame(functools.partial(augment.images, matrix=matrix), pixels)
  moved = _each_frame(functools.partial(augment.images, matrix=matrix), pixels.astype(jnp.float32) / 255)
  return jnp.round(moved * 255).astype(pixels.dtype)


def move_points(
  points: Float[AnyArray, ' batch *points coordinates'], matrix: Float[AnyArray, 'batch 2 3'], sides: tuple[int, int]
) -> Float[jax.Array, ' batch *points coordinates']:
  """points [B, ..., 2 or 3] through the inverse of matrix [B, 2, 3]; a third column becomes 0 outside of the image."""
  inverse = jnp.linalg.inv(matrix[:, :, :2])
  lead = (len(points), *(1,) * (points.ndim - 2))
  shifted = points[..., :2] - matrix[:, :, 2].reshape(*lead, 2)
  moved = jnp.einsum('bij,b...j->b...i', inverse, shifted, precision='highest').astype(points.dtype)
  if points.shape[-1] == 2:
    return moved
  inside = ((moved >= 0) & (moved < jnp.array(sides[::-1]))).all(-1)
  return jnp.concatenate([moved, jnp.where(inside, points[..., 2], 0)[..., None]], -1)


def move_boxes(
  boxes: Float[AnyArray, 'batch boxes 4'], matrix: Float[AnyArray, 'batch 2 3'], sides: tuple[int, int]
) -> tuple[Float[jax.Array, 'batch boxes 4'], Bool[jax.Array, 'batch boxes']]:
  """boxes [B, N, 4] around their moved corners, cut at the border; bool [B, N]: those of which something is left.

  As on the host, a cut box keeps at least a pixel along each side, or goes.
  """
  left, top, right, bottom = (boxes[..., side] for side in range(4))
  corners = jnp.stack([jnp.stack(c, -1) for c in ((left, top), (right, top), (left, bottom), (right, bottom))], -2)
  moved = move_points(corners, matrix, sides)
  whole = jnp.concatenate([moved.min(-2), moved.max(-2)], -1)
  limits = jnp.array([*sides[::-1], *sides[::-1]], whole.dtype)
  cut = jnp.clip(whole, 0, limits)
  lengths = cut[..., 2:] - cut[..., :2]
  return cut, jnp.isclose(cut, whole, atol=1e-3).all(-1) | (lengths >= 1).all(-1)
