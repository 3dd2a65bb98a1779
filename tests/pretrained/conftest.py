"""The reference libraries draw the same random weights in every test."""

import pytest


@pytest.fixture(autouse=True)
def same_weights_every_time():
  try:
    import torch
  except ImportError:
    return
  torch.manual_seed(0)
