"""The masked autoencoder against published counts and transformers' ViTMAE: features, loss and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmcv_jax.models.backbones.vit import vit
from fmcv_jax.models.common.patches import patchify, unpatchify
from fmcv_jax.models.common.positions import sincos_2d
from fmcv_jax.models.self_supervised.mae import mae
from fmcv_jax.objectives.mae import MaskedAutoencoding, masked_mse, normalize_patches, random_order
from fmcv_jax.parallel.mesh import MeshShape
from fmcv_jax.parallel.rules import path_of
from fmcv_jax.train.flops import matmul_flops
from tests.models.test_tables import count
from tests.train.tiny import Trainer, batch_of


# The published counts include the two fixed tables of positions, each with a row of zeros for the class token.
@pytest.mark.parametrize(
  ('variant', 'patches', 'parameters', 'gmac'),
  [('B/16', 196, 111_907_840, 9.781), ('L/16', 196, 329_541_888, 20.756), ('H/14', 256, 657_074_508, 48.562)],
)
def test_published_sizes(variant, patches, parameters, gmac):
  network = mae(vit(variant, pos_embed='sincos2d'))
  images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  order = jax.ShapeDtypeStruct((1, patches), jnp.int32)

  def forward(variables, images, order):
    return network.apply(variables, images, order, visible=patches // 4)

  variables = jax.eval_shape(lambda i, o: network.init(jax.random.key(0), i, o, visible=patches // 4), images, order)
  assert count(variables) + (patches + 1) * (network.encoder.width + 512) == parameters
  assert matmul_flops(forward, variables, images, order) / 2e9 == pytest.approx(gmac, abs=6e-4)


def small(**options):
  return mae(vit('mu/8', image_size=32, pos_embed='sincos2d', depth=1, **options), width=32, depth=1, num_heads=4)


def drawn(shapes):
  """Parameters that all have a say, without compiling an initialization."""
  generator = np.random.default_rng(1)
  return jax.tree.map(lambda s: 0.3 * generator.normal(size=s.shape).astype(np.float32), shapes)


def test_the_encoder_sees_the_first_patches_of_the_order_and_nothing_else():
  network = small()
  generator = np.random.default_rng(0)
  images = generator.normal(size=(2, 32, 32, 3)).astype(np.float32)
  order = np.stack([generator.permutation(16) for _ in range(2)])
  shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), images, order, visible=4))
  variables = drawn(shapes)
  apply = jax.jit(lambda images: network.apply(variables, images, order, visible=4))

  def with_noise(which):
    patches, grid = patchify(images, 8)
    noisy = np.array(patches)
    for image in range(2):
      noisy[image, order[image, which]] += 1
    return np.asarray(unpatchify(jnp.asarray(noisy), grid, 8))

  same, other = apply(with_noise(slice(4, None))), apply(with_noise(slice(3, 4)))
  before = apply(images)
  np.testing.assert_array_equal(before.pixels, same.pixels)
  assert np.abs(before.pixels - other.pixels).max() > 0.1


def test_orders_are_permutations_and_differ_between_images():
  order = np.asarray(random_order(jax.random.key(0), 8, 16))
  np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(16), (8, 1)))
  assert len(np.unique(order, axis=0)) == 8


def test_reconstruct_keeps_the_true_pixels_where_they_are_visible():
  objective = MaskedAutoencoding(small())
  params, _ = drawn(jax.eval_shape(objective.init, jax.random.key(0)))
  batch = {'image': np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)}
  masked, filled = np.moveaxis(np.asarray(jax.jit(objective.reconstruct)(params, {}, batch)), 1, 0)
  visible = (masked != 0.5).any(-1)
  assert visible.mean() == pytest.approx(0.25, abs=0.01)
  np.testing.assert_allclose(filled[visible], batch['image'][visible] / 255, atol=1e-6)
  # What is filled in has the patches' own mean: the network is asked for the rest only.
  assert np.abs(filled[~visible] - batch['image'][~visible] / 255).max() > 0.1


def test_parity_with_transformers():
  torch = pytest.importorskip('torch', reason='pip install fmcv-jax[parity]')
  transformers = pytest.importorskip('transformers', reason='pip install fmcv-jax[parity]')
  from tests.models.test_parity import IMAGES, OURS, TOWER, randomized, to_ours, to_torch

  config = transformers.ViTMAEConfig(
    **TOWER, intermediate_size=96, image_size=32, patch_size=8, decoder_hidden_size=32, decoder_num_hidden_layers=2,
    decoder_num_attention_heads=4, decoder_intermediate_size=128, norm_pix_loss=True, attn_implementation='eager',
  )  # fmt: skip
  reference = randomized(transformers.ViTMAEForPreTraining(config))
  fixed = {'vit.embeddings.position_embeddings': 48, 'decoder.decoder_pos_embed': 32}
  for name, width in fixed.items():  # transformers' own table has rows and columns the other way round
    table = np.concatenate([np.zeros((1, width)), sincos_2d(4, 4, width)]).astype(np.float32)
    reference.get_parameter(name).data = torch.from_numpy(table)[None]
  network = mae(vit('mu/8', image_size=32, pos_embed='sincos2d', **OURS), width=32, depth=2, num_heads=4)

  noise = np.random.default_rng(3).uniform(size=(4, 16)).astype(np.float32)
  order = np.argsort(noise, axis=1)
  shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), IMAGES, order, visible=4))['params']

  def adopted(tensors):
    own = {name.replace('decoder.decoder_', 'decoder.').replace('pred', 'head'): x for name, x in tensors.items()}
    parts = {'encoder': 'vit.', 'decoder': 'decoder.'}
    return {
      part: to_ours({name.removeprefix(start): x for name, x in own.items() if name.startswith(start)}, shapes[part])
      for part, start in parts.items()
    }

  theirs = reference(to_torch(IMAGES), noise=torch.from_numpy(noise))
  theirs.loss.backward()
  latent = reference.vit(to_torch(IMAGES), noise=torch.from_numpy(noise)).last_hidden_state

  trained = {name: p for name, p in reference.named_parameters() if name not in fixed}
  params = adopted(trained)

  def loss(params):
    predicted = network.apply({'params': params}, IMAGES, order, visible=4)
    target, _ = patchify(IMAGES, 8)
    return masked_mse(predicted.pixels, normalize_patches(target)[0], order, 4), predicted

  (ours, predicted), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  np.testing.assert_allclose(ours, theirs.loss.detach(), rtol=1e-5)
  np.testing.assert_allclose(predicted.features, latent[:, 0].detach(), rtol=0, atol=1e-5)
  scale = float(theirs.logits.detach().abs().max())
  np.testing.assert_allclose(predicted.pixels, theirs.logits.detach(), rtol=0, atol=1e-5 * scale)

  expected = adopted({name: p.grad for name, p in trained.items()})
  largest = max(np.abs(g).max() for g in jax.tree.leaves(expected))
  for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(gradients)[0], jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max() + 1e-6 * largest, err_msg=path_of(path))


@pytest.mark.slow
def test_training_on_eight_devices_equals_one():
  learner = MaskedAutoencoding(small())
  batches = [batch_of(learner, seed) for seed in range(4)]
  one, eight = Trainer(learner, devices=1), Trainer(learner, MeshShape(data=2, fsdp=2, tensor=2))
  losses = [trainer.run(batches) for trainer in (one, eight)]
  np.testing.assert_allclose(losses[1], losses[0], rtol=2e-5)
  assert len(set(losses[0])) == 4
