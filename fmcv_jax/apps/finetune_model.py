"""Pretrained models for fine-tuning: the objective, initial weights and tokenizer that a workdir gives another run."""

import dataclasses
import inspect
import json
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from etils import epath

from fmcv_jax import config as config_lib
from fmcv_jax.errors import UserError
from fmcv_jax.models.backbones.vit import ViT, vit
from fmcv_jax.objectives.base import BATCH_STATS
from fmcv_jax.registry import KINDS
from fmcv_jax.run import Run, use_saved_tokenizer
from fmcv_jax.train.layer_decay import map_by_path

HEAD = ('head/.*',)
# Objective -> the path of its image network in the config, and the part of the state with its parameters.
_ENCODERS = {
  'classification': ('', 'params'),
  'encoder': ('', 'params'),
  'contrastive': ('image', 'params/image'),
  'mae': ('encoder', 'params/encoder'),
  'dino': ('encoder', 'extra/teacher/encoder'),
}


def is_workdir(path: str) -> bool:
  """True for a workdir of `fmcv train` or `fmcv import`, False for a folder of another library."""
  config = epath.Path(path) / 'config.json'
  try:
    return config.exists() and 'objective' in json.loads(config.read_text())
  except (ValueError, OSError):
    return False


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """The model of a workdir; `config` is its resolved config."""

  workdir: str
  config: Mapping[str, Any]

  @classmethod
  def open(cls, workdir: str) -> 'Pretrained':
    """Raises UserError for a path that is not a workdir."""
    if not is_workdir(workdir):
      raise UserError(
        f'{workdir}: is not a workdir of `fmcv train` or `fmcv import`; import published weights first: '
        f'fmcv import {workdir} --to runs/pretrained'
      )
    return cls(workdir, Run.reopen(workdir).config)

  @property
  def objective(self) -> Mapping[str, Any]:
    """The config of the objective; of a run that trained a part of a network, the objective of the whole."""
    own = self.config['objective']
    return own['objective'] if own['name'] == 'finetune' else own

  @property
  def has_texts(self) -> bool:
    """True for an image-text model."""
    return self.objective['name'] == 'contrastive'

  def classification(self, classes: int) -> dict[str, Any]:
    """Fields of a run that classifies: the image network with a new head of `classes` outputs.

    Raises UserError for a model without an image encoder.
    """
    name = self.objective['name']
    if name not in _ENCODERS:
      raise UserError(
        f'{self.workdir}: a model of objective {name!r} has no image encoder to classify with; give one of '
        f'{", ".join(_ENCODERS)}'
      )
    below, part = _ENCODERS[name]
    network = self._network(below)
    head = {'num_classes': classes} | ({'head_bias': True} if 'head_bias' in network else {})
    objective = {
      'name': 'classification',
      'network': {**network, **head},
      'normalize': self.objective['normalize'],
      'augment': ({'name': 'flip'},),
    }
    sources = {'params': {'workdir': self.workdir, 'part': self._whole(part), 'skip': HEAD}}
    return {'objective': objective, 'init_from': sources | self._statistics(part.removeprefix('params').lstrip('/'))}

  def contrastive(self) -> dict[str, Any]:
    """Fields of a run that continues to train both encoders. Raises UserError for a model without a text encoder."""
    if not self.has_texts:
      raise UserError(
        f'{self.workdir}: the data has captions, but this model (objective {self.objective["name"]!r}) has no text '
        f'encoder; give a CLIP-like model, or images in class folders'
      )
    tokenizer = use_saved_tokenizer(dict(self.config), epath.Path(self.workdir))['tokenizer']
    if tokenizer is None:
      raise UserError(f'{self.workdir}: has no tokenizer; import it again with --config.tokenizer.name=...')
    sources = {'params': {'workdir': self.workdir, 'part': self._whole('params')}}
    return {'objective': dict(self.objective), 'tokenizer': tokenizer, 'init_from': sources | self._statistics('')}

  def has_blocks(self) -> bool:
    """True for a network of stacked blocks, whose layers can have learning rates of their own."""
    return any(re.search(r'(^|/)blocks/', path) for path in self._paths('params'))

  def _whole(self, part: str) -> str:
    """The part of a run's state; of a run that trained a part of a network, of the merged whole."""
    return re.sub('^params', 'whole', part) if self.config['objective']['name'] == 'finetune' else part

  def _network(self, below: str) -> Mapping[str, Any]:
    network = self.objective['network']
    if not below or isinstance(network.get(below), Mapping):
      return network[below] if below else network
    built = config_lib.build(nn.Module, network, KINDS, 'config.objective.network')  # by a published name, such as clip
    return described(getattr(built, below), self.workdir)

  def _statistics(self, tower: str) -> dict[str, Any]:
    """Entries of `init_from` for batch norm statistics; none for a network without them."""
    path = '/'.join(filter(None, (BATCH_STATS, tower)))
    if not any(f'{name}/'.startswith(f'{path}/') for name in self._paths('extra')):
      return {}
    return {f'extra/{BATCH_STATS}': {'workdir': self.workdir, 'part': f'extra/{path}'}}

  def _paths(self, field: str) -> list[str]:
    paths: list[str] = []
    map_by_path(lambda path, x: paths.append(path), getattr(Run.reopen(self.workdir).abstract_state, field))
    return paths


def described(network: nn.Module, workdir: str) -> dict[str, Any]:
  """A ViT as the fields of a config that build the very same network. Raises UserError for any other network."""
  if isinstance(network, ViT):
    parts = (network, network.stack, network.stack.block)
    spec: dict[str, Any] = {'variant': f'B/{network.patch_size}'}
    for name in inspect.signature(vit).parameters:
      owner = next((part for part in parts if hasattr(part, name)), None)
      if owner is not None:
        spec[name] = getattr(owner, name)
    if vit(**spec) == network:
      return {'name': 'vit', **spec}
  raise UserError(
    f'{workdir}: its image encoder ({type(network).__name__}) cannot be described apart from the whole; set '
    f'--config.objective.network'
  )
