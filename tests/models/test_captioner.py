"""Decoders with cross-attention: CapPa against its definition in numpy, and what parallel prediction may read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmcv_jax.models.backbones.cross_decoder import caption_decoder, cross_decoder
from fmcv_jax.models.backbones.text import text_transformer
from fmcv_jax.models.backbones.vit import vit
from fmcv_jax.models.multimodal.captioner import cappa, contrastive_captioner
from fmcv_jax.objectives.language import Language, SpecialIds

WIDTH, HEADS, LENGTH, WORDS = 8, 2, 5, 11
RANDOM = np.random.default_rng(0)
TOKENS = RANDOM.integers(0, WORDS, (2, LENGTH))
CONTEXT = RANDOM.normal(size=(2, 3, 6)).astype(np.float32)


@pytest.fixture(scope='module')
def decoder(random_variables):
  network = caption_decoder(WORDS, LENGTH, WIDTH, 2, HEADS, mlp_dim=12, mask_token=True)
  return network, random_variables(network, jnp.asarray(TOKENS), jnp.asarray(CONTEXT))['params']


def norm(x, scale, bias=0.0):
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale + bias


def attend(p, x, context, mask):
  """Without biases; mask [B, 1, T, S]."""

  def heads(y, name):
    return (y @ p[name]['kernel']).reshape(*y.shape[:2], HEADS, -1).swapaxes(1, 2)

  query, key, value = heads(x, 'query'), heads(context, 'key'), heads(context, 'value')
  weights = np.exp(query @ key.swapaxes(-1, -2) / np.sqrt(WIDTH / HEADS)) * mask
  y = weights / weights.sum(-1, keepdims=True) @ value
  return y.swapaxes(1, 2).reshape(x.shape) @ p['out']['kernel']


def expected(params, parallel):
  """Tschannen et al. 2023, section 3, with the layers of their release: no biases but in the last norm and logits."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  x = np.where(parallel[:, None, None], p['mask_token'], p['tokens']['embedding'][TOKENS]) + p['position']
  causal = np.tril(np.ones((LENGTH, LENGTH), bool))
  mask = (parallel[:, None, None] | causal)[:, None]
  for i in range(2):
    b = jax.tree.map(lambda x, i=i: x[i], p['decoder']['blocks'])
    y = norm(x, b['norm1']['scale'])
    x = x + attend(b['attention'], y, y, mask)
    x = x + attend(b['cross_attention'], norm(x, b['cross_norm']['scale']), CONTEXT, 1.0)
    y = norm(x, b['norm2']['scale']) @ b['mlp']['up']['kernel']
    gelu = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    x = x + gelu @ b['mlp']['down']['kernel']
  x = norm(x, p['decoder']['norm']['scale'], p['decoder']['norm']['bias'])
  return x @ p['decoder']['logits']['kernel'] + p['decoder']['logits']['bias']


@pytest.mark.parametrize('parallel', [None, [False, True]])
def test_a_caption_decoder_computes_its_definition(decoder, parallel):
  network, params = decoder
  given = None if parallel is None else jnp.asarray(parallel)
  ours = network.apply({'params': params}, TOKENS, CONTEXT, parallel=given)
  theirs = expected(params, np.zeros(2, bool) if parallel is None else np.array(parallel))
  np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())


def test_parallel_prediction_reads_no_token_and_the_rest_only_those_before(decoder):
  network, params = decoder
  parallel = jnp.array([True, False])

  def logits(tokens):
    return np.asarray(network.apply({'params': params}, tokens, CONTEXT, parallel=parallel))

  other = TOKENS.copy()
  other[:, 2] = (other[:, 2] + 1) % WORDS
  changed = np.abs(logits(other) - logits(TOKENS)).max(axis=-1) > 1e-6
  np.testing.assert_array_equal(changed, [[False] * 5, [False, False, True, True, True]])


@pytest.mark.parametrize(('fraction', 'equal'), [(0.0, 0), (1.0, 1)])
def test_the_loss_is_that_of_all_examples_in_parallel_or_of_none(random_variables, fraction, equal):
  network = cappa('mu/8', image_size=16, vocab_size=WORDS, length=LENGTH, depth=1)
  batch = {'image': jnp.asarray(RANDOM.integers(0, 256, (2, 16, 16, 3)), jnp.uint8), 'tokens': jnp.asarray(TOKENS)}
  params = random_variables(network, jnp.zeros((2, 16, 16, 3)), batch['tokens'], jnp.ones(2, jnp.int32))['params']
  objective = Language(network, parallel_fraction=fraction, special=SpecialIds(0, WORDS - 1, None))
  loss = objective.loss(params, batch, jax.random.key(0), {})
  images = objective.normalize(batch['image'] / 255)
  parallel = jnp.full(2, bool(equal))
  logits = network.apply({'params': params}, images, batch['tokens'][:, :-1], jnp.ones(2, jnp.int32), parallel=parallel)
  losses, weights, _ = objective.token_losses(logits, batch['tokens'])
  assert float(loss.value) == pytest.approx(float((losses * weights).sum() / weights.sum()), rel=1e-5)


def test_three_of_four_examples_are_predicted_in_parallel():
  """By the loss, which is that of one kind or the other: 4 standard errors of 1024 draws are 0.054."""
  network = cappa('mu/8', image_size=16, vocab_size=WORDS, length=LENGTH, depth=1)
  objective = Language(network, parallel_fraction=0.75, special=SpecialIds(0, WORDS - 1, None))
  drawn = {}

  def logits(params, images, tokens, *, parallel, **options):
    drawn['parallel'] = parallel
    return jnp.zeros((len(images), LENGTH - 1, WORDS))

  object.__setattr__(objective, '_logits', logits)
  batch = {'image': jnp.zeros((1024, 16, 16, 3), jnp.uint8), 'tokens': jnp.zeros((1024, LENGTH), jnp.int32)}
  objective.loss({}, batch, jax.random.key(0), {})
  assert float(drawn['parallel'].mean()) == pytest.approx(0.75, abs=0.054)


def test_parts_that_do_not_fit_are_refused():
  image = vit('mu/8', image_size=16, num_classes=16)
  text = text_transformer(WORDS, LENGTH, 16, 1, 2, pool='cls', num_classes=16)
  with pytest.raises(ValueError, match=r'decoder\.width: 8, but the tokens of the text have a width of 16'):
    contrastive_captioner(image, text, cross_decoder(WORDS, 8, 1, 2))
  with pytest.raises(ValueError, match=r'decoder\.vocab_size: 7, but the text has 11 ids'):
    contrastive_captioner(image, text, cross_decoder(7, 16, 1, 2))
  with pytest.raises(ValueError, match="a contrastive captioner needs a text_transformer with pool 'cls'"):
    contrastive_captioner(image, text_transformer(WORDS, LENGTH, 16, 1, 2), cross_decoder(WORDS, 16, 1, 2))
  with pytest.raises(ValueError, match="pool: 'cls' is the pool of a causal transformer"):
    text_transformer(WORDS, LENGTH, 16, 1, 2, pool='cls', causal=False)
