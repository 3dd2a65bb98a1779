"""The loss of a prefix language model from its logits, and what its attention may read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmcv_jax.augment.normalize import Normalize
from fmcv_jax.data.tokenizers import ClipBpe
from fmcv_jax.decoding.generation import generate
from fmcv_jax.decoding.options import DecodingOptions
from fmcv_jax.models.backbones.vit import vit
from fmcv_jax.models.multimodal.prefix_lm import paligemma
from fmcv_jax.objectives.language import Language, SpecialIds, cross_entropy
from fmcv_jax.parallel.mesh import MeshShape, make_mesh
from fmcv_jax.parallel.rules import Placement

WORDS, LENGTH = 32, 8
PAD, END, SEPARATOR = 0, 1, 4
TOKENS = np.array([
  [2, 7, 8, 4, 9, 10, 1, 0],  # prompt of 7 8; answer 9 10
  [2, 4, 9, 4, 1, 0, 0, 0],  # no prompt; the second separator belongs to the answer
  [2, 7, 4, 5, 6, 7, 8, 1],
  [2, 7, 8, 9, 10, 4, 1, 0],
])  # fmt: skip
ANSWERS = [(4, 5, 6), (2, 3, 4), (3, 4, 5, 6, 7), (6,)]  # places of the predicted tokens


def language(**options):
  network = paligemma('paligemma2_mu', image_size=16, vocab_size=WORDS, length=LENGTH)
  return Language(network, special=SpecialIds(PAD, END, SEPARATOR), **options)


@pytest.fixture(scope='module')
def batch():
  images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3)).astype(np.uint8)
  return {'image': jnp.asarray(images), 'tokens': jnp.asarray(TOKENS, jnp.int32)}


@pytest.fixture(scope='module')
def params(batch, random_variables):
  network = language().network
  return random_variables(network, jnp.zeros((4, 16, 16, 3)), batch['tokens'], jnp.ones(4, jnp.int32))['params']


def reference(logits, smoothing=0.0):
  """Loss of each predicted token by its row and place, in float64."""
  logits = np.asarray(logits, np.float64)
  log = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
  target = np.eye(WORDS) * (1 - smoothing) + smoothing / WORDS
  return {
    (row, place): -(target[TOKENS[row, place]] * log[row, place - 1]).sum()
    for row, places in enumerate(ANSWERS)
    for place in places
  }


def logits_of(params, batch):
  images = Normalize()(batch['image'].astype(jnp.float32) / 255)
  lengths = jnp.array([4, 2, 3, 6])
  return language().network.apply({'params': params}, images, batch['tokens'][:, :-1], lengths)


@pytest.mark.parametrize('smoothing', [0.0, 0.2])
def test_the_loss_is_the_mean_over_answers_and_their_ends(params, batch, smoothing):
  loss = language(label_smoothing=smoothing).loss(params, batch, jax.random.key(0), {})
  expected = reference(logits_of(params, batch), smoothing)
  assert float(loss.weight) == len(expected) == 12
  assert float(loss.value) == pytest.approx(np.mean(list(expected.values())), rel=1e-5)


def test_weights_of_tokens_are_those_of_their_own_loss(params, batch):
  weights = np.random.default_rng(1).uniform(size=TOKENS.shape).astype(np.float32)
  given = {**batch, 'token_weights': jnp.asarray(weights)}
  loss = language(token_weights=True).loss(params, given, jax.random.key(0), {})
  expected = reference(logits_of(params, batch))
  assert float(loss.weight) == pytest.approx(sum(weights[place] for place in expected), rel=1e-5)
  assert float(loss.total) == pytest.approx(sum(weights[place] * x for place, x in expected.items()), rel=1e-5)


def test_losses_of_parts_add_up_to_that_of_the_batch(params, batch):
  """With 3, 3, 5 and 1 tokens, means of parts would not."""
  objective = language()
  whole = objective.loss(params, batch, jax.random.key(0), {})
  parts = [
    objective.loss(params, {name: x[rows] for name, x in batch.items()}, jax.random.key(0), {})
    for rows in (slice(0, 1), slice(1, 4))
  ]
  assert float(sum(part.weight for part in parts)) == float(whole.weight)
  assert float(sum(part.total for part in parts)) == pytest.approx(float(whole.total), rel=1e-5)


def test_the_log_likelihood_is_the_sum_over_the_answer(params, batch):
  found = language(label_smoothing=0.3).outputs()['log_likelihood'].call(params, {}, batch)
  expected = reference(logits_of(params, batch))
  for row in range(4):
    assert float(found[row]) == pytest.approx(-sum(x for (r, _), x in expected.items() if r == row), rel=1e-5)


def test_a_prompt_is_read_in_both_directions_and_an_answer_in_one(params, batch):
  """Row 0: place 1 is a prompt's, places 4 and 5 are the answer's."""

  def changed(place):
    other = {**batch, 'tokens': batch['tokens'].at[0, place].set(20)}
    return np.abs(np.asarray(logits_of(params, other) - logits_of(params, batch)))[0].max(axis=-1)

  assert (changed(2) > 1e-4).all()  # also place 0 and 1, before it
  later = changed(5)
  assert (later[:5] < 1e-6).all()
  assert (later[5:] > 1e-4).all()


def test_padding_changes_nothing_before_it(params, batch):
  other = {**batch, 'tokens': batch['tokens'].at[1, 5:].set(17)}
  difference = np.asarray(logits_of(params, other) - logits_of(params, batch))[1, :4]
  np.testing.assert_allclose(difference, 0, atol=1e-6)


def test_cross_entropy_without_smoothing_is_that_of_optax():
  import optax

  logits, targets = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 9))), jnp.arange(15).reshape(3, 5) % 9
  expected = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  np.testing.assert_allclose(cross_entropy(logits, targets), expected, rtol=1e-5)


def test_a_tokenizer_that_does_not_fit_is_refused():
  network = paligemma('paligemma_mu', image_size=16, vocab_size=50_000, length=77)
  assert Language(network).with_tokenizer(ClipBpe()).special == SpecialIds(0, 49_407, None)
  with pytest.raises(ValueError, match='the tokenizer has 49408 ids, the network 32'):
    language().with_tokenizer(ClipBpe())
  with pytest.raises(ValueError, match=r'network.text.length: 77, but the rows of the tokenizer have 60 ids'):
    Language(network).with_tokenizer(ClipBpe(60))
  with pytest.raises(ValueError, match='network: language needs one that reads images and writes texts'):
    Language(vit('mu/8', image_size=16))


@pytest.mark.parametrize('beams', [1, 3])
def test_texts_are_the_same_on_any_mesh_and_in_any_batch(params, batch, beams):
  objective, options = language(), DecodingOptions(max_tokens=6, beams=beams)

  def texts(mesh, devices, rows):
    placement = Placement(make_mesh(mesh, jax.devices()[:devices]))

    def program(params, batch):
      with placement.active():
        return generate(objective.language_model(params, {}), batch, options).tokens

    return np.asarray(jax.jit(program)(params, {name: x[rows] for name, x in batch.items()}))

  whole = texts(MeshShape(data=1), 1, slice(0, 4))
  np.testing.assert_array_equal(texts(MeshShape(data=2, tensor=2), 4, slice(0, 4)), whole)
  np.testing.assert_array_equal(texts(MeshShape(data=1), 1, slice(2, 3)), whole[2:3])
