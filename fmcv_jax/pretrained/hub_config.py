"""What a folder of a library says beside its arrays: heads, activations, eps, tokenizer, how images are normalized."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fmcv_jax.errors import UserError
from fmcv_jax.models.generative.unet import SIZES
from fmcv_jax.pretrained.export_diffusers import PREDICTIONS
from fmcv_jax.pretrained.export_transformers import ACTIVATIONS

_NAMES = ('model.', 'pytorch_model.', 'open_clip_', 'diffusion_pytorch_model.')
_FIELDS = {'num_attention_heads': 'num_heads', 'layer_norm_eps': 'eps', 'hidden_act': 'activation'}
# What transformers takes where a config of CLIP says nothing.
_UNSAID = {'clip': {'hidden_act': 'quick_gelu'}}
_TOKENIZERS: dict[str, dict[str, Any]] = {
  'spiece.model': {'name': 'sentencepiece'},
  'tokenizer.json': {'name': 'tokenizer_json', 'end': '<eos>', 'lowercase': True},
}


def folder_of(file: Path) -> Path:
  """The folder whose other files speak of this one: itself, or its own where it is called as the libraries call it."""
  return file.parent if not file.is_dir() and file.name.startswith(_NAMES) else file


def fields(folder: Path, config: Mapping[str, Any]) -> list[str]:
  """Fields of a config, as 'objective.network.num_heads=8', that a folder tells; of a file none."""
  found: list[str] = []
  network = config['objective']['network']
  said = _json(folder / 'config.json')
  path = 'objective.network'
  for place, numbers in _networks(network, said):
    found += [f'{place}.{field}={value}' for field, value in _told(numbers)]
  theirs = _json(folder / 'open_clip_config.json')
  if network['name'] == 'dual_encoder' and 'quick_gelu' in (model := theirs.get('model_cfg', {})):
    activation = 'quick_gelu' if model['quick_gelu'] else 'gelu'
    found += [f'{path}.{tower}.activation={activation}' for tower in ('image', 'text')]
  images = _json(folder / 'preprocessor_config.json')
  seen = [{field: images.get(f'image_{field}') for field in ('mean', 'std')}]
  seen += [theirs.get('preprocess_cfg', {}), said.get('pretrained_cfg', {})]
  for field in ('mean', 'std') if 'normalize' in config['objective'] else ():
    if value := next((given[field] for given in seen if given.get(field)), None):
      found.append(f'objective.normalize.{field}={tuple(value)}')
  found += _of_diffusion(folder, config['objective'])
  return found


def _of_diffusion(folder: Path, objective: Mapping[str, Any]) -> list[str]:
  """Sides of pictures and latents, the scale of latents, what is predicted: of a pipeline, or of a network alone."""
  found: list[str] = []
  network, latent_space = objective['network'], objective.get('latent_space', {})
  coder = latent_space.get('autoencoder')
  side = (_json(folder / 'unet' / 'config.json') or _json(folder / 'config.json')).get('sample_size')
  if isinstance(side, int) and network['name'] == 'unet' and coder is not None:
    factor = coder['image_size'] // SIZES[network['variant']].image_size
    coder_size = f'objective.latent_space.autoencoder.image_size={side * factor}'
    found += [f'objective.network.image_size={side}', coder_size]
  elif isinstance(side, int) and network['name'] == 'autoencoder':
    found.append(f'objective.network.image_size={side}')
  scale = _json(folder / 'vae' / 'config.json').get('scaling_factor')
  if scale and 'scale' in latent_space:
    found.append(f'objective.latent_space.scale={scale}')
  prediction = _json(folder / 'scheduler' / 'scheduler_config.json').get('prediction_type')
  named = {theirs: ours for ours, theirs in PREDICTIONS.items()}
  if prediction in named:
    found.append(f'objective.process.prediction={named[prediction]}')
  return found


def tokenizer(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
  """The tokenizer of a model whose texts no tokenizer of ours reads: SigLIP's."""
  text = config['objective']['network'].get('text')
  for name, spec in _TOKENIZERS.items() if text is not None and 'tokenizer' not in config else ():
    if (folder / name).is_file():
      return {'tokenizer': {**spec, 'file': str(folder / name), 'length': text['length']}}
  return {}


def _networks(network: Mapping[str, Any], said: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
  """Where the transformers of a network stand in our config, and what is said of each."""
  path, unsaid = 'objective.network', _UNSAID.get(said.get('model_type', ''), {})
  match network['name']:
    case 'vit':
      yield path, {'num_attention_heads': said.get('model_args', {}).get('num_heads')}
      yield path, {name: x for name, x in said.items() if name != 'hidden_act' or not network.get('gated_mlp')}
    case 'mae':
      yield f'{path}.encoder', said
      yield path, {'num_attention_heads': said.get('decoder_num_attention_heads')}
    case 'dual_encoder':
      yield f'{path}.image', unsaid | said.get('vision_config', {})
      yield f'{path}.text', unsaid | said.get('text_config', {})


def _told(said: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
  activations = {theirs: ours for ours, theirs in ACTIVATIONS.items()}
  for name, field in _FIELDS.items():
    if (value := said.get(name)) is not None:
      yield field, activations.get(value, value)


def _json(file: Path) -> dict[str, Any]:
  if not file.is_file():
    return {}
  try:
    found = json.loads(file.read_text(encoding='utf-8'))
  except (ValueError, OSError) as error:
    raise UserError(f'{file}: cannot be read ({error})') from error
  return found if isinstance(found, dict) else {}
