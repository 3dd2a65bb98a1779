"""A file in which something is wanting, one array or a group of them, is refused by the name of what is missing.

The names are those of the reference libraries' own networks, built without memory at small sizes, and the same networks
in every other format of their family. A few groups can be wanting because what is left is a network too.
"""

import functools
import json
import re

import jax
import numpy as np
import pytest

from fmcv_jax.apps import conversion
from fmcv_jax.errors import UserError
from fmcv_jax.pretrained.families import FAMILIES
from fmcv_jax.pretrained.layout import with_heads, write
from fmcv_jax.pretrained.recognition import recognize
from tests.pretrained.references import CODER, IMAGE, TEXT, unet_config
from tests.pretrained.test_real_sizes import Names

torch = pytest.importorskip('torch', reason='pip install fmcv-jax[parity]')
transformers = pytest.importorskip('transformers', reason='pip install fmcv-jax[parity]')
diffusers = pytest.importorskip('diffusers', reason='pip install fmcv-jax[parity]')
timm = pytest.importorskip('timm', reason='pip install fmcv-jax[parity]')

T, D = transformers, diffusers
CLIP = {'vision_config': IMAGE, 'text_config': TEXT, 'projection_dim': 24}
SMALL = {'img_size': 32, 'patch_size': 8, 'embed_dim': 128, 'depth': 2, 'num_heads': 2}
SWIN = {'image_size': 96, 'patch_size': 4, 'embed_dim': 24, 'depths': [2, 4, 2, 2], 'num_heads': [2, 4, 6, 8]}
DINO = {'image_size': 32, 'patch_size': 8, 'hidden_size': 128, 'num_hidden_layers': 2, 'num_attention_heads': 2}
DECODER = {'decoder_hidden_size': 64, 'decoder_num_hidden_layers': 2, 'decoder_intermediate_size': 256}
WORDS = {'vocab_size': 49_408, 'max_position_embeddings': 77, 'eos_token_id': 49_407, 'bos_token_id': 49_406}
SD_TEXT = {'hidden_size': 64, 'num_hidden_layers': 2, 'num_attention_heads': 1, 'intermediate_size': 128, **WORDS}


def pipeline(family):
  parts = {
    'unet.': D.UNet2DConditionModel(**unet_config(family)),
    'vae.': D.AutoencoderKL(**CODER),
    'text_encoder.': T.CLIPTextModel(T.CLIPTextConfig(**SD_TEXT)),
  }
  return {prefix + name: x.shape for prefix, part in parts.items() for name, x in part.state_dict().items()}


def control_net():
  config = unet_config('sd1')
  del config['up_block_types'], config['sample_size']
  return D.ControlNetModel(**config, conditioning_embedding_out_channels=(16, 32))


def inception():
  network = conversion.resolve({'objective': {'name': 'encoder', 'network': {'name': 'inception'}}})
  return names_of(conversion.Run(network), FAMILIES['inception'].layouts[0][1])


