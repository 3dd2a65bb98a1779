"""Configs are checked against the constructors they describe, and every mistake is one clear line."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Literal

import pytest

from fmcv_jax import config, experiment
from fmcv_jax.errors import UserError


class Animal(abc.ABC):  # noqa: B024
  """A kind, for tests."""


@dataclasses.dataclass(frozen=True)
class Cat(Animal):
  lives: int = 9
  color: Literal['black', 'gray'] = 'gray'


def dog(weight: float, friends: tuple[str, ...] = ()) -> Animal:
  if weight < 0:
    raise ValueError(f'weight is positive, got {weight}')
  return Cat(lives=int(weight))


@dataclasses.dataclass(frozen=True)
class Zoo:
  first: Animal
  others: Mapping[str, Animal] = dataclasses.field(default_factory=dict)
  row: tuple[Animal, ...] = ()
  size: tuple[int, int] = (1, 2)
  owner: str | None = None
  spare: Animal = Cat(lives=3)


KINDS = {Animal: {'cat': Cat, 'dog': dog}}


def test_resolve_fills_in_every_default_and_build_constructs_the_same_from_it():
  written = {'first': {'name': 'dog', 'weight': 3}, 'others': {'cat': {'lives': 2}}, 'row': ({'name': 'cat'},)}
  resolved = config.resolve(Zoo, written, KINDS)
  assert resolved['first'] == {'name': 'dog', 'weight': 3.0, 'friends': ()}
  assert resolved['others'] == {'cat': {'name': 'cat', 'lives': 2, 'color': 'gray'}}
  assert config.resolve(Zoo, resolved, KINDS) == resolved
  assert config.build(Zoo, written, KINDS) == config.build(Zoo, resolved, KINDS)
  assert config.build(Zoo, resolved, KINDS).others == {'cat': Cat(lives=2)}


@pytest.mark.parametrize(
  ('override', 'message'),
  [
    ('first.weightt=3', "config.first.weightt: unknown field; did you mean 'weight'?"),
    ('first.name=dgo', "config.first.name: unknown 'dgo'; did you mean 'dog'?"),
    ('first.weight=heavy', "config.first.weight: expected float, got str 'heavy'"),
    ('first.weight=-1', 'config.first: weight is positive, got -1.0'),
    (
      'others.cat.color=grayish',
      "config.others.cat.color: 'grayish' is not one of 'black', 'gray'; did you mean 'gray'?",
    ),
    ('size=(1,2,3)', 'config.size: expected 2 values, got 3: (1, 2, 3)'),
    ('row.7.lives=1', "--config.row.7.lives: '7' is not a valid index into a list of length 1"),
    ('first.name.x=1', "--config.first.name.x: cannot set 'x': the value 'dog' is not a mapping"),
    ('owner=3', 'config.owner: expected str, got int 3'),
    ('first', '--config.first: write --config.path.to.field=value'),
    ('first.name=os:nothing', "config.first.name: cannot import 'os:nothing'"),
  ],
)
def test_a_mistake_is_one_line_that_names_the_field_and_the_nearest_valid_name(override, message):
  written = {'first': {'name': 'dog', 'weight': 3}, 'others': {'cat': {}}, 'row': ({'name': 'cat'},)}
  with pytest.raises(UserError) as caught:
    config.build(Zoo, config.override(written, [override]), KINDS)
  assert message in str(caught.value)
  assert '\n' not in str(caught.value)


def test_overrides_reach_fields_that_the_file_does_not_mention_and_keep_the_rest():
  written = {'first': {'name': 'cat', 'color': 'black'}}
  tree = config.override(written, ['first.lives=4', 'owner=Ann', 'spare.color=black', 'size=[3,4]'])
  zoo = config.build(Zoo, tree, KINDS)
  assert zoo.first == Cat(lives=4, color='black')
  assert zoo.spare == Cat(lives=3, color='black')
  assert (zoo.owner, zoo.size) == ('Ann', (3, 4))
  assert written == {'first': {'name': 'cat', 'color': 'black'}}


def test_a_name_with_a_colon_reaches_code_outside_the_table():
  zoo = config.build(Zoo, {'first': {'name': f'{__name__}:dog', 'weight': 5.0}}, KINDS)
  assert zoo.first == Cat(lives=5)


def test_missing_required_field_is_named():
  with pytest.raises(UserError, match=r'config\.first\.weight: missing'):
    config.build(Zoo, {'first': {'name': 'dog'}}, KINDS)


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('x = 1', 'defines no get_config'),
    ('def get_config():\n  return undefined', 'c.py:2: NameError'),
    ('def get_config(:', 'c.py:1: SyntaxError'),
  ],
)
def test_a_faulty_config_file_is_one_line_that_says_where(tmp_path, text, message):
  (tmp_path / 'c.py').write_text(text)
  with pytest.raises(UserError, match=message):
    config.load_file(str(tmp_path / 'c.py'))


def test_a_missing_config_file_names_its_nearest_neighbour(tmp_path):
  (tmp_path / 'clip.py').write_text('')
  with pytest.raises(UserError, match=r'no file .*did you mean .*clip\.py'):
    config.load_file(str(tmp_path / 'clp.py'))


@pytest.mark.parametrize('spec', ['configs/demo/clip.py', 'demo/clip', 'demo/clip.py'])
def test_a_config_of_the_package_is_found_from_any_folder(tmp_path, monkeypatch, spec):
  monkeypatch.chdir(tmp_path)
  assert config.load_file(spec) == config.load_file(str(config.shipped_configs() / 'demo/clip.py'))


def test_an_argument_of_a_config_follows_its_short_name(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert config.load_file('vit_i1k:L/16')['objective']['network']['variant'] == 'L/16'


def test_a_file_of_the_current_folder_precedes_a_config_of_the_package(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'configs').mkdir()
  (tmp_path / 'configs/clip.py').write_text('def get_config():\n  return {"own": 1}')
  assert config.load_file('configs/clip.py') == {'own': 1}


@pytest.mark.parametrize(('spec', 'near'), [('demo/clap', 'demo/clip'), ('configs/vit_i1K.py', r'configs/vit_i1k\.py')])
def test_a_misspelled_config_of_the_package_names_the_nearest(tmp_path, monkeypatch, spec, near):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match=f'no config of that name in the package; .*{near}'):
    config.load_file(spec)


@pytest.mark.parametrize(('name', 'peak_lr', 'unscaled'), [('vit_s16_i1k', 1e-3, 1e-4), ('siglip_b16', 1e-3, 1e-4)])
def test_weight_decay_of_big_vision_is_divided_by_its_learning_rate(name, peak_lr, unscaled):
  optimizer = experiment.load_config(name)['optimizer']
  assert optimizer['schedule']['peak_lr'] == peak_lr
  assert optimizer['weight_decay'] * peak_lr == pytest.approx(unscaled)


def test_every_config_of_the_project_resolves():
  files = sorted(config.shipped_configs().rglob('*.py'))
  assert len(files) >= 2
  for file in files:
    if 'def complete(' in file.read_text():  # its fields follow from data that is not here
      with pytest.raises(UserError, match=r'config\.data\.source\.path: missing'):
        experiment.load_config(str(file))
      continue
    resolved = experiment.load_config(str(file))
    assert resolved['objective']['name']
    assert experiment.resolve(resolved) == resolved
