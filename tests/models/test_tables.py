"""Parameters and multiply-adds of the named networks against the reference implementations in torch.

Parameters are exact; GMAC (linear layers, convolutions, both attention products) are as printed, to their last digit.
The references are timm (ViT, DeiT, DINOv2, Swin, EfficientNet), OpenAI's CLIP = open_clip = transformers, and
transformers' SigLIP, ALIGN, PaliGemma, Depth Anything and SAM, and open_clip's CoCa.
"""

import jax
import jax.numpy as jnp
import pytest

from fmcv_jax.models.backbones.efficientnet import efficientnet
from fmcv_jax.models.backbones.swin import swin
from fmcv_jax.models.backbones.vit import vit
from fmcv_jax.models.dense.dpt import depth_anything
from fmcv_jax.models.dense.sam import sam
from fmcv_jax.models.multimodal.captioner import cappa, coca
from fmcv_jax.models.multimodal.dual_encoder import align, clip, siglip
from fmcv_jax.models.multimodal.prefix_lm import paligemma
from fmcv_jax.train.flops import matmul_flops


def images(size):
  return jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)


def variables_of(network, *inputs):
  return jax.eval_shape(network.init, jax.random.key(0), *inputs)


def count(variables):
  return sum(leaf.size for leaf in jax.tree.leaves(variables))


def assert_gmac(printed, fn, *args):
  digits = len(printed.partition('.')[2])
  assert f'{matmul_flops(fn, *args) / 2e9:.{digits}f}' == printed


def check(network, size, parameters, gmac):
  variables = variables_of(network, images(size))
  assert count(variables) == parameters
  assert_gmac(gmac, network.apply, variables, images(size))
  return variables


@pytest.mark.parametrize(
  ('variant', 'size', 'parameters', 'backbone', 'gmac'),
  [
    ('Ti/16', 224, 5_717_416, 5_524_416, '1.254'),
    ('S/32', 224, 22_878_952, 22_493_952, '1.143'),
    ('S/16', 224, 22_050_664, 21_665_664, '4.599'),
    ('B/32', 224, 88_224_232, 87_455_232, '4.409'),
    ('B/16', 224, 86_567_656, 85_798_656, '17.564'),
    ('B/16', 384, 86_859_496, 86_090_496, '55.484'),
    ('B/8', 224, 86_576_872, 85_807_872, '78.148'),
    ('L/16', 224, 304_326_632, 303_301_632, '61.555'),
    ('L/16', 384, 304_715_752, 303_690_752, '191.066'),
    ('L/32', 384, 306_632_680, 305_607_680, '45.276'),
    ('L/14', 224, 304_203_752, 303_178_752, '81.013'),
    ('g/14', 224, 1_012_611_432, 1_011_202_432, '267.031'),
    ('G/14', 224, 1_844_440_680, 1_842_775_680, '483.748'),
  ],
)
def test_vit_with_a_thousand_classes(variant, size, parameters, backbone, gmac):
  variables = check(vit(variant, image_size=size, num_classes=1000), size, parameters, gmac)
  assert parameters - count(variables['params']['head']) == backbone


def test_the_largest_vit_has_the_parameters_of_its_paper():
  """Dehghani et al. 2023, table 1: 21,743 M, the parameters of the blocks' matrices."""
  network = vit('22B/14', parallel=True, qk_norm=True, qkv_bias=False)
  blocks = variables_of(network, images(224))['params']['blocks']
  kernels = [x for path, x in jax.tree_util.tree_flatten_with_path(blocks)[0] if 'kernel' in str(path[-1])]
  assert count(kernels) == 21_743_271_936


@pytest.mark.parametrize(
  ('variant', 'parameters', 'gmac'), [('S/8', 21_670_272, '22.405'), ('H/14', 630_764_800, '167.294')]
)
def test_vit_without_a_head(variant, parameters, gmac):
  check(vit(variant), 224, parameters, gmac)


@pytest.mark.parametrize(
  ('variant', 'parameters', 'gmac'),
  [
    ('S/16', 22_059_496, '4.599'),
    ('M/16', 38_849_512, '7.991'),
    ('B/16', 86_585_320, '17.564'),
    ('L/16', 304_374_760, '61.555'),
    ('H/14', 632_126_440, '167.295'),
  ],
)
def test_deit3_scales_its_layers_and_does_not_place_the_class_token(variant, parameters, gmac):
  check(vit(variant, num_classes=1000, layer_scale=1e-4, class_token_has_position=False), 224, parameters, gmac)


