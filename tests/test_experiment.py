"""Whole runs on real files: what they write, how they resume, and what they refuse."""

import functools
import json

import jax
import numpy as np
import pytest

from fmcv_jax import config as config_lib
from fmcv_jax import experiment, trainer
from fmcv_jax.apps import evaluation
from fmcv_jax.apps.evaluation import evaluate_workdir, evaluate_workdirs
from fmcv_jax.errors import UserError
from fmcv_jax.run import Run, parameter_count
from fmcv_jax.train.flops import matmul_flops
from fmcv_jax.train.storage import read_metrics
from tests import runs

TIMES = ('time', 'train/steps_per_second', 'train/images_per_second', 'train/data_wait_fraction')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return runs.image_folder(tmp_path_factory.mktemp('images'))


@pytest.fixture(scope='module')
def finished(folder, tmp_path_factory):
  """A run that was never interrupted: (config, workdir, final state)."""
  workdir = tmp_path_factory.mktemp('finished')
  config = runs.classification(folder)
  return config, workdir, jax.device_get(trainer.train(config, workdir))


def rows_without_times(workdir):
  return [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(workdir / 'metrics.jsonl')]


def test_workdir_identifies_the_run_and_holds_its_metrics(finished):
  config, workdir, _ = finished
  saved = json.loads((workdir / 'config.json').read_text())
  assert experiment.resolve(experiment.config_lib.to_plain_dict(saved)) == config
  identity = json.loads((workdir / 'run.json').read_text())
  assert identity['devices']['count'] == 8
  assert identity['versions']['jax'] == jax.__version__
  assert identity['parameters'] == parameter_count(Run(config).abstract_state.params)
  rows = read_metrics(workdir / 'metrics.jsonl')
  assert [row['step'] for row in rows if 'train/loss' in row] == list(range(1, 9))
  assert [row['step'] for row in rows if 'val/top1' in row] == [4, 8]


def test_it_learns_the_colors(finished):
  _, workdir, _ = finished
  rows = read_metrics(workdir / 'metrics.jsonl')
  assert rows[-1]['val/top1'] >= 0.6


def test_stopped_run_resumes_bitwise(finished, tmp_path):
  """State, data order, metrics: stopped at step 5 and resumed equals never stopped."""
  config, workdir, state = finished
  runs.stopped(config, tmp_path, 5)
  runs.assert_bitwise_equal(trainer.train(config, tmp_path), state)
  assert rows_without_times(tmp_path) == rows_without_times(workdir)


def test_evaluate_gives_the_metrics_of_the_last_training_step_on_any_mesh(finished):
  _, workdir, _ = finished
  last = read_metrics(workdir / 'metrics.jsonl')[-1]
  for overrides in ([], ['mesh.data=2', 'mesh.fsdp=2', 'mesh.tensor=2']):
    figures, step = evaluate_workdir(workdir, overrides)
    assert (figures, step) == ({name: last[name] for name in figures}, 8)
  assert json.loads((workdir / 'evaluation_8.json').read_text())['val/top1'] == last['val/top1']


def test_evaluate_puts_several_runs_in_one_table(finished, capsys, monkeypatch):
  monkeypatch.setenv('COLUMNS', '300')
  workdir = str(finished[1])
  evaluate_workdirs([workdir, workdir + '/'])
  printed = capsys.readouterr().out
  assert printed.count('step 8') == 2
  cells = next(line for line in printed.splitlines() if 'val/top1' in line).split('│')[1:-1]
  name, first, second = (cell.strip() for cell in cells)
  assert (name, first) == ('val/top1', second)


def test_a_table_of_several_runs_names_them_in_a_narrow_window(capsys, monkeypatch):
  monkeypatch.setenv('COLUMNS', '80')
  monkeypatch.setattr(
    evaluation, 'evaluate_workdir', lambda workdir, overrides, step: ({'pixels_ridge/strength': 1.0}, 1000)
  )
  evaluation.evaluate_workdirs(['runs/features/untrained', 'runs/features/mae', 'runs/features/supervised/'])
  printed = capsys.readouterr().out
  assert all(name in printed for name in ('untrained', 'mae', 'supervised', 'pixels_ridge/strength'))


def test_evaluate_of_a_step_that_is_not_kept_says_which_are(finished):
  with pytest.raises(UserError, match=r'no checkpoint of step 7; steps there: 6, 8'):
    evaluate_workdir(finished[1], step=7)


def test_checkpoint_of_one_mesh_continues_on_another(folder, tmp_path):
  changes = {'data__shuffle': True}
  straight = trainer.train(runs.classification(folder, **changes), tmp_path / 'straight')
  runs.stopped(runs.classification(folder, **changes), tmp_path / 'moved', 4)
  moved = runs.classification(folder, **changes, mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
  for x, y in zip(
    jax.tree.leaves(jax.device_get(trainer.train(moved, tmp_path / 'moved').params)),
    jax.tree.leaves(jax.device_get(straight.params)),
    strict=True,
  ):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5)


