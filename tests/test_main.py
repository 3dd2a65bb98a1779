"""What a person at the terminal sees: help, and one clear line for each mistake."""

import json

import jax
import pytest

from fmcv_jax.__main__ import main
from tests import runs


def config_file(path, config):
  path.write_text(f'import json\n\ndef get_config():\n  return json.loads({json.dumps(config)!r})\n')
  return str(path)


def fails(capsys, *argv):
  """Runs a command that must end with status 2 and one line on stderr; returns the line."""
  assert main(argv) == 2
  lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith('fmcv ')]
  assert len(lines) == 1
  return lines[0]


def test_compiled_programs_are_kept_in_the_cache_or_where_the_user_says(monkeypatch, tmp_path):
  monkeypatch.setenv('FMCV_CACHE', str(tmp_path))
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR')
  given = jax.config.jax_compilation_cache_dir
  try:
    main(['report', '--workdir', str(tmp_path / 'none')])
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / 'compiled')
    monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', given)
    jax.config.update('jax_compilation_cache_dir', given)
    main(['report', '--workdir', str(tmp_path / 'none')])
    assert jax.config.jax_compilation_cache_dir == given
  finally:
    jax.config.update('jax_compilation_cache_dir', given)


@pytest.mark.parametrize('argv', [['--help'], ['train', '--help'], ['evaluate', '--help'], ['demo', '--help']])
def test_every_command_has_help(argv, capsys):
  with pytest.raises(SystemExit) as caught:
    main(argv)
  assert caught.value.code == 0
  out = capsys.readouterr().out
  assert 'usage: fmcv' in out
  assert len(out) > 200


def test_imagenet_that_is_not_there_says_where_it_looked_and_how_to_get_it(capsys, tmp_path, monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'tfds'))
  line = fails(capsys, 'train', '--config', 'configs/vit_s16_i1k.py', '--workdir', str(tmp_path / 'x'))
  assert str(tmp_path / 'tfds') in line
  assert 'tfds build imagenet2012' in line


@pytest.mark.parametrize(
  ('override', 'message'),
  [
    ('--config.train.stepz=3', "config.train.stepz: unknown field; did you mean 'steps'?"),
    ('--config.objective.network.variant=B/15x', "did you mean 'B/16'?"),
    ('--config.optimizer.schedule.name=cosin', "did you mean 'cosine'?"),
    ('--config.mesh.data=3', 'config.mesh: data=3 is 3 devices, but there are 8'),
    ('--verbose', "unknown argument '--verbose'"),
  ],
)
def test_mistaken_override_is_one_line(capsys, tmp_path, override, message):
  folder = runs.image_folder(tmp_path / 'images')
  file = config_file(tmp_path / 'c.py', runs.classification(folder))
  assert message in fails(capsys, 'train', '--config', file, '--workdir', str(tmp_path / 'x'), override)
  assert not (tmp_path / 'x').exists()


def test_truncated_image_in_a_folder_is_skipped_counted_and_reported(capsys, tmp_path):
  folder = runs.image_folder(tmp_path / 'images', count=48)
  broken = folder / 'a' / '0.png'
  broken.write_bytes(broken.read_bytes()[:200])
  config = runs.classification(folder, data__max_bad=0.2, evaluators={}, train__steps=3)
  assert main(['train', '--config', config_file(tmp_path / 'c.py', config), '--workdir', str(tmp_path / 'x')]) == 0
  out = ' '.join(capsys.readouterr().out.split())
  assert '1 records could not be read and were skipped: ' in out
  assert 'a/0.png' in out


def test_caption_table_with_missing_columns_names_them_and_those_found(capsys, tmp_path):
  folder = runs.image_folder(tmp_path / 'images')
  (folder / 'captions.csv').write_text('file,title\na/0.png,red\n')
  config = config_file(tmp_path / 'c.py', runs.contrastive(folder))
  line = fails(capsys, 'train', '--config', config, '--workdir', str(tmp_path / 'x'))
  assert 'captions.csv' in line
  assert 'image' in line
  assert 'file' in line


def test_workdir_that_cannot_be_written_is_one_line(capsys, tmp_path):
  file = config_file(tmp_path / 'c.py', runs.classification(runs.image_folder(tmp_path / 'images')))
  (tmp_path / 'taken').write_text('')
  line = fails(capsys, 'train', '--config', file, '--workdir', str(tmp_path / 'taken' / 'run'))
  assert 'cannot be written' in line


def test_evaluate_of_a_folder_without_a_run_is_one_line(capsys, tmp_path):
  assert 'no run here (no config.json)' in fails(capsys, 'evaluate', '--workdir', str(tmp_path))


@pytest.mark.parametrize(
  'argv',
  [
    ['evaluate', '--workdir', 'DIR', '--config.evaluators={"val": {"name": "accuracy", "stepz": 1}}'],
    ['precompute', 'features', '--model', 'DIR', '--to', 'OUT', '--config.data={"source": {"name": "x y"}}'],
    ['precompute', '--model', 'DIR', '--to', 'OUT', 'features', '--config.data={"source": {"name": "x y"}}'],
  ],
)
def test_an_override_with_spaces_is_not_a_value_of_the_option_before_it(argv, monkeypatch):
  from fmcv_jax.apps import evaluation, precompute

  calls = []
  monkeypatch.setattr(evaluation, 'evaluate_workdirs', lambda *args, **options: calls.append(args))
  monkeypatch.setattr(precompute, 'run', lambda *args, **options: calls.append((args[0], args[2])))
  assert main(argv) == 0
  values, overrides = calls[0]
  assert list(values) == (['DIR'] if argv[0] == 'evaluate' else ['features'])
  assert overrides == [argv[-1].removeprefix('--config.')]


def test_an_override_of_a_command_without_a_config_is_refused(capsys):
  assert '--config.train.steps=3' in fails(capsys, 'report', '--workdir', 'x', '--config.train.steps=3')