NETWORKS = {
  'vit': lambda: T.ViTForImageClassification(T.ViTConfig(**IMAGE, num_labels=7)),
  'deit': lambda: T.DeiTForImageClassificationWithTeacher(T.DeiTConfig(**IMAGE, num_labels=7)),
  'deit-3': lambda: timm.create_model('deit3_base_patch16_224', **SMALL, num_classes=7),
  'dino': lambda: T.ViTModel(T.ViTConfig(**IMAGE), add_pooling_layer=False),
  'mae': lambda: timm.create_model('vit_base_patch16_224', **SMALL, num_classes=7, global_pool='avg'),
  'mae_pretrain': lambda: T.ViTMAEForPreTraining(T.ViTMAEConfig(**IMAGE, **DECODER)),
  'dinov2': lambda: T.Dinov2Model(T.Dinov2Config(**DINO)),
  'dinov2-gated': lambda: T.Dinov2WithRegistersModel(T.Dinov2WithRegistersConfig(**DINO, use_swiglu_ffn=True)),
  'dinov2-registers': lambda: timm.create_model('vit_base_patch14_reg4_dinov2', **SMALL),
  'swin': lambda: T.SwinForImageClassification(T.SwinConfig(**SWIN, window_size=3, num_labels=7)),
  'clip': lambda: T.CLIPModel(T.CLIPConfig(**CLIP)),
  'clip_image': lambda: T.CLIPVisionModelWithProjection(T.CLIPVisionConfig(**IMAGE, projection_dim=24)),
  'clip_text': lambda: T.CLIPTextModelWithProjection(T.CLIPTextConfig(**TEXT, projection_dim=24)),
  'siglip': lambda: T.SiglipModel(T.SiglipConfig(vision_config=IMAGE, text_config=TEXT)),
  'siglip_image': lambda: T.SiglipVisionModel(T.SiglipVisionConfig(**IMAGE)),
  'siglip_text': lambda: T.SiglipTextModel(T.SiglipTextConfig(**TEXT)),
  'efficientnet': lambda: timm.create_model('tf_efficientnet_b0', num_classes=7),
  'inception': inception,
  'dit': lambda: D.DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=64, num_layers=2),
  'sd_vae': lambda: D.AutoencoderKL(**CODER),
  'controlnet_sd1': control_net,
  'sd1': lambda: pipeline('sd1'),
  'sd2': lambda: pipeline('sd2'),
}
# What can be wanting, if all of it is, because what is left is another network: one without classes or a projection, or
# of a kind without such a part. That it was meant to have one, only a config could say.
ANOTHER = {
  '': (r'(params/)?(classifier|head)[./].*', r'(text|visual)_projection(\.weight)?', 'proj'),
  'deit': (r'blocks\.\d+\.ls\d\.gamma',),
  'dinov2': (r'(.*embeddings\.)?mask_token', r'(.*embeddings\.)?(register_tokens|reg_token)'),
  'siglip_image': (r'norm_pre\..*',),
}
_STACK = re.compile(r'(.*?(?:blocks|layers?|encoderblock)[._])\d+[./].*')
APART = [
  *(f'init_from.extra/{part}.workdir=elsewhere' for part in ('network', 'autoencoder', 'text')),
  *(f'objective.text_condition.encoder.{field}' for field in ('width=64', 'depth=2', 'num_heads=1', 'mlp_dim=128')),
  *('objective.network.image_size=8', 'objective.latent_space.autoencoder.image_size=16'),
  *('objective.latent_space.autoencoder.channels=(128,128)', 'objective.latent_space.autoencoder.layers=1'),
]
OVERRIDES = {'dit': ['objective.latent_space.autoencoder=None'], 'controlnet_sd1': APART}


def names_of(run, layout):
  """What a network's arrays are called in a format, with their shapes."""
  state = {'params': run.abstract_state.params, 'extra': run.abstract_state.extra}
  flat = jax.tree_util.tree_flatten_with_path(state)[0]
  paths = {conversion.path_of(path).removeprefix('params/'): leaf.shape for path, leaf in flat}
  rows = {row.ours for row in layout.rows}
  zeros = {path: np.broadcast_to(np.float32(0), shape) for path, shape in paths.items() if path in rows}
  if len(zeros) < len([path for path in paths if not path.startswith('extra/') or path.count('/') > 1]):
    raise UserError('not of this format')
  objective = run.experiment.objective
  written = write(with_heads(layout, lambda path: conversion._heads(objective, path)), zeros, objective.network)
  return {name: np.asarray(x).shape for name, x in written.items()}


