"""MMDiT (Esser et al. 2024, section 4): image and text as two streams with weights of their own and joint attention.

Letters in shapes: B batch, T patches, L text tokens, D width, H heads, K head dimension, E width of a text embedding.
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from typing_extensions import override

from fmcv_jax.bounds import PositiveInt
from fmcv_jax.diffusion.condition import Condition
from fmcv_jax.errors import did_you_mean
from fmcv_jax.fields import ImageSize, height_width
from fmcv_jax.models.common.attention.dispatch import Backend, attention
from fmcv_jax.models.common.layers import (
  ATTENTION_AXES,
  HEAD_AXES,
  Activation,
  BlockConfig,
  Dtype,
  Mlp,
  dense,
)
from fmcv_jax.models.common.patches import PATCH_AXES, patchify
from fmcv_jax.models.common.positions import sincos_2d
from fmcv_jax.models.common.scan import Remat, Unroll, rematerialize, scan_layers
from fmcv_jax.models.generative.adaln import MODULATION_AXES, final_layer, layer_norm_no_affine
from fmcv_jax.models.generative.conditioning import MLPEmbedder, timestep_embedding
from fmcv_jax.parallel.rules import with_logical_constraint


class Projections(nn.Module):
  """One stream's side of the attention: (query, key, value) [B, T, H, K] of its tokens, and `leave` what comes back.

  `pre_only` for a stream of which nothing is read afterwards.
  """

  logical_axes = (*ATTENTION_AXES,)

  config: BlockConfig
  width: int
  qk_norm: bool
  pre_only: bool = False

  @override
  def setup(self) -> None:
    c = self.config
    self.query, self.key, self.value = (dense(self.width, c.dtype, name) for name in ('query', 'key', 'value'))
    if self.qk_norm:
      self.query_norm, self.key_norm = (
        nn.RMSNorm(epsilon=c.eps, dtype=jnp.dtype(c.dtype), name=name) for name in ('query_norm', 'key_norm')
      )
    if not self.pre_only:
      self.out = dense(self.width, c.dtype, 'out')

  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values [B, T, H, K] of x [B, T, D]."""
    shape = (*x.shape[:2], self.config.num_heads, -1)
    query, key, value = (project(x).reshape(shape) for project in (self.query, self.key, self.value))
    if self.qk_norm:
      query, key = self.query_norm(query), self.key_norm(key)
    return query, key, value

  def project_out(self, y: jax.Array) -> jax.Array:
    """Output projection of the attention: [B, T, H, K] -> [B, T, D]."""
    return self.out(y.reshape(*y.shape[:2], self.width))


class Stream(nn.Module):
  """One stream's half of a block: x [B, T, D], modulated by c [B, D], before and after the joint attention."""

  logical_axes = (*MODULATION_AXES,)

  config: BlockConfig
  width: int
  qk_norm: bool
  pre_only: bool = False

  @override
  def setup(self) -> None:
    parts = 2 if self.pre_only else 6
    self.modulation = dense(parts * self.width, self.config.dtype, 'modulation', init=nn.initializers.zeros)
    self.norm = layer_norm_no_affine(self.config)
    self.attention = Projections(self.config, self.width, self.qk_norm, self.pre_only)
    if not self.pre_only:
      self.mlp = Mlp(self.config)

  def pre_attention(self, x: jax.Array, c: jax.Array) -> Any:
    """(queries, keys and values [B, T, H, K]; the modulation that `post_attention` takes), of x [B, T, D] and c [B,
    D]."""
    shift, scale, *parts = jnp.split(self.modulation(jax.nn.silu(c))[:, None], 2 if self.pre_only else 6, axis=-1)
    return self.attention(self.norm(x) * (1 + scale) + shift), parts

  def post_attention(self, x: jax.Array, y: jax.Array, parts: Any) -> jax.Array:
    """x [B, T, D] after the attention output y [B, T, H, K] and the MLP, both gated by `parts` of `pre_attention`."""
    gate1, shift2, scale2, gate2 = parts
    x = x + (gate1 * self.attention.project_out(y)).astype(x.dtype)
    y = self.mlp(self.norm(x) * (1 + scale2) + shift2)
    return x + (gate2 * y).astype(x.dtype)


class JointBlock(nn.Module):
  """Patches x [B, T, D] and text [B, L, D], modulated by c [B, D], in the form of a scan; the `last` drops the text.

  mask: bool [B, 1, 1, T + L], the tokens that are attended to; None for all.
  """

  config: BlockConfig
  width: int
  qk_norm: bool
  last: bool = False

  @nn.compact
  def __call__(
    self, carry: Any, index: jax.Array, c: jax.Array, mask: jax.Array | None, tap: int | None
  ) -> tuple[Any, None]:
    x, words, tapped = carry
    x = with_logical_constraint(x, 'batch', 'tokens', 'width')
    image = Stream(self.config, self.width, self.qk_norm, name='image')
    text = Stream(self.config, self.width, self.qk_norm, self.last, name='text')
    (mine, parts), (others, text_parts) = image.pre_attention(x, c), text.pre_attention(words, c)
    both = (jnp.concatenate(pair, axis=1) for pair in zip(mine, others, strict=True))
    y = attention(*both, mask=mask, backend=self.config.attention)
    y, text_y = y[:, : x.shape[1]], y[:, x.shape[1] :]
    x = with_logical_constraint(image.post_attention(x, y, parts), 'batch', 'tokens', 'width')
    words = (
      None
      if self.last
      else with_logical_constraint(text.post_attention(words, text_y, text_parts), 'batch', None, 'width')
    )
    return (x, words, None if tapped is None else jnp.where(index == tap, x, tapped)), None


