"""What the reference libraries need to be imported."""

import pytest


@pytest.fixture(scope='session')
def torchvision_names():
  """Names two operators of torchvision, whose wheels bring them in a form that a torch for the CPU cannot load.

  timm and OpenCLIP import torchvision, and use neither here.
  """
  torch = pytest.importorskip('torch', reason='pip install fmcv-jax[parity]')
  library = torch.library.Library('torchvision', 'FRAGMENT')
  for name in ('nms', 'qnms'):
    if not hasattr(torch.ops.torchvision, name):
      library.define(f'{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
  yield
  del library


@pytest.fixture(autouse=True)
def same_weights_every_time():
  try:
    import torch
  except ImportError:
    return
  torch.manual_seed(0)
