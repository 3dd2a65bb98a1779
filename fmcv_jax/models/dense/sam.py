"""Segment Anything (Kirillov et al. 2023): masks of what points, boxes and earlier masks indicate in an image.

The image is encoded once; each prompt is then decoded against its embedding. Letters in shapes: B images, P prompts of
an image, N points of a prompt, T tokens, D channels, G = S / patch the side of the embedding.
"""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from typing_extensions import override

from fmcv_jax.bounds import PositiveFloat, PositiveInt
from fmcv_jax.errors import did_you_mean
from fmcv_jax.models.common.conv_blocks import GLOROT, PixelExpand
from fmcv_jax.models.common.layers import NORM_AXES, Activation, Attention, BlockConfig, Dtype, Mlp, dense, layer_norm
from fmcv_jax.models.common.patches import patchify
from fmcv_jax.models.common.scan import Remat, Unroll
from fmcv_jax.models.dense.heads import MlpHead
from fmcv_jax.models.dense.sam_encoder import GROUPS, SamEncoder
from fmcv_jax.parallel.rules import with_logical_constraint

# Labels of points.
BACKGROUND, FOREGROUND, TOP_LEFT, BOTTOM_RIGHT, NO_POINT, PADDING = 0, 1, 2, 3, -1, -10
MASKS = 4  # the first for prompts without ambiguity, the others for the whole, a part, and a part of that
MASK_HIDDEN = 16  # channels of the embedding of masks


class Masks(NamedTuple):
  """Masks of each prompt, float32: `logits` [B, P, 4, 4 G, 4 G], above 0 inside, and `iou` [B, P, 4], their predicted
  intersection over union with the true mask. The first is for prompts without ambiguity, the others for several."""

  logits: jax.Array
  iou: jax.Array


class Prompts(NamedTuple):
  """Prompts of each image; None for what there is none of.

  points  float [B, P, N, 2], x and y in pixels of the network's input
  labels  int [B, P, N]: 1 inside, 0 outside, 2 and 3 the corners of a box (left top, right bottom), -1 no point (which
          closes a prompt without a box), -10 padding (a token of zeros)
  masks   float [B, P, 4 G, 4 G], logits of an earlier mask
  """

  points: jax.Array | None = None
  labels: jax.Array | None = None
  masks: jax.Array | None = None


def make_prompts(
  points: jax.Array | None = None, labels: jax.Array | None = None, boxes: jax.Array | None = None
) -> Prompts:
  """Prompts of points float [B, P, N, 2] with labels [B, P, N], boxes float [B, P, 4] (left, top, right, bottom), or
  both of each, in the order of the published model."""
  if boxes is None:
    if points is None or labels is None:
      return Prompts()
    return Prompts(
      jnp.pad(points, ((0, 0), (0, 0), (0, 1), (0, 0))),
      jnp.pad(labels, ((0, 0), (0, 0), (0, 1)), constant_values=NO_POINT),
    )
  corners = boxes.reshape(*boxes.shape[:2], 2, 2)
  kinds = jnp.broadcast_to(jnp.array([TOP_LEFT, BOTTOM_RIGHT]), corners.shape[:3])
  if points is None or labels is None:
    return Prompts(corners, kinds)
  return Prompts(jnp.concatenate([points, corners], 2), jnp.concatenate([labels, kinds], 2))


