"""Reads the arrays of an adapter file by module, whichever program wrote it."""

import pathlib
import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np

from fmcv_jax.errors import UserError
from fmcv_jax.pretrained.arrays import Tensors
from fmcv_jax.pretrained.lora.formulas import NORMS, form_of
from fmcv_jax.pretrained.lora.peft_config import CONFIG, HEADER, read_config, read_header
from fmcv_jax.pretrained.tensors import open_tensors

PEFT = 'base_model.model.'
_STEMS = ('adapter_model', 'pytorch_lora_weights')
# The end of a key -> our name of the array. PEFT writes the adapter's name, 'default', in files that it did not save
# itself. `_w_norm` and `_b_norm` are LyCORIS's full differences of norms.
_ENDS = (
  (re.compile(r'\.(lora_down|lora_A(\.default)?|lora(_linear_layer|_layer)?\.down)\.weight'), 'down'),
  (re.compile(r'\.(lora_up|lora_B(\.default)?|lora(_linear_layer|_layer)?\.up)\.weight'), 'up'),
  (re.compile(r'\.lora_mid\.weight'), 'mid'),
  (re.compile(r'\.lora_embedding_A(\.default)?'), 'embedding_down'),
  (re.compile(r'\.lora_embedding_B(\.default)?'), 'embedding_up'),
  (re.compile(r'\.lora_magnitude_vector(\.default)?(\.weight)?'), 'magnitude'),
  (re.compile(r'\.dora_scale'), 'dora'),
  (re.compile(r'\.alpha'), 'alpha'),
  *((re.compile(rf'\.{name}(\.default)?'), name) for n in (1, 2) for name in (f'hada_w{n}_a', f'hada_w{n}_b')),
  *((re.compile(rf'\.{name}(\.default)?'), name) for name in ('hada_t1', 'hada_t2', 'lokr_t2', 'ia3_l')),
  *((re.compile(rf'\.lokr_w{n}{end}(\.default)?'), f'lokr_w{n}{end}') for n in (1, 2) for end in ('', '_a', '_b')),
  (re.compile(r'\.on_input'), 'on_input'),
  (re.compile(r'\.(diff|w_norm)'), 'diff'),
  (re.compile(r'\.(diff_b|b_norm)'), 'bias_diff'),
  (re.compile(r'\.weight'), 'weight'),
  (re.compile(r'\.bias'), 'bias'),
)
_OWN = ('alpha', 'bias_diff', 'bias', 'weight')  # arrays that no formula of a difference takes


class Module(NamedTuple):
  """The arrays of one module: its name, in the spelling of its file without prefixes of PEFT, and keys by our names."""

  name: str
  keys: Mapping[str, str]

  @property
  def key(self) -> str:
    """A key of the file that shows which module it is."""
    return min(self.keys.values())


