"""Dual encoders as OpenAI and OpenCLIP, and as transformers name them: CLIP and SigLIP."""

from collections.abc import Mapping
from typing import Any

from fmcv_jax.models.backbones.vit import SIZES
from fmcv_jax.pretrained.layout import (
  BATCHED,
  ROW,
  SCALAR_AS_1D,
  Layout,
  Row,
  Rows,
  Shape,
  fused,
  layer_rows,
  linear,
  matrix,
  norm,
  patch,
  with_prefix,
)
from fmcv_jax.pretrained.shape_inference import has, part
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
    *layer_rows('blocks/mlp', f'{theirs}.mlp', {'up': 'c_fc', 'down': 'c_proj'}),
  )


def open_clip_text() -> Rows:
  """Rows of OpenCLIP's text tower, which is also OpenAI's."""
  return (
    Row('tokens/embedding', 'token_embedding.weight'),
    Row('position', 'positional_embedding'),
    *_resblocks(),
    *norm('norm', 'ln_final'),
  )


def open_clip_image() -> Rows:
  """Rows of the image tower of OpenCLIP, which is also OpenAI's."""
  return (
    Row('class_token', 'class_embedding', ROW),
    Row('position', 'positional_embedding'),
    *patch('conv1')[:1],
    *norm('pre_norm', 'ln_pre'),
    *_resblocks(),
    *norm('norm', 'ln_post'),
    Row('head/kernel', 'proj'),  # a bare matrix, not transposed
  )


def _open_clip_words() -> Rows:
  return (*open_clip_text(), Row('head/kernel', 'text_projection'))


_BUFFERS = ('input_resolution', 'context_length', 'vocab_size', 'attn_mask')


def open_clip(text: str = '') -> Layout:
  """OpenAI's names, which OpenCLIP kept; `text`: the prefix of the text tower's, 'text.' where it is apart."""
  rows = (*with_prefix('image', open_clip_image(), 'visual.'), *with_prefix('text', _open_clip_words(), text))
  return Layout((*rows, Row('temperature', 'logit_scale')), ignored=_BUFFERS)


def _blocks(theirs: str) -> Rows:
  parts = {'query': 'q_proj', 'key': 'k_proj', 'value': 'v_proj', 'out': 'out_proj'}
  return (
    *norm('blocks/norm1', f'{theirs}.layer_norm1'),
    *layer_rows('blocks/attention', f'{theirs}.self_attn', parts),
    *norm('blocks/norm2', f'{theirs}.layer_norm2'),
    *layer_rows('blocks/mlp', f'{theirs}.mlp', _MLP),
  )


def transformers_text() -> Rows:
  """Rows of the text tower of transformers' CLIPTextModel."""
  return (
    Row('tokens/embedding', 'embeddings.token_embedding.weight'),
    Row('position', 'embeddings.position_embedding.weight'),
    *_blocks('encoder.layers.{i}'),
    *norm('norm', 'final_layer_norm'),
  )


def clip_image(pre_norm: str = 'pre_layrnorm') -> Rows:  # so spelt
  """Rows of the image tower of transformers' CLIPVisionModel, without its projection."""
  return (
    Row('class_token', 'embeddings.class_embedding', ROW),
    Row('position', 'embeddings.position_embedding.weight'),
    *patch('embeddings.patch_embedding')[:1],
    *norm('pre_norm', pre_norm),
    *_blocks('encoder.layers.{i}'),
    *norm('norm', 'post_layernorm'),
  )


_POSITIONS = (r'.*\.position_ids',)


def transformers_clip() -> Layout:
  """Layout of transformers' CLIPModel."""
  rows = (
    *with_prefix('image', clip_image(), 'vision_model.'),
    *matrix('image/head', 'visual_projection'),
    *with_prefix('text', transformers_text(), 'text_model.'),
    *matrix('text/head', 'text_projection'),
    Row('temperature', 'logit_scale'),
  )
  return Layout(rows, ignored=_POSITIONS)


def image_towers() -> tuple[tuple[str, Layout], ...]:
  """Layouts of CLIP's image tower alone, with or without its projection."""
  projected = (*with_prefix('', clip_image(), 'vision_model.'), *matrix('head', 'visual_projection'))
  return (
    ('transformers', Layout(projected, ignored=_POSITIONS)),
    ('transformers', Layout(clip_image(), ignored=_POSITIONS)),
    ('open_clip', Layout(open_clip_image(), ignored=_BUFFERS)),
  )


def text_towers() -> tuple[tuple[str, Layout], ...]:
  """Layouts of CLIP's text tower alone, with or without its projection."""
  projected = (*with_prefix('', transformers_text(), 'text_model.'), *matrix('head', 'text_projection'))
  return (
    ('transformers', Layout(projected, ignored=_POSITIONS)),
    ('transformers', Layout(transformers_text(), ignored=_POSITIONS)),
    ('open_clip', Layout(_open_clip_words(), ignored=(*_BUFFERS, 'logit_scale'))),
  )


