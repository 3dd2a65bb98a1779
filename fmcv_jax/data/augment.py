"""Augmentation on the device, inside the train step: pure functions of images [B, H, W, 3] in [0, 1] and a key.

The host decodes and crops only; what is here costs no host time, differs for every example and step, and is the same on
any mesh.
"""

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from fmcv_jax.data.randaugment import INCREASING, OPERATIONS, RECIPES, apply_operations, within
from fmcv_jax.data.warp import warp

# ImageNet's statistics, with which most published networks were trained; CLIP has its own.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class Normalize:
  """(x - mean) / std by channel of images in [0, 1]; the default maps them to [-1, 1]."""

  mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
  std: tuple[float, float, float] = (0.5, 0.5, 0.5)

  def __call__(self, images: jax.Array) -> jax.Array:
    return (images - jnp.array(self.mean, images.dtype)) / jnp.array(self.std, images.dtype)

  def undo(self, images: jax.Array) -> jax.Array:
    """Back to [0, 1]."""
    return images * jnp.array(self.std, images.dtype) + jnp.array(self.mean, images.dtype)


class Augment(abc.ABC):
  """One random change of a batch of images, drawn for each image anew."""

  @abc.abstractmethod
  def __call__(self, images: jax.Array, rng: jax.Array) -> jax.Array:
    """images float32 [B, H, W, 3] in [0, 1] -> the same shape and range."""


def augmented(images: jax.Array, augments: Sequence[Augment], rng: jax.Array) -> jax.Array:
  """uint8 [B, H, W, 3] -> float32 in [0, 1], after every augmentation in order."""
  images = images.astype(jnp.float32) / 255
  for index, augment in enumerate(augments):
    images = augment(images, jax.random.fold_in(rng, index))
  return images


@dataclasses.dataclass(frozen=True)
class Flip(Augment):
  """Mirrors left and right with the given probability."""

  probability: float = 0.5

  def __post_init__(self):
    _check_share('probability', self.probability)

  def __call__(self, images, rng):
    return jnp.where(_drawn(rng, self.probability, images), images[:, :, ::-1], images)


@dataclasses.dataclass(frozen=True)
class Invert(Augment):
  """The negative of the image, with the given probability."""

  probability: float = 0.5

  def __post_init__(self):
    _check_share('probability', self.probability)

  def __call__(self, images, rng):
    return jnp.where(_drawn(rng, self.probability, images), 1 - images, images)


@dataclasses.dataclass(frozen=True)
class Solarize(Augment):
  """The negative of what is at least as light as the threshold, with the given probability (as in BYOL and DINO)."""

  threshold: float = 0.5
  probability: float = 0.2

  def __post_init__(self):
    _check_share('threshold', self.threshold)
    _check_share('probability', self.probability)

  def __call__(self, images, rng):
    solarized = _drawn(rng, self.probability, images) & (images >= self.threshold)
    return jnp.where(solarized, 1 - images, images)


@dataclasses.dataclass(frozen=True)
class Affine(Augment):
  """Zooms, turns, shifts and shears the image about its centre, in one warp with bilinear sampling.

  scale      bounds of the zoom, drawn uniformly in the logarithm; at 2 things look twice as large
  ratio      bounds of the stretch of width over height, the same way
  rotation   in degrees; it and the two below are drawn from -x to x
  translate  along each axis, as a share of that side
  shear      how far a row moves sideways for each row of height
  fill       what lies outside: 1 is white; None continues the nearest edge
  """

  scale: tuple[float, float] = (1.0, 1.0)
  ratio: tuple[float, float] = (1.0, 1.0)
  rotation: float = 0.0
  translate: float = 0.0
  shear: float = 0.0
  fill: float | None = 1.0

  def __post_init__(self):
    _check_bounds('scale', self.scale)
    _check_bounds('ratio', self.ratio)
    for name in ('rotation', 'translate', 'shear'):
      if getattr(self, name) < 0:
        raise ValueError(f'{name}: expected at least 0, drawn on both sides of it; got {getattr(self, name)}')
    if self.fill is not None:
      _check_share('fill', self.fill)

  def __call__(self, images, rng):
    batch, height, width, _ = images.shape
    return warp(images, self.matrices(batch, height, width, rng), self.fill)

  def matrices(self, batch: int, height: int, width: int, rng: jax.Array) -> jax.Array:
    """One for each image [B, 2, 3], from the point (x, y) of the result back to the point of the image."""
    rngs = jax.random.split(rng, 6)

    def within_bounds(rng, bounds):
      return jnp.exp(jax.random.uniform(rng, (batch,), minval=math.log(bounds[0]), maxval=math.log(bounds[1])))

    def around_zero(rng, most):
      return jax.random.uniform(rng, (batch,), minval=-most, maxval=most)

    scale, stretch = within_bounds(rngs[0], self.scale), jnp.sqrt(within_bounds(rngs[1], self.ratio))
    angle, shear = around_zero(rngs[2], math.radians(self.rotation)), around_zero(rngs[3], self.shear)
    right, down = around_zero(rngs[4], self.translate * width), around_zero(rngs[5], self.translate * height)

    # Backwards, so that every step is its inverse.
    across, along = 1 / (scale * stretch), stretch / scale
    a, b = jnp.cos(angle) * across, (shear - jnp.sin(angle)) * along
    c, d = jnp.sin(angle) * across, jnp.cos(angle) * along
    x, y = width / 2, height / 2
    rows = [[a, b, x - a * (x + right) - b * (y + down)], [c, d, y - c * (x + right) - d * (y + down)]]
    return jnp.stack([jnp.stack(row, -1) for row in rows], -2)


