"""The wheel holds all that the package reads, and works in an empty folder."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def built(folder: pathlib.Path) -> pathlib.Path:
  """The files of a wheel, below `folder`."""
  command = [
    sys.executable,
    'setup.py',
    '-q',
    'egg_info',
    '--egg-base',
    folder,
    'build_py',
    '--build-lib',
    folder / 'lib',
  ]
  subprocess.run([str(word) for word in command], cwd=ROOT, check=True, capture_output=True)
  return folder / 'lib'


def below(folder: pathlib.Path) -> set[str]:
  files = (file for file in folder.rglob('*') if file.is_file() and file.parent.name != '__pycache__')
  return {file.relative_to(folder).as_posix() for file in files}


@pytest.fixture(scope='module')
def site(tmp_path_factory):
  return built(tmp_path_factory.mktemp('wheel'))


def test_the_wheel_has_every_config_and_every_file_of_the_package(site):
  configs = {f'configs/{name}' for name in below(ROOT / 'configs')}
  assert len(configs) > 20
  assert below(site / 'fmcv_jax') == below(ROOT / 'fmcv_jax') | configs
  assert {'py.typed', 'data/images/crop.c', 'data/clip_merges.txt.gz'} <= below(site / 'fmcv_jax')
  assert [path.name for path in site.iterdir()] == ['fmcv_jax']


def run(site, folder, *arguments):
  """Runs fmcv from the built files in an empty folder, without the checkout on the path."""
  code = f'import sys; sys.path.insert(0, {str(site)!r}); from fmcv_jax.__main__ import main; sys.exit(main())'
  environment = {'PATH': '', 'JAX_PLATFORMS': 'cpu', 'HOME': str(folder), 'PYTHONSAFEPATH': '1'}
  command = [sys.executable, '-c', code, *arguments]
  return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_a_config_that_the_wheel_lacks_is_an_error_with_the_nearest_of_its_own(site, tmp_path):
  done = run(site, tmp_path, 'train', '--config', 'demo/mea', '--workdir', 'run')
  assert done.returncode == 2
  assert "fmcv train: --config: no file 'demo/mea'" in done.stderr
  assert "'demo/mae'" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize('config', ['configs/demo/mae.py', 'demo/text_to_image'])
def test_the_wheel_trains_in_an_empty_folder(site, tmp_path, config):
  small = (
    '--config.train.steps=2',
    '--config.train.batch_size=8',
    '--config.optimizer.schedule.warmup_steps=1',
    '--config.evaluators={}',
    '--config.init_from={}',
  )
  done = run(site, tmp_path, 'train', '--config', config, '--workdir', 'run', *small)
  assert done.returncode == 0, done.stderr
  assert (tmp_path / 'run' / 'metrics.jsonl').is_file()
