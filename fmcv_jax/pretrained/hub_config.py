"""Reads the configuration files next to the weights: those of transformers, timm, OpenCLIP and diffusers."""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fmcv_jax import config as config_lib
from fmcv_jax.pretrained import (
  hub_classes,
  hub_diffusers,
  hub_images,
  hub_open_clip,
  hub_timm,
  hub_tokenizers,
  hub_transformers,
)
from fmcv_jax.pretrained.hub_file import Findings, HubFile, opened
from fmcv_jax.pretrained.hub_vit import side

_NAMES = ('model.', 'model-', 'pytorch_model', 'open_clip_', 'diffusion_pytorch_model')
# Networks whose values diffusers stores in config.json.
_DIFFUSION = ('unet', 'dit', 'autoencoder')
# Fields that array shapes do not determine, by the last name of the path in our config.
_UNSHOWN = (
  *('num_heads', 'activation', 'eps', 'pool', 'causal', 'normalize', 'schedule', 'prediction', 'padding'),
  *('num_kv_heads', 'head_dim', 'query_scale', 'attention_softcap', 'logit_softcap', 'rope_base', 'window'),
  *('taps', 'max_depth', 'decoder_heads', 'decoder_eps'),
)

_SIDE = re.compile(r'objective\.network\.(image\.|encoder\.)?image_size=')  # of images, as a user's override


def folder_of(file: Path) -> Path:
  """Folder of the configuration files: the path itself, or the parent of a file with a library's standard name."""
  return file.parent if not file.is_dir() and file.name.startswith(_NAMES) else file


def read(folder: Path, format_name: str, config: dict[str, Any], objective: Any) -> Findings:
  """Reads all configuration files of a folder for a checkpoint in the format `format_name`; empty if there are none.

  config     ours, as the shapes of the arrays tell it; gets the format's own rounding of images, where it shows some
  objective  what it describes, built

  UserError, one line with file, key and value, for values that our network does not support.
  """
  findings, own = Findings(), config
  if format_name == 'diffusers' or own['objective']['network']['name'] in _DIFFUSION:
    hub_diffusers.read(folder, own, objective, findings)
    if 'text_condition' in own['objective'] and (padding := hub_tokenizers.padding(folder, findings)):
      findings.overrides['objective.text_condition.padding'] = padding
    return findings
  file = opened(folder / 'config.json', 'config.json', findings)
  if file is not None and (names := hub_classes.names_in(file.values)):
    findings.class_names = names
  open_clip = opened(folder / 'open_clip_config.json', 'open_clip_config.json', findings)
  if open_clip is not None and (format_name == 'open_clip' or file is None):
    hub_open_clip.read(open_clip, own, objective)
    if 'normalize' in own['objective']:
      tower, path = hub_open_clip.image_tower(objective)
      size = findings.overrides.get(f'{path}.image_size', tower.image_size)
      hub_images.open_clip(open_clip.part('preprocess_cfg'), size)
  elif file is not None and 'model_type' not in file and ('architecture' in file or 'pretrained_cfg' in file):
    _timm(file, own, objective)
  else:
    if file is not None:
      hub_transformers.read(file, own, objective)
    _transformers_images(folder, own, objective, findings)
    image = own.get('data', {}).get('image', {})
    if (
      format_name == 'transformers' and image.get('name') == 'pillow_resize' and 'data.image' not in findings.overrides
    ):
      image['center'] = 'floor'  # as all of its processors round
  if any(path.startswith('data.') for path in findings.overrides) and 'data' not in own:
    findings.overrides = {'data.source': {'name': 'none'}, **findings.overrides}
  return findings


