"""Networks own the shape of their images: objectives take those that are not square, or not of three channels."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmcv_jax.augment.geometry import Flip
from fmcv_jax.augment.normalize import Normalize
from fmcv_jax.errors import UserError
from fmcv_jax.models.backbones.swin import swin
from fmcv_jax.models.backbones.text import text_transformer
from fmcv_jax.models.backbones.vit import vit
from fmcv_jax.models.dense.segmenter import segmenter
from fmcv_jax.models.multimodal.dual_encoder import dual_encoder
from fmcv_jax.models.self_supervised.dino import dino
from fmcv_jax.models.self_supervised.mae import mae
from fmcv_jax.objectives.classification import Classification
from fmcv_jax.objectives.contrastive import Contrastive
from fmcv_jax.objectives.dino import SelfDistillation
from fmcv_jax.objectives.mae import MaskedAutoencoding
from fmcv_jax.objectives.segmentation import Segmentation
from fmcv_jax.pretrained.hub_vit import exported_side

WIDE = {'image_size': (16, 32), 'in_channels': 4, 'depth': 1}
NORMALIZE = Normalize((0.5,) * 4, (0.5,) * 4)
TEXT = text_transformer(vocab_size=20, length=5, width=32, depth=1, num_heads=2, num_classes=32)


def objectives():
  encoder = vit('mu/8', **WIDE)
  return {
    'classification': Classification(vit('mu/8', num_classes=3, **WIDE), augment=(Flip(),), normalize=NORMALIZE),
    'swin': Classification(swin('mu', num_classes=3, image_size=(32, 64), in_channels=4), normalize=NORMALIZE),
    'contrastive': Contrastive(
      dual_encoder(vit('mu/8', num_classes=32, **WIDE), TEXT), patch_keep_ratio=0.5, normalize=NORMALIZE
    ),
    'mae': MaskedAutoencoding(mae(encoder, width=32, depth=1, num_heads=2), normalize=NORMALIZE),
    'dino': SelfDistillation(
      dino(encoder, prototypes=16, hidden=16, bottleneck=8), local_crops_number=0, normalize=NORMALIZE
    ),
    'segmentation': Segmentation(segmenter(encoder, 3), augment=(Flip(),), normalize=NORMALIZE),
  }


@pytest.mark.parametrize('name', ['classification', 'swin', 'contrastive', 'mae', 'dino', 'segmentation'])
def test_wide_images_of_four_channels_have_a_loss_and_gradients(name):
  objective = objectives()[name]
  draw = np.random.default_rng(0)
  batch = {field: draw.integers(0, 3, (2, *x.shape)).astype(x.dtype) for field, x in objective.example_batch.items()}
  image = next(x for field, x in objective.example_batch.items() if field in ('image', 'global_views'))
  assert image.shape[-3:] == ((32, 64, 4) if name == 'swin' else (16, 32, 4))
  assert objective.input_size in ((16, 32), (32, 64), None)
  params, extra = jax.jit(objective.init)(jax.random.key(0))
  value, gradient = jax.jit(
    jax.value_and_grad(lambda params: objective.loss(params, batch, jax.random.key(1), extra).value)
  )(params)
  assert np.isfinite(value)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))


def test_a_wide_vit_is_the_square_one_whose_position_table_is_cut():
  """Positions are the only parameters that know the size; the same table gives the same features."""
  square, wide = vit('mu/8', image_size=32, depth=1), vit('mu/8', image_size=(16, 32), depth=1)
  params = jax.jit(square.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))['params']
  shapes = jax.eval_shape(wide.init, jax.random.key(0), jnp.zeros((1, 16, 32, 3)))['params']
  cut = dict(params, position=params['position'][: 1 + 2 * 4])
  assert jax.tree.map(jnp.shape, cut) == jax.tree.map(jnp.shape, shapes)
  images = jax.random.normal(jax.random.key(1), (2, 16, 32, 3))
  narrow = dataclasses.replace(wide, pos_embed='sincos2d'), dataclasses.replace(square, pos_embed='sincos2d')
  same = [network.apply({'params': params}, images).pooled for network in narrow]
  np.testing.assert_array_equal(*same)
  assert wide.apply({'params': cut}, images).tokens.shape == (2, 9, 32)


def test_means_for_other_channels_and_exports_of_other_shapes_are_refused():
  with pytest.raises(ValueError, match='normalize: 3 means for images of 4 channels'):
    Normalize()(jnp.zeros((1, 2, 2, 4)))
  with pytest.raises(UserError, match=r'timm: .* square RGB images; the network takes 16 x 32 pixels .* of 4 channels'):
    exported_side(vit('mu/8', **WIDE), 'timm')
  with pytest.raises(ValueError, match=r'image_size \(16, 30\) is not divisible by the patch size 8'):
    vit('mu/8', image_size=(16, 30))
