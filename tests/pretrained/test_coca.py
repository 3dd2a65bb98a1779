"""CoCa as OpenCLIP saves it: embeddings, logits, losses, greedy captions, exports, and what is refused by name."""

import copy
import importlib
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fmcv_jax.apps.conversion import export_checkpoint, import_checkpoint
from fmcv_jax.decoding.generation import generate
from fmcv_jax.decoding.options import DecodingOptions
from fmcv_jax.errors import UserError
from tests.pretrained.references import to_torch

torch = pytest.importorskip('torch', reason='pip install fmcv-jax[parity]')
open_clip = pytest.importorskip('open_clip', reason='pip install fmcv-jax[parity]')
hub = importlib.import_module('open_clip.push_to_hf_hub')

LENGTH, WORDS, START, END = 12, 92, 90, 91
POOL = {'attentional_pool': True, 'attn_pooler_queries': 7, 'attn_pooler_heads': 4}
VISION = {'layers': 2, 'width': 64, 'head_width': 16, 'patch_size': 8, 'image_size': 32, 'output_tokens': True}
TEXT = {'context_length': LENGTH, 'vocab_size': WORDS, 'width': 48, 'heads': 6, 'layers': 2}
TEXT |= {'embed_cls': True, 'output_tokens': True}
DECODER = {'context_length': LENGTH, 'vocab_size': WORDS, 'width': 48, 'heads': 4, 'layers': 3}


def model_cfg(vision=(), text=(), decoder=(), embed_dim=48, **more):
  parts = {
    'vision_cfg': VISION | dict(vision),
    'text_cfg': TEXT | dict(text),
    'multimodal_cfg': DECODER | dict(decoder),
  }
  return {'embed_dim': embed_dim, 'custom_text': True, **parts, **more}


CONFIGS = {
  'queries': model_cfg(POOL),
  'queries of the width of the tower': model_cfg({**POOL, 'width': 48}),
  'quick_gelu': model_cfg(POOL, quick_gelu=True),
  # As coca_base: the decoder attends to patches of its own width, and the embedding may have another.
  'patches': model_cfg({'width': 48}, embed_dim=24),
}
# Padding after 5 and after 12 tokens, and a word with the id of padding within a text.
TOKENS = np.array([
  [START, 5, 7, 9, END, 0, 0, 0, 0, 0, 0, 0],
  [START, 62, 9, 11, 3, 14, 15, 9, 26, 5, 35, END],
  [START, 8, 0, 21, 4, END, 0, 0, 0, 0, 0, 0],
], np.int32)  # fmt: skip
PIXELS = np.random.default_rng(0).normal(size=(3, 32, 32, 3)).astype(np.float32)


def published(folder, config):
  """A folder as OpenCLIP's save_config_for_hf writes it, with weights that are no initial values."""
  given = copy.deepcopy(config)
  given.pop('custom_text')
  torch.manual_seed(0)
  model = open_clip.CoCa(**given).eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    model.text_decoder.text_projection.zero_()  # which the library leaves as memory happens to be
    for parameter in model.parameters():
      parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.text.token_embedding.weight *= 40  # so that a token decides the next one, and the image does not alone
    model.text_decoder.text_projection *= 10
    for block in model.text_decoder.cross_attn:
      block.attn.out_proj.weight *= 0.2
      block.attn.out_proj.bias *= 0.2
  folder.mkdir()
  model.visual.image_mean, model.visual.image_std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
  model.visual.preprocess_cfg = {}
  hub.save_config_for_hf(model, folder / 'open_clip_config.json', config)
  save_file({key: x.numpy() for key, x in model.state_dict().items()}, folder / 'open_clip_model.safetensors')
  return model


@pytest.fixture(scope='module')
def models(tmp_path_factory):
  """{name: (their model, our run, our parameters)}"""
  found = {}
  for name, config in CONFIGS.items():
    folder = tmp_path_factory.mktemp('coca')
    theirs = published(folder / 'theirs', config)
    run = import_checkpoint(str(folder / 'theirs'), str(folder / 'ours'))
    found[name] = theirs, run, run.restored_model()[0].params
  return found


