"""The reference libraries' own networks of the published sizes: every name and shape is known, none is left over.

They are built on torch's device 'meta', without memory, so that the largest cost no more than the smallest.
"""

import json

import numpy as np
import pytest

from fmcv_jax.apps.conversion import matched
from fmcv_jax.pretrained.tensors import Tensors

torch = pytest.importorskip('torch', reason='pip install fmcv-jax[parity]')
transformers = pytest.importorskip('transformers', reason='pip install fmcv-jax[parity]')
diffusers = pytest.importorskip('diffusers', reason='pip install fmcv-jax[parity]')

T = transformers
SMALL = {'hidden_size': 384, 'num_attention_heads': 6, 'intermediate_size': 1536}
LARGE = {'hidden_size': 1024, 'num_hidden_layers': 24, 'num_attention_heads': 16, 'intermediate_size': 4096}
HUGE = {'hidden_size': 1280, 'num_hidden_layers': 32, 'num_attention_heads': 16, 'intermediate_size': 5120}
SO = {'hidden_size': 1152, 'num_hidden_layers': 27, 'num_attention_heads': 16, 'intermediate_size': 4304}
DINO_L = {'hidden_size': 1024, 'num_hidden_layers': 24, 'num_attention_heads': 16, 'patch_size': 14, 'image_size': 518}
SWIN_L = {'embed_dim': 192, 'depths': [2, 2, 18, 2], 'num_heads': [6, 12, 24, 48], 'window_size': 12, 'image_size': 384}
UNETS = {('sd15', 4): 859_520_964, ('sd15', 9): 859_535_364, ('sd2', 4): 865_910_724}
TEXT = {'hidden_size': 768, 'num_attention_heads': 12, 'intermediate_size': 3072, 'vocab_size': 49_408}
UNET = {'block_out_channels': (320, 640, 1280, 1280)}
SD1 = {**UNET, 'cross_attention_dim': 768, 'attention_head_dim': 8}
SD2 = {**UNET, 'cross_attention_dim': 1024, 'attention_head_dim': (5, 10, 20, 20), 'use_linear_projection': True}
CODER = {
  'block_out_channels': (128, 256, 512, 512),
  'down_block_types': ('DownEncoderBlock2D',) * 4,
  'up_block_types': ('UpDecoderBlock2D',) * 4,
  'layers_per_block': 2,
}


class Names(Tensors):
  def __init__(self, module):
    arrays = module if isinstance(module, dict) else {name: x.shape for name, x in module.state_dict().items()}
    self._shapes = {name: tuple(shape) for name, shape in arrays.items()}

  @property
  def shapes(self):
    return self._shapes

  def __getitem__(self, name):
    raise AssertionError('nothing is read')


def timm(name, **more):
  return pytest.importorskip('timm', reason='pip install fmcv-jax[parity]').create_model(name, **more)


def open_clip(name):
  return pytest.importorskip('open_clip', reason='pip install fmcv-jax[parity]').create_model(name, device='meta')


def siglip(image=None, text=None):
  return T.SiglipModel(T.SiglipConfig(vision_config=image or {}, text_config=text or {}))


def dit(heads, width, depth):
  return diffusers.DiTTransformer2DModel(num_attention_heads=heads, attention_head_dim=width, num_layers=depth)


