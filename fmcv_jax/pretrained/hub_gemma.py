"""Maps the text_config of transformers' Gemma and Gemma 2 to a text decoder of ours."""

from typing import Any

from fmcv_jax.pretrained.hub_file import ACTIVATION, Has, HubFile, Sets, Table

_SIZES: Table = {
  'hidden_size': Has(lambda text: text.width),
  'num_hidden_layers': Has(lambda text: text.stack.depth),
  'intermediate_size': Has(lambda text: text.stack.block.mlp_dim),
  'vocab_size': Has(lambda text: text.vocab_size),
  'head_dim': Sets('head_dim', 256),
  'rms_norm_eps': Sets('eps', 1e-6, float),
  'attention_bias': Has(False, False),
}
_GEMMA: Table = {
  **_SIZES,
  'num_attention_heads': Sets('num_heads', 16),
  'num_key_value_heads': Sets('num_kv_heads', 16),
  # The library takes 'gelu' for the approximation by tanh, with which Gemma was trained.
  'hidden_act': Sets(
    'activation', 'gelu_pytorch_tanh', lambda name: 'gelu_tanh' if name == 'gelu' else ACTIVATION(name)
  ),
}
_GEMMA2: Table = {
  **_SIZES,
  'num_attention_heads': Sets('num_heads', 8),
  'num_key_value_heads': Sets('num_kv_heads', 4),
  'hidden_activation': Sets('activation', 'gelu_pytorch_tanh', ACTIVATION),
  'query_pre_attn_scalar': Sets('query_scale', 256, lambda scalar: scalar**-0.5),
}
_SOFTCAPS = {'attn_logit_softcapping': ('attention_softcap', 50.0), 'final_logit_softcapping': ('logit_softcap', 30.0)}


def read(file: HubFile, path: str, text: Any) -> None:
  """Reads a text_config into `path`, that of the text decoder `text`."""
  kind = file.get('model_type', 'gemma')
  second = text.stack.block.branch_norm
  if kind != ('gemma2' if second else 'gemma'):
    raise file.refusal('model_type', kind, 'gemma2' if second else 'gemma')
  file.apply(_GEMMA2 if second else _GEMMA, path, text)
  _rope(file, path)
  if not file.get('use_bidirectional_attention', True):
    raise file.refusal('use_bidirectional_attention', False, 'full attention within the prefix')
  for key in ('max_position_embeddings', 'num_image_tokens', 'eos_token_id'):  # which the model does not use
    file.get(key)
  if second:
    file.get('hidden_act')  # which the library writes next to hidden_activation, and does not use
    for key, (field, usual) in _SOFTCAPS.items():
      off = key in file.values and file.values[key] is None  # as given: null switches it off
      value = file.get(key, None if off else usual)
      file.set(f'{path}.{field}', value)
    file.apply({'sliding_window': Sets('window', 4096)}, path, text)
    kinds = ('sliding_attention', 'full_attention')
    order = [kinds[i % 2] for i in range(text.stack.depth)]
    file.apply({'layer_types': Has(order, order)}, path, text)


def _rope(file: HubFile, path: str) -> None:
  """Positions: 'rope_theta' of version 4, or 'rope_parameters' of version 5."""
  if file.get('rope_scaling') is not None:
    raise file.refusal('rope_scaling', file.get('rope_scaling'), 'plain rotary positions')
  rope = file.part('rope_parameters')
  if rope.get('rope_type', 'default') != 'default':
    raise rope.refusal('rope_type', rope.get('rope_type'), "'default'")
  own = 'rope_theta' in rope
  file.set(f'{path}.rope_base', float((rope if own else file).get('rope_theta', 10_000.0)))
  rope.done()