def outputs(model):
  """Embeddings of images and texts, and logits of the 11 next tokens."""
  with torch.no_grad():
    found = model(to_torch(PIXELS), torch.from_numpy(TOKENS).long())
  return {name: found[name].numpy() for name in ('image_features', 'text_features', 'logits')}


@pytest.mark.parametrize('name', CONFIGS)
def test_embeddings_and_logits_are_those_of_open_clip(models, name):
  model, run, params = models[name]
  theirs = outputs(model)
  ours = run.experiment.objective.network.apply({'params': params}, PIXELS, TOKENS, method='embed_and_predict')
  np.testing.assert_allclose(ours.pairs.image, theirs['image_features'], atol=1e-5)
  np.testing.assert_allclose(ours.pairs.text, theirs['text_features'], atol=1e-5)
  assert np.abs(theirs['logits']).max() > 3
  np.testing.assert_allclose(ours.logits[:, :-1], theirs['logits'], atol=1e-4)


def test_both_losses_are_those_of_open_clip(models):
  """On texts in which no word has the id of padding, which OpenCLIP would not count."""
  model, run, params = models['queries']
  tokens = torch.from_numpy(TOKENS[:2]).long()
  with torch.no_grad():
    found = model(to_torch(PIXELS[:2]), tokens)
    loss = open_clip.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)
    contrast, caption = loss(**found)
  objective = run.experiment.objective.with_tokenizer(Words())
  normalize = objective.normalize
  images = 255 * (PIXELS[:2] * np.float32(normalize.std) + np.float32(normalize.mean))
  batch = {'image': images, 'tokens': TOKENS[:2]}
  ours = objective.loss(params, batch, jax.random.key(0), {})
  assert float(ours.metrics['contrastive_loss'].value) == pytest.approx(contrast.item(), rel=1e-4)
  assert 2 * float(ours.metrics['caption_loss'].value) == pytest.approx(caption.item(), rel=1e-4)
  assert float(ours.value) == pytest.approx((contrast + caption).item(), rel=1e-4)


class Words:
  length, vocab_size, pad_id, start_id, end_id = LENGTH, WORDS, 0, START, END


@pytest.fixture
def generation(monkeypatch):
  """OpenCLIP 3.3 gives up on transformers 5, which has no BeamSearchScorer; greedy search does not need it."""
  transformers = pytest.importorskip('transformers', reason='pip install fmcv-jax[parity]')
  theirs = importlib.import_module('open_clip.coca_model')
  for name in ('LogitsProcessorList', 'MinLengthLogitsProcessor', 'RepetitionPenaltyLogitsProcessor'):
    monkeypatch.setattr(theirs, name, getattr(transformers, name), raising=False)
  for name in ('MaxLengthCriteria', 'StoppingCriteriaList'):
    monkeypatch.setattr(theirs, name, getattr(transformers, name), raising=False)
  monkeypatch.setattr(theirs, '_has_transformers', True)
  monkeypatch.setitem(theirs.GENERATION_TYPES, 'top_k', transformers.TopKLogitsWarper)


@pytest.mark.parametrize('name', ['queries', 'quick_gelu'])
def test_greedy_captions_are_those_of_open_clip(models, generation, name):
  """generation_type='top_k' with top_k=1 takes the most likely token each time; its seq_len counts the start.

  A frequent token is made the end, so that texts end early. With a seq_len beyond what is compared it writes no end of
  its own. Beam search is that of transformers' groups of beams, which is not ours.
  """
  model, run, params = models[name]

  def generated(end):
    with torch.no_grad():
      options = {'generation_type': 'top_k', 'top_k': 1, 'seq_len': LENGTH + 1, 'max_seq_len': LENGTH, 'min_seq_len': 0}
      return model.generate(to_torch(PIXELS), sot_token_id=START, eos_token_id=end, **options).numpy()[:, 1:LENGTH]

  free = generated(WORDS + 1)
  assert free.shape == (3, LENGTH - 1)
  assert len(np.unique(free)) > 8  # texts that repeat one token would say little
  assert (free != 0).all()  # which would end a text there
  end = int(free[0, 4])
  theirs = generated(end)
  objective = run.experiment.objective.with_tokenizer(Words())
  language = objective.outputs()['caption'].language(params, {})._replace(end_id=end)
  images = PIXELS * np.float32(objective.normalize.std) + np.float32(objective.normalize.mean)
  batch = {'image': images * 255, 'tokens': TOKENS}
  found = np.asarray(jax.jit(lambda batch: generate(language, batch, DecodingOptions()).tokens)(batch))
  assert found.shape == (3, LENGTH - 1)  # as many as the network has places for
  np.testing.assert_array_equal(found[:, : theirs.shape[1]], theirs)


