"""PaliGemma 1 and 2 as transformers saves them: logits, greedy texts, and every trap of the processor."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fmcv_jax.apps.conversion import export_checkpoint, import_checkpoint
from fmcv_jax.decoding.generation import generate
from fmcv_jax.decoding.options import DecodingOptions
from fmcv_jax.errors import UserError
from fmcv_jax.run import evaluated_as
from tests.pretrained import captions
from tests.pretrained.captions import IMAGES

torch = pytest.importorskip('torch', reason='pip install fmcv-jax[parity]')
transformers = pytest.importorskip('transformers', reason='pip install fmcv-jax[parity]')

PROMPTS = ['caption en', 'answer en how many cats?', '']
ANSWERS = ['a red cat', 'two of them on the table and a dog', 'détect']
FAMILIES = ('paligemma', 'paligemma2')
WINDOWED = 'paligemma2 with a window'  # of fewer tokens than images and texts have


@pytest.fixture(scope='module')
def models(tmp_path_factory):
  """{family: (their model, processor, our run, our model)}"""
  found = {}
  for family in (*FAMILIES, WINDOWED):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('model')
    more = {'sliding_window': 19} if family == WINDOWED else {}
    theirs = captions.paligemma(folder / 'theirs', family.partition(' ')[0], **more)
    run = import_checkpoint(str(folder / 'theirs'), str(folder / 'ours'))
    found[family] = (*theirs, run, run.restored_model()[0])
  return found


def processed(processor, suffix=None):
  texts = [f'<image>{prompt}' for prompt in PROMPTS]
  return processor(images=IMAGES, text=texts, suffix=suffix, padding=True, return_tensors='pt')


def pixels(run):
  """The images as our transform gives them, uint8 [N, side, side, 3]."""
  transform = evaluated_as(run)
  return np.stack([transform(np.asarray(image), np.random.default_rng(0)) for image in IMAGES])


@pytest.mark.parametrize('family', FAMILIES)
def test_rows_are_those_of_the_processor(models, family):
  """Start, newline, no space before either part, the end; image tokens are not in the row; padding is at the end."""
  _, processor, run, _ = models[family]
  ours = run.experiment.tokenizer([f'{prompt}\n{answer}' for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)])
  theirs = processed(processor, ANSWERS)
  for row, ids, real in zip(ours, theirs['input_ids'].numpy(), theirs['attention_mask'].numpy(), strict=True):
    text = ids[(real == 1) & (ids != processor.image_token_id)]
    assert ((real == 1) & (ids == processor.image_token_id)).sum() == 16
    np.testing.assert_array_equal(row[: len(text)], text)
    assert set(row[len(text) :]) == {processor.tokenizer.pad_token_id}
  prompts = run.experiment.tokenizer.prompts(PROMPTS)
  for row, ids in zip(prompts, processed(processor)['input_ids'].numpy(), strict=True):
    text = [i for i in ids if i not in (processor.image_token_id, processor.tokenizer.pad_token_id)]
    np.testing.assert_array_equal(row[: len(text)], text)
  np.testing.assert_array_equal(run.experiment.tokenizer.decode(ours), [
    f'{prompt}\n{answer}' for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)
  ])  # fmt: skip


@pytest.mark.parametrize('family', FAMILIES)
def test_images_are_those_of_the_processor(models, family):
  _, processor, run, _ = models[family]
  ours = run.experiment.objective.normalize(pixels(run).astype(np.float32) / 255)
  theirs = processed(processor)['pixel_values'].numpy().transpose(0, 2, 3, 1)
  np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize('family', [*FAMILIES, WINDOWED])
def test_logits_of_prompt_and_answer_agree(models, family):
  """Also the image's scale, the attention within the prefix, positions after padding, and both softcaps."""
  model, processor, run, subject = models[family]
  inputs = processed(processor, ANSWERS)
  with torch.no_grad():
    theirs = model(**{name: x for name, x in inputs.items() if name != 'labels'}).logits.numpy()
  tokens = run.experiment.tokenizer([f'{prompt}\n{answer}' for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)])
  images = inputs['pixel_values'].numpy().transpose(0, 2, 3, 1)
  objective = run.experiment.objective
  ours = objective.network.apply({'params': subject.params}, images, tokens, objective._prefix_lengths(tokens))
  for row, logits, real in zip(np.asarray(ours), theirs, inputs['attention_mask'].numpy(), strict=True):
    expected = logits[real == 1][16:]  # the text's; padding is on the left
    np.testing.assert_allclose(row[: len(expected)], expected, atol=1e-4)


