"""What is exported to a folder opens in the libraries by one line, says the same, and is given the same inputs."""

import json

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from fmcv_jax.apps.conversion import export_checkpoint, import_checkpoint
from fmcv_jax.errors import UserError
from fmcv_jax.objectives.outputs import encoder_of
from fmcv_jax.run import evaluated_as
from tests.pretrained.references import CODER, IMAGE, PIXELS, TEXT, TOKENS, initialized, published, sd_parts, to_torch

torch = pytest.importorskip('torch', reason='pip install fmcv-jax[parity]')
transformers = pytest.importorskip('transformers', reason='pip install fmcv-jax[parity]')

T = transformers
EPS = {'layer_norm_eps': 1e-6}
SWIN = {'image_size': 96, 'patch_size': 4, 'embed_dim': 24, 'depths': [2, 2, 2, 2], 'num_heads': [2, 4, 6, 8]}
DINO = {'image_size': 32, 'patch_size': 8, 'hidden_size': 128, 'num_hidden_layers': 2, 'num_attention_heads': 2}
MAE = {'decoder_hidden_size': 64, 'decoder_num_hidden_layers': 2, 'decoder_intermediate_size': 256}


def clip(activation):
  act = {'hidden_act': activation}
  return T.CLIPConfig(vision_config={**IMAGE, **act}, text_config={**TEXT, **act}, projection_dim=24)


NETWORKS = {
  'vit': lambda: T.ViTForImageClassification(T.ViTConfig(**IMAGE, **EPS, num_labels=7)),
  'deit': lambda: T.DeiTForImageClassificationWithTeacher(T.DeiTConfig(**IMAGE, **EPS, num_labels=7)),
  'dino': lambda: T.ViTModel(T.ViTConfig(**IMAGE, **EPS), add_pooling_layer=False),
  'dinov2': lambda: T.Dinov2Model(T.Dinov2Config(**DINO, use_swiglu_ffn=True)),
  'dinov2-registers': lambda: T.Dinov2WithRegistersModel(T.Dinov2WithRegistersConfig(**DINO)),
  'swin': lambda: T.SwinForImageClassification(T.SwinConfig(**SWIN, window_size=3, num_labels=7)),
  'clip': lambda: T.CLIPModel(clip('gelu')),
  'clip_openai': lambda: T.CLIPModel(clip('quick_gelu')),
  'siglip': lambda: T.SiglipModel(T.SiglipConfig(vision_config=IMAGE, text_config=TEXT)),
}


def inputs(model):
  side = getattr(model.config, 'image_size', 32)
  pixels = to_torch(np.random.default_rng(0).normal(size=(2, side, side, 3)).astype(np.float32))
  texts = {'input_ids': torch.from_numpy(TOKENS).long()} if hasattr(model.config, 'text_config') else {}
  return {'pixel_values': pixels, **texts}


@pytest.mark.parametrize('name', NETWORKS)
def test_transformers_opens_a_folder_by_from_pretrained(tmp_path, name):
  model = published(NETWORKS[name](), tmp_path / 'theirs')
  import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'), name.split('-')[0])
  export_checkpoint(str(tmp_path / 'ours'), str(tmp_path / 'out'), 'transformers')
  more = {'add_pooling_layer': False} if name == 'dino' else {}
  again, loading = type(model).from_pretrained(tmp_path / 'out', output_loading_info=True, **more)
  assert not any(loading[kind] for kind in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), loading
  assert json.loads((tmp_path / 'out' / 'config.json').read_text())['architectures'] == [type(model).__name__]
  assert set(load_file(tmp_path / 'out' / 'model.safetensors')) == set(
    load_file(tmp_path / 'theirs' / 'model.safetensors')
  )
  with torch.no_grad():
    first, second = (network.eval()(**inputs(model)) for network in (model, again))
  for one, other in zip(first.to_tuple(), second.to_tuple(), strict=True):
    if isinstance(one, torch.Tensor):
      torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_transformers_opens_a_masked_autoencoder_that_was_trained_here(tmp_path):
  initialized(
    tmp_path / 'ours',
    {
      'name': 'mae',
      'network': {
        'name': 'mae',
        'encoder': {'name': 'vit', 'variant': 'mu/8', 'image_size': 32, 'positions': 'sincos2d'},
        'width': 32,
        'depth': 2,
        'num_heads': 4,
      },
    },
  )
  export_checkpoint(str(tmp_path / 'ours'), str(tmp_path / 'out'), 'transformers')
  model, loading = T.ViTMAEForPreTraining.from_pretrained(tmp_path / 'out', output_loading_info=True)
  assert not any(loading[kind] for kind in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), loading
  assert model.config.norm_pix_loss
  assert model.config.mask_ratio == 0.75


