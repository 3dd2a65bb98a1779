"""Claims about the diffusion transformer that no published network is needed for."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmcv_jax.diffusion.condition import make_condition
from fmcv_jax.models.common.patches import patchify, unpatchify
from fmcv_jax.models.generative.autoencoder import autoencoder
from fmcv_jax.models.generative.conditioning import timestep_embedding
from fmcv_jax.models.generative.dit import DetailHead, dit
from fmcv_jax.models.generative.mmdit import mmdit
from fmcv_jax.parallel.mesh import MeshShape, make_mesh
from fmcv_jax.parallel.parameter_axes import trace_init
from fmcv_jax.parallel.rules import Placement

RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 8, 8, 4)).astype(np.float32)
TIME = np.linspace(0, 999, 8).astype(np.float32)
TEXT = make_condition(
  text=RNG.normal(size=(8, 5, 16)).astype(np.float32),
  text_mask=np.arange(5) < np.array([1, 2, 3, 4, 5, 1, 2, 3])[:, None],
  pooled_text=RNG.normal(size=(8, 16)).astype(np.float32),
)
TEXT_CONDITION = dict(image_size=8, cross_attention=True, pooled_text=True)
MMDIT = mmdit('mu/2', image_size=8, channels=4, positions=(4, 6))


def test_unpatchify_inverts_patchify_on_oblong_images_of_any_channels():
  x = RNG.normal(size=(2, 8, 12, 5)).astype(np.float32)
  np.testing.assert_array_equal(unpatchify(*patchify(x, 2), 2), x)


def test_a_new_network_predicts_zero_and_its_blocks_are_the_identity():
  network = dit('mu/2', image_size=8)
  params = network.init(jax.random.key(0), X, TIME)['params']
  output, first = network.apply({'params': params}, X, TIME, tap=1)
  _, last = network.apply({'params': params}, X, TIME, tap=2)
  np.testing.assert_array_equal(output, 0)
  np.testing.assert_array_equal(first, last)


def test_a_new_detail_head_passes_the_first_features_on():
  features, noisy = RNG.normal(size=(2, 8, 12, 5)).astype(np.float32), RNG.normal(size=(2, 8, 12, 3)).astype(np.float32)
  output, _ = DetailHead(3, 'float32').init_with_output(jax.random.key(0), features, noisy)
  np.testing.assert_array_equal(output, features[..., :3])


def test_a_detail_head_sees_three_pixels_on_all_sides_across_patches(random_variables):
  features, noisy = (
    RNG.normal(size=(1, 16, 16, 5)).astype(np.float32),
    RNG.normal(size=(1, 16, 16, 3)).astype(np.float32),
  )
  head = DetailHead(3, 'float32')
  variables = random_variables(head, features, noisy)
  changed = noisy.copy()
  changed[0, 8, 8] += 10  # the first pixel of a patch of 8
  difference = head.apply(variables, features, changed) - head.apply(variables, features, noisy)
  rows, columns = np.nonzero(np.abs(difference[0]).max(-1))
  assert (rows.min(), rows.max(), columns.min(), columns.max()) == (5, 11, 5, 11)


@pytest.mark.parametrize('network', [dit('mu/2', **TEXT_CONDITION), MMDIT], ids=['dit', 'mmdit'])
def test_text_reaches_the_image_and_masked_tokens_do_not(network, random_variables):
  variables = random_variables(network, X, TIME, TEXT)
  apply = jax.jit(network.apply)
  before = apply(variables, X, TIME, TEXT)
  hidden = {**TEXT, 'text': np.where(TEXT['text_mask'][..., None], TEXT['text'], 7.0).astype(np.float32)}
  np.testing.assert_array_equal(apply(variables, X, TIME, hidden), before)
  for other in ({**TEXT, key: TEXT[key] + 1} for key in ('text', 'pooled_text')):
    assert np.abs(apply(variables, X, TIME, other) - before).max() > 1e-3


def test_an_mmdit_taps_every_block_and_the_last_one_ends_the_scan(random_variables):
  network = mmdit('mu/2', image_size=8, channels=4, depth=3)
  variables = random_variables(network, X, TIME, TEXT)
  apply = jax.jit(network.apply)
  plain = apply(variables, X, TIME, TEXT)
  taps = []
  for tap in (1, 2, 3):
    output, tokens = apply(variables, X, TIME, TEXT, tap=tap)
    np.testing.assert_allclose(output, plain, rtol=0, atol=1e-5 * np.abs(plain).max())
    taps.append(tokens)
  assert all(np.abs(a - b).max() > 1e-3 for a, b in itertools.pairwise(taps))


def test_remat_and_unrolling_change_no_result(random_variables):
  network = dit('mu/2', **TEXT_CONDITION)
  variables = random_variables(network, X, TIME, TEXT)

  def gradient(network):
    return jax.jit(jax.grad(lambda v: jnp.square(network.apply(v, X, TIME, TEXT)).mean()))(variables)

  expected = gradient(network)
  # Of the largest gradient of all: that of the keys' bias, to which softmax is blind, is rounding only.
  atol = 1e-5 * max(np.abs(x).max() for x in jax.tree.leaves(expected))
  for other in (dit('mu/2', **TEXT_CONDITION, remat='full'), dit('mu/2', **TEXT_CONDITION, unroll=2)):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), gradient(other), expected)


def test_sinusoids_are_exact_at_the_latest_time():
  frequency = 10_000.0 ** -(np.arange(128) / 128)
  expected = np.concatenate([np.cos(999 * frequency), np.sin(999 * frequency)])
  # float32 holds an angle of 999 to half a unit in the last place, 3e-5, and a frequency's error times 999 as much.
  np.testing.assert_allclose(timestep_embedding(np.array([999.0]), 256)[0], expected, rtol=0, atol=1e-4)


def assert_same_on_a_mesh(network, variables, *inputs):
  placement = Placement(make_mesh(MeshShape(data=2, fsdp=2, tensor=2)))
  whole = jax.jit(network.apply)(variables, *inputs)

  def call(variables, *inputs):
    with placement.active():
      return network.apply(variables, *inputs)

  _, rows = trace_init(lambda: network.init(jax.random.key(0), *inputs))
  shardings = {'params': placement.parameters(variables['params'], rows)}
  split = jax.jit(call, in_shardings=(shardings, *(placement.batch(x) for x in inputs)))(variables, *inputs)
  for a, b in zip(jax.tree.leaves(split), jax.tree.leaves(whole), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize('network', [dit('mu/2', **TEXT_CONDITION), MMDIT], ids=['dit', 'mmdit'])
def test_denoisers_split_over_eight_devices_equal_one(network, random_variables):
  assert_same_on_a_mesh(network, random_variables(network, X, TIME, TEXT), X, TIME, TEXT)


def test_autoencoder_split_over_eight_devices_equals_one(random_variables):
  network = autoencoder('kl-f8', image_size=8, channels=(32, 64), layers=1)
  images = X[..., :3]
  assert_same_on_a_mesh(network, random_variables(network, images), images)
