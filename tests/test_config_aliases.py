"""Configs and workdirs with the names of earlier versions."""

import json
import logging

import flax.linen as nn
import jax
import numpy as np
import pytest

from fmcv_jax import experiment
from fmcv_jax.config import build, override
from fmcv_jax.errors import UserError
from fmcv_jax.registry import KINDS
from fmcv_jax.run import Run
from tests import runs

# Where the fields of a diffusion were before it had parts, and before that what they were called.
FLAT = {
  ('latent_space', 'autoencoder'): ('autoencoder', 'autoencoder'),
  ('latent_space', 'scale'): ('latent_scale', 'latent_scale'),
  ('latent_space', 'shift'): ('latent_shift', 'latent_shift'),
  ('latent_space', 'precomputed'): ('precomputed_latents', 'latents'),
  ('text_condition', 'encoder'): ('text_encoder', 'text'),
  ('text_condition', 'train'): ('train_text', 'train_text'),
  ('text_condition', 'precomputed'): ('precomputed_text', 'words'),
  ('text_condition', 'padding'): ('padding', 'padding'),
  ('image_condition', 'control'): ('control', 'control'),
  ('image_condition', 'inpainting'): ('inpainting', 'holes'),
}


def flat(config, version):
  """A resolved config as an earlier version would have written it."""
  objective = {name: value for name, value in config['objective'].items() if name not in {part for part, _ in FLAT}}
  moved = {names[version]: config['objective'][part][field] for (part, field), names in FLAT.items()}
  return {**config, 'objective': objective | moved}


@pytest.fixture
def config(tmp_path):
  return runs.text_to_image(runs.image_folder(tmp_path / 'images'), objective__latent_space__scale=0.5)


@pytest.mark.parametrize('version', [0, 1])
def test_flat_fields_of_a_diffusion_open_as_its_parts_with_a_warning(config, version, caplog):
  with caplog.at_level(logging.WARNING):
    assert experiment.resolve(flat(config, version)) == config
  name = FLAT['text_condition', 'encoder'][version]
  assert f'config.objective.{name} is now called text_condition.encoder' in caplog.text


def test_a_field_in_its_old_and_its_new_place_is_refused(config):
  both = override(config, ['objective.latent_scale=0.3'])
  with pytest.raises(UserError, match=r'latent_scale is the earlier name of latent_space.scale, and both are given'):
    experiment.resolve(both)


@pytest.mark.slow
def test_a_workdir_of_an_earlier_version_reopens_bitwise_and_takes_todays_names(config, tmp_path):
  workdir = runs.untrained(config, tmp_path / 'run')
  expected = runs.parameters(workdir)
  (workdir / 'config.json').write_text(json.dumps(flat(config, 1)))
  for path, value in runs.parameters(workdir).items():
    np.testing.assert_array_equal(value, expected[path])
  run = Run.reopen(workdir, ['objective.text_condition.encoder.dtype=bfloat16'])
  assert run.experiment.objective.text_condition.encoder.block.dtype == 'bfloat16'
  state = jax.eval_shape(run.init)
  assert sorted(state.extra) == ['autoencoder', 'text']


def test_the_outputs_of_a_denoiser_were_its_channels_and_those_of_a_classifier_its_classes():
  denoiser = {'name': 'dit', 'variant': 'mu/2', 'outputs': 8, 'classes': 10}
  network = build(nn.Module, denoiser, KINDS)
  assert (network.out_channels, network.num_classes) == (8, 10)
  assert build(nn.Module, {'name': 'vit', 'variant': 'mu/8', 'outputs': 7}, KINDS).num_classes == 7
