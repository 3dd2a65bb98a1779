"""One version number, wherever it is written."""

import pathlib
import re
import tomllib

import yaml

import fmcv_jax

ROOT = pathlib.Path(__file__).parents[2]


def test_the_version_is_the_same_everywhere():
  version = fmcv_jax.__version__
  assert tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']['setuptools']['dynamic']['version'] == {
    'attr': 'fmcv_jax.version.__version__'
  }
  assert yaml.safe_load((ROOT / 'CITATION.cff').read_text())['version'] == version
  assert re.findall(r'version = \{(.*)\}', (ROOT / 'README.md').read_text()) == [version]


def test_the_changelog_has_an_entry_for_this_version():
  headings = re.findall(r'^## \[(.+?)\]', (ROOT / 'CHANGELOG.md').read_text(), re.MULTILINE)
  assert headings[0] == 'Unreleased'
  assert fmcv_jax.__version__ in headings


def test_every_package_of_the_extras_is_pinned():
  extras = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['optional-dependencies']
  pinned = {line.partition('==')[0].lower() for line in (ROOT / 'constraints.txt').read_text().splitlines()}
  needed = {
    re.match(r'[\w.-]+', name)[0].lower() for extra in ('demo', 'dev', 'docs', 'parity') for name in extras[extra]
  }
  assert needed <= pinned