# Millions of parameters as the papers or model cards have them, where they say so.
CASES = {
  'vit_b16': (lambda: T.ViTForImageClassification(T.ViTConfig(num_labels=1000)), 86.6),
  'vit_h14': (lambda: T.ViTForImageClassification(T.ViTConfig(**HUGE, patch_size=14, num_labels=1000)), 632.0),
  'vit_l16': (lambda: timm('vit_large_patch16_224'), 304.3),
  'deit_ti16_distilled': (lambda: timm('deit_tiny_distilled_patch16_224'), 5.9),
  'deit_b16_distilled': (lambda: timm('deit_base_distilled_patch16_384'), 87.6),
  'deit_s16': (lambda: timm('deit3_small_patch16_224'), 22.1),
  'deit_h14': (lambda: timm('deit3_huge_patch14_224'), 632.1),
  'dino_s16': (lambda: T.ViTModel(T.ViTConfig(**SMALL), add_pooling_layer=False), 21.7),
  'dino_b8': (lambda: timm('vit_base_patch8_224', num_classes=0), 85.8),
  'mae_l16': (lambda: timm('vit_large_patch16_224', num_classes=0), 303.3),
  'mae_pretrain': (lambda: T.ViTMAEForPreTraining(T.ViTMAEConfig(**LARGE)), None),
  'dinov2_s14': (lambda: timm('vit_small_patch14_dinov2'), 22.1),
  'dinov2_b14': (lambda: timm('vit_base_patch14_reg4_dinov2'), 86.6),
  'dinov2_l14': (lambda: T.Dinov2Model(T.Dinov2Config(**DINO_L)), 304.4),
  'dinov2': (lambda: timm('vit_giant_patch14_reg4_dinov2'), 1136.5),
  'swin_t': (lambda: timm('swin_tiny_patch4_window7_224'), 28.3),
  'swin_l': (lambda: T.SwinForImageClassification(T.SwinConfig(**SWIN_L, num_labels=1000)), 196.7),
  'clip_l14': (lambda: open_clip('ViT-L-14'), 427.6),
  'clip_h14': (lambda: open_clip('ViT-H-14'), 986.1),
  'clip_openai_b32': (lambda: open_clip('ViT-B-32-quickgelu'), 151.3),
  'coca_b32': (lambda: open_clip('coca_ViT-B-32'), 253.6),
  'coca_l14': (lambda: open_clip('coca_ViT-L-14'), 638.5),
  'coca': (lambda: open_clip('coca_base'), 440.3),
  'siglip_b16': (siglip, 203.2),
  'siglip_so400m14': (lambda: siglip(image={**SO, 'patch_size': 14, 'image_size': 384}, text=SO), 877.4),
  'siglip_l16': (lambda: open_clip('ViT-L-16-SigLIP2-256'), 881.9),
  'dit_s2': (lambda: dit(6, 64, 12), 32.9),
  'dit_xl2': (lambda: dit(16, 72, 28), 675.1),
  'sd_vae': (lambda: diffusers.AutoencoderKL(**CODER), 83.7),
}


@pytest.mark.parametrize('name', CASES)
def test_every_name_and_shape_of_a_published_size_is_known(name):
  build, millions = CASES[name]
  with torch.device('meta'):
    tensors = Names(build())
  alone = ['objective.latent_space.autoencoder=None'] if name.startswith('dit') else []
  match = matched(tensors, name, family=name, overrides=alone)
  assert millions is None or size(match) / 1e6 == pytest.approx(millions, rel=2e-3)


@pytest.mark.parametrize(('family', 'channels'), [('sd15', 4), ('sd15', 9), ('sd2', 4)])
def test_every_name_of_a_stable_diffusion_is_known(family, channels):
  second = family == 'sd2'
  text = {**LARGE, 'num_hidden_layers': 23, 'vocab_size': 49_408} if second else TEXT
  with torch.device('meta'):
    unet = Names(diffusers.UNet2DConditionModel(**(SD2 if second else SD1), in_channels=channels))
    coder, tower = Names(diffusers.AutoencoderKL(**CODER)), Names(T.CLIPTextModel(T.CLIPTextConfig(**text)))
  assert len(unet.shapes) == 686  # as many as the published files hold
  assert len(coder.shapes) == 248
  parts = {'unet.': unet, 'vae.': coder, 'text_encoder.': tower}
  arrays = {prefix + name: shape for prefix, part in parts.items() for name, shape in part.shapes.items()}
  match = matched(Names(arrays), family, family=family)
  words = 340_387_840 if second else 123_060_480
  assert size(match, 'network/') == UNETS[family, channels]
  assert size(match, 'extra/autoencoder/') == 83_653_863
  assert size(match, 'extra/text/') == words


