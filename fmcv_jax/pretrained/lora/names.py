"""Finds the layers that the modules of an adapter file name, in the layouts of a family, or says whose they are."""

import re
from collections.abc import Iterable, Mapping

from fmcv_jax.errors import UserError, did_you_mean
from fmcv_jax.pretrained.layout import EVERY, Layout, Shape, TheirArray, arrays
from fmcv_jax.pretrained.lora.adapter_file import AdapterFile

# Beginning of a name in our layouts -> what adapter files write instead, and before names with '_' for '.'.
# `lora_te1_` and `lora_te2_` are the two towers of SDXL: 1 has the shapes of Stable Diffusion 1, and is another tower.
_BEGINNINGS = (
  ('unet.', ('unet.', ''), ('lora_unet_',)),
  (
    'text_encoder.',
    ('text_encoder.', 'text_encoders.clip_l.transformer.', 'text_encoders.clip_h.transformer.', ''),
    ('lora_te_',),
  ),
  ('model.diffusion_model.', ('model.diffusion_model.', 'diffusion_model.'), ('lora_unet_',)),
  (
    'cond_stage_model.transformer.',
    ('cond_stage_model.transformer.', 'text_encoders.clip_l.transformer.'),
    ('lora_te_',),
  ),
  ('cond_stage_model.', ('cond_stage_model.',), ()),
  ('vae.', ('vae.',), ()),
  ('first_stage_model.', ('first_stage_model.',), ()),
  ('', ('', 'unet.', 'transformer.', 'diffusion_model.'), ('lora_unet_', 'lora_transformer_')),
)
# Signs of networks that are not here, in the order in which they decide.
_SIGNS = (
  ('FLUX.2', r'(double|single)_stream_modulation|to_qkv_mlp_proj'),
  ('FLUX.1 or HunyuanVideo', r'double_blocks|single_blocks|single_transformer_blocks'),
  ('Stable Diffusion 3', r'joint_blocks|lora_te3_|text_encoder_3\.|add_[qkv]_proj'),
  ('Qwen-Image', r'(img|txt)_(mlp|mod)'),
  ('Z-Image or Lumina 2', r'(context|noise)_refiner|layers[._]\d+[._](attention|feed_forward)[._]'),
  ('Wan', r'blocks[._]\d+[._](self_attn|cross_attn|ffn)[._]'),
  ('LTX-Video', r'patchify_proj'),
  (
    'SDXL',
    r'lora_te[12]_|text_encoder_2\.|clip_g\.|conditioner\.|add_embedding|label_emb|'
    r'(down|up|mid|input|middle|output)_block.*transformer_blocks[._][1-9]',
  ),
  ('Stable Diffusion', r'lora_unet_|lora_te_|(down|up|mid|input|output)_block.*transformer_blocks'),
)
_CONTEXT = {768: 'Stable Diffusion 1', 1024: 'Stable Diffusion 2', 2048: 'SDXL'}  # width of the words


class Place:
  """A layout whose layers a file names.

  arrays   their arrays by name
  modules  module of the file -> the name of its layer, without '.weight'
  """

  def __init__(self, layout: Layout, shapes: Mapping[str, Shape]):
    self.layout = layout
    placed = {row.ours for row in layout.rows}
    shapes = {path: shape for path, shape in shapes.items() if path in placed}
    self.arrays: Mapping[str, TheirArray] = {
      name: array for name, array in arrays(layout, shapes).items() if EVERY not in array.rows[0].theirs
    }
    self._spelled: dict[str, str] = {}
    for name in self.arrays:
      layer = name.removesuffix('.weight')
      if layer != name:
        self._spelled |= {spelling: layer for spelling in _spellings(layer)}
    self.modules: dict[str, str] = {}

  @property
  def spellings(self) -> Iterable[str]:
    """Every name that a file may have for a layer."""
    return self._spelled

  def found(self, modules: Iterable[str]) -> dict[str, str]:
    """Modules that are layers here -> their names."""
    return {module: self._spelled[module] for module in modules if module in self._spelled}

  def paths(self) -> set[tuple[str, int | None]]:
    """Our arrays, and their layers, that the modules are in."""
    return {
      (row.ours, self.arrays[f'{layer}.weight'].layer)
      for layer in self.modules.values()
      for row in self.arrays[f'{layer}.weight'].rows
    }


def _spellings(layer: str) -> list[str]:
  for start, dotted, flat in _BEGINNINGS:
    if layer.startswith(start):
      own = layer.removeprefix(start)
      return [*(other + own for other in dotted), *(other + own.replace('.', '_') for other in flat)]
  raise AssertionError('the last beginning is that of every name')


def located(adapter: AdapterFile, layouts: Iterable[Layout], shapes: Mapping[str, Shape], target: str) -> list[Place]:
  """The layouts that together have all modules of a file; UserError for a module that none has.

  Networks of one file may be in different spellings, as the text tower of Stable Diffusion 2 is. A layer of ours that
  two of them name is an error: its difference would be added twice.
  """
  places = [Place(layout, shapes) for layout in layouts]
  left, used = list(adapter.modules), []
  while left and places:
    best = max(places, key=lambda place: len(place.found(left)))
    if not (found := best.found(left)):
      break
    best.modules |= found
    used.append(best)
    left = [module for module in left if module not in found]
  if left:
    more = f' and {len(left) - 1} more' if len(left) > 1 else ''
    whose = sign_of(adapter)
    known = {spelling for place in places for spelling in place.spellings}
    advice = f'it seems to be for {whose}' if whose else did_you_mean(left[0], known)
    raise UserError(f'{adapter.file}: {adapter.modules[left[0]].key}{more}: not a layer of {target}; {advice}')
  for place in used:
    layers = list(place.modules.values())
    if twice := next((layer for layer in layers if layers.count(layer) > 1), None):
      both = [adapter.modules[module].key for module, layer in place.modules.items() if layer == twice]
      raise UserError(f'{adapter.file}: {both[0]} and {both[1]} are the same layer; which one counts?')
  for n, place in enumerate(used):
    for other in used[:n]:
      if common := sorted(place.paths() & other.paths(), key=str):
        raise UserError(f'{adapter.file}: names {common[0][0]} in two spellings; its difference would be added twice')
  return used


def sign_of(adapter: AdapterFile) -> str | None:
  """The network that a file seems to be for, by its names and the width of the words that it reads; None if unknown."""
  keys = [key for module in adapter.modules.values() for key in module.keys.values()]
  whose = next((network for network, sign in _SIGNS if any(re.search(sign, key) for key in keys)), None)
  if whose != 'Stable Diffusion':
    return whose
  for module in adapter.modules.values():
    if re.search(r'attn2[._]to_[kv]$', module.name) and (key := module.keys.get('down')):
      return _CONTEXT.get(adapter.shape(key)[1], whose)
  return whose