@pytest.mark.parametrize(
  ('variant', 'size', 'parameters', 'backbone', 'gmac'),
  [
    ('Ti/16', 224, 5_910_800, 5_524_800, '1.261'),
    ('S/16', 224, 22_436_432, 21_666_432, '4.624'),
    ('B/16', 224, 87_338_192, 85_800_192, '17.657'),
    ('B/16', 384, 87_630_032, 86_092_032, '55.591'),
  ],
)
def test_deit_with_a_distillation_token(variant, size, parameters, backbone, gmac):
  variables = check(vit(variant, image_size=size, num_classes=1000, distilled=True), size, parameters, gmac)
  heads = (variables['params'][name] for name in ('head', 'distillation_head'))
  assert parameters - count(list(heads)) == backbone


@pytest.mark.parametrize(
  ('variant', 'options', 'parameters', 'gmac'),
  [
    ('S/14', {}, 22_056_192, '46.7'),
    ('B/14', {}, 86_579_712, '151.6'),
    ('L/14', {}, 304_367_616, '506.8'),
    ('B/14', {'registers': 4, 'class_token_has_position': False}, 86_582_016, '152.1'),
    ('g/14', {'width': 1536, 'num_heads': 24, 'mlp_dim': 4096, 'gated_mlp': True}, 1_136_479_232, '1783.3'),
  ],
)
def test_dinov2_at_518_pixels(variant, options, parameters, gmac):
  check(vit(variant, image_size=518, layer_scale=1e-5, **options), 518, parameters, gmac)


@pytest.mark.parametrize(
  ('variant', 'size', 'window', 'parameters', 'backbone', 'gmac'),
  [
    ('T', 224, 7, 28_288_354, 27_519_354, '4.491'),
    ('S', 224, 7, 49_606_258, 48_837_258, '8.741'),
    ('B', 224, 7, 87_768_224, 86_743_224, '15.431'),
    ('L', 224, 7, 196_532_476, 194_995_476, '34.476'),
    ('B', 384, 12, 87_903_584, 86_878_584, '47.083'),
    ('L', 384, 12, 196_735_516, 195_198_516, '103.919'),
  ],
)
def test_swin_with_a_thousand_classes(variant, size, window, parameters, backbone, gmac):
  variables = check(swin(variant, image_size=size, window=window, num_classes=1000), size, parameters, gmac)
  assert parameters - count(variables['params']['head']) == backbone


@pytest.mark.parametrize(
  ('variant', 'size', 'parameters', 'gmac'),
  [
    ('B0', 224, 5_288_548, '0.39'),
    ('B1', 240, 7_794_184, '0.69'),
    ('B2', 260, 9_109_994, '0.99'),
    ('B3', 300, 12_233_232, '1.8'),
    ('B4', 380, 19_341_616, '4.4'),
    ('B5', 456, 30_389_784, '10.3'),
    ('B6', 528, 43_040_704, '19'),
    ('B7', 600, 66_347_960, '37.746'),
    ('L2', 800, 480_309_308, '476'),
  ],
)
def test_efficientnet_with_a_thousand_classes(variant, size, parameters, gmac):
  network = efficientnet(variant, num_classes=1000)
  assert network.image_size == size
  variables = variables_of(network, images(size))
  assert count(variables['params']) == parameters
  assert_gmac(gmac, network.apply, variables, images(size))


def test_align_is_kakaos_less_the_pooler_and_the_kinds_of_segments_that_it_never_uses():
  network = align('B7', vocab_size=30_522, length=512)
  variables = variables_of(network, images(289), jax.ShapeDtypeStruct((1, 64), jnp.int32))
  assert count(variables['params']) == 172_117_841 - (768 * 768 + 768) - 2 * 768


def check_pair(network, size, parameters, tower, image_gmac, text_gmac):
  tokens = jax.ShapeDtypeStruct((1, network.text.length), jnp.int32)
  variables = variables_of(network, images(size), tokens)
  assert count(variables) == parameters
  assert count(variables['params']['image']) == tower
  assert_gmac(image_gmac, lambda v, x: network.apply(v, x, method='encode_image'), variables, images(size))
  assert_gmac(text_gmac, lambda v, t: network.apply(v, t, method='encode_text'), variables, tokens)


@pytest.mark.parametrize(
  ('variant', 'size', 'parameters', 'tower', 'image_gmac', 'text_gmac'),
  [
    ('B/32', 224, 151_277_313, 87_849_216, '4.409', '2.980'),
    ('B/16', 224, 149_620_737, 86_192_640, '17.563', '2.980'),
    ('L/14', 224, 427_616_513, 303_966_208, '81.013', '6.650'),
    ('L/14', 336, 427_944_193, 304_293_888, '190.960', '6.650'),
    ('H/14', 224, 986_109_441, 632_076_800, '167.295', '23.546'),
    ('g/14', 224, 1_366_678_273, 1_012_645_632, '267.032', '23.546'),
    ('G/14', 224, 2_539_567_105, 1_844_907_264, '483.748', '48.932'),
  ],
)
def test_clip(variant, size, parameters, tower, image_gmac, text_gmac):
  check_pair(clip(variant, image_size=size), size, parameters, tower, image_gmac, text_gmac)


