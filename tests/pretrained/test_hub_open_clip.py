"""What open_clip_config.json says is computed, or refused by name; expected: OpenCLIP's own outputs."""

import copy
import importlib
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fmcv_jax.apps.conversion import export_checkpoint, import_checkpoint
from fmcv_jax.errors import UserError
from tests.pretrained.references import PIXELS, to_torch

torch = pytest.importorskip('torch', reason='pip install fmcv-jax[parity]')
open_clip = pytest.importorskip('open_clip', reason='pip install fmcv-jax[parity]')
hub = importlib.import_module('open_clip.push_to_hf_hub')

VISION = {'layers': 2, 'width': 128, 'head_width': 32, 'patch_size': 8, 'image_size': 32}
TEXT = {'context_length': 6, 'vocab_size': 92, 'width': 128, 'heads': 8, 'layers': 2}
WORDS = np.array([[90, 7, 5, 91, 7, 2], [90, 62, 2, 7, 3, 2]], np.int32)
NORMALIZE = {'mean': [0.4, 0.5, 0.6], 'std': [0.2, 0.3, 0.4]}


def model_cfg(vision=(), text=(), **more):
  return {'embed_dim': 24, 'vision_cfg': VISION | dict(vision), 'text_cfg': TEXT | dict(text), **more}


CONFIGS = {
  'heads': model_cfg(),
  'quick_gelu': model_cfg(quick_gelu=True),
  'tanh': model_cfg({'act_kwargs': {'approximate': 'tanh'}}, {'act_kwargs': {'approximate': 'tanh'}}),
  'eps': model_cfg({'norm_kwargs': {'eps': 0.1}}, {'norm_kwargs': {'eps': 0.2}}),
  'eos': model_cfg(text={'pool_type': 'eos', 'eos_id': 7}),
  'eos by default': model_cfg(text={'pool_type': 'eos'}),
  'last, not causal': model_cfg(text={'pool_type': 'last', 'no_causal_mask': True}),
  'first, not causal': model_cfg(text={'pool_type': 'first', 'no_causal_mask': True}),
  'average': model_cfg({'pool_type': 'avg'}),
  'clipa': model_cfg(
    {'no_ln_pre': True, 'pool_type': 'avg', 'final_ln_after_pool': True},
    {'pool_type': 'last', 'no_causal_mask': True},
  ),
  'tower apart': model_cfg(text={'pool_type': 'eos', 'eos_id': 7}, custom_text=True),
}


def published(folder, config, preprocess=()):
  """A folder as OpenCLIP's save_config_for_hf writes it, with weights that are no initial values."""
  given = copy.deepcopy(config)
  custom = given.pop('custom_text', False)
  model = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**given).eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
  folder.mkdir()
  model.visual.image_mean, model.visual.image_std = NORMALIZE['mean'], NORMALIZE['std']
  model.visual.preprocess_cfg = dict(preprocess)
  hub.save_config_for_hf(model, folder / 'open_clip_config.json', config)
  state = {key: x.numpy() for key, x in model.state_dict().items()}
  save_file(state, folder / 'open_clip_model.safetensors')
  return model


def embedded(model, pixels=PIXELS):
  with torch.no_grad():
    image = model.encode_image(to_torch(pixels), normalize=True)
    return image.numpy(), model.encode_text(torch.from_numpy(WORDS).long(), normalize=True).numpy()


@pytest.mark.parametrize('name', CONFIGS)
def test_a_folder_computes_what_open_clip_computes(tmp_path, name):
  model = published(tmp_path / 'theirs', CONFIGS[name])
  run = import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'))
  params = {'params': run.restored_model()[0].params}
  ours = run.experiment.objective.network.apply(params, PIXELS, WORDS)
  image, text = embedded(model)
  np.testing.assert_allclose(ours.image, image, atol=1e-5)
  np.testing.assert_allclose(ours.text, text, atol=1e-5)


@pytest.mark.parametrize('name', ['quick_gelu', 'eos', 'average', 'clipa'])
@pytest.mark.parametrize('part', ['image', 'text'])
def test_a_tower_with_the_config_of_its_pair_computes_the_same_features(tmp_path, part, name):
  model = published(tmp_path / 'theirs', CONFIGS[name])
  file = tmp_path / 'theirs' / 'open_clip_model.safetensors'
  state = {key: x for key, x in load_file(file).items() if key.startswith('visual.') == (part == 'image')}
  state.pop('logit_scale', None)
  save_file(state, file)
  run = import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'))
  params = {'params': run.restored_model()[0].params}
  ours = np.array(run.experiment.objective.network.apply(params, PIXELS if part == 'image' else WORDS).output)
  theirs = embedded(model)[('image', 'text').index(part)]
  np.testing.assert_allclose(ours / np.linalg.norm(ours, axis=-1, keepdims=True), theirs, atol=1e-5)


@pytest.mark.parametrize('name', ['heads', 'quick_gelu', 'tanh', 'eps', 'eos', 'last, not causal'])
def test_our_own_export_is_read_back_whole_and_by_open_clip(tmp_path, name):
  model = published(tmp_path / 'theirs', CONFIGS[name], {'resize_mode': 'longest', 'interpolation': 'bilinear'})
  run = import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'))
  export_checkpoint(str(tmp_path / 'ours'), str(tmp_path / 'out'), 'open_clip')
  opened = open_clip.create_model(f'local-dir:{tmp_path / "out"}').eval()
  for one, other in zip(embedded(model), embedded(opened), strict=True):
    np.testing.assert_allclose(one, other, atol=1e-6)
  again = import_checkpoint(str(tmp_path / 'out'), str(tmp_path / 'again'))
  assert again.config['objective'] == run.config['objective']
  assert again.config['data']['image'] == run.config['data']['image']


REFUSED = {
  'text pool': (('text_cfg', {'pool_type': 'none'}), 'pool_type is "none"'),
  'vision pool': (('vision_cfg', {'pool_type': 'max'}), 'pool_type is "max"'),
  'attentional': (('vision_cfg', {'attentional_pool': True}), 'attentional_pool is true'),
  'positions': (('vision_cfg', {'pos_embed_type': 'sin_cos_2d'}), 'pos_embed_type is "sin_cos_2d"'),
  'cosine': (('text_cfg', {'scaled_cosine_attn': True}), 'scaled_cosine_attn is true'),
  'width': (('text_cfg', {'width': 64}), 'width is 64'),
  'activation': (('vision_cfg', {'act_kwargs': {'inplace': True}}), 'act_kwargs is'),
  'another library': (('text_cfg', {'hf_model_name': 'roberta-base'}), 'hf_model_name'),
  'resize_mode': (('preprocess_cfg', {'resize_mode': 'stretch'}), 'resize_mode is "stretch"'),
  'size': (('preprocess_cfg', {'size': 64}), 'size is 64'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_would_be_computed_otherwise_is_refused_by_name(tmp_path, name):
  (part, change), line = REFUSED[name]
  published(tmp_path / 'theirs', CONFIGS['heads'])
  path = tmp_path / 'theirs' / 'open_clip_config.json'
  said = json.loads(path.read_text())
  (said if part == 'preprocess_cfg' else said['model_cfg'])[part].update(change)
  path.write_text(json.dumps(said))
  with pytest.raises(UserError) as caught:
    import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'))
  assert f'open_clip_config.json: {"" if part == "preprocess_cfg" else "model_cfg: "}{part}' in str(caught.value)
  assert line in str(caught.value)
