"""FID's Inception and statistics against torch-fidelity's, which the parity extra has not: pip install torch-fidelity.

Its weights are not here: random ones take the same way, from a file through `fmcv import`.
"""

import numpy as np
import pytest

from fmcv_jax.__main__ import main
from fmcv_jax.evaluate import distances
from fmcv_jax.inference.model import Model
from fmcv_jax.pretrained.tensors import open_tensors

torch = pytest.importorskip('torch', reason='pip install fmcv-jax[parity]')
extractor = pytest.importorskip('torch_fidelity.feature_extractor_inceptionv3', reason='pip install torch-fidelity')


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
  """Their network with random weights and statistics, and the file that holds them."""
  file = tmp_path_factory.mktemp('weights') / 'inception.pth'
  generator = torch.Generator().manual_seed(0)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(torch.nn.Module, 'load_state_dict', lambda self, state: None)
    patch.setattr(extractor, 'load_state_dict_from_url', lambda *args, **options: {})
    network = extractor.FeatureExtractorInceptionV3('inception', ['2048', 'logits'])
  with torch.no_grad():
    for key, x in network.state_dict().items():
      if key.endswith(('bn.weight', 'running_var')):
        x.copy_(torch.rand(x.shape, generator=generator) + 0.5)
      elif x.is_floating_point():
        scale = (2 / x[0].numel()) ** 0.5 if x.ndim > 1 else 0.1
        x.copy_(scale * torch.randn(x.shape, generator=generator))
  torch.save(network.state_dict(), file)
  return network, file


def test_features_and_logits_equal_theirs_at_any_size_and_weights_go_out_as_they_came(reference, tmp_path):
  network, file = reference
  assert main(['import', str(file), '--to', str(tmp_path / 'run')]) == 0
  model = Model(tmp_path / 'run')
  for size in (40, 320):
    images = np.random.default_rng(size).integers(0, 256, (8, size, size + 7, 3), np.uint8)
    with torch.no_grad():
      features, logits = network(torch.from_numpy(images).permute(0, 3, 1, 2))
    batch = {'image': images, 'index': np.arange(8)}
    for name, expected in (('features', features), ('logits', logits)):
      got = model._subject._run(name, batch)[0]
      np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
  back = tmp_path / 'back.safetensors'
  assert main(['export', str(tmp_path / 'run'), '--format', 'torch_fidelity', '--to', str(back)]) == 0
  theirs, ours = open_tensors(file), open_tensors(back)
  assert set(ours.shapes) == {name for name in theirs.shapes if 'num_batches' not in name}
  for name in ours.shapes:
    np.testing.assert_array_equal(ours[name], theirs[name])


def test_statistics_equal_theirs_on_the_same_features():
  metric_fid = pytest.importorskip('torch_fidelity.metric_fid')
  metric_kid = pytest.importorskip('torch_fidelity.metric_kid')
  metric_prc = pytest.importorskip('torch_fidelity.metric_prc')
  generator = np.random.default_rng(0)
  mix = generator.normal(size=(64, 64)) / 8
  made, real = generator.normal(size=(400, 64)) @ mix + 0.1, generator.normal(size=(500, 64))
  one, other = (torch.from_numpy(x) for x in (made, real))
  statistics = (metric_fid.fid_features_to_statistics(x) for x in (one, other))
  expected = metric_fid.fid_statistics_to_metric(*statistics, False)['frechet_inception_distance']
  assert distances.fid(made, real) == pytest.approx(expected, rel=1e-3)
  # Theirs is the mean over subsets; one subset of all is the estimator itself.
  size = dict(kid_subsets=1, kid_subset_size=400, kid_kernel='poly', verbose=False, rng_seed=0)
  expected = metric_kid.kid_features_to_metric(one, other[:400], **size)['kernel_inception_distance_mean']
  assert distances.kid(made, real[:400]) == pytest.approx(expected, rel=1e-3)
  found = metric_prc.prc_features_to_metric(one, other, prc_neighborhood=3, prc_batch_size=200, verbose=False)
  assert distances.precision_recall(made, real) == pytest.approx((found['precision'], found['recall']), rel=1e-3)
