"""RandAugment's operations (Cubuk et al. 2020) on whole batches: every operation is a table, a blend or a warp.

A layer draws one operation for each image. Computing all of them and keeping one would cost sixteen images for each;
instead all images go through the same three stages, and an image's operation sets the parameters of one of them and
leaves the others at the identity:

  table   256 entries for each image and channel: auto_contrast, equalize, invert, posterize, solarize, solarize_add,
          contrast, brightness
  blend   with a second image: color (with its gray), sharpness (with its smoothed self); and cutout
  warp    rotate, shear_x, shear_y, translate_x, translate_y

Pixels are whole numbers from 0 to 255 in float32 throughout, and every operation is PIL's, rounding included.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from fmcv_jax.augment.base import within
from fmcv_jax.augment.warp import warp

ENTRIES = 256

# Operations by recipe, in the order of their sources: section 3 of the paper; `distort_image_with_randaugment` in
# big_vision/pp/autoaugment.py, after tensorflow/tpu's EfficientNet; `_RAND_INCREASING_TRANSFORMS` in timm's
# data/auto_augment.py, which is 'rand-...-inc1' there, as DeiT used it.
RECIPES: dict[str, tuple[str, ...]] = {
  'paper': (
    *('identity', 'auto_contrast', 'equalize', 'rotate', 'solarize', 'color', 'posterize', 'contrast', 'brightness'),
    *('sharpness', 'shear_x', 'shear_y', 'translate_x', 'translate_y'),
  ),
  'big_vision': (
    *('auto_contrast', 'equalize', 'invert', 'rotate', 'posterize', 'solarize', 'color', 'contrast', 'brightness'),
    *('sharpness', 'shear_x', 'shear_y', 'translate_x', 'translate_y', 'cutout', 'solarize_add'),
  ),
  'timm': (
    *('auto_contrast', 'equalize', 'invert', 'rotate', 'posterize', 'solarize', 'solarize_add', 'color', 'contrast'),
    *('brightness', 'sharpness', 'shear_x', 'shear_y', 'translate_x', 'translate_y'),
  ),
}
OPERATIONS = tuple(sorted({name for names in RECIPES.values() for name in names}))
MOVING = frozenset(('rotate', 'shear_x', 'shear_y', 'translate_x', 'translate_y'))
INCREASING = {'paper': False, 'big_vision': False, 'timm': True}


def apply_operations(
  images: jax.Array,
  operation: jax.Array,
  level: jax.Array,
  sign: jax.Array,
  center: jax.Array,
  *,
  names: tuple[str, ...],
  increasing: bool,
  fill: float,
) -> jax.Array:
  """One layer. images [B, H, W, 3], whole numbers in [0, 255]; for each image an index into names [B], a level [B].

  level      magnitude / 10, which is 1 at the published maximum
  sign       1 or -1 [B], the direction of the operations that have one
  center     of the cutout, as shares of height and width [B, 2]
  increasing timm's scale: every operation grows stronger with the level. Google's: posterize and solarize grow
             weaker, and the factor of color, contrast, brightness and sharpness runs from 0.1 by way of 1 to 1.9

  Translations reach 0.45 of the side, timm's share; Google's 100 pixels are that of 224.
  """
  batch, height, width, _ = images.shape
  on = {name: operation == index for index, name in enumerate(names)}
  factor = jnp.maximum(0.1, 1 + sign * 0.9 * level) if increasing else 0.1 + 1.8 * level

  def plane(value: jax.Array) -> jax.Array:  # a number for each image, against images
    return value[:, None, None, None]

  def column(value: jax.Array) -> jax.Array:  # a number for each image, against tables [B, 3, 256]
    return value[:, None, None]

  entry = jnp.arange(float(ENTRIES))
  bits, threshold = jnp.floor(4 * level), jnp.floor(256 * level)
  if increasing:
    bits, threshold = 4 - bits, 256 - threshold
  coarse = column(2 ** (8 - jnp.clip(bits, 1, 8)))  # 0 bits would be a black image
  added = column(jnp.minimum(128, jnp.floor(110 * level)))
  counts = histogram(images)
  tables = {
    'auto_contrast': lambda: stretched(counts),
    'equalize': lambda: equalized(counts),
    'invert': lambda: 255 - entry,
    'posterize': lambda: jnp.floor(entry / coarse) * coarse,
    'solarize': lambda: jnp.where(entry < column(threshold), entry, 255 - entry),
    'solarize_add': lambda: jnp.where(entry < 128, jnp.minimum(255, entry + added), entry),
    'contrast': lambda: blend(column(jnp.round(mean_gray(counts))), entry, column(factor)),
    'brightness': lambda: blend(0.0, entry, column(factor)),
  }
  if drawn := [name for name in tables if name in on]:
    choices = jnp.stack([jnp.broadcast_to(tables[name](), (batch, 3, ENTRIES)) for name in drawn])
    chosen = jnp.stack([on[name] for name in drawn])
    # A product, because XLA on the CPU would make nested selects again for every pixel; it is exact in any precision.
    table = jnp.einsum('kb,kbcv->bcv', chosen.astype(jnp.float32), choices)
    images = jnp.where(plane(chosen.any(0)), lookup(images, table), images)

  second = images
  if 'color' in on:
    second = jnp.where(plane(on['color']), gray(images), second)
  if 'sharpness' in on:
    second = jnp.where(plane(on['sharpness']), smooth(images), second)
  images = blend(second, images, plane(factor))
  if 'cutout' in on:  # a square of 80 of 224 pixels at level 1, cut off at the border
    half = jnp.floor(40 / 224 * min(height, width) * level)
    middle = jnp.floor(center * jnp.array([height, width]))
    rows = within(middle[:, 0] - half, middle[:, 0] + half, height)
    columns = within(middle[:, 1] - half, middle[:, 1] + half, width)
    images = jnp.where(plane(on['cutout']) & (rows[:, :, None] & columns[:, None])[..., None], fill, images)

  # Last, so that only the loop over layers reads it: XLA on the CPU does a good part of a warp again for each reader.
  if on.keys() & MOVING:

    def amount(name: str, most: float) -> Any:
      return jnp.where(on[name], sign * level * most, 0.0) if name in on else jnp.zeros(batch)

    angle = amount('rotate', -math.radians(30))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x, y = width / 2, height / 2  # images turn about their center, and are sheared from the corner at the origin
    matrix = [
      [cos, sin + amount('shear_x', 0.3), x - cos * x - sin * y + amount('translate_x', 0.45 * width)],
      [-sin + amount('shear_y', 0.3), cos, y + sin * x - cos * y + amount('translate_y', 0.45 * height)],
    ]
    images = jnp.floor(warp(images, jnp.stack([jnp.stack(row, -1) for row in matrix], -2), fill))
  return images


def blend(second: jax.Array | float, images: jax.Array, factor: jax.Array) -> jax.Array:
  """`second` at factor 0, `images` at 1, and beyond."""
  return jnp.floor(jnp.clip(second + factor * (images - second), 0, 255))


def gray(images: jax.Array) -> jax.Array:
  """Luma (ITU-R 601) [B, H, W, 1], with PIL's whole-number weights."""
  red, green, blue = (images[..., channel, None] for channel in range(3))
  return jnp.floor((19595 * red + 38470 * green + 7471 * blue + 32768) / 65536)