def _transformers_images(folder: Path, config: dict[str, Any], objective: Any, findings: Findings) -> None:
  file = opened(folder / 'preprocessor_config.json', 'preprocessor_config.json', findings)
  whole = opened(folder / 'processor_config.json', 'processor_config.json', findings)
  if file is None and whole is not None and 'image_processor' in whole:  # where version 5 writes it, with the texts'
    file = whole.part('image_processor')
  if file is not None and 'normalize' in config['objective']:
    if 'image_seq_length' in file and config['objective']['network']['name'] == 'prefix_lm':
      file.agree('image_seq_length', file.get('image_seq_length'), math.prod(objective.network.image.grid))
    hub_images.transformers(file, config)


def _timm(file: HubFile, config: dict[str, Any], objective: Any) -> None:
  if 'pretrained_cfg' not in file:  # of before the two were apart
    values = dict(file.values)
    file = HubFile({'architecture': values.pop('architecture'), 'pretrained_cfg': values}, file.shown, file.findings)
  hub_timm.read(file, config, objective)
  images, path = file.part('pretrained_cfg'), 'objective.network'
  if 'input_size' in images and f'{path}.image_size' not in file.findings.overrides:
    sides = HubFile({'input_size': images.values['input_size'][1:]}, images.shown, Findings())
    side(sides, 'input_size', path, objective.network)
    file.findings.overrides |= sides.findings.overrides
  if 'normalize' in config['objective']:
    hub_images.timm(images, file.findings.overrides.get(f'{path}.image_size', objective.network.image_size))


def configured(
  config: Mapping[str, Any], folder: Path, findings: Findings, overrides: Sequence[str] = ()
) -> dict[str, Any]:
  """Our config with the values read from files next to the weights, then the user's overrides; not yet resolved."""
  own = config_lib.to_plain_dict(config)
  tokenizer = hub_tokenizers.read(folder, own, findings)
  own.pop('tokenizer', None)
  own |= {'tokenizer': tokenizer} if tokenizer else {}
  own = config_lib.override(own, [f'{path}={value!r}' for path, value in findings.overrides.items()])
  own = config_lib.override(own, overrides)
  sides = [assignment for assignment in overrides if _SIDE.match(assignment)]
  if sides and 'image' in own.get('data', {}) and not any(item.startswith('data.image') for item in overrides):
    own = config_lib.override(own, [f'data.image.size={sides[-1].partition("=")[2]}'])
  return own


def unsaid(config: Mapping[str, Any], objective: Any, findings: Findings, overrides: Sequence[str]) -> list[str]:
  """Fields that no array, file or override of the user determines, as 'objective.network.num_heads=12'.

  config is resolved, and `objective` is what it describes.
  """
  known = {*findings.overrides, *(assignment.partition('=')[0] for assignment in overrides)}

  def is_said(path: str) -> bool:
    return any(f'{path}.'.startswith(f'{other}.') or f'{other}.'.startswith(f'{path}.') for other in known)

  found: list[str] = []

  def visit(tree: Any, path: str) -> None:
    for key, value in tree.items() if isinstance(tree, Mapping) else ():
      here = f'{path}{key}'
      if key not in _UNSHOWN and here != 'data.image':
        visit(value, f'{here}.')
      elif key in ('num_heads', 'window') and tree.get('name') in (
        'swin',
        'sam',
      ):  # whose tables of positions show them
        continue
      elif value is not None or key in ('num_heads', 'max_depth'):
        shown = _heads(objective, here) if value is None and key == 'num_heads' else _plain(value)
        found.extend([] if is_said(here) else [f'{here}={shown}'])

  visit({key: config[key] for key in ('objective', 'data') if key in config}, '')
  return found


def _heads(objective: Any, path: str) -> Any:
  """Number of heads that None stands for in a config: that of the network's named size."""
  network = functools.reduce(getattr, path.split('.')[1:-1], objective)
  for owner in ('stack.block', 'decoder.stack.block', 'block', 'config'):
    try:
      return functools.reduce(getattr, f'{owner}.num_heads'.split('.'), network)
    except AttributeError:
      continue
  return 'unknown'


def _plain(value: Any) -> str:
  return ', '.join(f'{key} {item}' for key, item in value.items()) if isinstance(value, Mapping) else str(value)