SIGLIP_PATCHES: Rows = (
  Row('position', 'embeddings.position_embedding.weight'),
  *patch('embeddings.patch_embedding'),
  *_blocks('encoder.layers.{i}'),
  *norm('norm', 'post_layernorm'),
)
_SIGLIP_IMAGE: Rows = (
  *SIGLIP_PATCHES,
  Row('map_pool/probe', 'head.probe', BATCHED),
  *fused('map_pool/attention', 'head.attention.in_proj_'),
  *linear('map_pool/attention/out', 'head.attention.out_proj'),
  *norm('map_pool/norm', 'head.layernorm'),
  *layer_rows('map_pool/mlp', 'head.mlp', _MLP),
)


def _siglip_words() -> Rows:
  return (*transformers_text(), *linear('head', 'head'))


def transformers_siglip() -> Layout:
  """Layout of transformers' SiglipModel."""
  rows = (
    *with_prefix('image', _SIGLIP_IMAGE, 'vision_model.'),
    *with_prefix('text', _siglip_words(), 'text_model.'),
    Row('temperature', 'logit_scale', SCALAR_AS_1D),
    Row('bias', 'logit_bias', SCALAR_AS_1D),
  )
  return Layout(rows, ignored=_POSITIONS)


def _siglip_trunk() -> Rows:
  """timm's names of SigLIP's image tower."""
  pool = (
    Row('probe', 'latent', BATCHED),
    *linear('attention/query', 'q'),
    *fused('attention', 'kv.', ('key', 'value')),
    *linear('attention/out', 'proj'),
    *norm('norm', 'norm'),
    *layer_rows('mlp', 'mlp', _MLP),
  )
  return (*timm().rows, *with_prefix('map_pool', pool, 'attn_pool.'))


def _open_clip_siglip_words() -> Rows:
  return (*open_clip_text(), *linear('head', 'text_projection'))


def open_clip_siglip() -> Layout:
  """OpenCLIP's SigLIP: an image tower of timm's, and its own text tower."""
  rows = (
    *with_prefix('image', _siglip_trunk(), 'visual.trunk.'),
    *with_prefix('text', _open_clip_siglip_words(), 'text.'),
    Row('temperature', 'logit_scale'),
    Row('bias', 'logit_bias'),
  )
  return Layout(rows)


def siglip_image_towers() -> tuple[tuple[str, Layout], ...]:
  """Layouts of SigLIP's image tower alone, of transformers and timm."""
  return (('transformers', Layout(_SIGLIP_IMAGE, ignored=_POSITIONS)), ('timm', Layout(_siglip_trunk())))


def siglip_text_towers() -> tuple[tuple[str, Layout], ...]:
  """Layouts of SigLIP's text tower alone, of transformers and OpenCLIP."""
  return (
    ('transformers', Layout(_siglip_words(), ignored=_POSITIONS)),
    ('open_clip', Layout(_open_clip_siglip_words())),
  )


def dual_encoder(shapes: Mapping[str, Shape], *, sigmoid: bool, activation: str) -> dict[str, Any]:
  """Config of the network with these parameter shapes; they do not determine `activation`."""
  image = image_tower(part(shapes, 'image/'), sigmoid=sigmoid, activation=activation)
  own = part(shapes, 'text/')
  text = text_tower(own, sigmoid=sigmoid, activation=activation) | {'num_classes': own['head/kernel'][-1]}
  outputs = {} if sigmoid else {'num_classes': shapes['image/head/kernel'][-1]}
  network = {'name': 'dual_encoder', 'image': image | outputs, 'text': text}
  return network | ({'initial_scale': 10.0, 'initial_bias': -10.0} if sigmoid else {})


def image_tower(shapes: Mapping[str, Shape], *, sigmoid: bool, activation: str) -> dict[str, Any]:
  """Config of the image tower of SigLIP (`sigmoid`) or CLIP; parts common to all are set even if a file lacks them."""
  found = tower(shapes)
  if sigmoid:
    return found | {'pool': 'map', 'activation': activation, 'eps': 1e-6}
  projected = {'head_bias': False} if 'num_classes' in found else {}
  return found | {'pre_norm': True, 'patch_bias': False, 'activation': activation, 'eps': 1e-5} | projected


def text_tower(shapes: Mapping[str, Shape], *, sigmoid: bool, activation: str) -> dict[str, Any]:
  """Config of the text tower of SigLIP (`sigmoid`) or CLIP."""
  outputs = {'num_classes': shapes['head/kernel'][-1]} if has(shapes, 'head/') else {}
  shared = {'activation': activation, 'eps': 1e-6 if sigmoid else 1e-5}
  own = {'causal': False, 'pool': 'last', 'head_bias': True} if sigmoid else {}
  return {'name': 'text_transformer', **text_numbers(shapes), **outputs, **shared, **own}


def text_numbers(text: Mapping[str, Shape]) -> dict[str, Any]:
  """Config values of a text tower, inferred from its parameter shapes."""
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