def photo():
  return Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)).resize((700, 500))


@pytest.mark.parametrize('name', ['vit', 'clip', 'siglip'])
def test_transformers_shows_it_images_as_we_do(tmp_path, name):
  published(NETWORKS[name](), tmp_path / 'theirs')
  run = import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'), name)
  export_checkpoint(str(tmp_path / 'ours'), str(tmp_path / 'out'), 'transformers')
  processor = T.AutoImageProcessor.from_pretrained(tmp_path / 'out')
  theirs = processor(photo(), return_tensors='np')['pixel_values'][0].transpose(1, 2, 0)
  shown = evaluated_as(run)(np.asarray(photo()), np.random.default_rng(0))
  ours = run.experiment.objective.normalize(shown.astype(np.float32) / 255)
  # Pillow rounds to whole numbers after each of two passes: a few differ by one of 255 steps, or by two.
  steps = np.abs(ours - theirs) * np.asarray(run.experiment.objective.normalize.std) * 255
  assert steps.max() < 2.01
  assert steps.mean() < 0.1


TIMM = {
  'vit': ('vit_base_patch16_224', {'num_classes': 7}),
  'deit': ('deit_base_distilled_patch16_224', {'num_classes': 7}),
  'deit-3': ('deit3_base_patch16_224', {'num_classes': 7}),
  'dinov2-registers': ('vit_base_patch14_reg4_dinov2', {'num_classes': 0}),
  'dinov2-giant': ('vit_giant_patch14_dinov2', {'num_classes': 0, 'mlp_ratio': 3.0}),
  'mae-tuned': ('vit_base_patch16_224', {'num_classes': 7, 'global_pool': 'avg'}),
  'vit-pooled': (
    'vit_base_patch16_224',
    {'num_classes': 7, 'global_pool': 'avg', 'class_token': False, 'fc_norm': True},
  ),
}


@pytest.mark.parametrize('name', TIMM)
def test_timm_opens_a_folder_and_its_file(tmp_path, name):
  timm = pytest.importorskip('timm', reason='pip install fmcv-jax[parity]')
  architecture, more = TIMM[name]
  sizes = {'img_size': 32, 'patch_size': 8, 'embed_dim': 128, 'depth': 2, 'num_heads': 2, **more}
  model = timm.create_model(architecture, **sizes)
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
  state = {key: x.numpy() for key, x in model.state_dict().items()}
  save_file(state, tmp_path / 'theirs.safetensors')
  run = import_checkpoint(str(tmp_path / 'theirs.safetensors'), str(tmp_path / 'ours'), name.split('-')[0])
  params = jax.device_get(run.restored_model()[0].params)
  ours = run.experiment.objective.network.apply({'params': params}, PIXELS).output
  with torch.no_grad():
    theirs = model.eval()(to_torch(PIXELS))
  np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())
  export_checkpoint(str(tmp_path / 'ours'), str(tmp_path / 'out'), 'timm')
  again = {
    'folder': timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True),
    'file': timm.create_model(architecture, **sizes, checkpoint_path=str(tmp_path / 'out' / 'model.safetensors')),
  }
  for opened in again.values():
    with torch.no_grad():
      torch.testing.assert_close(opened.eval()(to_torch(PIXELS)), theirs, rtol=0, atol=0)
  back = load_file(tmp_path / 'out' / 'model.safetensors')
  assert set(back) == set(state)
  for key, x in state.items():
    np.testing.assert_array_equal(back[key], x, err_msg=key)


def test_timm_opens_a_swin(tmp_path):
  timm = pytest.importorskip('timm', reason='pip install fmcv-jax[parity]')
  published(NETWORKS['swin'](), tmp_path / 'theirs')
  run = import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'), None)
  params = jax.device_get(run.restored_model()[0].params)
  pixels = np.random.default_rng(0).normal(size=(2, 96, 96, 3)).astype(np.float32)
  ours = run.experiment.objective.network.apply({'params': params}, pixels).output
  export_checkpoint(str(tmp_path / 'ours'), str(tmp_path / 'out'), 'timm')
  model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
  with torch.no_grad():
    np.testing.assert_allclose(ours, model(to_torch(pixels)), atol=1e-5)


