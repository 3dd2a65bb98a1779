"""What config.json of transformers says is computed, refused by name, or said to be assumed, as its outputs show."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fmcv_jax.apps.conversion import export_checkpoint, import_checkpoint
from fmcv_jax.errors import UserError
from fmcv_jax.run import evaluated_as
from tests.pretrained.references import IMAGE, PIXELS, TEXT, published, to_torch

torch = pytest.importorskip('torch', reason='pip install fmcv-jax[parity]')
T = pytest.importorskip('transformers', reason='pip install fmcv-jax[parity]')

WIDE = {**IMAGE, 'num_attention_heads': 4}  # of a width that a guess by 64 channels would give two heads
DINO = {key: value for key, value in WIDE.items() if key != 'intermediate_size'}
SWIN = {'image_size': 96, 'patch_size': 4, 'embed_dim': 24, 'depths': [2, 2, 2, 2], 'num_heads': [2, 4, 6, 8]}


def dual(library='CLIP', **more):
  vision, text = ({**WIDE, **more}, {**TEXT, 'num_attention_heads': 8, **more})
  config = getattr(T, f'{library}Config')
  projection = {} if library == 'Siglip' else {'projection_dim': 24}
  model = f'{library}Model'
  if library == 'Siglip':
    text['projection_size'] = 128
  return getattr(T, model)(config(vision_config=vision, text_config=text, **projection))


ENCODERS = {
  'vit-heads': lambda: T.ViTModel(T.ViTConfig(**WIDE), add_pooling_layer=False),
  'vit-gelu_new': lambda: T.ViTModel(T.ViTConfig(**WIDE, hidden_act='gelu_new'), add_pooling_layer=False),
  'vit-gelu_fast': lambda: T.ViTModel(T.ViTConfig(**WIDE, hidden_act='gelu_fast'), add_pooling_layer=False),
  'vit-swish': lambda: T.ViTModel(T.ViTConfig(**WIDE, hidden_act='swish'), add_pooling_layer=False),
  'vit-quick_gelu': lambda: T.ViTModel(T.ViTConfig(**WIDE, hidden_act='quick_gelu'), add_pooling_layer=False),
  'vit-qkv_bias': lambda: T.ViTModel(T.ViTConfig(**WIDE, qkv_bias=False), add_pooling_layer=False),
  'vit-eps': lambda: T.ViTModel(T.ViTConfig(**WIDE, layer_norm_eps=0.5), add_pooling_layer=False),
  'vit_msn': lambda: T.ViTMSNModel(T.ViTMSNConfig(**WIDE)),
  'dinov2-relu': lambda: T.Dinov2Model(T.Dinov2Config(**DINO, hidden_act='relu', mlp_ratio=2)),
  'dinov2-gated': lambda: T.Dinov2Model(T.Dinov2Config(**DINO, use_swiglu_ffn=True, hidden_act='relu')),
  'dinov2-qkv_bias': lambda: T.Dinov2Model(T.Dinov2Config(**DINO, qkv_bias=False)),
  'dinov2-registers': lambda: T.Dinov2WithRegistersModel(T.Dinov2WithRegistersConfig(**DINO, layer_norm_eps=0.1)),
}


def features(run, pixels):
  params = {'params': jax.device_get(run.restored_model()[0].params)}
  return run.experiment.objective.network.apply(params, pixels)


@pytest.mark.parametrize('name', ENCODERS)
def test_an_encoder_computes_what_its_config_says(tmp_path, name):
  model = published(ENCODERS[name](), tmp_path / 'theirs')
  run = import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'))
  side = run.experiment.objective.network.image_size
  pixels = np.random.default_rng(0).normal(size=(2, side, side, 3)).astype(np.float32)
  with torch.no_grad():
    theirs = model(to_torch(pixels)).last_hidden_state.numpy()
  ours = np.asarray(features(run, pixels).tokens)
  if 'registers' in name:  # the class token, registers, then patches in both
    assert ours.shape == theirs.shape
  np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())


PAIRS = {
  'clip-heads': lambda: dual(),
  'clip-gelu': lambda: dual(hidden_act='gelu'),
  'clip-gelu_new': lambda: dual(hidden_act='gelu_new'),
  'clip-eps': lambda: dual(layer_norm_eps=0.1),
  'clip-eos': lambda: dual(eos_token_id=7),
  'clip-eos_2': lambda: dual(eos_token_id=2),
  'metaclip2-eos_2': lambda: dual('MetaClip2', eos_token_id=2),
  'siglip-heads': lambda: dual('Siglip'),
  'siglip-gelu': lambda: dual('Siglip', hidden_act='gelu', layer_norm_eps=0.1),
}
# The end id is neither the largest nor the last, and stands twice.
WORDS = np.array([[90, 7, 5, 91, 7, 2], [90, 62, 2, 7, 3, 2]], np.int32)


@pytest.mark.parametrize('name', PAIRS)
def test_both_towers_compute_what_their_config_says(tmp_path, name):
  model = published(PAIRS[name](), tmp_path / 'theirs')
  run = import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'))
  with torch.no_grad():
    theirs = model(pixel_values=to_torch(PIXELS), input_ids=torch.from_numpy(WORDS).long())
  params = {'params': run.restored_model()[0].params}
  ours = run.experiment.objective.network.apply(params, PIXELS, WORDS)
  np.testing.assert_allclose(ours.image, theirs.image_embeds, atol=1e-5)
  np.testing.assert_allclose(ours.text, theirs.text_embeds, atol=1e-5)


VISION = {**WIDE, 'hidden_act': 'relu', 'layer_norm_eps': 0.1}
LAST = {**TEXT, 'num_attention_heads': 8, 'hidden_act': 'gelu_new', 'layer_norm_eps': 0.1}
TOWERS = {
  'clip_vision_model': lambda: T.CLIPVisionModel(T.CLIPVisionConfig(**VISION)),
  'clip_vision_model, projected': lambda: T.CLIPVisionModelWithProjection(
    T.CLIPVisionConfig(**VISION, projection_dim=24)
  ),
  'clip_text_model': lambda: T.CLIPTextModel(T.CLIPTextConfig(**{**LAST, 'eos_token_id': 7})),
  'clip_text_model, projected': lambda: T.CLIPTextModelWithProjection(T.CLIPTextConfig(**LAST, projection_dim=24)),
  'siglip_vision_model': lambda: T.SiglipVisionModel(T.SiglipVisionConfig(**VISION)),
  'siglip_text_model': lambda: T.SiglipTextModel(T.SiglipTextConfig(**{**LAST, 'hidden_act': 'relu'})),
}


@pytest.mark.parametrize('name', TOWERS)
def test_a_tower_alone_computes_what_its_config_says(tmp_path, name):
  model = published(TOWERS[name](), tmp_path / 'theirs')
  assert json.loads((tmp_path / 'theirs' / 'config.json').read_text())['model_type'] == name.partition(',')[0]
  run = import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'))
  inputs = torch.from_numpy(WORDS).long() if 'text' in name else to_torch(PIXELS)
  with torch.no_grad():
    theirs = model(inputs)
  kind = 'text' if 'text' in name else 'image'
  expected = (theirs[f'{kind}_embeds'] if 'projected' in name else theirs.pooler_output).numpy()
  ours = features(run, WORDS if kind == 'text' else PIXELS).output
  np.testing.assert_allclose(ours, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize('name', ['clip_vision_model, projected', 'clip_text_model, projected'])
def test_the_width_of_a_towers_embeddings_is_held_against_its_arrays(tmp_path, name):
  published(TOWERS[name](), tmp_path / 'theirs')
  path = tmp_path / 'theirs' / 'config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | {'projection_dim': 32}))
  with pytest.raises(UserError, match=r'config\.json: projection_dim is 32, but this would be computed with 24'):
    import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'))


@pytest.mark.parametrize('part', ['vision', 'text'])
def test_a_tower_with_the_config_of_its_pair_computes_the_same_features(tmp_path, part):
  model = published(dual(hidden_act='relu', layer_norm_eps=0.1), tmp_path / 'theirs')
  file = tmp_path / 'theirs' / 'model.safetensors'
  kept = (f'{part}_model.', 'visual_projection.' if part == 'vision' else 'text_projection.')
  save_file({key: x for key, x in load_file(file).items() if key.startswith(kept)}, file)
  run = import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'))
  with torch.no_grad():
    theirs = model(pixel_values=to_torch(PIXELS), input_ids=torch.from_numpy(WORDS).long())
  expected = theirs.image_embeds if part == 'vision' else theirs.text_embeds
  ours = np.array(features(run, PIXELS if part == 'vision' else WORDS).output)
  np.testing.assert_allclose(ours / np.linalg.norm(ours, axis=-1, keepdims=True), expected, atol=1e-5)


@pytest.mark.parametrize('name', ['clip-gelu_new', 'clip-eos', 'metaclip2-eos_2', 'vit-qkv_bias', 'vit-gelu_new'])
def test_our_own_export_is_read_back_whole(tmp_path, name):
  published({**PAIRS, **ENCODERS}[name](), tmp_path / 'theirs')
  run = import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'))
  export_checkpoint(str(tmp_path / 'ours'), str(tmp_path / 'out'), 'transformers')
  again = import_checkpoint(str(tmp_path / 'out'), str(tmp_path / 'again'))
  assert again.config['objective'] == run.config['objective']
  first, second = evaluated_as(run), evaluated_as(again)
  assert (first.size, first.side, first.mode) == (second.size, second.side, second.mode)


def test_swin_computes_what_its_config_says(tmp_path):
  model = published(SMALL['swin'](), tmp_path / 'theirs')
  run = import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'))
  pixels = np.random.default_rng(0).normal(size=(2, 96, 96, 3)).astype(np.float32)
  with torch.no_grad():
    theirs = model(to_torch(pixels)).logits.numpy()
  np.testing.assert_allclose(features(run, pixels).output, theirs, atol=2e-5 * np.abs(theirs).max())


# file, key, value, and a part of the line that refuses it
REFUSED = {
  'model_type': ('vit', 'config.json', {'model_type': 'beit'}, "model_type is 'beit'"),
  'hidden_act': ('vit', 'config.json', {'hidden_act': 'selu'}, 'hidden_act is "selu"'),
  'hidden_size': ('vit', 'config.json', {'hidden_size': 64}, 'hidden_size is 64, but this would be computed with 128'),
  'layers': ('vit', 'config.json', {'num_hidden_layers': 3}, 'num_hidden_layers is 3'),
  'sides': ('vit', 'config.json', {'image_size': [32, 48]}, 'image_size is'),
  'another side': ('vit', 'config.json', {'image_size': 64}, 'image_size is 64'),
  'window': ('swin', 'config.json', {'window_size': 4}, 'window_size is 4'),
  'swin activation': ('swin', 'config.json', {'hidden_act': 'relu'}, 'hidden_act is "relu"'),
  'swin eps': ('swin', 'config.json', {'layer_norm_eps': 0.1}, 'layer_norm_eps is 0.1'),
  'absolute': ('swin', 'config.json', {'use_absolute_embeddings': True}, 'use_absolute_embeddings is true'),
  'resize': ('vit', 'preprocessor_config.json', {'do_resize': False}, 'do_resize is false'),
  'pad': ('vit', 'preprocessor_config.json', {'do_pad': True}, 'do_pad is true'),
  'not square': ('vit', 'preprocessor_config.json', {'size': {'height': 30, 'width': 32}}, 'size is'),
  'channels': ('vit', 'preprocessor_config.json', {'do_flip_channel_order': True}, 'do_flip_channel_order is true'),
  'processor': ('vit', 'preprocessor_config.json', {'image_processor_type': 'FlavaImageProcessor'}, 'Flava'),
}
SMALL = {
  'vit': lambda: T.ViTModel(T.ViTConfig(**WIDE), add_pooling_layer=False),
  'swin': lambda: T.SwinForImageClassification(T.SwinConfig(**SWIN, window_size=3, num_labels=7)),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_would_be_computed_otherwise_is_refused_by_name(tmp_path, name):
  network, file, change, line = REFUSED[name]
  published(SMALL[network](), tmp_path / 'theirs')
  T.ViTImageProcessor().save_pretrained(tmp_path / 'theirs')
  path = tmp_path / 'theirs' / file
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with pytest.raises(UserError) as caught:
    import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'))
  assert file in str(caught.value)
  assert line in str(caught.value)
  assert '\n' not in str(caught.value)


def test_an_import_prints_what_it_read_what_it_assumed_and_what_it_does_not_know(tmp_path, capsys):
  published(SMALL['vit'](), tmp_path / 'theirs')
  path = tmp_path / 'theirs' / 'config.json'
  said = json.loads(path.read_text())
  del said['layer_norm_eps']
  path.write_text(json.dumps({**said, 'rope_theta': 100.0}))
  import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'))
  lines = capsys.readouterr().err.splitlines()
  assert any(line.startswith('read: config.json:') and 'num_attention_heads=4' in line for line in lines), lines
  assert any('config.json does not say: ' in line and 'layer_norm_eps=1e-12' in line for line in lines), lines
  assert any('not understood, and not used: config.json: rope_theta=100.0' in line for line in lines), lines
  assert any(line.startswith('assumed: no file says: ') and 'objective.normalize' in line for line in lines), lines


def test_heads_of_a_bare_file_are_said_to_be_assumed(tmp_path, capsys):
  published(SMALL['vit'](), tmp_path / 'theirs')
  (tmp_path / 'theirs' / 'model.safetensors').rename(tmp_path / 'bare.safetensors')
  import_checkpoint(str(tmp_path / 'bare.safetensors'), str(tmp_path / 'ours'), 'vit')
  said = capsys.readouterr().err
  assert 'assumed: no file says:' in said
  for field in ('num_heads=2', 'activation=', 'eps=', 'normalize', 'data.image'):
    assert field in said


def test_a_vocabulary_is_held_against_the_table_of_words(tmp_path, capsys):
  published(PAIRS['clip-heads'](), tmp_path / 'theirs')
  run = import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'))
  assert run.experiment.tokenizer is None
  assert 'no known tokenizer matches its vocabulary' in capsys.readouterr().err


def test_metaclip_2_is_given_the_tokenizer_of_its_folder(tmp_path):
  tokenizers = pytest.importorskip('tokenizers')
  published(PAIRS['metaclip2-eos_2'](), tmp_path / 'theirs')
  special = ['<s>', '<pad>', '</s>', '<unk>']
  words = [*special, 'a', 'red', 'apple']
  model = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, '<unk>'))
  model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  model.post_processor = tokenizers.processors.TemplateProcessing(
    '<s> $A </s>', special_tokens=[('<s>', 0), ('</s>', 2)]
  )
  names = {'pad_token': '<pad>', 'eos_token': '</s>', 'bos_token': '<s>', 'unk_token': '<unk>'}
  theirs = T.PreTrainedTokenizerFast(tokenizer_object=model, model_max_length=6, **names)
  theirs.save_pretrained(tmp_path / 'theirs')
  run = import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'))
  texts = ['a red apple', 'a', 'a red apple a red apple']
  expected = theirs(texts, padding='max_length', truncation=True, max_length=6, return_tensors='np')['input_ids']
  np.testing.assert_array_equal(run.experiment.tokenizer(texts), expected)


def test_a_tokenizer_with_more_words_than_the_table_is_refused(tmp_path):
  tokenizers = pytest.importorskip('tokenizers')
  published(PAIRS['clip-heads'](), tmp_path / 'theirs')
  model = tokenizers.Tokenizer(tokenizers.models.WordLevel({f'{i}': i for i in range(93)}, '0'))
  T.PreTrainedTokenizerFast(tokenizer_object=model, pad_token='0').save_pretrained(tmp_path / 'theirs')
  with pytest.raises(UserError, match='the embedding table has 92 rows, but the tokenizer tokenizer_json has 93'):
    import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'))


INTERPOLATED = {
  'vit': lambda: T.ViTModel(T.ViTConfig(**WIDE), add_pooling_layer=False),
  'dinov2': lambda: T.Dinov2Model(T.Dinov2Config(**DINO)),
  'dinov2-registers': lambda: T.Dinov2WithRegistersModel(T.Dinov2WithRegistersConfig(**DINO)),
}


@pytest.mark.parametrize(('height', 'width'), [(24, 40), (64, 16)])
@pytest.mark.parametrize('name', INTERPOLATED)
def test_positions_are_interpolated_as_the_family_does(tmp_path, name, height, width):
  model = published(INTERPOLATED[name](), tmp_path / 'theirs')
  run = import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'))
  pixels = np.random.default_rng(0).normal(size=(1, height, width, 3)).astype(np.float32)
  more = {} if 'dinov2' in name else {'interpolate_pos_encoding': True}
  with torch.no_grad():
    theirs = model(to_torch(pixels), **more).last_hidden_state.numpy()
  np.testing.assert_allclose(features(run, pixels).tokens, theirs, atol=2e-5 * np.abs(theirs).max())