@functools.cache
def tables(case):
  """Names and shapes of a network in all formats of its family: [(format, shapes)]."""
  family = case.split('-')[0]
  with torch.device('meta'):
    own = NETWORKS[case]()
  reference = Names(own)
  match = matched(case, reference.shapes)
  found, covered = [('reference', dict(reference.shapes))], {('', _spelling(reference.shapes))}
  for form, layout in FAMILIES[family].layouts:
    try:
      shapes = names_of(match.run, layout)
      is_read = (form, _spelling(shapes)) not in covered and recognize(Names(shapes), family, 'x').layout is layout
      if is_read:
        matched(case, shapes)
    except (UserError, ValueError):  # another kind of network of the family
      continue
    if is_read:
      covered.add((form, _spelling(shapes)))
      found.append((form, shapes))
  return found


def _spelling(names):
  return frozenset(re.sub(r'\d+', '0', name) for name in names)


def groups(names):
  """Pattern -> names: each name, each module with all that is below it, and each of both in all layers at once."""
  found = {}
  names = [name for name in names if not re.search('num_batches_tracked|position_ids|relative_position_index', name)]
  for name in names:
    parts = re.split(r'(?<=[./])', name)
    for length in range(1, len(parts) + 1):
      head = ''.join(parts[:length])
      for pattern in (re.escape(head), re.sub(r'\d+', r'\\d+', re.escape(head))):
        pattern += '' if length == len(parts) else '.*'
        found.setdefault(pattern, None)
  wanting = {}
  for pattern in found:
    left = frozenset(name for name in names if re.fullmatch(pattern, name))
    if len(left) < len(names):
      wanting.setdefault(left, pattern)
  return {pattern: left for left, pattern in wanting.items()}


@pytest.fixture(scope='module', autouse=True)
def shapes_of_equal_networks_once():
  """Most files in which something is wanting are held against the same network."""
  found, original = {}, conversion._leaves

  def leaves(run):
    key = json.dumps(run.config['objective'], sort_keys=True, default=str)
    if key not in found:
      found[key] = original(run)
    return found[key]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(conversion, '_leaves', leaves)
    yield


def matched(case, shapes):
  family = case.split('-')[0]
  return conversion.matched(Names(shapes), 'the_file', family=family, overrides=OVERRIDES.get(family, []))


def unnamed(case, every):
  """(groups tried, those whose file was taken or refused without the name), every n-th group of each format."""
  tried, wrong = 0, []
  for form, shapes in tables(case):
    for pattern, left in sorted(groups(shapes).items())[::every]:
      tried += 1
      rest = {name: shape for name, shape in shapes.items() if name not in left}
      try:
        matched(case, rest)
        message = ''
      except UserError as error:
        message = str(error)
      is_line = message.startswith('the_file: ') and '\n' not in message
      is_named = any(name in message for name in left) or re.search(pattern, message) or blocks(shapes) <= left
      if not (is_line and 'missing' in message and is_named) and (message or not is_another(case, shapes, left)):
        wrong.append((form, pattern, message))
  return tried, wrong


def blocks(names):
  return {name for name in names if _STACK.fullmatch(name)}


def is_another(case, names, left):
  """Whether what is left over is a network of the family: one of fewer layers, or without an optional part."""
  stacks = {found[1] for name in names if (found := _STACK.fullmatch(name))}
  last = ({name for name in names if re.match(re.escape(stack) + '1[./]', name)} for stack in stacks)
  optional = (*ANOTHER[''], *ANOTHER.get(case.split('-')[0], ()))
  return left in (*last, *({name for name in names if re.fullmatch(pattern, name)} for pattern in optional))


@pytest.mark.parametrize('case', ['vit', 'dinov2', 'clip', 'siglip_image', 'clip_text', 'dit', 'sd_vae'])
def test_what_is_missing_is_named(case):
  tried, wrong = unnamed(case, every=19)
  assert tried >= 5
  assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize('case', NETWORKS)
def test_what_is_missing_is_named_whatever_it_is(case):
  tried, wrong = unnamed(case, every=1)
  assert tried >= 60
  assert not wrong