def test_contrastive_run_keeps_its_tokenizer_and_reopens_without_the_corpus(folder, tmp_path):
  import shutil

  own = tmp_path / 'images'
  shutil.copytree(folder, own)
  config = runs.contrastive(own)
  trainer.train(config, tmp_path / 'run')
  tokens = Run(config).experiment.tokenizer(['a red image'])
  shutil.rmtree(own)
  subject, step = Run.reopen(tmp_path / 'run').restored_model()
  assert step == 4
  np.testing.assert_array_equal(subject.tokenizer(['a red image']), tokens)
  embeddings = subject.embed_texts(['a red image', 'blue'], batch_size=8)
  np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-5)


def test_warm_start_loads_another_runs_average_except_for_skipped_parts(finished, folder, tmp_path):
  _, workdir, state = finished
  changes = {'init_from__params__workdir': workdir, 'init_from__params__skip': "('head/.*',)", 'train__steps': 1}
  warm = runs.classification(folder, **changes, optimizer__schedule__peak_lr=1e-12, optimizer__schedule__warmup_steps=0)
  params = jax.device_get(trainer.train(warm, tmp_path).params)
  np.testing.assert_allclose(params['patch']['kernel'], state.ema['patch']['kernel'], atol=1e-8)
  assert abs(params['head']['kernel']).max() < 1e-6
  with pytest.raises(UserError, match=r'head/bias is \(3,\) in .* and \(4,\) here; add a pattern'):
    trainer.train(
      runs.classification(folder, init_from__params__workdir=workdir, objective__network__num_classes=4),
      tmp_path / 'other',
    )


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'train__batch_size': 20}, r'config\.train\.batch_size: 20 is not divisible by data=8; use a multiple of 8'),
    ({'train__grad_accum_steps': 4}, r'16 is not divisible by data=8 times 4 microbatches; use a multiple of 32'),
    ({'evaluators__val__batch_size': 12}, r'config\.evaluators\.val\.batch_size: 12 is not divisible'),
    ({'train__steps': 2}, r'config\.optimizer\.schedule: warmup_steps 2 must be smaller than the number of steps, 2'),
    ({'mesh__tensor': 3}, 'tensor=3 needs a multiple of 3 devices'),
    ({'data__image__size': 24}, r'config\.data gives image of shape \(24, 24, 3\).* expects \(16, 16, 3\)'),
    (
      {'mesh__tensor': 4, 'objective__network__mlp_dim': 66},
      r'parameter blocks/mlp/down/kernel: axis .mlp. of size 66',
    ),
  ],
)
def test_mismatched_configs_are_one_line(folder, tmp_path, changes, message):
  with pytest.raises(UserError, match=message) as caught:
    trainer.train(runs.classification(folder, **changes), tmp_path)
  assert '\n' not in str(caught.value)


def test_workdir_of_another_experiment_is_refused_and_left_as_it_was(finished, folder):
  _, workdir, _ = finished
  before = (workdir / 'config.json').read_bytes()
  with pytest.raises(UserError, match=r'another experiment: config\.objective\.mixup is 0\.2 there and 0\.5 here'):
    trainer.train(runs.classification(folder, objective__mixup=0.5), workdir)
  assert (workdir / 'config.json').read_bytes() == before


def test_reopening_a_folder_without_a_run_says_so(tmp_path):
  with pytest.raises(UserError, match='no run here'):
    Run.reopen(tmp_path)


def test_model_flops_count_three_passes_of_trained_and_one_of_frozen_networks(folder):
  def flops(config, **changes):
    changed = config_lib.override(config, [f'{path.replace("__", ".")}={value}' for path, value in changes.items()])
    return Run(experiment.resolve(changed)).step_flops()

  classifier = runs.classification(folder)
  tokens, width, depth = 1 + 4, 32, 2
  block = 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * 64
  patches, head = 4 * 192 * width, 3 * width
  # Each product once, and once for the gradient by each of its factors; images have none.
  assert flops(classifier) == 2 * 16 * (2 * patches + 3 * (depth * block + head))
  config = runs.text_to_image(folder)
  assert flops(config, objective__network__remat='full') == flops(config)
  coder = Run(config).experiment.objective.latent_space.autoencoder
  images = jax.ShapeDtypeStruct((16, 16, 16, 3), np.float32)
  encode = functools.partial(coder.apply, method='encode')
  once = matmul_flops(encode, jax.eval_shape(coder.init, jax.random.key(0), images), images)
  assert flops(config) - flops(config, objective__latent_space__precomputed=True) == once
