"""Contrast and captions together: both losses, any number of microbatches, and all outputs of both objectives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmcv_jax.augment.normalize import Normalize
from fmcv_jax.decoding.generation import generate
from fmcv_jax.decoding.options import DecodingOptions
from fmcv_jax.models.multimodal.captioner import cappa, coca
from fmcv_jax.objectives.contrastive import Contrastive
from fmcv_jax.objectives.contrastive_captioning import ContrastiveCaptioning
from fmcv_jax.objectives.language import Language, SpecialIds
from fmcv_jax.parallel.mesh import MeshShape
from fmcv_jax.train.gradients import gradients
from tests.train.tiny import Trainer, batch_of

WORDS, LENGTH = 64, 8
SPECIAL = SpecialIds(0, 63, None)
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3)).astype(np.uint8)
TOKENS = np.array([
  [62, 7, 8, 4, 63, 0, 0, 0],
  [62, 63, 0, 0, 0, 0, 0, 0],
  [62, 7, 4, 5, 6, 7, 8, 63],
  [62, 9, 63, 0, 0, 0, 0, 0],
], np.int32)  # fmt: skip
COUNTS = [4, 1, 7, 2]  # predicted tokens


def objective(**options):
  network = coca('mu/8', image_size=16, vocab_size=WORDS, length=LENGTH)
  return ContrastiveCaptioning(network, special=SPECIAL, **options)


@pytest.fixture(scope='module')
def batch():
  return {'image': jnp.asarray(IMAGES), 'tokens': jnp.asarray(TOKENS)}


@pytest.fixture(scope='module')
def params(random_variables):
  return random_variables(objective().network, jnp.zeros((4, 16, 16, 3)), jnp.asarray(TOKENS), jnp.ones(4, jnp.int32))[
    'params'
  ]


def test_the_loss_is_the_weighted_sum_of_both(params, batch):
  """From embeddings and logits, in float64: the mean over pairs in both directions, and over all predicted tokens."""
  network = objective().network
  images = Normalize()(batch['image'] / 255)
  found = network.apply({'params': params}, images, batch['tokens'], method='embed_and_predict')
  image, text, logits = (np.asarray(x, np.float64) for x in (*found.pairs, found.logits))
  similar = np.exp(float(params['temperature'])) * image @ text.T
  contrast = -(log_softmax(similar, 0) + log_softmax(similar, 1))[range(4), range(4)].mean() / 2
  log = log_softmax(logits, -1)
  own = [-log[row, i, TOKENS[row, i + 1]] for row, count in enumerate(COUNTS) for i in range(count)]
  loss = objective(contrastive_weight=0.5, caption_weight=3.0).loss(params, batch, jax.random.key(0), {})
  assert float(loss.value) == pytest.approx(0.5 * contrast + 3 * np.mean(own), rel=1e-5)
  assert float(loss.metrics['contrastive_loss'].value) == pytest.approx(contrast, rel=1e-5)
  assert float(loss.metrics['caption_loss'].value) == pytest.approx(np.mean(own), rel=1e-5)
  assert float(loss.metrics['caption_loss'].weight) == sum(COUNTS)


def log_softmax(x, axis):
  return x - np.log(np.exp(x).sum(axis=axis, keepdims=True))


def test_loss_and_gradient_are_the_same_in_microbatches(params, batch):
  """With 5 and 9 tokens, means of microbatches would not give the mean."""
  whole, parts = (gradients(objective(), params, batch, jax.random.key(0), {}, count) for count in (1, 2))
  assert float(parts[0]) == pytest.approx(float(whole[0]), rel=1e-6)
  largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(whole[3]))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5 * largest), whole[3], parts[3])


@pytest.mark.parametrize(
  'mesh',
  [
    MeshShape(data=2, fsdp=2, tensor=2),
    *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in (MeshShape(), MeshShape(fsdp=8), MeshShape(tensor=8))),
  ],
)
def test_losses_are_those_of_one_device_on_any_mesh(mesh):
  batches = [batch_of(objective(), seed) for seed in range(2)]
  one = Trainer(objective(), devices=1).run(batches)
  np.testing.assert_allclose(Trainer(objective(), mesh).run(batches), one, rtol=1e-5)


def test_a_fine_tuning_of_captions_alone_is_the_objective_language(params, batch):
  both = objective(contrastive_weight=0.0, caption_weight=1.0).loss(params, batch, jax.random.key(0), {})
  alone = Language(objective().network, special=SPECIAL).loss(params, batch, jax.random.key(0), {})
  assert float(both.value) == pytest.approx(float(alone.value), rel=1e-6)


def test_outputs_are_embeddings_and_captions(params, batch):
  outputs = objective().outputs()
  found = objective().network.apply(
    {'params': params}, Normalize()(batch['image'] / 255), batch['tokens'], method='embed_and_predict'
  )
  np.testing.assert_allclose(outputs['embed_image'].call(params, {}, batch), found.pairs.image, atol=1e-6)
  np.testing.assert_allclose(outputs['embed_text'].call(params, {}, batch), found.pairs.text, atol=1e-6)
  assert outputs['caption'].call(params, {}, batch).shape == (4, LENGTH - 1)
  assert outputs['features'].call(params, {}, batch).shape == (4, 24)
  assert outputs['patch_features'].call(params, {}, batch).shape == (4, 2, 2, 32)
  log = np.asarray(jax.nn.log_softmax(found.logits))
  own = [sum(log[row, i, TOKENS[row, i + 1]] for i in range(count)) for row, count in enumerate(COUNTS)]
  np.testing.assert_allclose(outputs['log_likelihood'].call(params, {}, batch), own, rtol=1e-5)


NETWORKS = {
  'coca': lambda: coca('mu/8', image_size=16, vocab_size=WORDS, length=LENGTH),
  'cappa': lambda: cappa('mu/8', image_size=16, vocab_size=WORDS, length=LENGTH, depth=2),
}


@pytest.mark.parametrize('beams', [1, 3])
@pytest.mark.parametrize('name', NETWORKS)
def test_a_cache_gives_the_tokens_of_whole_sequences(batch, random_variables, name, beams):
  """Greedy: each token is the most likely one after all before it. Beams: their log-likelihood is that of the text."""
  network, ones = NETWORKS[name](), jnp.ones(4, jnp.int32)
  images = Normalize()(batch['image'] / 255)
  params = random_variables(network, images, batch['tokens'], ones)['params']
  language = Language(network, special=SPECIAL).language_model(params, {})
  found = generate(language, batch, DecodingOptions(max_tokens=LENGTH - 1, beams=beams))
  rows = np.concatenate([np.full((4, 1), 62), found.tokens], axis=1).astype(np.int32)
  log = jax.nn.log_softmax(network.apply({'params': params}, images, rows, ones))
  for row in range(4):
    count = int(np.argmax(np.append(rows[row, 1:], 63) == 63)) + 1
    count = min(count, LENGTH - 1)
    if beams == 1:
      np.testing.assert_array_equal(np.argmax(log[row, :count], axis=-1), rows[row, 1 : count + 1])
    total = sum(float(log[row, i, rows[row, i + 1]]) for i in range(count))
    assert float(found.log_likelihood[row]) == pytest.approx(total, abs=1e-4)


def test_a_network_that_does_not_fit_is_refused():
  network = NETWORKS['cappa']()
  with pytest.raises(ValueError, match='contrastive_captioning needs coca or contrastive_captioner'):
    ContrastiveCaptioning(network)
  with pytest.raises(ValueError, match='contrastive needs a dual encoder'):
    Contrastive(NETWORKS['coca']())
  with pytest.raises(ValueError, match='parallel_fraction: parallel prediction needs a captioner with mask_token=True'):
    Language(NETWORKS['coca'](), parallel_fraction=0.5)
