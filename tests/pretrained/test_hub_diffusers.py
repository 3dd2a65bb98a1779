"""What the files of diffusers say is computed, or refused by name; expected: diffusers' own outputs and tables."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmcv_jax.apps.conversion import import_checkpoint, matched
from fmcv_jax.diffusion.condition import make_condition
from fmcv_jax.diffusion.process import alphas_cumprod
from fmcv_jax.errors import UserError
from fmcv_jax.pretrained import export_diffusers
from fmcv_jax.pretrained.tensors import open_tensors
from tests.pretrained.references import CODER, equal, published, to_torch, unet_config

torch = pytest.importorskip('torch', reason='pip install fmcv-jax[parity]')
diffusers = pytest.importorskip('diffusers', reason='pip install fmcv-jax[parity]')
transformers = pytest.importorskip('transformers', reason='pip install fmcv-jax[parity]')

TEXT = {'hidden_size': 64, 'num_hidden_layers': 2, 'intermediate_size': 128, 'vocab_size': 49_408}
TEXT |= {'max_position_embeddings': 77, 'eos_token_id': 49_407, 'bos_token_id': 49_406}
LIKE_SD = {'beta_schedule': 'scaled_linear', 'beta_start': 0.00085, 'beta_end': 0.012}


def pipeline(folder, scheduler, *, heads=(4, 8), activation='gelu_new', text_heads=4):
  """A small pipeline whose numbers are none that a version of Stable Diffusion has."""
  unet = diffusers.UNet2DConditionModel(**unet_config('sd2') | {'attention_head_dim': heads})
  coder = diffusers.AutoencoderKL(**CODER, scaling_factor=0.3)
  config = transformers.CLIPTextConfig(**TEXT, num_attention_heads=text_heads, hidden_act=activation)
  tower = transformers.CLIPTextModel(config)
  for name, part in (('unet', unet), ('vae', coder), ('text_encoder', tower)):
    published(part, folder / name)
  scheduler.save_pretrained(folder / 'scheduler')
  (folder / 'model_index.json').write_text('{}')
  return unet, tower


def test_a_pipeline_computes_what_its_configs_say(tmp_path):
  unet, tower = pipeline(tmp_path / 'theirs', diffusers.DDIMScheduler(**LIKE_SD))
  run = import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'), 'sd2')
  objective, (subject, _) = run.experiment.objective, run.restored_model()
  assert objective.latent_space.scale == 0.3
  rng = np.random.default_rng(0)
  x, words = rng.normal(size=(2, 8, 8, 4)).astype(np.float32), rng.normal(size=(2, 5, 64)).astype(np.float32)
  time, tokens = np.array([7, 900]), rng.integers(1, 49_000, (2, 77))
  params = {'params': subject.params['network']}
  ours = jax.jit(objective.network.apply)(params, x, jnp.asarray(time), make_condition(text=jnp.asarray(words)))
  read = objective.text_condition.encoder.apply({'params': subject.extra['text']}, tokens.astype(np.int32)).tokens
  with torch.no_grad():
    equal(ours, unet(to_torch(x), torch.from_numpy(time), torch.from_numpy(words)).sample)
    theirs = tower(torch.from_numpy(tokens)).last_hidden_state.numpy()
  np.testing.assert_allclose(read, theirs, atol=3e-5 * np.abs(theirs).max())


SCHEDULERS = {
  'ddim': lambda: diffusers.DDIMScheduler(**LIKE_SD),
  'velocity': lambda: diffusers.DDIMScheduler(**LIKE_SD, prediction_type='v_prediction'),
  'image': lambda: diffusers.DDPMScheduler(**LIKE_SD, prediction_type='sample'),
  'zero snr': lambda: diffusers.DDIMScheduler(
    **LIKE_SD, prediction_type='v_prediction', rescale_betas_zero_snr=True, timestep_spacing='trailing'
  ),
  'linear': lambda: diffusers.PNDMScheduler(),
  'cosine': lambda: diffusers.DDPMScheduler(beta_schedule='squaredcos_cap_v2'),
  'euler': lambda: diffusers.EulerDiscreteScheduler(**LIKE_SD),
}
NAMES = {'epsilon': 'noise', 'v_prediction': 'velocity', 'sample': 'image'}


@pytest.fixture(scope='module')
def small(tmp_path_factory):
  folder = tmp_path_factory.mktemp('small') / 'theirs'
  pipeline(folder, diffusers.DDIMScheduler(**LIKE_SD), heads=8)
  return folder


@pytest.mark.parametrize('name', SCHEDULERS)
def test_the_process_has_the_betas_and_the_prediction_of_the_scheduler(small, name):
  scheduler = SCHEDULERS[name]()
  scheduler.save_pretrained(small / 'scheduler')
  run = matched(open_tensors(str(small)), str(small), family='sd2').run
  process = run.experiment.objective.process
  assert process.prediction == NAMES[scheduler.config.prediction_type]
  np.testing.assert_allclose(alphas_cumprod(process.schedule), scheduler.alphas_cumprod, atol=2e-6)
  (small / 'scheduler' / 'scheduler_config.json').write_text(json.dumps(export_diffusers.scheduler(process)))
  again = matched(open_tensors(str(small)), str(small), family='sd2').run
  assert again.config['objective'] == run.config['objective']


SAID = {'scheduler': 'scheduler_config.json', 'unet': 'unet/config.json', 'vae': 'vae/config.json'}
REFUSED = {
  'betas': ('scheduler', {'beta_start': 0.0015}, 'beta_start is 0.0015'),
  'default betas': ('scheduler', {'beta_start': None}, 'beta_start is 0.0001 (the default of the library)'),
  'trained betas': ('scheduler', {'trained_betas': [0.1, 0.2]}, 'trained_betas is [0.1, 0.2]'),
  'steps': ('scheduler', {'num_train_timesteps': 4000}, 'num_train_timesteps is 4000'),
  'prediction': ('scheduler', {'prediction_type': 'flow_prediction'}, "prediction_type is 'flow_prediction'"),
  'zero snr': ('scheduler', {'beta_schedule': 'linear', 'rescale_betas_zero_snr': True}, 'rescale_betas_zero_snr is'),
  'heads by another name': ('unet', {'num_attention_heads': 8}, 'num_attention_heads is 8'),
  'norm_eps': ('unet', {'norm_eps': 1e-3}, 'norm_eps is 0.001'),
  'groups': ('unet', {'norm_num_groups': 16}, 'norm_num_groups is 16'),
  'activation': ('unet', {'act_fn': 'gelu'}, 'act_fn is "gelu"'),
  'sinusoids': ('unet', {'flip_sin_to_cos': False}, 'flip_sin_to_cos is false'),
  'frequencies': ('unet', {'freq_shift': 1}, 'freq_shift is 1'),
  'classes': ('unet', {'class_embed_type': 'timestep'}, 'class_embed_type is "timestep"'),
  'words': ('unet', {'cross_attention_dim': 768}, 'cross_attention_dim is 768'),
  'blocks': ('unet', {'down_block_types': ['DownBlock2D', 'DownBlock2D']}, 'down_block_types is'),
  'shift': ('vae', {'shift_factor': 0.1}, 'shift_factor is 0.1'),
  'coder groups': ('vae', {'norm_num_groups': 16}, 'norm_num_groups is 16'),
  'text activation': ('text_encoder', {'hidden_act': 'selu'}, 'hidden_act is "selu"'),
}
SAID['text_encoder'] = 'text_encoder/config.json'


@pytest.mark.parametrize('name', REFUSED)
def test_what_would_be_computed_otherwise_is_refused_by_name(small, tmp_path, name):
  part, change, line = REFUSED[name]
  diffusers.DDIMScheduler(**LIKE_SD).save_pretrained(small / 'scheduler')
  path = small / part / ('scheduler_config.json' if part == 'scheduler' else 'config.json')
  before = path.read_text()
  try:
    path.write_text(json.dumps(json.loads(before) | change))
    with pytest.raises(UserError) as caught:
      import_checkpoint(str(small), str(tmp_path / 'ours'), 'sd2')
  finally:
    path.write_text(before)
  assert SAID[part] in str(caught.value)
  assert line in str(caught.value)


@pytest.mark.parametrize(('token', 'padding'), [('!', 'zeros'), ('<|endoftext|>', 'end')])
def test_texts_are_lengthened_as_the_tokenizer_says(small, tmp_path, token, padding):
  (small / 'tokenizer').mkdir(exist_ok=True)
  (small / 'tokenizer' / 'tokenizer_config.json').write_text(json.dumps({'pad_token': token}))
  run = import_checkpoint(str(small), str(tmp_path / 'ours'), 'sd2')
  assert run.experiment.objective.text_condition.padding == padding


def test_a_transformer_of_classes_has_the_heads_of_its_config(tmp_path):
  numbers = {'num_attention_heads': 8, 'attention_head_dim': 16, 'num_layers': 2, 'sample_size': 16, 'patch_size': 4}
  model = published(diffusers.DiTTransformer2DModel(**numbers, num_embeds_ada_norm=10), tmp_path / 'theirs')
  # The embedding of time and class is one thing in published files, of which every block has a copy.
  for block in model.transformer_blocks[1:]:
    block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
  model.save_pretrained(tmp_path / 'theirs')
  # diffusers computes timestep frequencies with downscale_freq_shift=1; the published weights were trained with 0.
  for block in model.transformer_blocks:
    block.norm1.emb.time_proj.downscale_freq_shift = 0
  run = import_checkpoint(
    str(tmp_path / 'theirs'), str(tmp_path / 'ours'), 'dit', ['objective.latent_space.autoencoder=None']
  )
  x = np.random.default_rng(0).normal(size=(2, 16, 16, 4)).astype(np.float32)
  time, labels = np.array([7, 900]), np.array([3, 10])
  params = {'params': run.restored_model()[0].params['network']}
  condition = make_condition(label=jnp.asarray(labels))
  ours = run.experiment.objective.network.apply(params, x, jnp.asarray(time), condition)
  with torch.no_grad():
    theirs = model.eval()(to_torch(x), timestep=torch.from_numpy(time), class_labels=torch.from_numpy(labels)).sample
  equal(ours, theirs)