@pytest.mark.parametrize('name', CONFIGS)
def test_an_export_is_opened_by_open_clip_with_equal_outputs(models, tmp_path, name):
  model, run, _ = models[name]
  export_checkpoint(str(run.workdir), str(tmp_path / 'out'), 'open_clip')
  again = open_clip.create_model(f'local-dir:{tmp_path / "out"}').eval()
  first, second = outputs(model), outputs(again)
  for key, x in first.items():
    np.testing.assert_array_equal(x, second[key], err_msg=key)
  arrays = load_file(tmp_path / 'out' / 'open_clip_model.safetensors')
  assert arrays.keys() == model.state_dict().keys()
  read = import_checkpoint(str(tmp_path / 'out'), str(tmp_path / 'again'))
  assert read.config['objective'] == run.config['objective']


# A change of the config, and a part of the line that refuses it.
REFUSED = {
  'parallel pooling': ('vision_cfg', {'attentional_pool': 'parallel'}, 'attentional_pool is "parallel"'),
  'cascade pooling': ('vision_cfg', {'attentional_pool': 'cascade'}, 'attentional_pool is "cascade"'),
  'no pooling': ('vision_cfg', {'attentional_pool': False}, 'attentional_pool is false'),
  'mean of the queries': ('vision_cfg', {'pool_type': 'avg'}, 'pool_type is "avg"'),
  'queries': ('vision_cfg', {'attn_pooler_queries': 9}, 'attn_pooler_queries is 9'),
  'eps of the pooling': ('vision_cfg', {'norm_kwargs': {'eps': 1e-3}}, 'norm_kwargs is {"eps": 0.001}'),
  'norm of what is pooled': ('vision_cfg', {'final_ln_after_pool': True}, 'final_ln_after_pool is true'),
  'images without tokens': ('vision_cfg', {'output_tokens': False}, 'output_tokens is false'),
  'texts without tokens': ('text_cfg', {'output_tokens': None}, 'output_tokens is false (the default of the library)'),
  'no class token': ('text_cfg', {'embed_cls': False}, 'embed_cls is false'),
  'corrected mask': ('text_cfg', {'correct_cls_mask': True}, 'correct_cls_mask is true'),
  'not causal': ('text_cfg', {'no_causal_mask': True}, 'no_causal_mask is true'),
  'padding': ('text_cfg', {'pad_id': 1}, 'pad_id is 1'),
  'another library': ('text_cfg', {'hf_model_name': 'roberta-base'}, "hf_model_name is 'roberta-base'"),
  'layers of the decoder': ('multimodal_cfg', {'layers': 4}, 'layers is 4, but this would be computed with 3'),
  'width of the decoder': ('multimodal_cfg', {'width': 64}, 'width is 64'),
  'activation of the decoder': ('multimodal_cfg', {'act_kwargs': {'approximate': 'tanh'}}, 'act_kwargs is'),
  'eps of the decoder': ('multimodal_cfg', {'norm_kwargs': {'eps': 1e-3}}, 'norm_kwargs is'),
  'short decoder': ('multimodal_cfg', {'context_length': 10}, 'context_length is 10'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_would_be_computed_otherwise_is_refused_by_name(models, tmp_path, name):
  part, change, line = REFUSED[name]
  published(tmp_path / 'theirs', CONFIGS['patches' if 'final_ln_after_pool' in change else 'queries'])
  path = tmp_path / 'theirs' / 'open_clip_config.json'
  said = json.loads(path.read_text())
  said['model_cfg'][part].update(change)
  path.write_text(json.dumps(said))
  with pytest.raises(UserError) as caught:
    import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'))
  assert str(caught.value).startswith(f'open_clip_config.json: model_cfg: {part}: ')
  assert line in str(caught.value)
  assert '\n' not in str(caught.value)
