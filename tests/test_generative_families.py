"""Every family of the generating half: the same losses whatever splits it, and a stop that leaves no trace."""

import functools
import signal
import time

import jax
import numpy as np
import pytest

from fmcv_jax import trainer
from fmcv_jax.augment.control_maps import Edges
from fmcv_jax.augment.inpaint_masks import RandomInpaintMask
from fmcv_jax.diffusion.process import Process
from fmcv_jax.models.backbones.text import text_transformer
from fmcv_jax.models.backbones.vit import vit
from fmcv_jax.models.generative.autoencoder import autoencoder
from fmcv_jax.models.generative.dit import dit
from fmcv_jax.models.generative.mmdit import mmdit
from fmcv_jax.models.generative.unet import unet
from fmcv_jax.objectives.autoencoder import Autoencoding
from fmcv_jax.objectives.diffusion import Diffusion
from fmcv_jax.objectives.image_condition import ImageCondition
from fmcv_jax.objectives.latent_space import LatentSpace
from fmcv_jax.objectives.repa import REPA
from fmcv_jax.objectives.text_condition import TextCondition
from fmcv_jax.parallel.mesh import MeshShape
from tests import runs
from tests.train.tiny import MESHES, Trainer, batch_of, shaken

pytestmark = pytest.mark.slow

NETWORKS = ('autoencoder', 'text', 'teacher', 'features', 'network')  # that stay as they are, in `extra`
FLOW = Process('flow', 'flow')
CODER = autoencoder(channels=(8, 8), layers=1, latent_channels=4, image_size=16, middle_attention=False)
TEXT = text_transformer(64, 8, 16, 1, 2, causal=False, attend_padding=False, num_classes=16)
LATENT = functools.partial(Diffusion, latent_space=LatentSpace(CODER, 0.5))
# One level, with words; 'pixels by a unet' has two.
UNET = functools.partial(unet, 'mu', channels=4, image_size=8, layers=1, block_out_channels=(16,), depths=(1,))
FAMILIES = {
  'autoencoder': lambda: Autoencoding(
    CODER, discriminator_width=8, discriminator_layers=1, perceptual=0.1, features=vit('mu/8', image_size=16)
  ),
  'pixels by a unet': lambda: Diffusion(
    unet('mu', image_size=16, channels=3, out_channels=6, num_classes=10, layers=1, cross_attention_dim=0),
    Process(learned_variance=True),
  ),
  'text to image by dit': lambda: LATENT(
    dit('mu/2', image_size=8, cross_attention=True, pooled_text=True),
    FLOW,
    text_condition=TextCondition(TEXT),
    repa=REPA(vit('mu/8', image_size=16), layer=1, hidden=16),
  ),
  'text to image by mmdit': lambda: LATENT(
    mmdit('mu/2', image_size=8, channels=4), FLOW, text_condition=TextCondition(TEXT), timestep_sampling='logit_normal'
  ),
  'text to image by a unet': lambda: LATENT(UNET(), text_condition=TextCondition(TEXT), weighting='min_snr'),
  'a text tower of its own': lambda: LATENT(UNET(), text_condition=TextCondition(TEXT, train=True)),
  'controlnet': lambda: LATENT(
    UNET(), text_condition=TextCondition(TEXT), image_condition=ImageCondition(control=Edges())
  ),
  'inpainting': lambda: LATENT(
    UNET(extra_in_channels=5),
    text_condition=TextCondition(TEXT),
    image_condition=ImageCondition(inpainting=RandomInpaintMask()),
  ),
}


@pytest.mark.parametrize('family', FAMILIES)
def test_losses_are_those_of_one_device_however_the_model_is_split(family):
  objective = FAMILIES[family]()
  batches = [batch_of(objective, seed) for seed in range(3)]

  def moved(state):
    extra = {name: shaken(part) if name in NETWORKS else part for name, part in state.extra.items()}
    return state.replace(params=shaken(state.params), extra=extra)

  def run(mesh, devices=8):
    trainer = Trainer(objective, mesh, devices)
    trainer.state = jax.jit(moved, out_shardings=trainer.shardings)(trainer.state)
    frozen = {name: jax.device_get(part) for name, part in trainer.state.extra.items() if name in NETWORKS}
    losses = trainer.run(batches)
    runs.assert_bitwise_equal(frozen, {name: trainer.state.extra[name] for name in frozen})
    return losses

  one = run(MeshShape(), devices=1)
  assert len(set(one)) == 3
  for name, mesh in MESHES.items():
    np.testing.assert_allclose(run(mesh), one, rtol=2e-5, err_msg=name)


RUNS = {
  'classes': runs.class_to_image,
  'texts': runs.text_to_image,
  'controlnet': runs.controlnet,
  'inpainting': runs.inpainting,
  'autoencoder': runs.autoencoder,
}


@pytest.mark.parametrize('family', RUNS)
def test_a_resumed_run_is_bitwise_the_one_that_never_stopped(family, tmp_path):
  config = RUNS[family](runs.image_folder(tmp_path / 'images'), train__ema_decay=0.9)
  straight = trainer.train(config, tmp_path / 'straight')
  runs.stopped(config, tmp_path / 'stopped', 2)
  runs.assert_bitwise_equal(straight, trainer.train(config, tmp_path / 'stopped'))


def test_a_killed_diffusion_run_resumes_bitwise_from_its_last_checkpoint(tmp_path):
  config = runs.text_to_image(runs.image_folder(tmp_path / 'images'), train__steps=40, checkpoint__every=2)
  killed = runs.start(config, tmp_path / 'killed')
  while not any(step >= 5 for step in runs.steps_of(tmp_path / 'killed')):
    assert killed.poll() is None, killed.stderr.read()[-2000:]
    time.sleep(0.02)
  killed.send_signal(signal.SIGKILL)
  killed.communicate()
  assert runs.steps_of(tmp_path / 'killed')[-1] < 40
  for workdir in ('killed', 'straight'):
    run = runs.start(config, tmp_path / workdir)
    assert run.wait(timeout=600) == 0, run.stderr.read()[-2000:]
  runs.assert_bitwise_equal(*(runs.parameters(tmp_path / workdir) for workdir in ('killed', 'straight')))
