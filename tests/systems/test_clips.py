"""A video diffusion from outside of the package: one network, through the package's own objective."""

import numpy as np
import pytest

from tests.systems import experiments


def config():
  return experiments.make_config(
    {
      'name': 'diffusion',
      'network': 'tests.systems.clips:clip_denoiser',
      'process': {'schedule': 'flow', 'prediction': 'image'},
    },
    'tests.systems.sources:MovingBars',
  )


def test_a_video_diffusion_learns_and_gives_clips(tmp_path):
  """At first the output is zero: the error is the mean square of the clips, whose pixels are -1 and 1."""
  losses, run, model = experiments.trained(config(), tmp_path)
  assert losses[0] == pytest.approx(1, rel=1e-5)
  experiments.assert_falls(losses)
  found = experiments.map_all(run, model, truth=('image', 'label'))
  samples = model.outputs['samples']
  assert (samples.kind, samples.reads) == ('video', ('label',))
  clips = found['samples'].values
  assert (clips.dtype, clips.shape[1:]) == (np.uint8, (3, 8, 8, 3))
  np.testing.assert_array_equal(found['samples'].truth['label'], np.arange(32) % 2)


@pytest.mark.slow
def test_a_video_diffusion_trains_equally_on_all_meshes():
  experiments.assert_equal_losses_on_all_meshes(config())
