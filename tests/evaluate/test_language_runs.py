"""Runs of the objective `language` with evaluators of their words: metrics.jsonl, and `fmcv evaluate` afterwards."""

import json

import pytest
from etils import epath

from fmcv_jax import experiment, trainer
from fmcv_jax.__main__ import main
from fmcv_jax.errors import UserError
from fmcv_jax.train.storage import read_metrics
from tests import runs

FIGURES = ('cider', 'bleu1', 'bleu2', 'bleu3', 'bleu4', 'rouge_l', 'clip_score', 'ref_clip_score')


def language(folder, **evaluator):
  config = runs.language(folder)
  return experiment.resolve({**config, 'evaluators': {'words': {**config['evaluators']['val'], **evaluator}}})


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return runs.image_folder(tmp_path_factory.mktemp('words') / 'images')


@pytest.mark.slow
def test_figures_of_a_run_are_those_of_fmcv_evaluate(folder, tmp_path):
  scorer = {'image_text_model': 'demo', 'clip_template': '{}'}
  trainer.train(language(folder, **scorer), tmp_path / 'run')
  rows = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
  found = {name: value for row in rows if row['step'] == 4 for name, value in row.items() if name.startswith('words/')}
  assert set(found) == {f'words/{prefix}{name}' for prefix in ('', 'blind_') for name in FIGURES}
  assert all(0 <= value <= 10 for value in found.values())
  assert main(['evaluate', '--workdir', str(tmp_path / 'run')]) == 0
  again = json.loads((tmp_path / 'run' / 'evaluation_4.json').read_text())
  assert {name: again[name] for name in found} == pytest.approx(found, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
  ('evaluator', 'message'),
  [
    ({'image_text_model': 'nowhere'}, 'nowhere: no run here'),
    ({'image_text_model': 'demo', 'clip_template': 'a long sentence ' * 8 + '{}'}, 'leaves no room for a label'),
    ({'prompt': 'a' * 60}, 'more than the 38 that rows of 40 tokens have room for'),
  ],
)
def test_a_mistake_stops_a_run_before_its_first_step(folder, tmp_path, evaluator, message):
  with pytest.raises(UserError, match=message):
    trainer.train(language(folder, **evaluator), tmp_path / 'run')
  assert not read_metrics(epath.Path(tmp_path) / 'run' / 'metrics.jsonl')


@pytest.mark.parametrize(
  ('evaluator', 'message'),
  [
    ({'decoding': {'beams': 0}}, 'config.evaluators.words.decoding.beams: expected a number at least 1'),
    ({'decoding': {'top_k': 3}}, 'set a temperature above 0'),
    ({'clip_template': 'a photo'}, r"clip_template: needs one '\{\}'"),
    ({'image_text': 'demo'}, "did you mean 'image_text_model'"),
  ],
)
def test_a_value_that_an_evaluator_cannot_take_is_one_line(folder, evaluator, message):
  with pytest.raises(UserError, match=message):
    experiment.config_lib.build(experiment.Experiment, language(folder, **evaluator), experiment.KINDS)


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(folder, tmp_path):
  figures = []
  for name, launcher in (('one', ('-m', 'fmcv_jax')), ('two', runs.LOCAL)):
    run = runs.start(language(folder), tmp_path / name, launcher=launcher)
    assert run.wait(600) == 0, run.stderr.read()[-2000:]
    last = read_metrics(epath.Path(tmp_path) / name / 'metrics.jsonl')[-1]
    figures.append({figure: value for figure, value in last.items() if figure.startswith('words/')})
  assert len(figures[0]) == 12
  assert figures[1] == pytest.approx(figures[0], rel=1e-5)