@dataclasses.dataclass(frozen=True)
class ColorJitter(Augment):
  """Brightness, contrast, saturation and hue, with torchvision's meaning of the factors; then perhaps all grey.

  brightness, contrast, saturation   the factor is drawn from max(0, 1 - x) to 1 + x
  hue                                share of a full turn, at most 0.5, drawn from -x to x
  probability                        that an image is jittered at all
  grayscale                          probability that an image is grey in the end, jittered or not

  All of it is one 3 x 3 matrix and one offset for each image. Three things differ from torchvision: the order is the
  one above instead of random; values leave [0, 1] in between and are clipped once, at the end; and hue turns colours
  about the grey axis of the RGB cube instead of in HSV, which keeps the mean of the channels.
  """

  brightness: float = 0.0
  contrast: float = 0.0
  saturation: float = 0.0
  hue: float = 0.0
  grayscale: float = 0.0
  probability: float = 1.0

  def __post_init__(self):
    for name in ('brightness', 'contrast', 'saturation'):
      if getattr(self, name) < 0:
        raise ValueError(f'{name}: expected at least 0, got {getattr(self, name)}')
    if not 0 <= self.hue <= 0.5:
      raise ValueError(f'hue: expected a share of a turn between 0 and 0.5, got {self.hue}')
    _check_share('grayscale', self.grayscale)
    _check_share('probability', self.probability)

  def __call__(self, images, rng):
    batch = images.shape[0]
    rngs = jax.random.split(rng, 6)
    jittered = jax.random.bernoulli(rngs[0], self.probability, (batch,))

    def factor(rng, width):
      drawn = jax.random.uniform(rng, (batch,), minval=max(0.0, 1 - width), maxval=1 + width)
      return jnp.where(jittered, drawn, 1.0)

    brightness, contrast = factor(rngs[1], self.brightness), factor(rngs[2], self.contrast)
    saturation = factor(rngs[3], self.saturation)
    turn = jnp.where(jittered, jax.random.uniform(rngs[4], (batch,), minval=-self.hue, maxval=self.hue), 0.0)
    grayscale = jax.random.bernoulli(rngs[5], self.grayscale, (batch,))
    return jittered_colors(images, brightness, contrast, saturation, turn, grayscale)


LUMA = (0.299, 0.587, 0.114)


