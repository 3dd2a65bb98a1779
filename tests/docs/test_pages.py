"""The commands, config fields, files and functions that the documentation names exist."""

import ast
import dataclasses
import importlib
import itertools
import pathlib
import re
import shlex
import subprocess
import sys
import typing

import pytest

from fmcv_jax import __main__, experiment
from fmcv_jax import config as config_lib
from fmcv_jax.augment.base import Augment
from fmcv_jax.data.sources.base import Source
from fmcv_jax.data.transforms import ImageTransform
from fmcv_jax.errors import UserError
from fmcv_jax.evaluate.base import Evaluator
from fmcv_jax.models.common.attention import dispatch
from fmcv_jax.pretrained import families
from fmcv_jax.registry import KINDS

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / 'tools'))

PAGES = sorted([*ROOT.glob('*.md'), *(ROOT / 'docs').rglob('*.md')])
CONFIGS = sorted((ROOT / 'configs').rglob('*.py'))
BLOCK = re.compile(r'^(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^(?P=indent)```$', re.MULTILINE | re.DOTALL)


def text_of(path: pathlib.Path) -> str:
  return path.read_text() if path.suffix == '.md' else ast.get_docstring(ast.parse(path.read_text())) or ''


def commands_of(path: pathlib.Path) -> list[tuple[str, str]]:
  """(command, the error that the page shows for it, or '') of all lines that run fmcv, continuation lines joined."""
  text = re.sub(r'\\+\n\s*', ' ', text_of(path))
  text = re.sub(r"(?<=\{)\s*\n\s*|(?<=,)\n\s+(?=')", ' ', text)  # a dict that goes over lines
  lines = [line.strip() for line in text.split('\n')] + ['']
  error = re.compile(r'fmcv \w+: ')
  return [
    (line, following if error.match(following) else '')
    for line, following in itertools.pairwise(lines)
    if re.match(r'(LIBTPU\S+ )?fmcv [a-z]', line) and not error.match(line)
  ]


COMMANDS = [
  pytest.param(command, output, id=f'{path.relative_to(ROOT)}: {command[:60]}')
  for path in (*PAGES, *CONFIGS)
  for command, output in commands_of(path)
]


@pytest.mark.parametrize(('command', 'output'), COMMANDS)
def test_every_command_is_accepted_by_the_parser_and_the_schema(command, output, monkeypatch):
  monkeypatch.chdir(ROOT)
  words = [word for word in shlex.split(command, comments=True) if not word.startswith('LIBTPU')]
  if '...' in words or 'IMAGE...' in words:
    pytest.skip('abbreviated')
  args, rest = __main__.parser().parse_known_args(words[1:])
  assert all(word.startswith('--config.') for word in rest), rest
  overrides = [word.removeprefix('--config.') for word in rest if '...' not in word]
  config = getattr(args, 'config', None)
  if not config or not (ROOT / config.partition(':')[0]).exists():
    return
  if 'def complete(' in (ROOT / config.partition(':')[0]).read_text():  # its fields follow from data that is not here
    with pytest.raises(UserError, match=r'data\.source\.path: missing|no such folder or file'):
      experiment.load_config(config, overrides)
  elif output:  # the page shows an error
    with pytest.raises(UserError) as error:
      experiment.load_config(config, overrides)
    assert output == f'fmcv {args.command}: {error.value}'
  else:
    experiment.load_config(config, overrides)


def schema_fields() -> set[str]:
  """The names of all fields that any constructor of a config has."""
  names = {'name'}
  todo: list = [experiment.Experiment, *(made for table in KINDS.values() for made in table.values())]
  done = set()
  while todo:
    made = todo.pop()
    if made in done:
      continue
    done.add(made)
    for name, (annotation, _) in config_lib._parameters(made).items():
      names.add(name)
      todo += [part for part in parts_of(annotation) if dataclasses.is_dataclass(part)]
  return names


def parts_of(annotation) -> list:
  inner = getattr(annotation, '__args__', ())
  return [annotation, *(part for argument in inner for part in parts_of(argument))]


ARGUMENTS = {
  'antialias',
  'downscale_freq_shift',
  'interval',
  'labels',
  'prevent_cse',
  'use_ema',
  'year',
}  # of functions and partitions, not of configs
ROOTS = 'objective|train|network|optimizer|data|mesh|checkpoint|log|debug|network.encoder'


