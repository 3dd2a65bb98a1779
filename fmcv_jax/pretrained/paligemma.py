"""PaliGemma 1 and 2 as transformers names them."""

import math
from collections.abc import Mapping
from typing import Any

from fmcv_jax.models.multimodal.prefix_lm import PALIGEMMA_SIZES
from fmcv_jax.pretrained.clip import SIGLIP_PATCHES
from fmcv_jax.pretrained.layout import Layout, Row, Rows, Shape, linear, matrix, with_prefix
from fmcv_jax.pretrained.shape_inference import has, part
from fmcv_jax.pretrained.vit import tower

LENGTH = 128  # text tokens of a row, which no file says
_PROJECTIONS = {'query': 'q_proj', 'key': 'k_proj', 'value': 'v_proj', 'out': 'o_proj'}


def _gemma(second: bool) -> Rows:
  layer = 'model.layers.{i}'
  names = {'norm1': 'input_layernorm', 'norm2': 'post_attention_layernorm'}
  if second:
    names = {
      'norm1': 'input_layernorm',
      'attention_norm': 'post_attention_layernorm',
      'norm2': 'pre_feedforward_layernorm',
      'mlp_norm': 'post_feedforward_layernorm',
    }
  return (
    Row('tokens/embedding', 'model.embed_tokens.weight'),
    *(Row(f'blocks/{ours}/scale', f'{layer}.{theirs}.weight') for ours, theirs in names.items()),
    *(
      row
      for name, theirs in _PROJECTIONS.items()
      for row in matrix(f'blocks/attention/{name}', f'{layer}.self_attn.{theirs}')
    ),
    *(row for name in ('gate', 'up', 'down') for row in matrix(f'blocks/mlp/{name}', f'{layer}.mlp.{name}_proj')),
    Row('norm/scale', 'model.norm.weight'),
  )


def layouts(*, second: bool) -> tuple[tuple[str, Layout], ...]:
  """Those of published files, and those that version 5 writes, without 'vision_model.'; second: of PaliGemma 2."""
  return tuple(
    (
      'transformers',
      Layout(
        (
          *with_prefix('image', SIGLIP_PATCHES, image),
          *linear('image_projection', 'multi_modal_projector.linear'),
          *with_prefix('text', _gemma(second), 'language_model.'),
        ),
        ignored=(r'.*\.position_ids',),
      ),
    )
    for image in ('vision_tower.vision_model.', 'vision_tower.')
  )


def network(shapes: Mapping[str, Shape], *, second: bool) -> dict[str, Any]:
  """Config of the network with these parameter shapes, which do not determine the number of heads.

  It is that of the published model with the other sizes; without one, heads are as wide as possible.
  """
  own = part(shapes, 'text/')
  vocab_size, width = own['tokens/embedding']
  depth, _, mlp_dim = own['blocks/mlp/up/kernel']
  queries, keys = own['blocks/attention/query/kernel'][-1], own['blocks/attention/key/kernel'][-1]
  heads = {size[:3]: size[3:] for size in PALIGEMMA_SIZES.values()}
  head_dim = math.gcd(queries, keys)
  num_heads, num_kv_heads, head_dim = heads.get(
    (width, depth, mlp_dim), (queries // head_dim, keys // head_dim, head_dim)
  )
  softcaps = {'attention_softcap': 50.0, 'logit_softcap': 30.0, 'window': 4096} if second else {}
  text = {
    'name': 'text_decoder',
    'vocab_size': vocab_size,
    'length': LENGTH,
    'width': width,
    'depth': depth,
    'num_heads': num_heads,
    'num_kv_heads': num_kv_heads,
    'head_dim': head_dim,
    'mlp_dim': mlp_dim,
    'branch_norm': has(own, 'blocks/attention_norm/'),
    **({'query_scale': (width / num_heads) ** -0.5} if head_dim == 128 and second else {}),
    **softcaps,
  }
  return {'name': 'prefix_lm', 'image': tower(part(shapes, 'image/')) | {'activation': 'gelu_tanh'}, 'text': text}