def jittered_colors(images, brightness, contrast, saturation, turn, grayscale):
  """Images [B, H, W, 3] with their factors, turns of the hue and whether they become grey, each [B]."""
  identity, luma = jnp.eye(3), jnp.broadcast_to(jnp.array(LUMA), (3, 3))

  def from_gray(factor):
    factor = factor[:, None, None]
    return factor * identity + (1 - factor) * luma

  # Rodrigues' formula for the axis (1, 1, 1).
  cos, sin = jnp.cos(2 * math.pi * turn)[:, None, None], jnp.sin(2 * math.pi * turn)[:, None, None]
  across = jnp.array([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
  hue = cos * identity + (1 - cos) / 3 + sin * across

  matrix = jnp.matmul(hue, from_gray(saturation), precision='highest')
  matrix = jnp.matmul(from_gray(1 - grayscale.astype(jnp.float32)), matrix, precision='highest')
  matrix *= (brightness * contrast)[:, None, None]
  # Contrast moves towards the image's mean grey, which no later step changes.
  offset = brightness * (1 - contrast) * (images * jnp.array(LUMA)).sum(-1).mean((1, 2))

  red, green, blue = (images[..., channel, None] * matrix[:, None, None, :, channel] for channel in range(3))
  return jnp.clip(red + green + blue + offset[:, None, None, None], 0, 1)


@dataclasses.dataclass(frozen=True)
class Blur(Augment):
  """Gaussian blur with the given probability; sigma in pixels is drawn uniformly (as in SimCLR and DINO).

  The kernel reaches a twentieth of the short side to either side, so that it has 23 taps at 224 pixels as in SimCLR,
  and the border reflects. Each image has its own kernel: as a band matrix from the left and one from the right.
  """

  probability: float = 0.5
  sigma: tuple[float, float] = (0.1, 2.0)

  def __post_init__(self):
    _check_share('probability', self.probability)
    _check_bounds('sigma', self.sigma)

  def __call__(self, images, rng):
    drawn, sigma_rng = jax.random.split(rng)
    sigma = jax.random.uniform(sigma_rng, images.shape[:1], minval=self.sigma[0], maxval=self.sigma[1])
    return jnp.where(_drawn(drawn, self.probability, images), blurred(images, sigma), images)


def blurred(images: jax.Array, sigma: jax.Array) -> jax.Array:
  """Images [B, H, W, C] after a Gaussian of sigma [B] pixels."""
  radius = max(1, min(images.shape[1:3]) // 20)

  def weights(size):  # [B, size, size], from the pixel in the last axis to the one before it
    to, source = jnp.arange(size)[:, None], jnp.arange(size)

    def tap(distance):
      return jnp.exp(-0.5 * jnp.square(distance / sigma[:, None, None])) * (jnp.abs(distance) <= radius)

    before, beyond = tap(to + source) * (source > 0), tap(2 * (size - 1) - to - source) * (source < size - 1)
    kernel = tap(to - source) + before + beyond
    return kernel / kernel.sum(-1, keepdims=True)

  height, width = images.shape[1:3]
  images = jnp.einsum('bij,bjwc->biwc', weights(height), images, precision='highest')
  return jnp.clip(jnp.einsum('bij,bhjc->bhic', weights(width), images, precision='highest'), 0, 1)


@dataclasses.dataclass(frozen=True)
class RandomErasing(Augment):
  """Overwrites a random box with the given probability (Zhong et al. 2020).

  area    bounds of the box's share of the image, drawn uniformly
  ratio   bounds of width / height, drawn uniformly in the logarithm from those with which the box fits
  value   'noise', drawn from [0, 1] for each value anew, or what to fill in

  Cutout (DeVries & Taylor 2017), its square inside the image: probability=1, area=(a, a), ratio=(1, 1), value=0.5.
  """

  probability: float = 0.25
  area: tuple[float, float] = (0.02, 1 / 3)
  ratio: tuple[float, float] = (0.3, 1 / 0.3)
  value: Literal['noise'] | float = 'noise'

  def __post_init__(self):
    _check_share('probability', self.probability)
    _check_bounds('area', self.area, most=1.0)
    _check_bounds('ratio', self.ratio)
    if self.value != 'noise':
      if isinstance(self.value, str):
        raise ValueError(f"value: expected 'noise' or a number, got {self.value!r}")
      _check_share('value', self.value)

  def __call__(self, images, rng):
    rngs = jax.random.split(rng, 6)
    rows, columns = self.boxes(images.shape, rngs[:4])
    inside = _drawn(rngs[4], self.probability, images) & (rows[:, :, None] & columns[:, None])[..., None]
    value = jax.random.uniform(rngs[5], images.shape) if self.value == 'noise' else self.value
    return jnp.where(inside, value, images)

  def boxes(self, shape, rngs):
    """Whether each row bool [B, H] and each column bool [B, W] crosses the box."""
    (batch, height, width, _), square = shape, shape[1] / shape[2]
    share = jax.random.uniform(rngs[0], (batch,), minval=self.area[0], maxval=self.area[1])
    low = jnp.log(jnp.maximum(self.ratio[0], share / square))  # narrower than this the box would be too high
    high = jnp.log(jnp.minimum(self.ratio[1], 1 / (share * square)))
    ratio = jnp.exp(low + (high - low) * jax.random.uniform(rngs[1], (batch,)))

    def side(length, size, rng):
      length = jnp.clip(jnp.round(length), 1, size)
      start = jnp.floor(jax.random.uniform(rng, (batch,)) * (size - length + 1))
      return within(start, start + length, size)

    pixels = share * (height * width)
    return side(jnp.sqrt(pixels / ratio), height, rngs[2]), side(jnp.sqrt(pixels * ratio), width, rngs[3])


@dataclasses.dataclass(frozen=True)
class ThreeAugment(Augment):
  """Grey, solarized or blurred, each image one of the three (DeiT III, Touvron et al. 2022, section 3)."""

  threshold: float = 0.5
  sigma: tuple[float, float] = (0.1, 2.0)

  def __post_init__(self):
    _check_share('threshold', self.threshold)
    _check_bounds('sigma', self.sigma)

  def __call__(self, images, rng):
    choice_rng, blur_rng = jax.random.split(rng)
    choice = jax.random.randint(choice_rng, (images.shape[0], 1, 1, 1), 0, 3)
    gray = ColorJitter(grayscale=1.0)(images, rng)
    negative = Solarize(self.threshold, probability=1.0)(images, rng)
    return jnp.select([choice == 0, choice == 1], [gray, negative], Blur(1.0, self.sigma)(images, blur_rng))


@dataclasses.dataclass(frozen=True)
class RandAugment(Augment):
  """A few operations on each image, drawn with replacement, all of one magnitude (Cubuk et al. 2020).

  layers         operations one after the other
  magnitude      10 is the largest published; beyond it the scale goes on, as in big_vision's randaug(2, 15)
  magnitude_std  each operation draws its magnitude around it (timm's mstd), from 0 to the larger of it and 10
  probability    of each operation (timm's p)
  recipe         which operations and which scale: 'paper' and 'big_vision' Google's, on which posterize and solarize
                 grow weaker with the magnitude, 'timm' the increasing one ('inc1'), to use with probability=0.5,
                 magnitude_std=0.5
  operations     the operations to draw from, instead of the recipe's
  fill           what lies outside of a warped image, and in a cutout

  Works on, and returns, multiples of 1/255. Warps are bilinear (nearest or bicubic in the sources), and posterize keeps
  at least one bit of eight.
  """

  layers: int = 2
  magnitude: float = 10.0
  magnitude_std: float = 0.0
  probability: float = 1.0
  recipe: Literal['paper', 'big_vision', 'timm'] = 'big_vision'
  operations: tuple[str, ...] | None = None
  fill: float = 0.5

  def __post_init__(self):
    if self.layers < 1:
      raise ValueError(f'layers: expected at least 1, got {self.layers}')
    for name in ('magnitude', 'magnitude_std'):
      if getattr(self, name) < 0:
        raise ValueError(f'{name}: expected at least 0, got {getattr(self, name)}')
    if self.recipe not in RECIPES:
      raise ValueError(f'recipe: {self.recipe!r} is not one of {", ".join(RECIPES)}')
    if unknown := set(self.operations or ()) - set(OPERATIONS):
      raise ValueError(f'operations: unknown {", ".join(sorted(unknown))}; known: {", ".join(OPERATIONS)}')
    if self.operations is not None and (not self.operations or len(set(self.operations)) < len(self.operations)):
      raise ValueError(f'operations: expected different names, at least one; got {self.operations}')
    _check_share('probability', self.probability)
    _check_share('fill', self.fill)

  def __call__(self, images, rng):
    names = self.operations or RECIPES[self.recipe]
    batch = images.shape[:1]

    def layer(pixels, rng):
      rngs = jax.random.split(rng, 5)
      operation = jax.random.randint(rngs[0], batch, 0, len(names))
      magnitude = self.magnitude + self.magnitude_std * jax.random.normal(rngs[2], batch)
      pixels = apply_operations(
        pixels,
        jnp.where(jax.random.bernoulli(rngs[1], self.probability, batch), operation, -1),
        level=jnp.clip(magnitude, 0, max(10.0, self.magnitude)) / 10,
        sign=jax.random.rademacher(rngs[3], batch, jnp.float32),
        centre=jax.random.uniform(rngs[4], (*batch, 2)),
        names=names,
        increasing=INCREASING[self.recipe],
        fill=round(self.fill * 255),
      )
      return pixels, None

    pixels, _ = jax.lax.scan(layer, jnp.round(images * 255), jax.random.split(rng, self.layers))
    return pixels / 255


def _drawn(rng, probability, images):
  return jax.random.bernoulli(rng, probability, (images.shape[0], 1, 1, 1))


def _check_share(name: str, value: float) -> None:
  if not 0 <= value <= 1:
    raise ValueError(f'{name}: expected a number between 0 and 1, got {value}')


def _check_bounds(name: str, bounds: tuple[float, float], most: float = math.inf) -> None:
  if not 0 < bounds[0] <= bounds[1] <= most:
    raise ValueError(f'{name}: expected 0 < low <= high{"" if most == math.inf else f" <= {most:g}"}, got {bounds}')


AUGMENTS: dict[str, type[Augment]] = {
  'affine': Affine,
  'blur': Blur,
  'color_jitter': ColorJitter,
  'flip': Flip,
  'invert': Invert,
  'rand_augment': RandAugment,
  'random_erasing': RandomErasing,
  'solarize': Solarize,
  'three_augment': ThreeAugment,
}
