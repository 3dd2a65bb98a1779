"""DiT as its authors and as diffusers name it."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fmcv_jax.models.common.positions import sincos_2d
from fmcv_jax.models.generative.dit import SIZES
from fmcv_jax.pretrained.layout import Fixed, Layout, Row, Rows, Shape, layer_rows, linear, patch, with_prefix
from fmcv_jax.pretrained.shape_inference import part
from fmcv_jax.pretrained.vit import timm_block


def original() -> Layout:
  """Layout of the authors' checkpoints (Peebles & Xie 2023)."""
  rows = (
    *patch('x_embedder.proj', channels=4),
    *_condition('t_embedder.mlp.0', 't_embedder.mlp.2', 'y_embedder'),
    *timm_block('blocks', 'blocks.{i}'),
    *linear('blocks/modulation', 'blocks.{i}.adaLN_modulation.1'),
    *linear('modulation', 'final_layer.adaLN_modulation.1'),
    *linear('head', 'final_layer.linear'),
  )
  return Layout(with_prefix('network', rows), fixed=(Fixed('fixed/position', 'pos_embed', _positions),))


def diffusers() -> Layout:
  """Layout of diffusers, where every block has a copy of the time and class embeddings."""
  block, embed = 'transformer_blocks.{i}', 'transformer_blocks.{*}.norm1.emb'
  time = f'{embed}.timestep_embedder'
  attention = {'query': 'to_q', 'key': 'to_k', 'value': 'to_v', 'out': 'to_out.0'}
  rows = (
    *patch('pos_embed.proj', channels=4),
    *_condition(f'{time}.linear_1', f'{time}.linear_2', f'{embed}.class_embedder'),
    *layer_rows('blocks/attention', f'{block}.attn1', attention),
    *layer_rows('blocks/mlp', f'{block}.ff.net', {'up': '0.proj', 'down': '2'}),
    *linear('blocks/modulation', f'{block}.norm1.linear'),
    *linear('modulation', 'proj_out_1'),
    *linear('head', 'proj_out_2'),
  )
  return Layout(with_prefix('network', rows))


def _condition(first: str, second: str, classes: str) -> Rows:
  return (
    *linear('time_embedding/hidden1', first),
    *linear('time_embedding/hidden2', second),
    Row('classes/embedding', f'{classes}.embedding_table.weight'),
  )


def _positions(network: Any) -> np.ndarray:
  rows, columns = (side // network.patch_size for side in network.input_shape[:2])
  return np.asarray(sincos_2d(rows, columns, network.width), np.float32)[None]


def config(shapes: Mapping[str, Shape]) -> dict[str, Any]:
  """Class-conditional, in latents of kl-f8, with a learned variance (Peebles & Xie 2023); 256 pixels unless a file
  says otherwise.
  """
  own = part(shapes, 'network/')
  (rows, width), depth = own['patch/kernel'], own['blocks/modulation/bias'][0]
  cut = math.isqrt(rows // 4)
  size = next((name for name, numbers in SIZES.items() if numbers[:2] == (width, depth)), None)
  network: dict[str, Any] = {'name': 'dit', 'variant': f'{size or "B"}/{cut}'}
  if size is None:
    network |= {'width': width, 'depth': depth, 'num_heads': max(1, width // 64)}
  places = shapes.get('fixed/position', (1, (32 // cut) ** 2, width))[1]
  outputs, side = own['head/bias'][0] // cut**2, math.isqrt(places) * cut
  network |= {'image_size': side, 'num_classes': own['classes/embedding'][0] - 1, 'out_channels': outputs}
  objective = {
    'name': 'diffusion',
    'network': network,
    'latent_space': {
      'autoencoder': {'name': 'autoencoder', 'variant': 'kl-f8', 'image_size': 8 * side},
      'scale': 0.18215,
    },
    'process': {'schedule': 'linear', 'learned_variance': outputs == 8},
  }
  return {'objective': objective}