@pytest.mark.parametrize('family', FAMILIES)
def test_the_loss_is_that_of_the_library(models, family):
  model, processor, run, subject = models[family]
  inputs = processed(processor, ANSWERS)
  with torch.no_grad():
    theirs = model(**inputs).loss.item()
  objective = run.experiment.objective
  tokens = run.experiment.tokenizer([f'{prompt}\n{answer}' for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)])
  images = inputs['pixel_values'].numpy().transpose(0, 2, 3, 1)
  logits = objective._logits(subject.params, images, tokens)
  losses, weights, _ = objective.token_losses(logits, tokens)
  assert float((losses * weights).sum() / weights.sum()) == pytest.approx(theirs, rel=1e-5)
  assert int(weights.sum()) == int((inputs['labels'] != -100).sum())


SEARCHES = {
  'greedy': ({'max_tokens': 64}, {'max_new_tokens': 64}),
  'beams': (
    {'max_tokens': 24, 'beams': 3, 'length_penalty': 0.7},
    {'max_new_tokens': 24, 'num_beams': 3, 'length_penalty': 0.7},
  ),
  'min_tokens': ({'max_tokens': 20, 'min_tokens': 9}, {'max_new_tokens': 20, 'min_new_tokens': 9}),
}


BY_DEFAULT = {('paligemma', 'greedy'), ('paligemma2', 'beams'), (WINDOWED, 'greedy')}
ALL_SEARCHES = [*((family, search) for family in FAMILIES for search in SEARCHES), (WINDOWED, 'greedy')]


@pytest.mark.parametrize(
  ('family', 'search'),
  [pytest.param(*case, marks=() if case in BY_DEFAULT else pytest.mark.slow) for case in ALL_SEARCHES],
)
def test_generated_tokens_are_those_of_the_library(models, family, search):
  """Prompts of different lengths in one batch; a frequent token is made the end, so that texts end early."""
  model, processor, run, subject = models[family]
  ours, theirs = SEARCHES[search]
  inputs = processed(processor)
  with torch.no_grad():
    free = model.generate(**inputs, max_new_tokens=64, do_sample=False, eos_token_id=[]).numpy()
  free = free[:, inputs['input_ids'].shape[1] :]
  assert len(np.unique(free)) > 8  # texts that repeat one token would say little
  end = int(free[0, 12])
  with torch.no_grad():
    expected = model.generate(**inputs, do_sample=False, eos_token_id=end, pad_token_id=0, **theirs).numpy()
  expected = expected[:, inputs['input_ids'].shape[1] :]
  objective = run.experiment.objective
  language = objective.language_model(subject.params, {})._replace(end_id=end)
  # The pixels of the processor, so that a difference of resizing cannot change a token.
  images = inputs['pixel_values'].numpy().transpose(0, 2, 3, 1)
  batch = {'image': (images + 1) * 127.5, 'tokens': run.experiment.tokenizer.prompts(PROMPTS)}
  found = np.asarray(jax.jit(lambda batch: generate(language, batch, DecodingOptions(**ours)).tokens)(batch))
  for ours, theirs in zip(found, expected, strict=True):
    length = int(np.argmax(np.append(theirs, end) == end)) + 1  # beams of the library are padded with the end
    np.testing.assert_array_equal(ours[: len(theirs)][:length], theirs[:length])
    assert (ours[length:] == 0).all()


