"""PEFT's description of an adapter: adapter_config.json of its folders, and the header of diffusers' files."""

import json
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from fmcv_jax.errors import UserError
from fmcv_jax.pretrained.arrays import first_line

CONFIG = 'adapter_config.json'
HEADER = 'lora_adapter_metadata'  # of diffusers: keys of several networks, 'unet.r'

KINDS = ('LORA', 'LOHA', 'LOKR', 'IA3')
# What says how the adapter was trained, or which layers it has, which its arrays say as well.
_TRAINING = re.compile(
  r'task_type|auto_mapping|peft_version|base_model_name_or_path|revision|inference_mode|target_modules|exclude_modules|'
  r'layers_to_transform|layers_pattern|modules_to_save|(lora|rank|module)_dropout|rank_dropout_scale|init_ia3_weights|'
  r'megatron_core|qalora_group_size|eva_config|loftq_config|use_effective_conv2d|decompose_(both|factor)|bias|'
  r'feedforward_modules|runtime_config|use_dora'
)
_SCALE = ('r', 'lora_alpha', 'alpha', 'rank_pattern', 'alpha_pattern', 'use_rslora', 'peft_type')
# Initial values after which the base model's own weights are no longer those that the adapter is added to.
_MOVED_BASE = re.compile(r'pissa.*|olora|loftq|corda|lora_ga|mica')


class PeftConfig(NamedTuple):
  """One adapter's settings, and where they were read."""

  values: Mapping[str, Any]
  where: str

  def scaling(self, module: str, rank: int | None) -> float:
    """alpha / r of a module, or alpha / sqrt(r); UserError for arrays of another rank than it says."""
    if self.values.get('peft_type', 'LORA') == 'IA3':
      return 1.0
    r = self._number('r', 'rank_pattern', module)
    if rank is not None and rank != r:
      raise UserError(f'{self.where}: says rank {r:g} for {module}, whose arrays have rank {rank}')
    name = 'lora_alpha' if 'lora_alpha' in self.values else 'alpha'
    alpha = self._number(name, 'alpha_pattern', module)
    return alpha / (math.sqrt(r) if self.values.get('use_rslora') else r)

  def _number(self, name: str, pattern: str, module: str) -> float:
    """The number of a module; of patterns the first that its name ends with counts, as in PEFT."""
    patterns = self.values.get(pattern) or {}
    key = next((key for key in patterns if re.match(rf'(.*\.)?({key})$', module)), None)
    value = patterns[key] if key is not None else self.values.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
      raise UserError(f'{self.where}: {name} is {value!r}, expected a number above 0')
    return float(value)


def checked(values: Any, where: str) -> PeftConfig:
  """The settings; UserError for those that change what the arrays mean and are not known here."""
  if not isinstance(values, dict):
    raise UserError(f'{where}: is not an object of settings')
  kind = values.get('peft_type', 'LORA')
  if kind not in KINDS:
    raise UserError(f'{where}: peft_type is {kind!r}, which is not read; known are {", ".join(KINDS)}')
  for key, value in values.items():
    if key in ('init_lora_weights', 'init_weights'):
      if isinstance(value, str) and _MOVED_BASE.fullmatch(value):
        raise UserError(
          f"{where}: {key} is {value!r}, which also changes the base model; convert it with PEFT's "
          'path_initial_model_for_weight_conversion'
        )
    elif value and key not in _SCALE and not _TRAINING.fullmatch(key):
      raise UserError(f'{where}: {key} is {value!r}, which is not supported')
  return PeftConfig(values, where)


def read_config(file: pathlib.Path) -> PeftConfig:
  """adapter_config.json; UserError for one that is not JSON, or that is not supported."""
  try:
    values = json.loads(file.read_text(encoding='utf-8'))
  except (OSError, ValueError) as error:
    raise UserError(f'{file}: cannot be read ({first_line(error)})') from error
  return checked(values, str(file))


def read_header(text: str, file: str) -> dict[str, PeftConfig]:
  """Settings in the header of a file of diffusers, by network: 'unet', 'text_encoder', ''."""
  try:
    values = json.loads(text)
    parts: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
      network, _, own = key.rpartition('.')
      parts.setdefault(network, {})[own] = value
  except (ValueError, AttributeError) as error:
    raise UserError(f'{file}: {HEADER} in its header is not an object of settings') from error
  return {network: checked(own, f'{file}: {HEADER} {network}'.rstrip()) for network, own in parts.items()}
