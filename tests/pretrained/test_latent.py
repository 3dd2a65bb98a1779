"""Stable Diffusion, its autoencoder and DiT, as diffusers writes them, give their outputs and come back bitwise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fmcv_jax.apps.conversion import export_checkpoint, import_checkpoint
from fmcv_jax.apps.model import Model
from fmcv_jax.errors import UserError
from fmcv_jax.experiment import Run
from fmcv_jax.models.conditioning import Condition
from fmcv_jax.models.controlnet import controlnet
from fmcv_jax.pretrained.tensors import open_tensors
from tests.pretrained.test_published import comes_back, published

torch = pytest.importorskip('torch', reason='pip install fmcv-jax[parity]')
diffusers = pytest.importorskip('diffusers', reason='pip install fmcv-jax[parity]')
transformers = pytest.importorskip('transformers', reason='pip install fmcv-jax[parity]')

# Wide enough for the groups of the norms to be as many as in the published sizes.
CODER = {
  'block_out_channels': (128, 128),
  'down_block_types': ('DownEncoderBlock2D',) * 2,
  'up_block_types': ('UpDecoderBlock2D',) * 2,
  'layers_per_block': 1,
}
SIZES = ('network.image_size=8', 'autoencoder.image_size=16')
TEXT = {'hidden_size': 64, 'num_hidden_layers': 2, 'num_attention_heads': 1, 'intermediate_size': 128}


def torch_pictures(x):
  return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


def equal(ours, theirs):
  """ours [B, H, W, C] and theirs [B, C, H, W], to 3e-5 of the largest value."""
  theirs = theirs.detach().numpy().transpose(0, 2, 3, 1)
  np.testing.assert_allclose(ours, theirs, atol=3e-5 * np.abs(theirs).max())


def test_autoencoder(tmp_path):
  model = published(diffusers.AutoencoderKL(**CODER), tmp_path / 'theirs')
  run = import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'), None, ['objective.network.image_size=32'])
  params = run.restored_subject()[0].params['autoencoder']
  network = run.experiment.objective.network
  x = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
  latent = network.apply({'params': params}, x, method='encode')
  with torch.no_grad():
    theirs = model.encode(torch_pictures(x)).latent_dist
    decoded = model.decode(theirs.mean).sample
  equal(latent.mean, theirs.mean)
  equal(latent.log_variance, theirs.logvar)
  equal(network.apply({'params': params}, latent.mean, method='decode'), decoded)
  comes_back(tmp_path / 'theirs', tmp_path, 'diffusers')


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
    theirs = unet(torch_pictures(x), torch.from_numpy(time), words).sample
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
    theirs = model(
      torch_pictures(x), torch.from_numpy(time), torch.from_numpy(words), torch_pictures(hint), return_dict=False
    )
  for one, other in zip((*ours[0], ours[1]), (*theirs[0], theirs[1]), strict=True):
    equal(one, other)
  comes_back(tmp_path / 'theirs', tmp_path, 'diffusers')


def test_dit(tmp_path):
  config = {
    'num_attention_heads': 2,
    'attention_head_dim': 64,
    'in_channels': 4,
    'out_channels': 8,
    'num_layers': 2,
    'norm_num_groups': 32,
    'sample_size': 8,
    'num_embeds_ada_norm': 5,
  }
  model = diffusers.DiTTransformer2DModel(**config)
  published(model, tmp_path / 'apart')
  # What embeds time and class is one thing in published files, of which every block has a copy.
  for block in model.transformer_blocks[1:]:
    block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
  state = {name: x.numpy().copy() for name, x in model.state_dict().items()}
  (tmp_path / 'theirs').mkdir()
  save_file(state, tmp_path / 'theirs' / 'model.safetensors')
  coder = published(diffusers.AutoencoderKL(**CODER), tmp_path / 'coder')
  assert coder is not None
  import_checkpoint(str(tmp_path / 'coder'), str(tmp_path / 'vae'), 'sd_vae', ['objective.network.image_size=16'])
  given = [
    'objective.network.image_size=8',
    'objective.autoencoder.image_size=16',
    'objective.autoencoder.channels=(128,128)',
    'objective.autoencoder.layers=1',
    f'init_from.extra/autoencoder.workdir={tmp_path / "vae"}',
    'init_from.extra/autoencoder.part=params/autoencoder',
  ]
  run = import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'), 'dit', given)
  subject, _ = run.restored_subject()
  x = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32)
  label, time = np.array([1, 4]), np.array([7, 900])
  ours = run.experiment.objective.network.apply(
    {'params': subject.params['network']}, x, jnp.asarray(time), Condition(label=jnp.asarray(label))
  )
  # diffusers computes the frequencies of the time with a shift of one; the published weights learnt without it.
  for block in model.transformer_blocks:
    block.norm1.emb.time_proj.downscale_freq_shift = 0
  with torch.no_grad():
    theirs = model(torch_pictures(x), torch.from_numpy(time), torch.from_numpy(label)).sample
  equal(ours, theirs)
  first, again = (Model(tmp_path / 'ours').generate([4, 1], steps=2, seed=seed) for seed in (0, 1))
  assert first.shape == (2, 16, 16, 3)
  assert (first != again).any()
  vae, _ = Run.reopen(tmp_path / 'vae').restored_subject()
  jax.tree.map(np.testing.assert_array_equal, subject.extra['autoencoder'], vae.params['autoencoder'])
  comes_back(tmp_path / 'theirs', tmp_path, 'diffusers')
