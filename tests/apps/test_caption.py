"""`fmcv caption`, `fmcv ask` and the same in Python, of a small model with random weights."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import fmcv_jax
from fmcv_jax.__main__ import main
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.data.sources.in_memory import InMemoryImages
from fmcv_jax.decoding.options import DecodingOptions
from fmcv_jax.errors import UserError
from fmcv_jax.experiment import resolve
from fmcv_jax.run import Run, evaluated_as, keep_tokenizer
from fmcv_jax.train.checkpoint import Checkpointer
from fmcv_jax.train.storage import write_json

WORDS = {'name': 'bpe', 'vocab_size': 300, 'length': 40, 'corpus': {'name': 'tests.systems.sources:CaptionedColors'}}
NETWORK = {'name': 'paligemma', 'variant': 'paligemma_mu', 'image_size': 16, 'vocab_size': 300, 'length': 40}


def workdir_of(config, folder):
  """A workdir of random parameters, all away from zero."""
  run = Run(resolve(config), folder)
  state, noise = run.init(), np.random.default_rng(0)
  state = state.replace(params=jax.tree.map(lambda x: x + 0.2 * noise.normal(size=x.shape).astype('f'), state.params))
  folder.mkdir(parents=True)
  write_json(run.workdir / 'config.json', run.config)
  keep_tokenizer(run)
  store = Checkpointer(run.workdir)
  store.save(state, {})
  store.wait()
  store.close()
  return str(folder)


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  tokenizer = {'name': 'prompted', 'length': 40, 'words': WORDS}
  config = {'objective': {'name': 'language', 'network': NETWORK}, 'tokenizer': tokenizer}
  return workdir_of(config, tmp_path_factory.mktemp('caption') / 'model')


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
  folder = tmp_path_factory.mktemp('photos')
  (folder / 'inner').mkdir()
  for i, name in enumerate(('a.png', 'b.png', 'inner/c.png')):
    pixels = np.random.default_rng(i).integers(0, 256, (20, 24, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(folder / name)
  (folder / 'notes.txt').write_text('not an image')
  return folder


def run(*arguments):
  return main([str(x) for x in arguments])


def error_of(capsys):
  lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith('fmcv ')]
  assert len(lines) == 1
  return lines[0]


def test_captions_of_a_folder_are_those_in_python_and_a_cut_file_is_completed(model, photos, tmp_path, capsys):
  command = ('caption', photos, '--model', model, '--max-tokens', 6, '--batch', 8, '--temperature', 1)
  assert run(*command, '--to', tmp_path / 'out.jsonl') == 0
  whole = (tmp_path / 'out.jsonl').read_text()
  rows = [json.loads(line) for line in whole.splitlines()]
  files = [str(photos / name) for name in ('a.png', 'b.png', 'inner/c.png')]
  assert [row['file'] for row in rows] == files
  ours = fmcv_jax.load(model, batch=8)
  assert [row['text'] for row in rows] == ours.caption(files, options=DecodingOptions(max_tokens=6, temperature=1.0))
  assert len({row['log_likelihood'] for row in rows}) == 3

  (tmp_path / 'out.jsonl').write_text(whole[: whole.index('\n') + 20])  # killed within the second line
  assert run(*command, '--to', tmp_path / 'out.jsonl') == 0
  assert (tmp_path / 'out.jsonl').read_text() == whole
  capsys.readouterr()
  assert run(*command) == 0
  assert capsys.readouterr().out == whole

  assert run(*command, '--prompt', 'other', '--to', tmp_path / 'out.jsonl') == 2
  assert "holds texts of the prompt 'caption en', not 'other'" in error_of(capsys)


def test_texts_of_another_model_or_of_other_options_are_never_mixed_into_a_file(model, photos, tmp_path, capsys):
  out, other = tmp_path / 'out.jsonl', shutil.copytree(model, tmp_path / 'other')
  command = ('caption', photos / 'a.png', photos / 'b.png', '--to', out, '--max-tokens', 4)
  assert run(*command[:2], *command[3:], '--model', model) == 0
  row = json.loads(out.read_text())
  assert (row['model'], row['step'], row['options']) == (model, 0, {'max_tokens': 4})
  for more, message in (
    (('--model', other), f"holds texts of the model '{model}', not '{other}'"),
    (('--model', model, '--temperature', 1), "holds texts of the options {'max_tokens': 4}, not {'max_tokens': 4, 'te"),
  ):
    assert run(*command, *more) == 2
    assert message in error_of(capsys)
  assert json.loads(out.read_text()) == row
  question = ('ask', photos, 'what?', '--model', model, '--to', tmp_path / 'answers.jsonl', '--answers', 'yes')
  assert run(*question) == 0
  assert run(*question, 'no') == 2
  assert "holds texts of the answers ['yes'], not ['yes', 'no']" in error_of(capsys)


def test_a_closed_list_takes_the_answer_of_the_largest_log_likelihood(model, photos):
  """Against whole rows of question and answer, read at once."""
  ours, answers, file = fmcv_jax.load(model, batch=8), ['red', 'blue things', 'a'], photos / 'a.png'
  subject, transform = ours._subject, evaluated_as(ours._run)
  image = transform(file.read_bytes(), np.random.default_rng(0))
  rows = subject.tokenizer([f'answer en which?\n{answer}' for answer in answers])
  batch = {'image': np.stack([image] * 3), 'tokens': rows}
  scores = np.asarray(subject.outputs['log_likelihood'].call(subject.params, subject.extra, batch), np.float64)
  best = int(scores.argmax())
  assert ours.ask(file, 'which?', answers=answers) == answers[best]
  found = next(ours._text_generator.texts(_one(file, transform), ['answer en which?'], answers=answers))
  assert found.text == answers[best]
  assert found.log_likelihood == pytest.approx(scores[best] - np.log(np.exp(scores).sum()), abs=1e-4)


def _one(file, transform):
  return Pipeline(InMemoryImages([file]), transform)


def test_each_image_has_its_own_question(model, photos):
  ours, options = fmcv_jax.load(model, batch=8), DecodingOptions(max_tokens=5)
  files, questions = [photos / 'a.png', photos / 'b.png'], ['how many?', 'which of them is red?']
  apart = [ours.ask(file, question, options=options) for file, question in zip(files, questions, strict=True)]
  assert ours.ask(files, questions, options=options) == apart


def test_a_file_that_is_not_an_image_has_its_own_line(model, photos, tmp_path, caplog):
  (tmp_path / 'broken.png').write_bytes(b'\x89PNG nothing')
  files = (photos / 'a.png', tmp_path / 'broken.png', photos / 'b.png')
  command = ('ask', tmp_path, 'what?', '--model', model, '--max-tokens', 4)
  assert run('caption', *files, '--model', model, '--max-tokens', 4, '--to', tmp_path / 'out.jsonl') == 0
  rows = [json.loads(line) for line in (tmp_path / 'out.jsonl').read_text().splitlines()]
  assert [sorted(row) for row in rows] == [
    ['file', 'log_likelihood', 'model', 'options', 'prompt', 'step', 'text'],
    ['error', 'file', 'model', 'options', 'prompt', 'step'],
    ['file', 'log_likelihood', 'model', 'options', 'prompt', 'step', 'text'],
  ]
  assert run(*command) == 2  # nothing else to read


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (('caption', 'nowhere.png'), 'nowhere.png: no such file or folder'),
    (('caption', 'PHOTOS', '--top-k', '3'), 'set a temperature above 0'),
    (('caption', 'PHOTOS', '--max-tokens', '0'), '--max-tokens: expected at least 1, got 0'),
    (('caption', 'PHOTOS', '--prompt', 'long ' * 60), '--prompt: '),
    (('ask', 'PHOTOS', 'what?', '--template', 'no place'), "--template: needs one '{}'"),
    (('ask', 'PHOTOS', 'what?', '--answers', 'yes', 'no', 'yes'), "answers: 'yes' is given twice"),
    (('ask', 'PHOTOS', 'what?', '--answers', 'yes', ''), 'answers: one of them is empty'),
    (('caption', 'PHOTOS', '--to', 'PHOTOS'), 'is a folder; give a .jsonl file'),
  ],
)
def test_a_mistake_is_one_line_that_names_the_argument(model, photos, capsys, arguments, message):
  given = [str(photos) if argument == 'PHOTOS' else argument for argument in arguments]
  assert run(*given, '--model', model) == 2
  assert message in error_of(capsys)


def test_what_is_not_a_text_or_not_options_is_one_line_in_python(model, photos):
  ours, file = fmcv_jax.load(model), photos / 'a.png'
  for call, message in (
    (lambda: ours.caption(file, 5), 'prompt: expected a text, got int'),
    (lambda: ours.caption(file, options={'max_tokens': 3}), 'options: expected DecodingOptions, got dict'),
    (lambda: ours.ask(file, 7), 'question: expected a list of texts, got int'),
    (lambda: ours.ask(file, ['a', 7]), 'question: item 1 is int, not a text'),
    (lambda: ours.ask(file, 'a', answers=['yes', 1]), 'answers: expected a text, got int'),
  ):
    with pytest.raises(UserError, match=message):
      call()


def test_a_model_without_a_tokenizer_or_without_texts_says_so(photos, tmp_path, capsys):
  language = workdir_of({'objective': {'name': 'language', 'network': NETWORK}}, tmp_path / 'untokenized')
  assert run('caption', photos, '--model', language) == 2
  assert 'config.tokenizer: the model has no tokenizer' in error_of(capsys)
  encoder = {'name': 'encoder', 'network': {'name': 'vit', 'variant': 'mu/8', 'image_size': 16}}
  other = workdir_of({'objective': encoder}, tmp_path / 'encoder')
  assert run('caption', photos, '--model', other) == 2
  assert 'this model does not generate texts' in error_of(capsys)
  with pytest.raises(UserError, match='this model does not generate texts'):
    fmcv_jax.load(other).caption(photos / 'a.png')


@pytest.fixture(scope='module')
def coca(tmp_path_factory):
  network = {'name': 'coca', 'variant': 'mu/8', 'image_size': 16, 'vocab_size': 300, 'length': 40}
  config = {'objective': {'name': 'contrastive_captioning', 'network': network}, 'tokenizer': WORDS}
  return workdir_of(config, tmp_path_factory.mktemp('coca') / 'model')


def test_a_coca_captions_classifies_and_embeds(coca, photos, capsys):
  """By the same workdir; the captions of the command are those in Python, and it takes no prompt."""
  files = [str(photos / name) for name in ('a.png', 'b.png', 'inner/c.png')]
  ours = fmcv_jax.load(coca, batch=8)
  captions = ours.caption(files, options=DecodingOptions(max_tokens=6))
  assert run('caption', photos, '--model', coca, '--max-tokens', 6, '--batch', 8) == 0
  rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert [(row['text'], row['prompt']) for row in rows] == [(caption, '') for caption in captions]
  images, texts = ours.encode_image(files), ours.encode_text(['a red square', 'a blue circle'])
  logits = np.exp(float(ours._subject.params['temperature'])) * images @ texts.T
  expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  found = ours.classify(files, ['red square', 'blue circle'], templates='a {}')
  np.testing.assert_allclose(found, expected, atol=1e-5)
  assert run('caption', photos, '--model', coca, '--prompt', 'caption en') == 2
  assert 'prompt: this model was trained without prompts; leave it out' in error_of(capsys)