def mean_gray(counts: jax.Array) -> jax.Array:
  """Mean luma of an image [B] from its histograms [B, 3, 256]."""
  means = (counts * jnp.arange(ENTRIES)).sum(-1) / counts.sum(-1)
  return (means * jnp.array([0.299, 0.587, 0.114])).sum(-1)


def smooth(images: jax.Array) -> jax.Array:
  """PIL's ImageFilter.SMOOTH: the mean of 3 x 3 pixels with the middle counted five times; the border stays."""
  rows = images[:, :-2] + images[:, 1:-1] + images[:, 2:]
  total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * images[:, 1:-1, 1:-1]
  return images.at[:, 1:-1, 1:-1].set(jnp.floor(total / 13 + 0.5))


def stretched(counts: jax.Array) -> jax.Array:
  """Histograms [..., 256] -> the table that takes the darkest entry to 0 and the lightest to 255 (autocontrast)."""
  low, high = _darkest(counts), 255 - _darkest(counts[..., ::-1])
  entry = jnp.arange(ENTRIES)
  table = jnp.clip((entry - low) * 255 // jnp.maximum(high - low, 1), 0, 255)
  return jnp.where(high > low, table, entry).astype(jnp.float32)


def equalized(counts: jax.Array) -> jax.Array:
  """Histograms [..., 256] -> the table that makes all entries equally frequent."""
  lightest = 255 - _darkest(counts[..., ::-1])
  step = jnp.sum(jnp.where(jnp.arange(ENTRIES) < lightest, counts, 0), -1, keepdims=True) // 255
  below = jnp.cumsum(counts, -1) - counts
  table = jnp.minimum((below + step // 2) // jnp.maximum(step, 1), 255)
  return jnp.where(step > 0, table, jnp.arange(ENTRIES)).astype(jnp.float32)


def _darkest(counts: jax.Array) -> jax.Array:
  return jnp.argmax(counts > 0, axis=-1, keepdims=True)


# A TPU reads a table pixel by pixel but multiplies matrices for nothing: there an entry is a row and a column of a
# 16 x 16 table, both one-hot. Elsewhere that would cost 40 times what indexing does.


def histogram(images: jax.Array) -> jax.Array:
  """images [B, H, W, 3] of whole numbers in [0, 255] -> how often each occurs, int32 [B, 3, 256]."""
  return jax.lax.platform_dependent(channels_first(images), tpu=histogram_by_matmul, default=histogram_by_index)


def lookup(images: jax.Array, table: jax.Array) -> jax.Array:
  """images [B, H, W, 3] of whole numbers in [0, 255], table [B, 3, 256] of the same -> the table's entries."""
  entries = jax.lax.platform_dependent(channels_first(images), table, tpu=lookup_by_matmul, default=lookup_by_index)
  return jnp.moveaxis(entries, 1, -1).reshape(images.shape)


def channels_first(images: jax.Array) -> jax.Array:
  """Images as indices int32 [B, 3, H * W]."""
  batch, height, width, channels = images.shape
  return jnp.moveaxis(images.astype(jnp.int32).reshape(batch, height * width, channels), -1, 1)


def histogram_by_index(pixels: jax.Array) -> jax.Array:
  """Histograms int32 [B, C, ENTRIES] of pixels int [B, C, P], by scattered counts."""
  channels = pixels.shape[1]
  bins = (pixels + ENTRIES * jnp.arange(channels)[:, None]).reshape(pixels.shape[0], -1)
  counts = jax.vmap(lambda image: jnp.zeros(channels * ENTRIES, jnp.int32).at[image].add(1))(bins)
  return counts.reshape(-1, channels, ENTRIES)


def lookup_by_index(pixels: jax.Array, table: jax.Array) -> jax.Array:
  """table [B, C, ENTRIES] at pixels int [B, C, P], by gathers."""
  return jnp.take_along_axis(table, pixels, axis=-1, mode='clip')


def histogram_by_matmul(pixels: jax.Array) -> jax.Array:
  """As `histogram_by_index`, by products of one-hot digits, which a TPU does faster than scattered counts."""
  high, low = _digits(pixels)
  counts = jnp.einsum('bchp,bclp->bchl', high, low, preferred_element_type=jnp.float32)
  return counts.reshape(*pixels.shape[:2], ENTRIES).astype(jnp.int32)


def lookup_by_matmul(pixels: jax.Array, table: jax.Array) -> jax.Array:
  """As `lookup_by_index`, by products of one-hot digits, which a TPU does faster than gathers."""
  high, low = _digits(pixels)
  square = table.astype(jnp.bfloat16).reshape(*table.shape[:2], 16, 16)
  rows = jnp.einsum('bchl,bclp->bchp', square, low, preferred_element_type=jnp.float32)
  return jnp.where(high > 0, rows, 0).sum(2)


def _digits(pixels: jax.Array) -> tuple[jax.Array, ...]:
  """The two base-16 digits of each pixel, one-hot [B, 3, 16, H * W]; bfloat16 holds these and whole numbers to 256."""
  digit = jnp.arange(16)[:, None]
  return tuple((part[:, :, None] == digit).astype(jnp.bfloat16) for part in (pixels // 16, pixels % 16))
