"""Parts of language models against transformers' own, and the cache against the whole sequence at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmcv_jax.models.backbones.decoder import text_decoder
from fmcv_jax.models.common.attention.dispatch import attention
from fmcv_jax.models.common.attention.masks import PrefixMask
from fmcv_jax.models.common.layers import BlockConfig
from fmcv_jax.models.common.norms import RMSNorm
from fmcv_jax.models.common.positions import rope_1d, rotate
from fmcv_jax.models.multimodal.prefix_lm import paligemma

RANDOM = np.random.default_rng(0)


def normal(*shape):
  return RANDOM.normal(size=shape).astype(np.float32)


def softmax(x):
  x = np.exp(x - x.max(axis=-1, keepdims=True))
  return x / x.sum(axis=-1, keepdims=True)


def test_rms_norm_is_gemmas():
  torch = pytest.importorskip('torch', reason='pip install fmcv-jax[parity]')
  gemma = pytest.importorskip('transformers.models.gemma.modeling_gemma', reason='pip install fmcv-jax[parity]')
  x, scale = 3 * normal(2, 5, 8), normal(8)
  theirs = gemma.GemmaRMSNorm(8, eps=1e-3)
  theirs.weight.data = torch.from_numpy(scale)
  ours = RMSNorm(1e-3, jnp.float32).apply({'params': {'scale': scale}}, x)
  np.testing.assert_allclose(ours, theirs(torch.from_numpy(x)).detach().numpy(), atol=1e-6)


def test_rotary_positions_are_gemmas_at_any_position():
  torch = pytest.importorskip('torch', reason='pip install fmcv-jax[parity]')
  T = pytest.importorskip('transformers', reason='pip install fmcv-jax[parity]')
  from transformers.models.gemma import modeling_gemma as gemma

  positions, x = np.array([[1, 2, 3, 4], [7, 8, 100, 4000]]), normal(2, 4, 3, 16)
  rotary = gemma.GemmaRotaryEmbedding(T.GemmaConfig(head_dim=16, hidden_size=48, num_attention_heads=3))
  cos, sin = rotary(torch.zeros(()), torch.from_numpy(positions))
  theirs, _ = gemma.apply_rotary_pos_emb(*(torch.from_numpy(x.swapaxes(1, 2).copy()),) * 2, cos, sin)
  ours = rotate(x, rope_1d(jnp.asarray(positions), 16))
  # Angles of up to 4000 have 2e-4 of rounding in float32.
  np.testing.assert_allclose(ours, theirs.numpy().swapaxes(1, 2), atol=1e-3)
  np.testing.assert_allclose(ours[0], theirs.numpy().swapaxes(1, 2)[0], atol=2e-6)


@pytest.mark.parametrize('kv_heads', [1, 2, 4])
def test_a_head_of_keys_serves_adjacent_query_heads(kv_heads):
  query, key, value = normal(2, 5, 4, 8), normal(2, 6, kv_heads, 8), normal(2, 6, kv_heads, 8)
  ours = attention(query, key, value, scale=0.7)
  for head in range(4):
    keys, values = (x[:, :, head * kv_heads // 4] for x in (key, value))
    weights = softmax(0.7 * np.einsum('bqk,btk->bqt', query[:, :, head], keys))
    np.testing.assert_allclose(ours[:, :, head], weights @ values, atol=1e-5)


def test_a_softcap_bounds_logits_before_the_mask():
  query, key, value = 10 * normal(2, 5, 2, 8), normal(2, 5, 2, 8), normal(2, 5, 2, 8)
  logits = np.einsum('bqhk,bthk->bhqt', query, key) * 8**-0.5
  capped = np.where(np.tril(np.ones((5, 5), bool)), 3 * np.tanh(logits / 3), -np.inf)
  expected = np.einsum('bhqt,bthk->bqhk', softmax(capped), value)
  np.testing.assert_allclose(attention(query, key, value, causal=True, softcap=3.0), expected, atol=1e-5)


def test_a_prefix_mask_is_full_in_the_prefix_and_causal_after_it():
  mask = PrefixMask(jnp.array([[1, 1, 0, 0]], bool))
  expected = [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
  np.testing.assert_array_equal(mask.dense()[0, 0], np.array(expected, bool))


@pytest.mark.parametrize('variant', ['paligemma_mu', 'paligemma2_mu'])
def test_a_cache_gives_the_logits_of_the_whole_sequence(variant, random_variables):
  network = paligemma(variant, image_size=16, vocab_size=50)
  images, tokens, lengths = normal(2, 16, 16, 3), RANDOM.integers(0, 50, (2, 8)), np.array([3, 2])
  variables = random_variables(network, images, tokens, lengths)
  whole = network.apply(variables, images, tokens, lengths)
  rows, capacity = np.arange(2), 4
  # What follows a prefix in its row is ignored.
  (logits, prefix), cache = network.apply(
    variables, images, tokens[:, :3], lengths, capacity, mutable=['cache'], method='prefill'
  )
  np.testing.assert_allclose(logits, whole[rows, lengths - 1], atol=1e-5)
  for step in range(capacity):
    logits, cache = network.apply(
      {**variables, **cache}, tokens[rows, lengths + step], prefix, step, capacity, mutable=['cache'], method='extend'
    )
    np.testing.assert_allclose(logits, whole[rows, lengths + step], atol=1e-5 * np.abs(whole).max())


def test_heads_that_do_not_form_groups_are_refused():
  with pytest.raises(ValueError, match='num_kv_heads: 4 heads are not divisible by 3'):
    BlockConfig(num_heads=4, mlp_dim=8, num_kv_heads=3)
  with pytest.raises(ValueError, match='branch_norm: only for blocks that are neither parallel nor post_norm'):
    BlockConfig(num_heads=4, mlp_dim=8, branch_norm=True, post_norm=True)


def test_text_without_an_image_is_gemmas(random_variables):
  torch = pytest.importorskip('torch', reason='pip install fmcv-jax[parity]')
  T = pytest.importorskip('transformers', reason='pip install fmcv-jax[parity]')
  numbers = {'hidden_size': 32, 'intermediate_size': 64, 'num_hidden_layers': 2, 'num_attention_heads': 4}
  model = T.GemmaForCausalLM(T.GemmaConfig(**numbers, num_key_value_heads=2, head_dim=16, vocab_size=50)).eval()
  network = text_decoder(50, 8, 32, 2, 4, mlp_dim=64, num_kv_heads=2, head_dim=16)
  tokens, places = RANDOM.integers(0, 50, (2, 8)), np.arange(8)
  mask = (places <= places[:, None])[None, None]
  variables = jax.tree.map(np.array, random_variables(network, tokens, positions=places[None], mask=mask))
  params, layers = variables['params'], model.model.layers
  with torch.no_grad():
    model.model.embed_tokens.weight.copy_(torch.from_numpy(params['tokens']['embedding']))
    model.model.norm.weight.copy_(torch.from_numpy(params['norm']['scale']))
    for i, layer in enumerate(layers):
      block = jax.tree.map(lambda x, i=i: torch.from_numpy(x[i]), params['blocks'])
      layer.input_layernorm.weight.copy_(block['norm1']['scale'])
      layer.post_attention_layernorm.weight.copy_(block['norm2']['scale'])
      for name, theirs in (('query', 'q'), ('key', 'k'), ('value', 'v'), ('out', 'o')):
        getattr(layer.self_attn, f'{theirs}_proj').weight.copy_(block['attention'][name]['kernel'].T)
      for name in ('gate', 'up', 'down'):
        getattr(layer.mlp, f'{name}_proj').weight.copy_(block['mlp'][name]['kernel'].T)
    theirs = model(input_ids=torch.from_numpy(tokens)).logits.numpy()
  ours = network.apply(variables, tokens, positions=places[None], mask=mask)
  np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())
