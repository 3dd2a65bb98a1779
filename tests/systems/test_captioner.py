"""A captioner from outside of the package: tokens of unequal numbers, and a text as its output."""

import jax
import numpy as np
import pytest

from fmcv_jax.run import Run
from fmcv_jax.train.flops import matmul_flops
from tests.systems import experiments
from tests.systems.sources import CAPTIONS

WORDS = ('a', 'all', 'blue', 'green', 'here', 'one', 'red', 'something', 'very', 'white', 'x', 'y', 'z')
LENGTH = 7


def config():
  encoder = {'name': 'vit', 'variant': 'mu/8', 'image_size': 16, 'depth': 1}
  vocabulary = {'vocab_size': len(WORDS) + 3, 'length': LENGTH}
  network = {'name': 'tests.systems.captioner:caption_network', 'encoder': encoder, **vocabulary}
  return experiments.make_config(
    {'name': 'tests.systems.captioner:Captioner', 'network': network},
    'tests.systems.sources:CaptionedColors',
    tokenizer={'name': 'tests.systems.sources:Words', 'words': WORDS, 'length': LENGTH},
    peak_lr=1e-2,
  )


def test_a_captioner_learns_and_gives_texts(tmp_path):
  """At first all tokens are equally likely; the captions that it gives at last are those of the data."""
  losses, run, model = experiments.trained(config(), tmp_path)
  assert losses[0] == pytest.approx(np.log(16), rel=1e-5)
  experiments.assert_falls(losses)
  found = experiments.map_all(run, model, truth=('tokens',))
  assert model.outputs['caption'].kind == 'tokens'
  tokens, truth = found['caption'].values, found['caption'].truth['tokens']

  np.testing.assert_array_equal(tokens, truth)
  assert model.tokenizer.decode(tokens[:4]) == list(CAPTIONS)
  assert tokens.dtype == np.int32


@pytest.mark.slow
def test_a_captioner_trains_equally_on_all_meshes_and_in_microbatches():
  more = [('fsdp, microbatches', (*experiments.MESHES['fsdp'], 'train.grad_accum_steps=2'))]
  experiments.assert_equal_losses_on_all_meshes(config(), more=more)


def test_flops_are_counted_for_an_objective_that_needs_its_tokenizer():
  run = Run(config())
  objective = run.experiment.objective
  gradient = jax.grad(lambda params, batch: objective.loss(params, batch, jax.random.key(0), {}).value)
  assert run.step_flops() == matmul_flops(gradient, run.abstract_state.params, run.batch_shapes)
