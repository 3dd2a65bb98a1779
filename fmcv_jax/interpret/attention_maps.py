"""Attention maps of transformers: attention of every layer, rollout, gradient-weighted relevance, and object masks.

Networks sow the queries, keys and values of their blocks only on request (see `Attention`); everything here is computed
from them, so there is no second network and no cost in training.

Letters in shapes: L depth, B batch, H heads, T tokens, K head dimension, D width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fmcv_jax.models.backbones.vit import AttentionPool, query_pool
from fmcv_jax.models.common.layers import layer_norm
from fmcv_jax.models.common.norms import l2_normalize
from fmcv_jax.models.common.outputs import AttentionNetwork, Features, PatchNetwork, linear_head
from fmcv_jax.models.common.patches import patch_features


class Projections(NamedTuple):
  """Queries, keys and values of every layer, [L, B, T, H, K]."""

  query: jax.Array
  key: jax.Array
  value: jax.Array

  def weights(self) -> jax.Array:
    """Attention of every layer, float32 [L, B, H, T, T]: rows are queries, columns are keys."""
    logits = jnp.einsum('lbqhk,lbthk->lbhqt', self.query, self.key, preferred_element_type=jnp.float32)
    return jax.nn.softmax(logits * self.query.shape[-1] ** -0.5, axis=-1)

  def last(self) -> 'Projections':
    """Projections of the last layer, [1, B, T, H, K]."""
    return Projections(*(x[-1:] for x in self))


def apply_with_intermediates(network: AttentionNetwork, params: Any, images: jax.Array) -> tuple[Features, Projections]:
  """Features of normalized images [B, height, width, 3], and the attention projections of every block."""
  features, kept = network.apply({'params': params}, images, mutable=['intermediates'])
  return features, Projections(*kept['intermediates']['blocks']['attention']['projections'][0])


def class_attention(network: AttentionNetwork, params: Any, images: jax.Array) -> jax.Array:
  """Attention from the class token to the patches in the last layer: float32 [B, H, rows, columns], sum at most 1.

  Without a class token: the mean over all query patches.
  """
  _, projections = apply_with_intermediates(network, params, images)
  return on_grid(from_class_token(projections.last().weights()[0], network), network, images)


def from_class_token(weights: jax.Array, network: AttentionNetwork) -> jax.Array:
  """weights [..., T, T] -> [..., patches]: the class token's row, or the mean of all patches' rows without one."""
  rows = weights[..., :1, :] if network.pool == 'cls' else weights[..., network.prefix :, :]
  return rows.mean(-2)[..., network.prefix :]


def on_grid(patches: jax.Array, network: AttentionNetwork, images: jax.Array) -> jax.Array:
  """[..., rows * columns] -> [..., rows, columns]."""
  height, width = images.shape[1:3]
  return patches.reshape(*patches.shape[:-1], height // network.patch_size, width // network.patch_size)


def rollout(weights: jax.Array) -> jax.Array:
  """Attention rollout (Abnar & Zuidema 2020): [L, B, H, T, T] -> [B, T, T], rows sum to 1.

  The product over layers of (A + 1) / 2, where A is the mean over heads and 1 the residual path.
  """
  identity = jnp.eye(weights.shape[-1])
  mixed = (weights.mean(2) + identity) / 2
  return jax.lax.scan(lambda total, layer: (layer @ total, None), jnp.broadcast_to(identity, mixed.shape[1:]), mixed)[0]


def relevance(
  network: AttentionNetwork, params: Any, images: jax.Array, score: Callable[[Features], jax.Array]
) -> tuple[jax.Array, jax.Array]:
  """Relevance of each token for a score: (float32 [B, T, T], the score [B]); score(features) returns one number per
  image.

  Chefer et al. 2021 (Generic attention-model explainability, eq. 5 and 6): R <- R + E_h[max(dS/dA * A, 0)] R, layer by
  layer from R = 1. The gradient of the weights A is the gradient of their output times the values.
  """
  _, projections = apply_with_intermediates(network, params, images)

  def total(mixed: jax.Array) -> tuple[jax.Array, jax.Array]:
    variables = {'params': params, 'probes': {'blocks': {'attention': {'mixed': mixed}}}}
    features: Any = network.apply(variables, images)
    scores = score(features)
    return scores.sum(), scores

  gradient, scores = jax.grad(total, has_aux=True)(jnp.zeros_like(projections.query))
  by_weights = jnp.einsum('lbqhk,lbthk->lbhqt', gradient, projections.value, preferred_element_type=jnp.float32)
  layers = jax.nn.relu(by_weights * projections.weights()).mean(2)
  start = jnp.broadcast_to(jnp.eye(layers.shape[-1]), layers.shape[1:])
  return jax.lax.scan(lambda r, layer: (r + layer @ r, None), start, layers)[0], scores


def patch_embeddings(network: AttentionNetwork, params: Any, images: jax.Array) -> jax.Array:
  """Embedding of each patch in the output space of the network: unit vectors, float32 [B, rows, columns, E].

  For heat maps of the similarity with a text. Without a class token each patch is pooled alone. With one, the value of
  the patch in the last block is passed through the class token's path (MaskCLIP, Zhou et al. 2022, section 3.2),
  because the last patch tokens were not trained to match texts.
  """
  block, (features, projections) = network.stack.block, apply_with_intermediates(network, params, images)
  if network.pool == 'cls':
    value, out = projections.value[-1], jax.tree.map(lambda x: x[-1], params['blocks']['attention']['out'])
    tokens = value.reshape(*value.shape[:2], -1) @ out['kernel'].astype(value.dtype) + out['bias'].astype(value.dtype)
    tokens = _apply(layer_norm(block.eps, block.dtype, 'norm'), params['norm'], tokens)
  else:
    tokens = features.tokens
  tokens = tokens[:, network.prefix :]
  if network.pool == 'map':
    alone = tokens.reshape(-1, 1, network.width)
    tokens = _apply(AttentionPool(block), params['map_pool'], alone).reshape(tokens.shape)
  if network.pool == 'queries':
    alone, pool = tokens.reshape(-1, 1, network.width), params['query_pool']
    first = _apply(query_pool(network, queries=1), {**pool, 'probe': pool['probe'][:1]}, alone)
    tokens = first.reshape(*tokens.shape[:2], -1)
  if network.num_classes:
    tokens = _apply(linear_head(network.num_classes, network.head_bias, block.dtype), params['head'], tokens)
  return jnp.moveaxis(on_grid(jnp.moveaxis(l2_normalize(tokens), -1, 1), network, images), 1, -1)


def _apply(module: nn.Module, params: Any, x: jax.Array) -> Any:
  return module.apply({'params': params}, x)


def pca_rgb(tokens: np.ndarray) -> np.ndarray:
  """First three principal components of patch features [N, rows, columns, D], fitted jointly, as RGB in [0, 1].

  As in DINOv2 (Oquab et al. 2023, figure 1), without its mask: similar colors are similar features. Each component is
  scaled from its 2nd to its 98th percentile; its sign makes its third moment positive, so colors are stable.
  """
  rows = tokens.reshape(-1, tokens.shape[-1]).astype(np.float64)
  rows = rows - rows.mean(0)
  _, vectors = np.linalg.eigh(rows.T @ rows)
  parts = rows @ vectors[:, ::-1][:, :3]
  parts = parts * np.where((parts**3).sum(0) < 0, -1, 1)
  low, high = np.percentile(parts, (2, 98), axis=0)
  return np.clip((parts - low) / np.maximum(high - low, 1e-12), 0, 1).reshape(*tokens.shape[:3], -1)


def attention_mass_masks(attention: np.ndarray, mass: float = 0.6) -> np.ndarray:
  """Smallest set of patches with `mass` of each map [..., rows, columns], as bool (DINO, Caron et al. 2021, fig. 4)."""
  flat = attention.reshape(*attention.shape[:-2], -1)
  order = np.argsort(-flat, axis=-1, kind='stable')
  ranked = np.take_along_axis(flat, order, -1) / flat.sum(-1, keepdims=True)
  before = np.cumsum(ranked, -1) - ranked  # mass of the higher-ranked patches
  mask = np.zeros(flat.shape, bool)
  np.put_along_axis(mask, order, before < mass, -1)
  return mask.reshape(attention.shape)


def available_outputs(network: nn.Module) -> dict[str, Callable[[Any, Any, jax.Array], jax.Array]]:
  """Patch maps that a network supports, by name: (network, params, normalized images) -> [B, ...].

  'patch_features' of a `PatchNetwork`, 'attention' of an `AttentionNetwork`.
  """
  found: dict[str, Callable[[Any, Any, jax.Array], jax.Array]] = {}
  if isinstance(network, PatchNetwork):
    found['patch_features'] = patch_features
  if isinstance(network, AttentionNetwork):
    found['attention'] = class_attention
  return found
