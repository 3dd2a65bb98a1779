"""What an adapter file holds beyond what is understood, or of another network, is one line that names it."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from fmcv_jax.errors import UserError
from fmcv_jax.inference.adapters import add_adapters, file_and_scale
from fmcv_jax.pretrained.layout import LINEAR, Layout, Row
from fmcv_jax.pretrained.lora import metadata
from fmcv_jax.pretrained.lora.adapter_file import AdapterFile
from fmcv_jax.pretrained.lora.merge import merge
from fmcv_jax.pretrained.lora.names import sign_of
from fmcv_jax.run import Run
from tests import runs

LAYOUT = Layout(
  (
    Row('up/kernel', 'unet.blocks.0.up.weight', LINEAR),
    Row('key/kernel', 'unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight', LINEAR),
  )
)
PARAMS = {'up/kernel': np.ones((6, 8), np.float32), 'key/kernel': np.ones((768, 8), np.float32)}
UP = 'unet.blocks.0.up'
KEY = 'lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k'


def pair(name, into=6, out=8, rank=2, ends=('lora_down', 'lora_up')):
  shapes = {f'{name}.{ends[0]}.weight': (rank, into), f'{name}.{ends[1]}.weight': (out, rank)}
  return {key: np.ones(shape, np.float32) for key, shape in shapes.items()}


def opened(folder, tensors, config=None, header=None):
  if config is not None:
    (folder / 'adapter_config.json').write_text(config if isinstance(config, str) else json.dumps(config))
  save_file(tensors, folder / 'adapter_model.safetensors', header)
  return AdapterFile(str(folder / 'adapter_model.safetensors'))


GOOD = pair(UP)
REFUSED = {
  'a key of no adapter': (
    GOOD | {f'{UP}.lora_C.weight2': np.ones(2)},
    r'unexpected array unet\.blocks\.0\.up\.lora_C',
  ),
  'a weight of a network': (GOOD | {f'{UP}.weight': np.ones((8, 6))}, 'is a weight of a network, not an array of an'),
  'a layer that is not there': (
    GOOD | pair('unet.blocks.0.uq'),
    r"of runs/sd; did you mean 'unet\.blocks\.0\.up'",
  ),
  'half a pair': (dict(list(GOOD.items())[:1]), r'lora_down.weight: has no up'),
  'an alpha alone': ({**GOOD, f'{KEY}.alpha': np.float32([1])}, r'to_k.alpha has no weights next to it'),
  'two kinds': (GOOD | {f'{UP}.diff': np.ones((8, 6))}, r'diff: is LoRA and a full difference at once'),
  'other inputs': (pair(UP, into=7), r'adapts a weight of \(8, 7\), but it is \(8, 6\)'),
  'other ranks': (
    {**GOOD, f'{UP}.lora_up.weight': np.ones((8, 3), np.float32)},
    r'\(8, 3\) and \(2, 6\) have no rank in common',
  ),
  'NaN': ({**GOOD, f'{UP}.lora_up.weight': np.full((8, 2), np.nan)}, r'up\.lora_up\.weight contains NaN or Inf'),
  'alpha 0': ({**GOOD, f'{UP}.alpha': np.float32([0])}, r'up\.alpha is \[0\.0\], expected one number above 0'),
  'a layer twice': (GOOD | pair('lora_unet_blocks_0_up'), 'are the same layer; which one counts'),
  'an array twice': (GOOD | {f'{UP}.lora_A.weight': np.ones((2, 6))}, 'are the same array of one module'),
  'a bias that is not there': (GOOD | {f'{UP}.diff_b': np.ones(8)}, 'up has no bias'),
  'nothing': ({'x.alpha': np.float32([1])}, 'x.alpha: not a layer of runs/sd'),
  'PEFT without its config': (
    pair(f'base_model.model.{UP}'),
    'no adapter_config.json next to it, which says',
  ),
  'too few magnitudes': (GOOD | {f'{UP}.dora_scale': np.ones((7, 1))}, 'has 7 magnitudes for a weight of'),
  'OFT': ({f'{UP}.oft_blocks': np.ones((2, 3, 3))}, r'up\.oft_blocks of shape \(2, 3, 3\), not part of a known'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_is_not_understood_is_refused_by_name(tmp_path, name):
  tensors, message = REFUSED[name]
  with pytest.raises(UserError, match=message):
    merge(opened(tmp_path, tensors), 1.0, [LAYOUT], PARAMS, 'runs/sd')


OTHERS = {
  'SDXL': [
    pair('lora_te2_text_model_encoder_layers_0_mlp_fc1'),
    pair('lora_te1_text_model_encoder_layers_0_mlp_fc1'),
    pair('text_encoder_2.text_model.encoder.layers.0.mlp.fc1'),
    pair('lora_unet_input_blocks_7_1_transformer_blocks_9_attn1_to_q'),
    pair(KEY, into=2048),
  ],
  'Stable Diffusion 2': [pair(KEY, into=1024)],
  'Stable Diffusion 3': [pair('lora_unet_joint_blocks_0_x_block_attn_qkv')],
  'FLUX.1': [
    pair('transformer.single_transformer_blocks.0.attn.to_q'),
    pair('lora_unet_double_blocks_0_img_attn_qkv'),
  ],
  'FLUX.2': [pair('transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj')],
  'Wan': [pair('diffusion_model.blocks.0.self_attn.q', ends=('lora_A', 'lora_B'))],
  'Qwen-Image': [pair('transformer.transformer_blocks.0.img_mlp.net.2')],
  'Z-Image': [pair('diffusion_model.layers.0.attention.qkv')],
}


@pytest.mark.parametrize('network', OTHERS)
def test_another_network_is_named(tmp_path, network):
  for tensors in OTHERS[network]:
    adapter = opened(tmp_path, tensors)
    assert sign_of(adapter).startswith(network)
    with pytest.raises(UserError, match=f'seems to be for {network}'):
      merge(adapter, 1.0, [LAYOUT], PARAMS, 'runs/sd')


SETTINGS = {
  "peft_type is 'OFT'": {'peft_type': 'OFT'},
  'use_qalora is True': {'use_qalora': True},
  'fan_in_fan_out is True': {'fan_in_fan_out': True},
  "init_lora_weights is 'pissa_niter_4', which also changes the base": {'init_lora_weights': 'pissa_niter_4'},
  'trainable_token_indices is': {'trainable_token_indices': [1]},
  "lora_alpha is 'x', expected a number above 0": {'lora_alpha': 'x'},
  'says rank 3': {'r': 3},
}


@pytest.mark.parametrize('message', SETTINGS)
def test_settings_of_peft_that_change_the_sum_are_refused_by_name(tmp_path, message):
  config = {'peft_type': 'LORA', 'r': 2, 'lora_alpha': 2, 'lora_dropout': 0.1, 'base_model_name_or_path': 'x'}
  tensors = pair(f'base_model.model.{UP}', ends=('lora_A', 'lora_B'))
  merge(opened(tmp_path, tensors, config), 1.0, [LAYOUT], PARAMS, 'runs/sd')
  with pytest.raises(UserError, match=message):
    merge(opened(tmp_path, tensors, config | SETTINGS[message]), 1.0, [LAYOUT], PARAMS, 'runs/sd')


def test_a_config_that_is_no_json_is_an_error(tmp_path):
  with pytest.raises(UserError, match=r'adapter_config\.json: cannot be read'):
    opened(tmp_path, pair(f'base_model.model.{UP}'), '{')


HEADERS = [
  ({'ss_base_model_version': 'sd_v2'}, 'sd1', 'noise', 'trained on sd_v2, but runs/sd is Stable Diffusion 1'),
  ({'ss_base_model_version': 'sdxl_base_v1-0'}, 'sd1', 'noise', 'trained on sdxl_base_v1-0'),
  ({'ss_base_model_version': 'sd_v1'}, 'sd2', 'noise', 'is Stable Diffusion 2'),
  ({'ss_base_model_version': 'sd3m'}, 'sd2', 'noise', 'trained on sd3m'),
  ({'modelspec.architecture': 'flux-1-dev/lora'}, 'sd1', 'noise', 'trained on flux-1-dev/lora'),
  ({'modelspec.architecture': 'stable-diffusion-v1/lora'}, 'vit', None, "is 'vit'"),
  ({'ss_v2': 'True'}, 'sd1', 'noise', 'ss_v2 is True'),
  ({'ss_v2': 'False'}, 'sd2', 'noise', 'ss_v2 is False'),
  ({'ss_base_model_version': 'sd_v2_v'}, 'sd2', 'noise', 'predicts velocities .* but runs/sd predicts the noise'),
  ({'modelspec.architecture': 'stable-diffusion-v2-768-v/lora'}, 'sd2', 'noise', 'predicts velocities'),
  ({'modelspec.prediction_type': 'epsilon'}, 'sd2_velocity', 'velocity', 'but runs/sd predicts velocities'),
]


@pytest.mark.parametrize(('header', 'family', 'prediction', 'message'), HEADERS)
def test_the_header_is_held_against_the_network(header, family, prediction, message):
  with pytest.raises(UserError, match=message):
    metadata.check(header, family, prediction, 'x.safetensors', 'runs/sd')


def test_headers_of_the_same_network_pass():
  for header in (
    {},
    {'ss_base_model_version': 'sd_v1', 'ss_v2': 'False', 'modelspec.prediction_type': 'epsilon'},
    {'ss_base_model_version': 'sd_1.5', 'modelspec.architecture': 'stable-diffusion-v1/lora'},
  ):
    metadata.check(header, 'sd1', 'noise', 'x', 'runs/sd')
  metadata.check({'ss_base_model_version': 'sd_v2_v', 'ss_v2': 'True'}, 'sd2', 'velocity', 'x', 'runs/sd')
  for family, prediction in (('sd1', 'noise'), ('sd2', 'noise'), ('sd2', 'velocity'), ('sd1', 'velocity')):
    metadata.check(metadata.written(family, prediction, 4, 4.0), family, prediction, 'x', 'runs/sd')


def test_a_controlnet_whose_layers_have_the_names_of_the_unet_is_refused(tmp_path):
  images = runs.image_folder(tmp_path / 'images')
  run = Run(runs.controlnet(images), tmp_path / 'run')
  subject = run.subject()
  subject.params, subject.extra = run.abstract_state.params, run.abstract_state.extra
  with pytest.raises(UserError, match='is a ControlNet; merge adapters into its base model'):
    add_adapters(run, subject, ['x.safetensors'])


@pytest.mark.parametrize('given', [[3], [('x', 'y')], [('x', True)], ('x', 0.5), [('x', float('nan'))]])
def test_anything_but_files_and_scales_is_refused(given):
  with pytest.raises(UserError, match='lora: expected paths, or pairs of a path and a scale'):
    add_adapters(None, None, given)


def test_a_scale_is_behind_the_last_colon(tmp_path):
  assert file_and_scale('a.safetensors:0.8') == ('a.safetensors', 0.8)
  assert file_and_scale('gs://bucket/a.safetensors') == ('gs://bucket/a.safetensors', 1.0)
  assert file_and_scale('a.safetensors:-1') == ('a.safetensors', -1.0)
  odd = tmp_path / 'a:2'
  odd.touch()
  assert file_and_scale(str(odd)) == (str(odd), 1.0)


def test_no_alpha_at_all_is_said(tmp_path):
  assert 'has no alpha' in opened(tmp_path, GOOD).notes[0]
  assert not opened(tmp_path, GOOD | {f'{UP}.alpha': np.float32([2])}).notes