class MaskEmbedding(nn.Module):
  """Logits of masks [B, 4 G, 4 G] -> [B, G, G, channels]."""

  logical_axes = (
    (r'(.*/)?mask_embedding/conv[123]/kernel', (None, 'embed')),
    (r'(.*/)?mask_embedding/conv[123]/bias', (None,)),
    NORM_AXES,
  )

  channels: int
  dtype: str

  @nn.compact
  def __call__(self, masks: jax.Array) -> jax.Array:
    x = masks[..., None]
    for number, features in ((1, MASK_HIDDEN // 4), (2, MASK_HIDDEN)):
      batch, side, _, _ = x.shape
      x = dense(features, self.dtype, f'conv{number}')(patchify(x, 2)[0]).reshape(batch, side // 2, side // 2, -1)
      x = nn.gelu(layer_norm(1e-6, self.dtype, f'norm{number}')(x), approximate=False)
    return dense(self.channels, self.dtype, 'conv3')(x)


class PromptEncoder(nn.Module):
  """Prompts -> tokens of points [B, P, N, D], or None, and embeddings of masks [B, P, G, G, D] or [1, 1, 1, 1, D]."""

  logical_axes = (
    (r'(.*/)?(frequencies|no_point|no_mask)', (None, 'embed')),
    (r'(.*/)?kinds', (None, None, 'embed')),
  )

  channels: int
  side: int
  image_size: int
  dtype: str

  @override
  def setup(self) -> None:
    normal = nn.initializers.normal(1.0)
    # Random Fourier features, which are not learned (Tancik et al. 2020).
    self.frequencies = self.param('frequencies', normal, (2, self.channels // 2))
    self.kinds = self.param(
      'kinds', normal, (4, 1, self.channels)
    )  # by label: outside, inside, and two corners of a box
    self.no_point = self.param('no_point', normal, (1, self.channels))
    self.no_mask = self.param('no_mask', normal, (1, self.channels))
    self.mask_embedding = MaskEmbedding(self.channels, self.dtype)

  def position(self, fractions: jax.Array) -> jax.Array:
    """Positions [..., 2], x and y from 0 to 1 -> [..., channels]."""
    frequencies = jax.lax.stop_gradient(self.frequencies)
    angles = 2 * jnp.pi * jnp.matmul(2 * fractions.astype(jnp.float32) - 1, frequencies, precision='highest')
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)

  def grid(self) -> jax.Array:
    """Positions of the embedding of an image, [G, G, channels]."""
    place = (jnp.arange(self.side) + 0.5) / self.side
    return self.position(jnp.stack(jnp.meshgrid(place, place), -1))

  def __call__(self, prompts: Prompts) -> tuple[jax.Array | None, jax.Array]:
    """Tokens, and what is added to the embedding of the image."""
    around = self.no_mask[0, None, None, None, None]
    if prompts.masks is not None:
      masks = prompts.masks.reshape(-1, *prompts.masks.shape[2:])
      around = self.mask_embedding(masks).reshape(*prompts.masks.shape[:2], self.side, self.side, -1)
    elif self.is_initializing():
      self.mask_embedding(jnp.zeros((1, 4 * self.side, 4 * self.side)))
    if prompts.points is None or prompts.labels is None:
      return None, around
    label = prompts.labels[..., None]
    x = self.position((prompts.points + 0.5) / self.image_size)  # of the centers of pixels
    x = jnp.where(label == NO_POINT, self.no_point[0], jnp.where(label == PADDING, 0, x))
    for kind in range(len(self.kinds)):
      x = jnp.where(label == kind, x + self.kinds[kind, 0], x)
    return x, around


class TwoWayBlock(nn.Module):
  """Tokens x [B, T, D] attend to each other and to the image [B, G * G, D], and the image to the tokens.

  places, grid  positions that are added to tokens and image wherever they are queries or keys
  """

  logical_axes = (NORM_AXES,)

  config: BlockConfig
  first: bool

  @nn.compact
  def __call__(self, x: jax.Array, image: jax.Array, places: jax.Array, grid: jax.Array) -> tuple[jax.Array, jax.Array]:
    c = self.config
    norms = [layer_norm(c.eps, c.dtype, f'norm{number}') for number in (1, 2, 3, 4)]
    attend = Attention(whole(c, x.shape[-1]), name='self_attention')
    # The tokens of the first block are their own positions, and it has no residual connection, as published.
    x = attend(x, x) if self.first else x + attend(x + places, x + places, values=x)
    x = norms[0](x)
    x = norms[1](x + Attention(c, name='token_attention')(x + places, image + grid, values=image))
    x = norms[2](x + Mlp(c, name='mlp')(x))
    image = norms[3](image + Attention(c, name='image_attention')(image + grid, x + places, values=x))
    return x, image


def whole(config: BlockConfig, width: int) -> BlockConfig:
  """The config with heads that make up the whole width."""
  return dataclasses.replace(config, head_dim=width // config.num_heads)


class MaskDecoder(nn.Module):
  """Tokens of prompts [B, T, D] and embeddings of images [B, G, G, D] -> logits [B, 4, 4 G, 4 G] and IoU [B, 4].

  A network of each mask makes a token of the decoder into a filter of the upscaled image.
  """

  logical_axes = (
    (r'(.*/)?(mask_tokens|iou_token)', (None, 'embed')),
    (r'(.*/)?upscale[12]/kernel', ('embed', None)),
    (r'(.*/)?upscale[12]/bias', (None,)),
    NORM_AXES,
  )

  config: BlockConfig
  iou_hidden: int

  @nn.compact
  def __call__(self, tokens: jax.Array | None, image: jax.Array, grid: jax.Array) -> tuple[jax.Array, jax.Array]:
    c, (batch, side, _, channels) = self.config, image.shape
    normal = nn.initializers.normal(1.0)
    own = [self.param('iou_token', normal, (1, channels)), self.param('mask_tokens', normal, (MASKS, channels))]
    places = jnp.broadcast_to(jnp.concatenate(own), (batch, 1 + MASKS, channels))
    if tokens is not None:
      places = jnp.concatenate([places, tokens], 1)
    places = places.astype(c.dtype)
    grid = grid.reshape(1, side * side, channels).astype(c.dtype)
    x, image = places, image.reshape(batch, side * side, channels)
    for number in (1, 2):
      x, image = TwoWayBlock(c, number == 1, name=f'layer{number}')(x, image, places, grid)
      image = with_logical_constraint(image, 'batch', 'tokens', None)
    x = x + Attention(c, name='last_attention')(x + places, image + grid, values=image)
    x = layer_norm(1e-5, c.dtype, 'last_norm')(x)
    y = PixelExpand(channels // 4, 2, c.dtype, name='upscale1')(image.reshape(batch, side, side, channels))
    y = nn.gelu(layer_norm(1e-6, c.dtype, 'upscale_norm')(y), approximate=False)
    y = nn.gelu(PixelExpand(channels // 8, 2, c.dtype, name='upscale2')(y), approximate=False)
    filters = nn.vmap(MlpHead, variable_axes={'params': 0}, split_rngs={'params': True}, in_axes=1, out_axes=1)
    kernels = filters(channels // 8, c.dtype, GLOROT, 'relu', name='blocks')(x[:, 1 : 1 + MASKS]).astype(y.dtype)
    logits = jnp.einsum('bmc,bhwc->bmhw', kernels, y, preferred_element_type=jnp.float32)
    return logits, MlpHead(MASKS, c.dtype, GLOROT, 'relu', self.iou_hidden, name='iou')(x[:, 0])


class Sam(nn.Module):
  """Segment Anything; the image encoder, and what decodes prompts against an embedding of an image."""

  encoder: SamEncoder
  decoder_block: BlockConfig
  iou_hidden: int = 256

  @property
  def image_size(self) -> int:
    """Side of the images in pixels."""
    return self.encoder.image_size

  @property
  def input_shape(self) -> tuple[int, int, int]:
    """(height, width, channels) of the images that the network is made for."""
    return self.image_size, self.image_size, 3

  @override
  def setup(self) -> None:
    channels, dtype = self.encoder.channels, self.decoder_block.dtype
    self.prompt = PromptEncoder(channels, self.encoder.side, self.image_size, dtype)
    self.decoder = MaskDecoder(self.decoder_block, self.iou_hidden)

  def encode(self, images: jax.Array) -> jax.Array:
    """Normalized images [B, S, S, 3], padded with zeros -> embeddings [B, G, G, D] for `decode`."""
    return self.encoder(images)

  def decode(self, embeddings: jax.Array, prompts: Prompts) -> Masks:
    """The masks of all prompts of each image; one prompt that indicates nothing without any."""
    tokens, around = self.prompt(prompts)
    batch, side = len(embeddings), self.encoder.side
    count = next((x.shape[1] for x in prompts if x is not None), 1)
    image = embeddings[:, None] + around.astype(embeddings.dtype)
    flat = jnp.broadcast_to(image, (batch, count, *image.shape[2:])).reshape(batch * count, side, side, -1)
    tokens = None if tokens is None else tokens.reshape(batch * count, *tokens.shape[2:])
    logits, iou = self.decoder(tokens, flat, self.prompt.grid())
    return Masks(logits.reshape(batch, count, *logits.shape[1:]), iou.reshape(batch, count, -1))

  def __call__(self, images: jax.Array, prompts: Prompts = Prompts()) -> Masks:
    """Both in one."""
    return self.decode(self.encode(images), prompts)


# Width, depth, and heads of the image encoder; mu is for tests.
SAM_SIZES: dict[str, tuple[int, int, int]] = {
  'mu': (32, 12, 2),
  'B': (768, 12, 12),
  'L': (1024, 24, 16),
  'H': (1280, 32, 16),
}


def sam(
  variant: str = 'B',
  *,
  image_size: PositiveInt = 1024,
  patch_size: PositiveInt = 16,
  window: PositiveInt = 14,
  width: PositiveInt | None = None,
  depth: PositiveInt | None = None,
  num_heads: PositiveInt | None = None,
  mlp_dim: PositiveInt | None = None,
  activation: Activation = 'gelu',
  qkv_bias: bool = True,
  eps: PositiveFloat = 1e-6,
  channels: PositiveInt = 256,
  decoder_heads: PositiveInt = 8,
  decoder_mlp_dim: PositiveInt = 2048,
  decoder_eps: PositiveFloat = 1e-5,
  iou_hidden: PositiveInt = 256,
  remat: Remat = 'none',
  unroll: Unroll = 1,
  dtype: Dtype = 'float32',
) -> Sam:
  """Segment Anything by its published sizes, B, L and H; width, depth, heads and mlp_dim override the size's."""
  if variant not in SAM_SIZES:
    raise ValueError(f'unknown SAM variant {variant!r}; {did_you_mean(variant, SAM_SIZES)}')
  if image_size % patch_size:
    raise ValueError(f'image_size {image_size} is not divisible by the patch size {patch_size}')
  defaults = SAM_SIZES[variant]
  width, depth, num_heads = width or defaults[0], depth or defaults[1], num_heads or defaults[2]
  if depth % GROUPS:
    raise ValueError(f'depth: {depth} is not divisible by {GROUPS}; the last block of each quarter is global')
  if channels % (2 * decoder_heads):
    raise ValueError(f'channels: {channels} is not divisible by twice the {decoder_heads} heads of the decoder')
  block = BlockConfig(num_heads, mlp_dim or 4 * width, activation=activation, qkv_bias=qkv_bias, eps=eps, dtype=dtype)
  # Attention between tokens and image has half of the width.
  head_dim = channels // (2 * decoder_heads)
  decoder = BlockConfig(
    decoder_heads, decoder_mlp_dim, activation='relu', eps=decoder_eps, head_dim=head_dim, dtype=dtype
  )
  encoder = SamEncoder(patch_size, width, depth, block, image_size, window, channels, remat, unroll)
  return Sam(encoder, decoder, iou_hidden)
