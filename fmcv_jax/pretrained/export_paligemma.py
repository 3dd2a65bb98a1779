"""Writes config.json and the processor of PaliGemma 1 and 2 for transformers."""

from pathlib import Path
from typing import Any

from fmcv_jax.data.prompts import Prompted
from fmcv_jax.data.tokenizers import Tokenizer, TokenizerJson
from fmcv_jax.errors import UserError

_ACTIVATIONS = {'gelu': 'gelu', 'gelu_tanh': 'gelu_pytorch_tanh', 'silu': 'silu', 'relu': 'relu'}


def config(network: Any, patches: dict[str, Any], image_token: int) -> dict[str, Any]:
  """config.json; UserError for a network that transformers does not have.

  patches      the numbers of the image tower, as of a SigLIP
  image_token  id of the token that stands for the image in texts
  """
  text, image = network.text, network.image
  block, second = text.stack.block, text.stack.block.branch_norm
  if image.pool != 'gap' or image.registers or block.bias or not block.gated_mlp:
    raise UserError('transformers has PaliGemma with the patches of a SigLIP, and gated MLPs without biases')
  capped = block.logit_softcap is not None or text.logit_softcap is not None or block.query_scale is not None
  if capped and not second:
    raise UserError('transformers has PaliGemma 1 without softcaps and without a query_scale')
  if block.activation not in _ACTIVATIONS or (block.activation == 'gelu' and not second):
    raise UserError(f'transformers has no PaliGemma with the activation {block.activation}')
  activation = _ACTIVATIONS[block.activation]
  head_dim = block.head_dim or text.width // block.num_heads
  own: dict[str, Any] = {
    'vocab_size': text.vocab_size,
    'hidden_size': text.width,
    'num_hidden_layers': text.stack.depth,
    'intermediate_size': block.mlp_dim,
    'num_attention_heads': block.num_heads,
    'num_key_value_heads': block.num_kv_heads or block.num_heads,
    'head_dim': head_dim,
    'rms_norm_eps': block.eps,
    'rope_parameters': {'rope_type': 'default', 'rope_theta': text.rope_base},
  }
  if second:
    scalar = head_dim if block.query_scale is None else round(block.query_scale**-2)
    own |= {
      'model_type': 'gemma2',
      'hidden_activation': activation,
      'query_pre_attn_scalar': scalar,
      'attn_logit_softcapping': block.logit_softcap,
      'final_logit_softcapping': text.logit_softcap,
      'sliding_window': text.window or text.length + 2**20,  # without one, more than any text has
    }
  else:
    own |= {'model_type': 'gemma', 'hidden_act': activation}
  return {
    'model_type': 'paligemma',
    'architectures': ['PaliGemmaForConditionalGeneration'],
    'vision_config': {'model_type': 'siglip_vision_model', 'vision_use_head': False, **patches},
    'text_config': own,
    'projection_dim': text.width,
    'hidden_size': text.width,
    'image_token_index': image_token,
  }


def image_token_of(tokenizer: Tokenizer | None, vocab_size: int) -> int:
  """Id of the token '<image>', or of the last row of embeddings, which then no text uses."""
  words = tokenizer.words if isinstance(tokenizer, Prompted) else None
  if isinstance(words, TokenizerJson):
    return words.token_id('<image>')
  return vocab_size - 1


def texts(tokenizer: Tokenizer | None) -> dict[str, Any]:
  """Tokenizer files, for a vocabulary from a tokenizer.json."""
  words = tokenizer.words if isinstance(tokenizer, Prompted) else None
  if not isinstance(words, TokenizerJson):
    return {}
  assert isinstance(tokenizer, Prompted)
  special = {'pad_token': words.padding, 'bos_token': tokenizer.start or '<bos>', 'eos_token': tokenizer.end or '<eos>'}
  kind = {'tokenizer_class': 'PreTrainedTokenizerFast', 'processor_class': 'PaliGemmaProcessor', 'padding_side': 'left'}
  return {'tokenizer.json': Path(words.file), 'tokenizer_config.json': {**kind, **special}}