@pytest.mark.parametrize('path', PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_config_field_that_a_page_names_exists(path):
  if 'coming_from' in path.parts or path.name == 'CHANGELOG.md':  # which name the fields of others, and old ones
    return
  fields, missing = schema_fields(), []
  for span in re.findall(r'`([^`\n]+)`', BLOCK.sub('', path.read_text())):
    for match in re.finditer(rf'(?:^|[ .])(?:{ROOTS})((?:\.[a-z_]+)+)', span):
      missing += [name for name in match[1].strip('.').split('.') if name not in fields]
    if (match := re.match(r'([a-z_]+)=', span)) and match[1] not in fields | ARGUMENTS:
      missing.append(match[1])
  assert not missing


@pytest.mark.parametrize('path', PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_of_the_repository_that_a_page_names_exists(path):
  found = re.findall(r'(?<![\w/])((?:fmcv_jax|configs|tests|benchmarks|launch|docs|tools)/[\w/.*]+)', path.read_text())
  if path.name == 'CHANGELOG.md':
    return
  missing = [name for name in found if not name.lower().endswith('/x.py') and not list(ROOT.glob(name.rstrip('.')))]
  assert not missing


@pytest.mark.parametrize('path', PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_import_that_a_page_shows_works(path):
  for name, names in re.findall(r'^ *from (fmcv_jax[\w.]*) import ([\w, ]+)$', path.read_text(), re.MULTILINE):
    module = importlib.import_module(name)
    for attribute in names.split(','):
      if not hasattr(module, attribute.strip()):
        importlib.import_module(f'{name}.{attribute.strip()}')


@pytest.mark.parametrize('path', PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_blocks_compile(path):
  for block in BLOCK.finditer(path.read_text()):
    if block['language'] == 'python':
      code = '\n'.join(line.removeprefix(block['indent']) for line in block['code'].splitlines())
      compile(code, str(path), 'exec')


def test_the_attention_page_lists_all_backends():
  listed = re.findall(r'^\| `(\w+)` \|', (ROOT / 'docs/attention.md').read_text(), re.MULTILINE)
  assert {'auto', *listed} == set(typing.get_args(dispatch.Backend))


def test_the_evaluation_page_lists_all_evaluators():
  listed = re.findall(r'^\| `(\w+)` \|', (ROOT / 'docs/evaluation.md').read_text(), re.MULTILINE)
  assert set(listed) == set(KINDS[Evaluator])


def test_the_augmentation_page_lists_all_augmentations_and_crops():
  text = (ROOT / 'docs/augmentation.md').read_text()
  tables = re.findall(r'^\| name \| .*\n\|[- |]+\n((?:\|.*\n)+)', text, re.MULTILINE)
  listed = [set(re.findall(r'^\| (`.*?`) \|', table, re.MULTILINE)) for table in tables]
  names = [{name for row in rows for name in re.findall(r'\w+', row)} for rows in listed]
  assert names == [set(KINDS[Augment]), set(KINDS[ImageTransform])]


def test_the_data_page_lists_all_sources():
  rows = re.findall(r'^\| (`\w+`(?:, `\w+`)*) \|', (ROOT / 'docs/data.md').read_text(), re.MULTILINE)
  assert {name for row in rows for name in re.findall(r'\w+', row)} == set(KINDS[Source]) - {'none'}


def test_the_page_of_imports_lists_all_families():
  table = (ROOT / 'docs/pretrained.md').read_text().partition('| `--as` |')[2].partition('\n\n')[0]
  first = ' '.join(row.split('|')[1] for row in table.splitlines()[2:])
  assert set(re.findall(r'`(\w+)`', first)) - {'sd15', 'controlnet_sd15'} == set(families.FAMILIES)


def test_no_retired_word_is_in_the_documentation():
  pages = [str(path) for path in PAGES]
  done = subprocess.run([sys.executable, ROOT / 'tools/check_text.py', *pages], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


def test_a_retired_word_and_a_long_file_are_reported(tmp_path, monkeypatch):
  import check_text

  monkeypatch.setattr(check_text, 'ROOT', tmp_path)
  file = tmp_path / 'fmcv_jax' / 'long.py'
  file.parent.mkdir()
  word, term = next(iter(check_text.RETIRED.items()))
  file.write_text('"""What it does."""\n' + f'{word}_apart = 1\n' * 400)
  found = [finding.text for finding in check_text.findings(file)]
  assert found.count(f'{word!r} is retired: {term}') == 400
  assert "docstring begins with 'What': use a verb or a noun" in found
  assert '401 lines; at most 400' in found