@pytest.mark.parametrize('family', FAMILIES)
def test_published_names_of_the_image_tower_are_read_too(models, tmp_path, family):
  model, _, _, subject = models[family]
  model.save_pretrained(tmp_path / 'theirs')
  file = tmp_path / 'theirs' / 'model.safetensors'
  old = 'vision_tower.'
  arrays = {name.replace(old, f'{old}vision_model.'): x for name, x in load_file(file).items()}
  save_file(arrays, file)
  run = import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'))
  jax.tree.map(np.testing.assert_array_equal, run.restored_model()[0].params, subject.params)


# A change of config.json, and a part of the line that refuses it.
REFUSED = {
  'vision_use_head': ({'vision_config': {'vision_use_head': True}}, 'vision_use_head is true'),
  'hidden_size': ({'text_config': {'hidden_size': 64}}, 'hidden_size is 64, but this would be computed with 48'),
  'attention_bias': ({'text_config': {'attention_bias': True}}, 'attention_bias is true'),
  'rope_type': ({'text_config': {'rope_parameters': {'rope_type': 'linear'}}}, 'rope_type is "linear"'),
  'model_type': ({'text_config': {'model_type': 'gemma3_text'}}, 'model_type is "gemma3_text"'),
  'causal': ({'text_config': {'use_bidirectional_attention': False}}, 'use_bidirectional_attention is false'),
  'layer_types': ({'text_config': {'layer_types': ['full_attention'] * 3}}, 'layer_types is'),
  'projection_dim': ({'projection_dim': 64}, 'projection_dim is 64'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_would_be_computed_otherwise_is_refused_by_name(models, tmp_path, name):
  model, *_ = models['paligemma2']
  model.save_pretrained(tmp_path / 'theirs')
  change, line = REFUSED[name]
  path = tmp_path / 'theirs' / 'config.json'
  said = json.loads(path.read_text())
  for key, value in change.items():
    said[key] = {**said[key], **value} if isinstance(value, dict) else value
  path.write_text(json.dumps(said))
  with pytest.raises(UserError) as caught:
    import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'))
  assert line in str(caught.value)
  assert '\n' not in str(caught.value)


def test_a_softcap_of_null_is_none(models, tmp_path):
  model, *_ = models['paligemma2']
  model.save_pretrained(tmp_path / 'theirs')
  path = tmp_path / 'theirs' / 'config.json'
  said = json.loads(path.read_text())
  said['text_config']['final_logit_softcapping'] = None
  del said['text_config']['attn_logit_softcapping']
  path.write_text(json.dumps(said))
  text = import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours')).experiment.objective.network.text
  assert (text.logit_softcap, text.stack.block.logit_softcap) == (None, 50.0)


def test_a_processor_of_another_number_of_image_tokens_is_refused(models, tmp_path):
  model, processor, *_ = models['paligemma']
  model.save_pretrained(tmp_path / 'theirs')
  processor.save_pretrained(tmp_path / 'theirs')
  path = tmp_path / 'theirs' / 'processor_config.json'
  said = json.loads(path.read_text())
  said['image_processor']['image_seq_length'] = 9
  path.write_text(json.dumps(said))
  with pytest.raises(UserError, match='image_seq_length is 9, but this would be computed with 16'):
    import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'))


@pytest.mark.parametrize('family', FAMILIES)
def test_an_export_is_opened_by_the_library_with_the_same_logits(models, tmp_path, family):
  model, processor, run, _ = models[family]
  export_checkpoint(str(run.workdir), str(tmp_path / 'out'), 'transformers')
  again = transformers.PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / 'out').eval()
  inputs = processed(processor)
  with torch.no_grad():
    np.testing.assert_allclose(again(**inputs).logits, model(**inputs).logits, atol=1e-5)
  theirs = transformers.AutoProcessor.from_pretrained(tmp_path / 'out')
  texts = processed(theirs)
  for name in ('input_ids', 'attention_mask', 'token_type_ids'):
    np.testing.assert_array_equal(texts[name], inputs[name], err_msg=name)
  # The library opens the file with its processor of torchvision, which differs from Pillow's by some levels.
  assert np.abs(texts['pixel_values'] - inputs['pixel_values']).mean() < 0.005
