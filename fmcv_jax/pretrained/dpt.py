"""Depth Anything as transformers and the original release name it."""

from collections.abc import Mapping
from typing import Any

from fmcv_jax.dataset_statistics import IMAGENET
from fmcv_jax.pretrained import vit
from fmcv_jax.pretrained.layout import (
  SPATIAL,
  Layout,
  Project,
  Row,
  Rows,
  Shape,
  expand,
  point,
  spatial,
  with_prefix,
)
from fmcv_jax.pretrained.shape_inference import part

SIDE, MULTIPLE = 518, 14  # of the images of all published models


def _levels(project: str, resize: str, align: str) -> Rows:
  """`project` and `resize` with the number of the level from 0, `align` with that from 1."""
  rows: Rows = ()
  resizes: tuple[Project | None, ...] = (expand(4), expand(2), None, spatial)
  for number, own in enumerate(resizes):
    ours = f'reassemble{number + 1}'
    rows += point(f'{ours}/project', project.format(number))
    rows += () if own is None else own(f'{ours}/resize', resize.format(number))
    rows += (Row(f'{ours}/align/kernel', f'{align.format(number, number + 1)}.weight', SPATIAL),)
  return rows


def _fusions(name: str, out: str, units: tuple[str, str], convolution: str) -> Rows:
  """`name` has the number of the level, from 1, and that of its place when the coarsest is the first, from 0."""
  rows: Rows = ()
  for level in (1, 2, 3, 4):
    ours, theirs = f'fusion{level}', name.format(level, 4 - level)
    rows += point(f'{ours}/out', f'{theirs}.{out}')
    for unit, own in zip(('skip_unit', 'unit'), units, strict=True):
      for conv in (1, 2):
        rows += spatial(f'{ours}/{unit}/conv{conv}', f'{theirs}.{own}.{convolution}{conv}')
  return rows


def _head(conv1: str, conv2: str, out: str) -> Rows:
  return (*spatial('depth_conv1', conv1), *spatial('depth_conv2', conv2), *point('depth_out', out))


def transformers(*, hub: bool = True) -> Layout:
  """transformers' names: those of published files, or (hub=False) those that its version 5 has in memory."""
  fusion = 'neck.fusion_stage.layers.{1}'
  stage = 'neck.reassemble_stage.layers.{0}'
  return Layout(
    (
      *with_prefix('encoder', vit.transformers_dinov2('backbone.', hub=hub).rows),
      *_levels(f'{stage}.projection', f'{stage}.resize', 'neck.convs.{0}'),
      *_fusions(fusion, 'projection', ('residual_layer1', 'residual_layer2'), 'convolution'),
      *_head('head.conv1', 'head.conv2', 'head.conv3'),
    )
  )


def original() -> Layout:
  """The names of the original repositories, of both versions."""
  scratch, fusion = 'depth_head.scratch', 'depth_head.scratch.refinenet{0}'
  return Layout(
    (
      *with_prefix('encoder', vit.original().rows, 'pretrained.'),
      *_levels('depth_head.projects.{0}', 'depth_head.resize_layers.{0}', f'{scratch}.layer{{1}}_rn'),
      *_fusions(fusion, 'out_conv', ('resConfUnit1', 'resConfUnit2'), 'conv'),
      *_head(f'{scratch}.output_conv1', f'{scratch}.output_conv2.0', f'{scratch}.output_conv2.2'),
    )
  )


def config(shapes: Mapping[str, Shape]) -> dict[str, Any]:
  """Config of a run with the network of these parameter shapes.

  Arrays show neither which blocks are read nor whether depth is metric: without a file that says so, the blocks are
  those of version 2, and inverse depth is relative.
  """
  encoder = vit.dinov2(part(shapes, 'encoder/'))
  depth = shapes['encoder/blocks/norm1/scale'][0]
  network = {
    'name': 'dpt',
    'encoder': encoder | {'position_antialias': False},
    'taps': (5, 12, 18, 24) if depth == 24 else tuple(depth * step // 4 for step in (1, 2, 3, 4)),
    'channels': tuple(shapes[f'reassemble{level}/project/kernel'][1] for level in (1, 2, 3, 4)),
    'width': shapes['fusion1/out/kernel'][0],
    'hidden': shapes['depth_out/kernel'][0],
    'max_depth': None,
  }
  image = {'name': 'resize_to_multiple', 'size': encoder['image_size'], 'multiple': MULTIPLE}
  return {
    'objective': {'name': 'depth', 'network': network, 'normalize': dict(IMAGENET)},
    'data': {'source': {'name': 'none'}, 'image': image},
  }
