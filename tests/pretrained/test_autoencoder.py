"""Autoencoders of latent diffusion, as diffusers writes them, give their outputs and come back bitwise."""

import numpy as np
import pytest

from fmcv_jax.apps.conversion import import_checkpoint
from tests.pretrained.references import CODER, comes_back, equal, published, to_torch

torch = pytest.importorskip('torch', reason='pip install fmcv-jax[parity]')
diffusers = pytest.importorskip('diffusers', reason='pip install fmcv-jax[parity]')


def test_autoencoder(tmp_path):
  model = published(diffusers.AutoencoderKL(**CODER), tmp_path / 'theirs')
  run = import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'), None, ['objective.network.image_size=32'])
  params = run.restored_model()[0].params['autoencoder']
  network = run.experiment.objective.network
  x = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
  latent = network.apply({'params': params}, x, method='encode')
  with torch.no_grad():
    theirs = model.encode(to_torch(x)).latent_dist
    decoded = model.decode(theirs.mean).sample
  equal(latent.mean, theirs.mean)
  equal(latent.log_variance, theirs.logvar)
  equal(network.apply({'params': params}, latent.mean, method='decode'), decoded)
  comes_back(tmp_path / 'theirs', tmp_path, 'diffusers')
