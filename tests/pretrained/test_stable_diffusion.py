"""Stable Diffusion and ControlNet, as diffusers writes them, give their outputs and come back bitwise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fmcv_jax.apps.conversion import export_checkpoint, import_checkpoint
from fmcv_jax.errors import UserError
from fmcv_jax.models.conditioning import Condition
from fmcv_jax.models.controlnet import controlnet
from fmcv_jax.pretrained.tensors import open_tensors
from tests.pretrained.references import CODER, comes_back, equal, published, to_torch

torch = pytest.importorskip('torch', reason='pip install fmcv-jax[parity]')
diffusers = pytest.importorskip('diffusers', reason='pip install fmcv-jax[parity]')
transformers = pytest.importorskip('transformers', reason='pip install fmcv-jax[parity]')

SIZES = ('network.image_size=8', 'autoencoder.image_size=16')
TEXT = {'hidden_size': 64, 'num_hidden_layers': 2, 'num_attention_heads': 1, 'intermediate_size': 128}


@pytest.mark.parametrize('family', [pytest.param('sd1', marks=pytest.mark.slow), 'sd2'])
def test_stable_diffusion(tmp_path, family):
  config = {
    'block_out_channels': (128, 128),
    'down_block_types': ('CrossAttnDownBlock2D', 'DownBlock2D'),
    'up_block_types': ('UpBlock2D', 'CrossAttnUpBlock2D'),
    'cross_attention_dim': 64,
    'attention_head_dim': 8 if family == 'sd1' else (2, 2),  # in truth the number of heads
    'use_linear_projection': family == 'sd2',
    'sample_size': 8,
  }
  unet = published(diffusers.UNet2DConditionModel(**config), tmp_path / 'theirs' / 'unet')
  published(diffusers.AutoencoderKL(**CODER), tmp_path / 'theirs' / 'vae')
  activation = {'sd1': 'quick_gelu', 'sd2': 'gelu'}[family]
  tokens = {'vocab_size': 49_408, 'max_position_embeddings': 77, 'eos_token_id': 49_407, 'bos_token_id': 49_406}
  tower = transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT, **tokens, hidden_act=activation))
  published(tower, tmp_path / 'theirs' / 'text_encoder')
  file = tmp_path / 'theirs' / 'text_encoder' / 'model.safetensors'
  with_prefix = {f'text_model.{name.removeprefix("text_model.")}': x for name, x in load_file(file).items()}
  save_file(with_prefix, file)  # as the hub's files have it; transformers 5 writes it without
  run = import_checkpoint(
    str(tmp_path / 'theirs'), str(tmp_path / 'ours'), family, [f'objective.{field}' for field in SIZES]
  )
  subject, _ = run.restored_subject()
  x = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32)
  prompts, time = ['a red apple', ''], np.array([7, 900])
  generator = run.experiment.objective.generator(subject.params, subject.extra)
  batch = {'tokens': subject.tokenizer(prompts)}
  ours = jax.jit(generator.denoise)(jnp.asarray(x), jnp.asarray(time), generator.condition(batch))
  ends = np.where(batch['tokens'] == 0, 49_407 if family == 'sd1' else 0, batch['tokens'])
  with torch.no_grad():
    words = tower(torch.from_numpy(ends).long()).last_hidden_state
    theirs = unet(to_torch(x), torch.from_numpy(time), words).sample
  equal(ours, theirs)
  comes_back(tmp_path / 'theirs', tmp_path, 'diffusers')
  if family == 'sd1':
    as_compvis(tmp_path, run, config)
    (tmp_path / 'control').mkdir()
    steered(tmp_path / 'control', tmp_path / 'ours')


def as_compvis(tmp_path, run, config):
  """The file of the original release, as diffusers itself turns it into its own names."""
  from diffusers.loaders import single_file_utils

  export_checkpoint(str(tmp_path / 'ours'), str(tmp_path / 'one.safetensors'), 'compvis')
  whole, theirs = load_file(tmp_path / 'one.safetensors'), open_tensors(tmp_path / 'theirs')
  state = {name: torch.from_numpy(x) for name, x in whole.items()}
  unet = single_file_utils.convert_ldm_unet_checkpoint(dict(state), {'layers_per_block': 2, **config})
  coder = single_file_utils.convert_ldm_vae_checkpoint(dict(state), CODER)
  for prefix, converted in (('unet.', unet), ('vae.', coder)):
    assert {f'{prefix}{name}' for name in converted} == {name for name in theirs.shapes if name.startswith(prefix)}
    for name, x in converted.items():
      np.testing.assert_array_equal(x.numpy(), theirs[prefix + name].reshape(x.shape), err_msg=name)
  again = import_checkpoint(
    str(tmp_path / 'one.safetensors'), str(tmp_path / 'again'), 'sd1', [f'objective.{field}' for field in SIZES]
  )
  first, second = (jax.device_get(r.restored_subject()[0].params) for r in (run, again))
  jax.tree.map(np.testing.assert_array_equal, first, second)


def steered(tmp_path, base):
  """A ControlNet on top of a workdir."""
  config = {
    'block_out_channels': (128, 128),
    'down_block_types': ('CrossAttnDownBlock2D', 'DownBlock2D'),
    'cross_attention_dim': 64,
    'attention_head_dim': 8,
    'conditioning_embedding_out_channels': (16, 32),
  }
  model = published(diffusers.ControlNetModel(**config), tmp_path / 'theirs')
  given = [*SIZES, 'autoencoder.channels=(128,128)', 'autoencoder.layers=1']
  given += ['text.width=64', 'text.depth=2', 'text.heads=1', 'text.mlp_dim=128']
  given = [f'objective.{field}' for field in given]
  with pytest.raises(UserError, match='also needs what is not in it: autoencoder, network, text'):
    import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'), 'controlnet_sd1', given)
  for name, part in (('network', 'params/network'), ('autoencoder', 'extra/autoencoder'), ('text', 'extra/text')):
    given += [f'init_from.extra/{name}.workdir={base}', f'init_from.extra/{name}.part={part}']
  run = import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'), 'controlnet_sd1', given)
  subject, _ = run.restored_subject()
  rng = np.random.default_rng(0)
  x, words = rng.normal(size=(2, 8, 8, 4)), rng.normal(size=(2, 5, 64))
  x, words, hint = x.astype(np.float32), words.astype(np.float32), rng.uniform(size=(2, 16, 16, 3)).astype(np.float32)
  time = np.array([7, 900])
  network = controlnet(run.experiment.objective.network, 2)
  told = Condition(text=jnp.asarray(words), control=jnp.asarray(hint))
  ours = jax.jit(network.apply)({'params': subject.params['control']}, x, jnp.asarray(time), told)
  with torch.no_grad():
    theirs = model(to_torch(x), torch.from_numpy(time), torch.from_numpy(words), to_torch(hint), return_dict=False)
  for one, other in zip((*ours[0], ours[1]), (*theirs[0], theirs[1]), strict=True):
    equal(one, other)
  comes_back(tmp_path / 'theirs', tmp_path, 'diffusers')
