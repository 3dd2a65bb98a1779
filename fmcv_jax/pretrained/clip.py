"""Dual encoders as OpenAI and OpenCLIP, and as transformers name them: CLIP and SigLIP."""

from collections.abc import Mapping
from typing import Any

from fmcv_jax.models.backbones.vit import SIZES
from fmcv_jax.pretrained.layout import (
  BATCHED,
  ONE,
  ROW,
  Layout,
  Row,
  Rows,
  Shape,
  below,
  each,
  fused,
  linear,
  matrix,
  norm,
  part,
  patch,
)
from fmcv_jax.pretrained.vit import HEAD_WIDTH, timm, tower

# Width, depth and hidden width of the one text tower whose heads are not 64 wide.
SO400M = tuple(SIZES['So400m'][i] for i in (0, 1, 3))
_MLP = {'up': 'fc1', 'down': 'fc2'}


def _resblocks() -> Rows:
  theirs = 'transformer.resblocks.{i}'
  return (
    *norm('blocks/norm1', f'{theirs}.ln_1'),
    *fused('blocks/attention', f'{theirs}.attn.in_proj_'),
    *linear('blocks/attention/out', f'{theirs}.attn.out_proj'),
    *norm('blocks/norm2', f'{theirs}.ln_2'),
    *each('blocks/mlp', f'{theirs}.mlp', {'up': 'c_fc', 'down': 'c_proj'}),
  )


def open_clip_text() -> Rows:
  return (
    Row('tokens/embedding', 'token_embedding.weight'),
    Row('position', 'positional_embedding'),
    *_resblocks(),
    *norm('norm', 'ln_final'),
  )


def open_clip(text: str = '') -> Layout:
  """OpenAI's names, which OpenCLIP kept; `text`: the prefix of the text tower's, 'text.' where it is apart."""
  image = (
    Row('class_token', 'class_embedding', ROW),
    Row('position', 'positional_embedding'),
    *patch('conv1')[:1],
    *norm('pre_norm', 'ln_pre'),
    *_resblocks(),
    *norm('norm', 'ln_post'),
    Row('head/kernel', 'proj'),  # a bare matrix, not transposed
  )
  words = (*open_clip_text(), Row('head/kernel', 'text_projection'))
  rows = (*below('image', image, 'visual.'), *below('text', words, text), Row('temperature', 'logit_scale'))
  return Layout(rows, ignored=('input_resolution', 'context_length', 'vocab_size', 'attn_mask'))


def _blocks(theirs: str) -> Rows:
  parts = {'query': 'q_proj', 'key': 'k_proj', 'value': 'v_proj', 'out': 'out_proj'}
  return (
    *norm('blocks/norm1', f'{theirs}.layer_norm1'),
    *each('blocks/attention', f'{theirs}.self_attn', parts),
    *norm('blocks/norm2', f'{theirs}.layer_norm2'),
    *each('blocks/mlp', f'{theirs}.mlp', _MLP),
  )


def transformers_text() -> Rows:
  return (
    Row('tokens/embedding', 'embeddings.token_embedding.weight'),
    Row('position', 'embeddings.position_embedding.weight'),
    *_blocks('encoder.layers.{i}'),
    *norm('norm', 'final_layer_norm'),
  )


def transformers_clip() -> Layout:
  image = (
    Row('class_token', 'embeddings.class_embedding', ROW),
    Row('position', 'embeddings.position_embedding.weight'),
    *patch('embeddings.patch_embedding')[:1],
    *norm('pre_norm', 'pre_layrnorm'),  # so spelt
    *_blocks('encoder.layers.{i}'),
    *norm('norm', 'post_layernorm'),
  )
  rows = (
    *below('image', image, 'vision_model.'),
    *matrix('image/head', 'visual_projection'),
    *below('text', transformers_text(), 'text_model.'),
    *matrix('text/head', 'text_projection'),
    Row('temperature', 'logit_scale'),
  )
  return Layout(rows, ignored=(r'.*\.position_ids',))


def transformers_siglip() -> Layout:
  head = (
    Row('probe', 'probe', BATCHED),
    *fused('attention', 'attention.in_proj_'),
    *linear('attention/out', 'attention.out_proj'),
    *norm('norm', 'layernorm'),
    *each('mlp', 'mlp', _MLP),
  )
  image = (
    Row('position', 'embeddings.position_embedding.weight'),
    *patch('embeddings.patch_embedding'),
    *_blocks('encoder.layers.{i}'),
    *norm('norm', 'post_layernorm'),
    *below('map_pool', head, 'head.'),
  )
  text = (*transformers_text(), *linear('head', 'head'))
  rows = (
    *below('image', image, 'vision_model.'),
    *below('text', text, 'text_model.'),
    Row('temperature', 'logit_scale', ONE),
    Row('bias', 'logit_bias', ONE),
  )
  return Layout(rows, ignored=(r'.*\.position_ids',))


def open_clip_siglip() -> Layout:
  """OpenCLIP's SigLIP: an image tower of timm's, and its own text tower."""
  pool = (
    Row('probe', 'latent', BATCHED),
    *linear('attention/query', 'q'),
    *fused('attention', 'kv.', ('key', 'value')),
    *linear('attention/out', 'proj'),
    *norm('norm', 'norm'),
    *each('mlp', 'mlp', _MLP),
  )
  text = (*open_clip_text(), *linear('head', 'text_projection'))
  rows = (
    *below('image', timm().rows, 'visual.trunk.'),
    *below('image/map_pool', pool, 'visual.trunk.attn_pool.'),
    *below('text', text, 'text.'),
    Row('temperature', 'logit_scale'),
    Row('bias', 'logit_bias'),
  )
  return Layout(rows)


def dual_encoder(shapes: Mapping[str, Shape], *, sigmoid: bool, activation: str) -> dict[str, Any]:
  """The network that has these parameters, as a config; `activation` is what shapes do not tell."""
  image, text = part(shapes, 'image/'), part(shapes, 'text/')
  eps = 1e-6 if sigmoid else 1e-5
  shared = {'activation': activation, 'eps': eps}
  words = {'name': 'text_transformer', **text_numbers(text), 'num_classes': text['head/kernel'][-1], **shared}
  if sigmoid:
    words |= {'causal': False, 'pool': 'last', 'head_bias': True}
  network = {'name': 'dual_encoder', 'image': {**tower(image), **shared}, 'text': words}
  return network | ({'initial_scale': 10.0, 'initial_bias': -10.0} if sigmoid else {})


def text_numbers(text: Mapping[str, Shape]) -> dict[str, Any]:
  """What the shapes of a text tower tell."""
  depth, width = text['blocks/norm1/scale']
  hidden = text['blocks/mlp/up/kernel'][-1]
  return {
    'vocab_size': text['tokens/embedding'][0],
    'length': text['position'][0],
    'width': width,
    'depth': depth,
    'mlp_dim': hidden,
    'num_heads': SIZES['So400m'][2] if (width, depth, hidden) == SO400M else max(1, width // HEAD_WIDTH),
  }
