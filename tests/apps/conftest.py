"""Pretrained models of the tests of fine-tuning."""

import pytest

from tests import runs


@pytest.fixture(scope='module')
def classifier(tmp_path_factory):
  """A workdir of an untrained classifier of three other classes."""
  path = tmp_path_factory.mktemp('classifier')
  config = runs.classification(runs.image_folder(path / 'images'), objective__network__drop_path=0.0)
  return str(runs.untrained(config, path / 'run'))


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
  """A workdir of an untrained image-text model."""
  path = tmp_path_factory.mktemp('pairs')
  return str(runs.untrained(runs.contrastive(runs.image_folder(path / 'images')), path / 'run'))
