"""Commands that stand in for those of a cluster."""

import os

import pytest


@pytest.fixture
def commands(tmp_path):
  """A folder first on PATH; write(name, body) puts a bash command there."""
  folder = tmp_path / 'bin'
  folder.mkdir()

  def write(name, body):
    path = folder / name
    path.write_text(f'#!/bin/bash\n{body}\n')
    path.chmod(0o755)
    return path

  write.env = os.environ | {'PATH': f'{folder}:{os.environ["PATH"]}'}
  return write