@pytest.mark.parametrize(
  ('variant', 'size', 'options', 'parameters', 'tower', 'image_gmac', 'text_gmac'),
  [
    ('B/16', 224, {}, 203_155_970, 92_884_224, '17.7', '5.512'),
    ('B/16', 224, {'vocab_size': 256_000}, 375_187_970, 92_884_224, '17.7', '5.512'),
    ('L/16', 256, {}, 652_150_786, 315_956_224, '81.3', '19.530'),
    ('So400m/14', 224, {'length': 16}, 877_360_306, 427_680_704, '110.2', '6.594'),
  ],
)
def test_siglip(variant, size, options, parameters, tower, image_gmac, text_gmac):
  network = siglip(variant, image_size=size, **options)
  check_pair(network, size, parameters, tower, image_gmac, text_gmac)


def test_siglip_at_384_reads_27_patches_of_14_a_side():
  network = siglip('So400m/14', image_size=378)  # the published 384-pixel weights never look at the last 6 pixels
  variables = variables_of(network, images(378), jax.ShapeDtypeStruct((1, 64), jnp.int32))
  assert (count(variables), count(variables['params']['image'])) == (877_960_498, 428_225_600)


@pytest.mark.parametrize(
  ('variant', 'size', 'parameters'),
  [
    ('paligemma_3b', 224, 2_923_466_480),
    ('paligemma_3b', 448, 2_924_351_216),
    ('paligemma_3b', 896, 2_927_890_160),
    ('paligemma2_3b', 224, 3_032_242_416),
    ('paligemma2_10b', 224, 9_662_638_832),
    ('paligemma2_28b', 224, 27_650_487_024),
  ],
)
def test_paligemma(variant, size, parameters):
  """The published models have 257,216 rows of embeddings, more than the defaults of transformers' configuration."""
  text, lengths = jax.ShapeDtypeStruct((1, 8), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
  assert count(variables_of(paligemma(variant, image_size=size), images(size), text, lengths)) == parameters


@pytest.mark.parametrize(
  ('variant', 'options', 'parameters', 'image', 'text', 'gmac'),
  [
    ('B/32', {}, 253_560_065, 89_164_032, 63_428_608, '4.595'),
    ('L/14', {}, 638_450_177, 306_724_864, 123_651_072, '81.820'),
    ('base/18', {'image_size': 288, 'vocab_size': 64_000}, 440_337_409, 86_395_392, 134_661_120, '23.237'),
  ],
)
def test_coca(variant, options, parameters, image, text, gmac):
  """Counts of open_clip.create_model, and of its towers `visual` and `text`."""
  size, network = options.get('image_size', 224), coca(variant, **options)
  tokens, lengths = jax.ShapeDtypeStruct((1, 76), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
  params = variables_of(network, images(size), tokens, lengths)['params']
  assert [count(x) for x in (params, params['image'], params['text'])] == [parameters, image, text]
  assert_gmac(gmac, network.image.apply, {'params': params['image']}, images(size))


def test_cappa():
  """B/16: the ViT without a class token; embedding, mask token and positions; 6 layers of 16 w^2 without biases and
  with 3 scales; last norm and logits with biases."""
  w, words, length = 768, 32_000, 64
  decoder = (words + 1 + length) * w + 6 * (16 * w * w + 3 * w) + 2 * w + (w + 1) * words
  tokens, lengths = jax.ShapeDtypeStruct((1, length), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
  params = variables_of(cappa(), images(224), tokens, lengths)['params']
  assert count(params['text']) == decoder
  assert count(params['image']) == count(variables_of(vit('B/16', pool='gap'), images(224)))


@pytest.mark.parametrize(('variant', 'parameters'), [('S', 24_785_089), ('B', 97_470_785), ('L', 335_315_649)])
def test_depth_anything(variant, parameters):
  assert count(variables_of(depth_anything(variant), images(518))) == parameters


@pytest.mark.parametrize(
  ('variant', 'encoder', 'parameters'),
  [('B', 89_670_912, 93_735_728), ('L', None, 312_343_088), ('H', None, 641_090_864)],
)
def test_segment_anything(variant, encoder, parameters):
  variables = variables_of(sam(variant), images(1024))
  assert count(variables) == parameters
  assert encoder is None or count(variables['params']['encoder']) == encoder
  assert count(variables['params']['prompt']) == 6_476
  assert count(variables['params']['decoder']) == 4_058_340
