"""CoCa as OpenCLIP names it."""

from collections.abc import Mapping
from typing import Any

from fmcv_jax.pretrained import clip
from fmcv_jax.pretrained.layout import QKV, ROW, Layout, Row, Rows, Shape, fused, layer_rows, linear, norm, with_prefix
from fmcv_jax.pretrained.shape_inference import has, part
from fmcv_jax.pretrained.vit import HEAD_WIDTH

_MLP = {'up': 'c_fc', 'down': 'c_proj'}


def _pool(*, joined: bool) -> Rows:
  """The attention pooling; `joined`: its projections are one array, as torch has them if all widths are equal."""
  theirs = 'attn_pool.attn'
  kernels = fused('query_pool/attention', f'{theirs}.in_proj_')
  if not joined:
    kernels = tuple(
      row._replace(theirs=f'{theirs}.{name[0]}_proj_weight') if row.ours.endswith(f'{name}/kernel') else row
      for name, row in zip((*QKV, *QKV), kernels, strict=True)
    )
  return (
    Row('query_pool/probe', 'attn_pool.query'),
    *norm('query_pool/query_norm', 'attn_pool.ln_q'),
    *kernels,
    *linear('query_pool/attention/out', f'{theirs}.out_proj'),
    *norm('norm', 'attn_pool.ln_k'),
    *norm('query_pool/norm', 'ln_post'),
  )


def _image(pool: Rows) -> Rows:
  """The image tower of CLIP, whose last norm a pooling replaces by its own."""
  own = clip.open_clip_image()
  return tuple(row for row in own if not (pool and row.ours.startswith('norm/'))) + pool


def _decoder() -> Rows:
  text, image = 'resblocks.{i}', 'cross_attn.{i}'
  return (
    *norm('blocks/norm1', f'{text}.ln_1'),
    *fused('blocks/attention', f'{text}.attn.in_proj_'),
    *linear('blocks/attention/out', f'{text}.attn.out_proj'),
    *norm('blocks/self_mlp_norm', f'{text}.ln_2'),
    *layer_rows('blocks/self_mlp', f'{text}.mlp', _MLP),
    *norm('blocks/cross_norm', f'{image}.ln_1'),
    *norm('blocks/context_norm', f'{image}.ln_1_kv'),
    *fused('blocks/cross_attention', f'{image}.attn.in_proj_'),
    *linear('blocks/cross_attention/out', f'{image}.attn.out_proj'),
    *norm('blocks/norm2', f'{image}.ln_2'),
    *layer_rows('blocks/mlp', f'{image}.mlp', _MLP),
    *norm('norm', 'ln_final'),
    Row('logits/kernel', 'text_projection'),  # a bare matrix, not transposed
  )


def layouts() -> tuple[tuple[str, Layout], ...]:
  """Without an attention pooling, and with one whose projections are one array or three."""
  rest = (
    *with_prefix('text', (*clip.open_clip_text(), Row('class_token', 'cls_emb', ROW)), 'text.'),
    Row('text/head/kernel', 'text.text_projection'),
    *with_prefix('decoder', _decoder(), 'text_decoder.'),
    Row('temperature', 'logit_scale'),
  )
  ignored = (r'(text|text_decoder)\.attn_mask',)
  pools: tuple[Rows, ...] = ((), _pool(joined=True), _pool(joined=False))
  return tuple(
    ('open_clip', Layout((*with_prefix('image', _image(pool), 'visual.'), *rest), ignored)) for pool in pools
  )


def network(shapes: Mapping[str, Shape]) -> dict[str, Any]:
  """Config of the network with these parameter shapes; they do not determine heads and activations."""
  own: dict[str, Any] = {'sigmoid': False, 'activation': 'gelu'}
  image, text, decoder = (part(shapes, prefix) for prefix in ('image/', 'text/', 'decoder/'))
  tower = clip.image_tower(image, **own)
  if has(image, 'query_pool/'):
    queries, width = image['query_pool/probe']
    tower |= {'pool': 'queries', 'class_token': True, 'queries': queries, 'query_width': width, 'query_heads': 8}
  words = clip.text_tower(text, **own) | {'pool': 'cls', 'length': text['position'][0] - 1}
  depth, width, mlp_dim = decoder['blocks/mlp/up/kernel']
  captions = {
    'name': 'cross_decoder',
    'vocab_size': decoder['logits/kernel'][-1],
    'width': width,
    'depth': depth,
    'mlp_dim': mlp_dim,
    'num_heads': max(1, width // HEAD_WIDTH),
    'activation': 'gelu',
  }
  return {'name': 'contrastive_captioner', 'image': tower, 'text': words, 'decoder': captions}
