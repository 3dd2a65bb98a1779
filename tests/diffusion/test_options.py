import pytest

from fmcv_jax.apps.arguments import command_line_errors
from fmcv_jax.diffusion.options import SamplingOptions
from fmcv_jax.diffusion.process import Process
from fmcv_jax.errors import UserError


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (dict(steps=0), 'steps: 0 is not at least 1'),
    (dict(solver='eular'), "solver: unknown 'eular'; did you mean 'euler'"),
    (dict(seed=-1), 'seed: -1 is not from 0'),
    (dict(interval=(800, 200)), 'interval: 800 to 200; give the lower time first'),
    (dict(rescale=1.5), 'rescale: 1.5 is not from 0 to 1'),
    (dict(guidance=float('nan')), 'guidance: nan is not finite'),
    (dict(strength=0.0), 'strength: 0.0 is not above 0 and at most 1'),
    (dict(control_scale=float('inf')), 'control_scale: inf is not finite'),
  ],
)
def test_the_library_names_the_argument_and_the_command_line_its_option(options, message):
  with pytest.raises(UserError, match=f'^{message}'):
    SamplingOptions(**options)
  (name,) = options
  with pytest.raises(UserError, match=f'^--{name.replace("_", "-")}:'), command_line_errors():
    SamplingOptions(**options)


def test_an_error_about_something_else_keeps_its_words_on_the_command_line():
  with pytest.raises(UserError, match=r'^config\.train: no'), command_line_errors():
    raise UserError('config.train: no')


def test_options_are_hashable_whatever_sequences_they_are_given():
  assert hash(SamplingOptions(guidance=[1, 2], interval=[0, 500])) == hash(
    SamplingOptions(guidance=(1.0, 2.0), interval=(0, 500))
  )


def test_a_wrong_option_is_a_type_error_of_the_public_function_with_the_nearest_name():
  options = SamplingOptions(steps=7)
  assert options.changed({'guidance': 2.0}, 'generate') == SamplingOptions(steps=7, guidance=2.0)
  with pytest.raises(TypeError, match="generate: unexpected option 'guidence'; did you mean 'guidance'"):
    options.changed({'guidence': 2.0}, 'generate')
  with pytest.raises(TypeError, match="edit: unexpected option 'controls'; did you mean 'control'"):
    options.changed({'controls': 2.0}, 'edit', ['control'])


def test_an_edit_starts_at_the_last_times():
  times = SamplingOptions(steps=10).times(Process('flow', 'flow'))
  assert times == (1000, 900, 800, 700, 600, 500, 400, 300, 200, 100)
  assert SamplingOptions(steps=10).times(Process('flow', 'flow'), 0.3) == (300, 200, 100)
  with pytest.raises(UserError, match='solver: heun divides by alpha'):
    SamplingOptions(solver='heun').times(Process('zero_snr', 'velocity'))
