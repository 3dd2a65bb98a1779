"""DiT weights of diffusers give the same outputs, generate images, and round-trip bitwise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from fmcv_jax.apps.conversion import import_checkpoint
from fmcv_jax.diffusion.condition import make_condition
from fmcv_jax.inference.model import Model
from fmcv_jax.run import Run
from tests.pretrained.references import CODER, comes_back, equal, published, to_torch

torch = pytest.importorskip('torch', reason='pip install fmcv-jax[parity]')
diffusers = pytest.importorskip('diffusers', reason='pip install fmcv-jax[parity]')


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
  published(diffusers.AutoencoderKL(**CODER), tmp_path / 'coder')
  import_checkpoint(str(tmp_path / 'coder'), str(tmp_path / 'vae'), 'sd_vae', ['objective.network.image_size=16'])
  given = [
    'objective.network.image_size=8',
    'objective.latent_space.autoencoder.image_size=16',
    'objective.latent_space.autoencoder.channels=(128,128)',
    'objective.latent_space.autoencoder.layers=1',
    f'init_from.extra/autoencoder.workdir={tmp_path / "vae"}',
    'init_from.extra/autoencoder.part=params/autoencoder',
  ]
  run = import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'), 'dit', given)
  subject, _ = run.restored_model()
  x = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32)
  label, time = np.array([1, 4]), np.array([7, 900])
  ours = run.experiment.objective.network.apply(
    {'params': subject.params['network']}, x, jnp.asarray(time), make_condition(label=jnp.asarray(label))
  )
  # diffusers computes timestep frequencies with downscale_freq_shift=1; the published weights were trained with 0.
  for block in model.transformer_blocks:
    block.norm1.emb.time_proj.downscale_freq_shift = 0
  with torch.no_grad():
    theirs = model(to_torch(x), torch.from_numpy(time), torch.from_numpy(label)).sample
  equal(ours, theirs)
  first, again = (Model(tmp_path / 'ours').generate([4, 1], steps=2, seed=seed) for seed in (0, 1))
  assert first.shape == (2, 16, 16, 3)
  assert (first != again).any()
  vae, _ = Run.reopen(tmp_path / 'vae').restored_model()
  jax.tree.map(np.testing.assert_array_equal, subject.extra['autoencoder'], vae.params['autoencoder'])
  comes_back(tmp_path / 'theirs', tmp_path, 'diffusers')
