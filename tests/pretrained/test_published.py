"""Published checkpoints, as the reference libraries write them, give their outputs here and come back bitwise."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fmcv_jax.models.common.positions import sincos_2d
from tests.pretrained.references import IMAGE, PIXELS, TEXT, TOKENS, comes_back, imported, published, to_torch

torch = pytest.importorskip('torch', reason='pip install fmcv-jax[parity]')
transformers = pytest.importorskip('transformers', reason='pip install fmcv-jax[parity]')


@pytest.mark.parametrize('family', ['vit', 'deit'])
def test_vision_transformers(tmp_path, family):
  configs = {'vit': transformers.ViTConfig, 'deit': transformers.DeiTConfig}
  models = {'vit': transformers.ViTForImageClassification, 'deit': transformers.DeiTForImageClassificationWithTeacher}
  numbers = {**IMAGE, 'num_attention_heads': 4, 'layer_norm_eps': 1e-5, 'hidden_act': 'gelu_pytorch_tanh'}
  model = published(models[family](configs[family](**numbers, num_labels=7)), tmp_path / 'theirs')
  normalization = {'image_mean': [0.4, 0.5, 0.6], 'image_std': [0.2, 0.3, 0.2]}
  (tmp_path / 'theirs' / 'preprocessor_config.json').write_text(json.dumps(normalization))
  objective, params = imported(tmp_path / 'theirs', tmp_path, None)  # config files give what shapes do not
  assert [list(objective.normalize.mean), list(objective.normalize.std)] == list(normalization.values())
  with torch.no_grad():
    theirs = model(to_torch(PIXELS)).logits.numpy()
  np.testing.assert_allclose(objective.network.apply({'params': params}, PIXELS).output, theirs, atol=1e-5)
  comes_back(tmp_path / 'theirs', tmp_path, 'transformers')


def test_swin(tmp_path):
  config = transformers.SwinConfig(
    image_size=96, patch_size=4, embed_dim=24, depths=[2, 4, 2, 2], num_heads=[2, 4, 6, 8], window_size=3, num_labels=7
  )
  model = published(transformers.SwinForImageClassification(config), tmp_path / 'theirs')
  objective, params = imported(tmp_path / 'theirs', tmp_path, None)
  pixels = np.random.default_rng(0).normal(size=(2, 96, 96, 3)).astype(np.float32)
  with torch.no_grad():
    theirs = model(to_torch(pixels)).logits.numpy()
  np.testing.assert_allclose(objective.network.apply({'params': params}, pixels).output, theirs, atol=1e-5)
  comes_back(tmp_path / 'theirs', tmp_path, 'transformers')


@pytest.mark.parametrize(('family', 'activation'), [('clip', 'gelu'), ('clip', 'quick_gelu'), ('siglip', '')])
def test_dual_encoders(tmp_path, family, activation):
  if family == 'siglip':
    model = transformers.SiglipModel(transformers.SiglipConfig(vision_config=IMAGE, text_config=TEXT))
  else:
    act = {'hidden_act': activation}
    config = transformers.CLIPConfig(vision_config={**IMAGE, **act}, text_config={**TEXT, **act}, projection_dim=24)
    model = transformers.CLIPModel(config)
  published(model, tmp_path / 'theirs')
  objective, params = imported(tmp_path / 'theirs', tmp_path, None)
  with torch.no_grad():
    theirs = model(input_ids=torch.from_numpy(TOKENS).long(), pixel_values=to_torch(PIXELS))
  ours = objective.network.apply({'params': params}, PIXELS, TOKENS)
  np.testing.assert_allclose(ours.image, theirs.image_embeds, atol=1e-5)
  np.testing.assert_allclose(ours.text, theirs.text_embeds, atol=1e-5)
  comes_back(tmp_path / 'theirs', tmp_path, 'transformers')


@pytest.mark.parametrize('swiglu', [False, True])
def test_dinov2_with_registers(tmp_path, swiglu):
  config = transformers.Dinov2WithRegistersConfig(
    image_size=32,
    patch_size=8,
    hidden_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_register_tokens=3,
    use_swiglu_ffn=swiglu,
  )
  model = published(transformers.Dinov2WithRegistersModel(config), tmp_path / 'theirs')
  objective, params = imported(tmp_path / 'theirs', tmp_path, None)
  with torch.no_grad():
    theirs = model(to_torch(PIXELS)).last_hidden_state.numpy()
  ours = objective.network.apply({'params': params}, PIXELS)
  np.testing.assert_allclose(ours.pooled, theirs[:, 0], atol=1e-5)
  comes_back(tmp_path / 'theirs', tmp_path, 'transformers')


def test_masked_autoencoder_with_its_decoder(tmp_path):
  decoder = {'decoder_hidden_size': 64, 'decoder_num_hidden_layers': 2, 'decoder_num_attention_heads': 16}
  config = transformers.ViTMAEConfig(**IMAGE, **decoder, decoder_intermediate_size=256, layer_norm_eps=1e-6)
  model = transformers.ViTMAEForPreTraining(config)
  published(model, tmp_path / 'moved')
  for name, width in (('vit.embeddings.position_embeddings', 128), ('decoder.decoder_pos_embed', 64)):
    table = np.concatenate([np.zeros((1, width)), sincos_2d(4, 4, width)]).astype(np.float32)
    model.get_parameter(name).data = torch.from_numpy(table)[None]  # the original's, which nobody learns
  model.save_pretrained(tmp_path / 'theirs')
  file = tmp_path / 'theirs' / 'model.safetensors'
  # As the hub's files have it; transformers 5 spoils the name when it writes one.
  save_file({name.replace('decoder_encoder.layer', 'decoder_layers'): x for name, x in load_file(file).items()}, file)
  objective, params = imported(tmp_path / 'theirs', tmp_path, None)
  noise = np.random.default_rng(0).uniform(size=(2, 16)).astype(np.float32)
  with torch.no_grad():
    theirs = model(to_torch(PIXELS), noise=torch.from_numpy(noise)).logits.numpy()
  ours = objective.network.apply({'params': params}, PIXELS, np.argsort(noise, axis=1), visible=objective.visible)
  np.testing.assert_allclose(ours.pixels, theirs, atol=1e-4)
  comes_back(tmp_path / 'theirs', tmp_path, 'transformers')
