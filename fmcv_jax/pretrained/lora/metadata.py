"""Headers of adapter files: checks of the network that a file was trained on, and headers of files of ours."""

import re
from collections.abc import Mapping

from fmcv_jax.errors import UserError

# Names of kohya's scripts, ai-toolkit and modelspec for a network -> our family.
_VERSIONS = (
  ('sd1', re.compile(r'sd[_-]?v?1([._].*)?|stable-diffusion-v1([/-].*)?')),
  ('sd2', re.compile(r'sd[_-]?v?2([._].*)?|stable-diffusion-v2([/-].*)?')),
)
_KEYS = ('ss_base_model_version', 'modelspec.architecture')
_VELOCITY = re.compile(r'sd_v\d_v|stable-diffusion-v2-768-v(/.*)?')
_PREDICTIONS = {'epsilon': 'noise', 'eps': 'noise', 'v': 'velocity', 'v_prediction': 'velocity', 'sample': 'image'}
_SAID = {'noise': 'the noise', 'velocity': 'velocities (v-prediction)', 'image': 'the image'}


def check(metadata: Mapping[str, str], family: str, prediction: str | None, file: str, target: str) -> None:
  """Raises UserError if the header names another network than `family`, or another prediction.

  prediction  what the target predicts, 'noise', 'velocity' or 'image'; None for a network that does not denoise
  """
  own = 'sd2' if family.startswith('sd2') else family
  for key in _KEYS:
    if not (value := metadata.get(key, '')):
      continue
    whose = next((name for name, pattern in _VERSIONS if pattern.fullmatch(value)), None)
    if whose != own:
      raise UserError(f'{file}: {key} says that it was trained on {value}, but {target} is {_shown(own)}')
  if (second := metadata.get('ss_v2', '')) and own in ('sd1', 'sd2') and (second.lower() == 'true') != (own == 'sd2'):
    raise UserError(f'{file}: ss_v2 is {second}, but {target} is {_shown(own)}')
  said = _prediction(metadata)
  if prediction is not None and said is not None and said[1] != prediction:
    raise UserError(
      f'{file}: {said[0]} is {metadata[said[0]]}: it was trained on a model that predicts {_SAID[said[1]]}, '
      f'but {target} predicts {_SAID.get(prediction, prediction)}'
    )


def _prediction(metadata: Mapping[str, str]) -> tuple[str, str] | None:
  """(key, prediction) of the first key that tells it."""
  if (said := metadata.get('modelspec.prediction_type', '').lower()) in _PREDICTIONS:
    return 'modelspec.prediction_type', _PREDICTIONS[said]
  for key in _KEYS:
    if _VELOCITY.fullmatch(metadata.get(key, '')):
      return key, 'velocity'
  return None


def _shown(family: str) -> str:
  return {'sd1': 'Stable Diffusion 1', 'sd2': 'Stable Diffusion 2'}.get(family, repr(family))


def written(family: str, prediction: str, rank: int, alpha: float) -> dict[str, str]:
  """The header for a file of ours in kohya's layout: the keys above and those that its readers show."""
  versions = {'sd1': ('sd_v1', 'stable-diffusion-v1'), 'sd2': ('sd_v2', 'stable-diffusion-v2-512')}
  if family not in versions or prediction not in ('noise', 'velocity'):
    raise UserError(f"kohya's layout is that of Stable Diffusion 1 and 2, not of {family!r} predicting {prediction!r}")
  base, architecture = versions[family]
  if prediction == 'velocity':
    base, architecture = f'{base}_v', 'stable-diffusion-v2-768-v' if family == 'sd2' else architecture
  return {
    'ss_base_model_version': base,
    'ss_v2': str(family == 'sd2'),
    'ss_network_module': 'networks.lora',
    'ss_network_dim': str(rank),
    'ss_network_alpha': f'{alpha:g}',
    'modelspec.sai_model_spec': '1.0.0',
    'modelspec.architecture': f'{architecture}/lora',
    'modelspec.implementation': 'diffusers',
    'modelspec.prediction_type': 'v' if prediction == 'velocity' else 'epsilon',
  }
