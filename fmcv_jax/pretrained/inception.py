"""FID's Inception v3 as torch-fidelity and pytorch-fid name TensorFlow's weights of 2015."""

from collections.abc import Iterator

from fmcv_jax.models.backbones.inception import BLOCKS, STEM, Branch, Conv
from fmcv_jax.pretrained.layout import SPATIAL, Layout, Row, Rows, linear


def published() -> Layout:
  """Layout of the port of the Inception-v3 of 2015 to PyTorch that FID implementations share."""
  blocks = ((f'{name}/', branch) for name, branches in BLOCKS.items() for branch in branches)
  rows = [row for scope, branch in (('', STEM), *blocks) for conv in _convs(branch) for row in _unit(scope, conv)]
  return Layout((*rows, *linear('head', 'fc')), ignored=(r'.*\.num_batches_tracked',))


def _convs(branch: Branch) -> Iterator[Conv]:
  for step in branch:
    if isinstance(step, Conv):
      yield step
    elif isinstance(step, tuple):
      yield from step


def _unit(scope: str, conv: Conv) -> Rows:
  ours = f'{scope}{conv.name}'
  theirs = (ours[0].upper() + ours[1:]).replace('/', '.')
  names = {'scale': 'weight', 'bias': 'bias', 'mean': 'running_mean', 'variance': 'running_var'}
  return (
    Row(f'{ours}/conv/kernel', f'{theirs}.conv.weight', SPATIAL),
    *(Row(f'{ours}/norm/{mine}', f'{theirs}.bn.{name}') for mine, name in names.items()),
  )