@pytest.mark.parametrize('name', ['clip', 'clip_openai'])
def test_open_clip_opens_a_folder(tmp_path, name):
  open_clip = pytest.importorskip('open_clip', reason='pip install fmcv-jax[parity]')
  model = published(NETWORKS[name](), tmp_path / 'theirs')
  import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'), name)
  export_checkpoint(str(tmp_path / 'ours'), str(tmp_path / 'out'), 'open_clip')
  again, _, preprocess = open_clip.create_model_and_transforms(f'local-dir:{tmp_path / "out"}')
  with torch.no_grad():
    theirs = model(**inputs(model))
    image = again.eval().encode_image(inputs(model)['pixel_values'], normalize=True)
    text = again.encode_text(inputs(model)['input_ids'], normalize=True)
  np.testing.assert_allclose(image, theirs.image_embeds, atol=1e-5)
  np.testing.assert_allclose(text, theirs.text_embeds, atol=1e-5)
  assert preprocess(photo()).shape == (3, 32, 32)
  # Config files of the folder are read even if the weights file is named: shapes do not determine activations.
  back = import_checkpoint(str(tmp_path / 'out' / 'open_clip_model.safetensors'), str(tmp_path / 'back'), None)
  params = {'params': back.restored_model()[0].params}
  ours = back.experiment.objective.network.apply(params, PIXELS, TOKENS)
  np.testing.assert_allclose(ours.image, image, atol=1e-5)


@pytest.mark.parametrize(('name', 'channels'), [('sd2', 4), pytest.param('sd2', 9, marks=pytest.mark.slow)])
def test_diffusers_opens_a_pipeline_and_generates(tmp_path, name, channels):
  diffusers = pytest.importorskip('diffusers', reason='pip install fmcv-jax[parity]')
  unet, _, _ = sd_parts(tmp_path / 'theirs', name, channels)
  sizes = ['objective.network.image_size=8', 'objective.latent_space.autoencoder.image_size=16']
  import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'), name, sizes)
  export_checkpoint(str(tmp_path / 'ours'), str(tmp_path / 'out'), 'diffusers')
  pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / 'out')
  assert type(pipeline).__name__ == ('StableDiffusionPipeline' if channels == 4 else 'StableDiffusionInpaintPipeline')
  for key, x in unet.state_dict().items():
    torch.testing.assert_close(pipeline.unet.state_dict()[key], x, rtol=0, atol=0)
  assert pipeline.vae.config.scaling_factor == 0.2
  assert pipeline.scheduler.config.prediction_type == 'epsilon'
  pipeline.set_progress_bar_config(disable=True)
  more = {}
  if channels == 9:
    more = {'image': photo().resize((16, 16)), 'mask_image': Image.new('L', (16, 16), 255)}
  said = pipeline('a red apple', height=16, width=16, num_inference_steps=2, output_type='np', **more)
  assert said.images.shape == (1, 16, 16, 3)


def test_diffusers_opens_single_networks(tmp_path):
  diffusers = pytest.importorskip('diffusers', reason='pip install fmcv-jax[parity]')
  model = published(diffusers.AutoencoderKL(**CODER, scaling_factor=1.0), tmp_path / 'theirs')
  import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'), 'sd_vae', ['objective.network.image_size=32'])
  export_checkpoint(str(tmp_path / 'ours'), str(tmp_path / 'out'), 'diffusers')
  again = diffusers.AutoencoderKL.from_pretrained(tmp_path / 'out')
  for key, x in model.state_dict().items():
    torch.testing.assert_close(again.state_dict()[key], x, rtol=0, atol=0)


def test_a_pipeline_wants_a_folder_and_another_library_says_what_it_has_not(tmp_path):
  network = {'name': 'vit', 'variant': 'mu/8', 'image_size': 32, 'pool': 'gap', 'num_classes': 3}
  initialized(tmp_path / 'ours', {'name': 'encoder', 'network': network})
  with pytest.raises(UserError, match='without a class token'):
    export_checkpoint(str(tmp_path / 'ours'), str(tmp_path / 'out'), 'transformers')
  assert not (tmp_path / 'out').exists()


def uneven(model):
  """Statistics and scales that are no initial values, with which images still differ at the end."""
  generator = torch.Generator().manual_seed(1)
  with torch.no_grad():
    for module in model.modules():
      if isinstance(module, torch.nn.BatchNorm2d):
        module.weight.fill_(1.0)
        module.running_mean.copy_(0.3 * torch.rand(module.running_mean.shape, generator=generator))
        module.running_var.copy_(0.1 + 0.3 * torch.rand(module.running_var.shape, generator=generator))
  return model.eval()