def size(match, part=''):
  return sum(int(np.prod(shape)) for name, shape in match.shapes.items() if name.startswith(part))


@pytest.mark.parametrize('family', ['controlnet_sd15', 'controlnet_sd2'])
def test_every_name_of_a_controlnet_is_known(family):
  with torch.device('meta'):
    tensors = Names(diffusers.ControlNetModel(**(SD2 if family == 'controlnet_sd2' else SD1)))
  assert len(tensors.shapes) == 340
  elsewhere = [f'init_from.extra/{part}.workdir=elsewhere' for part in ('network', 'autoencoder', 'text')]
  match = matched(tensors, family, family=family, overrides=elsewhere)
  assert size(match) == (361_279_120 if family == 'controlnet_sd15' else sum(map(np.prod, tensors.shapes.values())))


def clip_of(vision, text):
  return T.CLIPModel(T.CLIPConfig(vision_config=vision, text_config=text))


GOPT = {'hidden_size': 1536, 'num_hidden_layers': 40, 'num_attention_heads': 16, 'intermediate_size': 6144}
BIG = {
  'hidden_size': 1664,
  'num_hidden_layers': 48,
  'num_attention_heads': 16,
  'intermediate_size': 8192,
  'patch_size': 14,
}
BIG_TEXT = {'hidden_size': 1280, 'num_hidden_layers': 32, 'num_attention_heads': 20, 'intermediate_size': 5120}
SO_TEXT = {**SO, 'projection_size': 1536}
# The library's model and, of each tower, the heads that it computes with.
HEADS = {
  'transformers, H/14': (lambda: T.ViTModel(T.ViTConfig(**HUGE, patch_size=14), add_pooling_layer=False), (16,)),
  'transformers, bigG/14': (lambda: clip_of(BIG, BIG_TEXT), (16, 20)),
  'transformers, So400m/14': (lambda: siglip(image={**SO, 'patch_size': 14, 'image_size': 384}, text=SO), (16, 16)),
  'transformers, SigLIP 2 g/16': (lambda: siglip(image={**GOPT, 'image_size': 256}, text=SO_TEXT), (16, 16)),
  'open_clip, ViT-bigG-14': ('ViT-bigG-14', (16, 20)),
  'open_clip, SigLIP 2 g/16': ('ViT-gopt-16-SigLIP2-256', (16, 16)),
  'open_clip, So400m/14': ('ViT-SO400M-14-SigLIP-384', (16, 16)),
  'timm, gap_224': ('vit_base_patch16_gap_224', (16,)),
}


@pytest.mark.parametrize('name', HEADS)
def test_heads_of_the_published_sizes_are_those_of_the_config_next_to_them(tmp_path, name):
  build, expected = HEADS[name]
  with torch.device('meta'):
    model = build() if callable(build) else timm(build) if name.startswith('timm') else open_clip(build)
  names = ('num_heads', 'num_attention_heads')
  found = [heads for module in model.modules() for name in names if (heads := getattr(module, name, None))]
  assert set(found) == set(expected)  # as the library computes
  if name.startswith('transformers'):
    model.config.save_pretrained(tmp_path)
  elif name.startswith('timm'):
    (tmp_path / 'config.json').write_text(json.dumps({'architecture': build, 'pretrained_cfg': {}}))
  else:
    config = pytest.importorskip('open_clip').get_model_config(build)
    (tmp_path / 'open_clip_config.json').write_text(json.dumps({'model_cfg': config, 'preprocess_cfg': {}}))
  tensors = Names(model)
  network = matched(tensors, str(tmp_path)).run.experiment.objective.network
  towers = (network.image, network.text) if len(expected) == 2 else (network,)
  assert tuple(tower.stack.block.num_heads for tower in towers) == expected
