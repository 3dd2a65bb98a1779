"""An action-conditioned frame predictor from outside of the package: conditions that no part of the package knows."""

import numpy as np
import pytest

from fmcv_jax.errors import UserError
from fmcv_jax.run import Run
from tests.systems import experiments


def config():
  return experiments.make_config(
    {
      'name': 'diffusion',
      'network': 'tests.systems.predictor:frame_predictor',
      'process': {'schedule': 'flow', 'prediction': 'image'},
    },
    'tests.systems.sources:PushedDot',
    peak_lr=1e-2,
  )


def test_a_frame_predictor_learns_and_gives_frames(tmp_path):
  """At first the output is zero: the error is the mean square of the frames, whose pixels are -1 and 1."""
  losses, run, model = experiments.trained(config(), tmp_path)
  assert losses[0] == pytest.approx(1, rel=1e-5)
  experiments.assert_falls(losses)
  found = experiments.map_all(run, model, truth=('image', 'action', 'past_frames'))
  assert set(model.outputs['samples'].reads) == {'action', 'past_frames'}
  frames, truth = found['samples'].values, found['samples'].truth
  assert (frames.dtype, truth['past_frames'].dtype, truth['action'].dtype) == (np.uint8, np.uint8, np.float32)
  np.testing.assert_array_equal(truth['past_frames'][:, 0], truth['past_frames'][:, 1])


def test_a_flip_is_refused_where_the_action_would_point_the_wrong_way():
  flipped = config()
  flipped['objective']['augment'] = ({'name': 'flip'},)
  with pytest.raises(UserError, match=r'Flip moves the pixels .* in condition_kinds whether action moves with them'):
    Run(flipped)


@pytest.mark.slow
def test_a_frame_predictor_trains_equally_on_all_meshes():
  experiments.assert_equal_losses_on_all_meshes(config())