@pytest.mark.parametrize('library', ['timm', pytest.param('transformers', marks=pytest.mark.slow)])
def test_efficientnet_goes_in_and_out_with_its_statistics(tmp_path, library):
  timm = pytest.importorskip('timm', reason='pip install fmcv-jax[parity]')
  if library == 'timm':
    model = uneven(timm.create_model('tf_efficientnet_b0', num_classes=7))
    save_file({key: x.numpy() for key, x in model.state_dict().items()}, tmp_path / 'theirs.safetensors')
    given = tmp_path / 'theirs.safetensors'
  else:
    sizes = {'width_coefficient': 1.0, 'depth_coefficient': 1.1, 'hidden_dim': 1280, 'image_size': 64}
    model = uneven(T.EfficientNetForImageClassification(T.EfficientNetConfig(**sizes, num_labels=7)))
    given = tmp_path / 'theirs'
    model.save_pretrained(given)
  run = import_checkpoint(str(given), str(tmp_path / 'ours'), None, ['objective.network.image_size=64'])
  subject, _ = run.restored_model()
  pixels = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
  ours = jax.jit(run.experiment.objective.network.apply)({'params': subject.params, **subject.extra}, pixels).output

  def said(network):
    with torch.no_grad():
      value = network.eval()(to_torch(pixels))
    return value if library == 'timm' else value.logits

  np.testing.assert_allclose(ours, said(model), atol=2e-5 * float(said(model).abs().max()))
  export_checkpoint(str(tmp_path / 'ours'), str(tmp_path / 'out'), library)
  opened = {
    'timm': lambda: timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True),
    'transformers': lambda: T.EfficientNetForImageClassification.from_pretrained(tmp_path / 'out'),
  }[library]()
  torch.testing.assert_close(said(opened), said(model), rtol=0, atol=0)


ENCODER = {'name': 'vit', 'variant': 'mu/8', 'image_size': 32}
CLIP = {
  'name': 'dual_encoder',
  'image': {**ENCODER, 'pre_norm': True, 'patch_bias': False, 'num_classes': 24, 'head_bias': False, 'eps': 1e-5},
  'text': {
    'name': 'text_transformer',
    'vocab_size': 92,
    'length': 6,
    'width': 32,
    'depth': 2,
    'num_heads': 2,
    'mlp_dim': 64,
    'num_classes': 24,
  },
}
CLASSIFIER = {'name': 'classification', 'network': {**ENCODER, 'num_classes': 7}}
TRAINED = {
  'labels': CLASSIFIER,
  'lora': {'name': 'finetune', 'objective': CLASSIFIER, 'lora': {'rank': 2}},
  'dino': {
    'name': 'dino',
    'network': {'name': 'dino', 'encoder': ENCODER, 'prototypes': 16},
    'local_size': 16,
    'momentum_steps': 1,
  },
}


@pytest.mark.parametrize('name', TRAINED)
def test_timm_opens_what_was_trained_here(tmp_path, name):
  timm = pytest.importorskip('timm', reason='pip install fmcv-jax[parity]')
  run = initialized(tmp_path / 'ours', TRAINED[name])
  export_checkpoint(str(tmp_path / 'ours'), str(tmp_path / 'out'), 'timm')
  model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
  subject, _ = run.restored_model()
  tower = encoder_of(subject.outputs)(subject.params, subject.extra)
  ours = tower.network.apply({'params': tower.params}, PIXELS).output
  with torch.no_grad():
    np.testing.assert_allclose(ours, model(to_torch(PIXELS)), atol=1e-5)


def test_a_clip_that_was_trained_here_opens_in_both_libraries(tmp_path):
  open_clip = pytest.importorskip('open_clip', reason='pip install fmcv-jax[parity]')
  run = initialized(tmp_path / 'ours', {'name': 'contrastive', 'network': CLIP})
  ours = run.experiment.objective.network.apply({'params': run.restored_model()[0].params}, PIXELS, TOKENS)
  for library in ('open_clip', 'transformers'):
    export_checkpoint(str(tmp_path / 'ours'), str(tmp_path / library), library)
  one = open_clip.create_model(f'local-dir:{tmp_path / "open_clip"}').eval()
  other = T.CLIPModel.from_pretrained(tmp_path / 'transformers').eval()
  pixels, tokens = to_torch(PIXELS), torch.from_numpy(TOKENS).long()
  with torch.no_grad():
    said = other(pixel_values=pixels, input_ids=tokens)
    image, text = one.encode_image(pixels, normalize=True), one.encode_text(tokens, normalize=True)
  for theirs in ((image, text), (said.image_embeds, said.text_embeds)):
    np.testing.assert_allclose(ours.image, theirs[0], atol=1e-5)
    np.testing.assert_allclose(ours.text, theirs[1], atol=1e-5)