class MMDiT(nn.Module):
  """Noisy images or latents [B, H, W, channels], time [B] (in steps, 0 to 1000), Condition -> [B, H, W, out_channels].

  Reads `text` [B, L, E] and adds its `pooled_text` to the time. `positions` (reach, side): the table of them is
  laid out for side x side patches, reach / side apart, and smaller images are its middle, so that one network serves
  several sizes (their section 5.3.2); None for a table of each image's own size, one apart.
  """

  logical_axes = (
    *PATCH_AXES,
    (r'(.*/)?enter/kernel', ('embed', None)),
    (r'(.*/)?enter/bias', (None,)),
    *MODULATION_AXES,
    *HEAD_AXES,
  )

  patch_size: int
  width: int
  depth: int
  block: BlockConfig
  channels: int = 16
  out_channels: int = 16
  image_size: ImageSize = 128
  qk_norm: bool = False
  positions: tuple[int, int] | None = None
  remat: Remat = 'none'
  unroll: Unroll = 1

  condition_keys: ClassVar[tuple[str, ...]] = ('text', 'text_mask', 'pooled_text')

  @property
  def input_shape(self) -> tuple[int, int, int]:
    """Shape of one x."""
    return (*height_width(self.image_size), self.channels)

  @nn.compact
  def __call__(
    self, x: jax.Array, time: jax.Array, condition: Condition, *, train: bool = False, tap: int | None = None
  ) -> Any:
    """With `tap`, also the tokens [B, T, D] after that block (counted from 1)."""
    dtype = self.block.dtype
    x, grid = patchify(x, self.patch_size)
    x = dense(self.width, dtype, 'patch')(x)
    x = with_logical_constraint(x + jnp.asarray(self._table(*grid), x.dtype), 'batch', 'tokens', 'width')
    c = MLPEmbedder(self.width, dtype, name='time_embedding')(timestep_embedding(time, 256).astype(dtype))
    c = c + MLPEmbedder(self.width, dtype, name='text_embedding')(condition['pooled_text'])
    words = dense(self.width, dtype, 'enter')(condition['text'])
    mask = None
    if 'text_mask' in condition:
      everywhere = jnp.ones(x.shape[:2], bool)
      mask = jnp.concatenate([everywhere, condition['text_mask']], axis=1)[:, None, None, :]

    in_axes = (0, nn.broadcast, nn.broadcast, nn.broadcast)
    stack = scan_layers(JointBlock, self.depth - 1, in_axes, remat=self.remat, unroll=self.unroll)
    blocks = stack(self.block, self.width, self.qk_norm, name='blocks')
    last = rematerialize(JointBlock, self.remat)(self.block, self.width, self.qk_norm, True, name='last')
    carry = (x, words, None if tap is None else jnp.zeros_like(x))
    carry, _ = blocks(carry, jnp.arange(1, self.depth), c, mask, tap)
    (x, _, tapped), _ = last(carry, self.depth, c, mask, tap)

    x = final_layer(x, c, self.block, grid, self.patch_size, self.out_channels)
    return x if tap is None else (x, tapped)

  def _table(self, rows: int, columns: int) -> np.ndarray:
    if self.positions is None:
      return sincos_2d(rows, columns, self.width)
    reach, largest = self.positions
    step = reach / largest
    top, left = ((largest - side) // 2 * step for side in (rows, columns))
    return sincos_2d(rows, columns, self.width, first=(top, left), step=step)


# Depth is all that differs: 64 wide for each block, and a head for each. mu is for tests.
SIZES: dict[str, tuple[int, int, int]] = {
  'mu': (32, 2, 2),
  **{f'd{depth}': (64 * depth, depth, depth) for depth in (15, 18, 21, 24, 30, 38)},
}


def mmdit(
  variant: str = 'd24/2',
  *,
  image_size: ImageSize = 128,
  channels: PositiveInt = 16,
  out_channels: PositiveInt | None = None,
  width: PositiveInt | None = None,
  depth: PositiveInt | None = None,
  num_heads: PositiveInt | None = None,
  qk_norm: bool = True,
  positions: tuple[PositiveInt, PositiveInt] | None = None,
  activation: Activation = 'gelu_tanh',
  attention: Backend = 'auto',
  remat: Remat = 'none',
  unroll: Unroll = 1,
  dtype: Dtype = 'float32',
) -> MMDiT:
  """A named MMDiT, 'depth/patch' as in 'd24/2'. image_size is the side, or the (height, width), of x: 128 for 1024
  pixels in f8.

  qk_norm    queries and keys at unit scale before they meet (RMSNorm), which bfloat16 needs at high resolution
  positions  as in `MMDiT`; (64, 192) in Stable Diffusion 3
  """
  size, _, patch = variant.partition('/')
  if size not in SIZES or not patch.isdigit():
    raise ValueError(f'unknown MMDiT variant {variant!r}; {did_you_mean(variant, [f"{name}/2" for name in SIZES])}')
  if any(side % int(patch) for side in height_width(image_size)):
    raise ValueError(f'image_size: {image_size} is not divisible by the patch size {patch}')
  longest = max(height_width(image_size)) // int(patch)
  if positions is not None and positions[1] < longest:
    raise ValueError(f'positions: {positions[1]} is less than the {longest} patches of a side')
  defaults = SIZES[size]
  width, depth = width or defaults[0], depth or defaults[1]
  if depth < 2:
    raise ValueError(f'depth: expected at least 2, got {depth}')
  return MMDiT(
    patch_size=int(patch),
    width=width,
    depth=depth,
    block=BlockConfig(num_heads or defaults[2], 4 * width, activation, attention=attention, dtype=dtype),
    channels=channels,
    out_channels=out_channels or channels,
    image_size=image_size,
    qk_norm=qk_norm,
    positions=positions,
    remat=remat,
    unroll=unroll,
  )