class AdapterFile:
  """An adapter of PEFT, kohya's scripts, LyCORIS, diffusers or ComfyUI: a file, or a folder that PEFT or diffusers
  wrote; UserError for arrays that belong to no adapter.

  modules   by name
  metadata  the header of a safetensors file
  notes     what was assumed, one sentence each
  """

  def __init__(self, path: str):
    weights, config = _located(pathlib.Path(path))
    self.file, self._tensors = path, open_tensors(weights)
    self.metadata, self.notes = self._tensors.metadata, list(self._tensors.notes)
    self._config = None if config is None else read_config(config)
    self._headers = read_header(self.metadata[HEADER], path) if HEADER in self.metadata else {}
    self.modules = _modules(self._tensors, path)
    is_peft = any(key.startswith(PEFT) for key in self._tensors.shapes)
    has_alphas = any('alpha' in module.keys for module in self.modules.values())
    if is_peft and self._config is None and not has_alphas:
      raise UserError(f'{path}: has the names of PEFT, but no {CONFIG} next to it, which says its alpha')
    unsaid = [module.key for module in self.modules.values() if {'down', 'hada_w1_b'} & module.keys.keys()]
    if unsaid and not has_alphas and self._config is None and not self._headers:
      self.notes.append(f'{path}: has no alpha, so alpha is the rank: the scale is 1, as in diffusers and ComfyUI')

  def shape(self, key: str) -> tuple[int, ...]:
    """The shape of an array of the file."""
    return tuple(self._tensors.shapes[key])

  def read(self, module: Module, only: Collection[str]) -> dict[str, np.ndarray]:
    """Those of some arrays that a module has, by our names; UserError for NaN or Inf, and for anything but numbers."""
    parts = {}
    for name, key in module.keys.items():
      if name not in only:
        continue
      x = self._tensors[key]
      if x.dtype.kind not in 'fiub' or not np.isfinite(x).all():
        raise UserError(f'{self.file}: {key} contains NaN or Inf, or no numbers')
      parts[name] = x.astype(np.float32)
    return parts

  def difference(self, module: Module) -> tuple[dict[str, np.ndarray], float] | None:
    """The arrays of the difference of a module's weight, with those of DoRA, and its scaling; None for a module
    without one."""
    names = frozenset(module.keys) - set(_OWN)
    if not names:
      return None
    try:
      _, form = form_of(names - set(NORMS))
    except ValueError as error:
      raise UserError(f'{self.file}: {module.key}: {error}') from error
    parts = self.read(module, names)
    return parts, self._scaling(module, form.rank(parts))

  def _scaling(self, module: Module, rank: int | None) -> float:
    if 'alpha' in module.keys:
      alpha = self.read(module, ('alpha',))['alpha']
      if alpha.size != 1 or alpha.item() <= 0:
        raise UserError(f'{self.file}: {module.keys["alpha"]} is {alpha.tolist()}, expected one number above 0')
      return 1.0 if rank is None else float(alpha.item()) / rank
    if self._config is not None:
      return self._config.scaling(module.name, rank)
    network = next((name for name in self._headers if module.name.startswith(f'{name}.')), '')
    if network in self._headers:
      return self._headers[network].scaling(module.name.removeprefix(f'{network}.'), rank)
    return 1.0


def _located(path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path | None]:
  """The file of the arrays, and PEFT's config, if there is one."""
  if not path.is_dir():
    config = path.with_name(CONFIG)
    return path, config if path.stem == 'adapter_model' and config.exists() else None
  found = [file for stem in _STEMS for end in ('safetensors', 'bin') if (file := path / f'{stem}.{end}').exists()]
  if not found:
    raise UserError(f'{path}: has no {_STEMS[0]}.safetensors of PEFT and no {_STEMS[1]}.safetensors of diffusers')
  config = path / CONFIG
  return found[0], config if found[0].stem == 'adapter_model' and config.exists() else None


def _modules(tensors: Tensors, file: str) -> dict[str, Module]:
  keys: dict[str, dict[str, str]] = {}
  for key in tensors.shapes:
    name, part = _split(_modern(key))
    if part is None:
      raise UserError(
        f'{file}: unexpected array {key} of shape {tuple(tensors.shapes[key])}, not part of a known kind of adapter'
      )
    if part in (parts := keys.setdefault(name.removeprefix(PEFT), {})):
      raise UserError(f'{file}: {parts[part]} and {key} are the same array of one module')
    parts[part] = key
  if not keys:
    raise UserError(f'{file}: is empty')
  for parts in keys.values():
    if 'on_input' in parts and 'weight' in parts:
      parts['ia3_weight'] = parts.pop('weight')
    if (whole := parts.get('weight', parts.get('bias'))) and not whole.startswith(PEFT):
      raise UserError(f'{file}: {whole} is a weight of a network, not an array of an adapter; import it without --onto')
  return {name: Module(name, parts) for name, parts in keys.items()}


def _split(key: str) -> tuple[str, str | None]:
  for end, part in _ENDS:
    if found := re.search(rf'{end.pattern}$', key):
      return key[: found.start()], part
  return key, None


def _modern(key: str) -> str:
  """Names of diffusers before 0.22, whose attention processors have the adapters, as it writes them today."""
  if not re.search(r'\.to_(q|k|v|out)_lora\.', key):
    return key
  key = re.sub(r'\.to_(q|k|v)_lora\.', r'.to_\1.lora.', key.replace('.processor.', '.'))
  key = key.replace('.to_out_lora.', '.to_out.0.lora.')
  if '.self_attn.' in key:
    key = re.sub(r'\.to_(q|k|v)\.lora', r'.\1_proj.lora', key).replace('.to_out.0.lora', '.out_proj.lora')
  return key
