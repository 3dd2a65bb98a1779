"""Checkpoint detection from tensor names: single towers, teachers, single files and alternative names."""

import jax
import numpy as np
import pytest

from fmcv_jax.apps import conversion
from fmcv_jax.apps.conversion import export_checkpoint, import_checkpoint
from fmcv_jax.errors import UserError
from fmcv_jax.pretrained.families import FAMILIES
from fmcv_jax.pretrained.recognition import recognize
from fmcv_jax.pretrained.tensors import open_tensors
from tests.pretrained.references import CODER, IMAGE, PIXELS, TEXT, TOKENS, imported, published, to_torch
from tests.pretrained.test_completeness import APART, names_of, pipeline
from tests.pretrained.test_real_sizes import SD1, Names

torch = pytest.importorskip('torch', reason='pip install fmcv-jax[parity]')
timm = pytest.importorskip('timm', reason='pip install fmcv-jax[parity]')
diffusers = pytest.importorskip('diffusers', reason='pip install fmcv-jax[parity]')
transformers = pytest.importorskip('transformers', reason='pip install fmcv-jax[parity]')
open_clip = pytest.importorskip('open_clip', reason='pip install fmcv-jax[parity]')
from safetensors.torch import load_file, save_file  # noqa: E402

T = transformers
ACT = {'hidden_act': 'gelu'}
SMALL = {'img_size': 32, 'patch_size': 8, 'embed_dim': 128, 'depth': 2, 'num_heads': 2}


def uneven(model):
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for x in model.parameters():
      x += 0.1 * torch.randn(x.shape, generator=generator)
  return model.eval()


def near(ours, theirs):
  theirs = theirs.detach().numpy()
  np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())


IMAGE_TOWERS = {
  'clip_image': lambda: T.CLIPVisionModel(T.CLIPVisionConfig(**IMAGE, **ACT)),
  'clip_image-projected': lambda: T.CLIPVisionModelWithProjection(
    T.CLIPVisionConfig(**IMAGE, **ACT, projection_dim=24)
  ),
  'siglip_image': lambda: T.SiglipVisionModel(T.SiglipVisionConfig(**IMAGE)),
}


@pytest.mark.parametrize('name', IMAGE_TOWERS)
def test_an_image_tower_alone_gives_the_librarys_features(tmp_path, name):
  model = published(IMAGE_TOWERS[name](), tmp_path / 'theirs')
  objective, params = imported(tmp_path / 'theirs' / 'model.safetensors', tmp_path, None)
  with torch.no_grad():
    theirs = model(to_torch(PIXELS))
  expected = theirs.image_embeds if 'projected' in name else theirs.pooler_output
  near(objective.network.apply({'params': params}, PIXELS).output, expected)


TEXT_TOWERS = {
  'clip_text': lambda: T.CLIPTextModel(T.CLIPTextConfig(**TEXT, **ACT)),
  'clip_text-projected': lambda: T.CLIPTextModelWithProjection(T.CLIPTextConfig(**TEXT, **ACT, projection_dim=24)),
  'siglip_text': lambda: T.SiglipTextModel(T.SiglipTextConfig(**TEXT)),
}


@pytest.mark.parametrize('name', TEXT_TOWERS)
def test_a_text_tower_alone_gives_the_librarys_features(tmp_path, name):
  model = published(TEXT_TOWERS[name](), tmp_path / 'theirs')
  objective, params = imported(tmp_path / 'theirs' / 'model.safetensors', tmp_path, None)
  with torch.no_grad():
    theirs = model(torch.from_numpy(TOKENS).long())
  expected = theirs.text_embeds if 'projected' in name else theirs.pooler_output
  near(objective.network.apply({'params': params}, TOKENS).output, expected)
  offered = objective.outputs()['embed_text'].call(params, {}, {'tokens': TOKENS})
  near(offered, torch.nn.functional.normalize(expected, dim=-1))
  export_checkpoint(str(tmp_path / 'ours'), str(tmp_path / 'back.safetensors'), 'transformers')
  with pytest.raises(UserError, match='is a single encoder'):
    export_checkpoint(str(tmp_path / 'ours'), str(tmp_path / 'folder'), 'transformers')
  back, first = load_file(tmp_path / 'back.safetensors'), load_file(tmp_path / 'theirs' / 'model.safetensors')
  assert {name.removeprefix('text_model.') for name in back} >= {name.removeprefix('text_model.') for name in first}


OPEN_CLIP = {
  'embed_dim': 24,
  'vision_cfg': {'image_size': 32, 'layers': 2, 'width': 128, 'patch_size': 8, 'head_width': 64},
  'text_cfg': {'context_length': 6, 'vocab_size': 92, 'width': 128, 'heads': 2, 'layers': 2},
}


@pytest.mark.parametrize('prefix', ['', 'visual.'])
def test_the_image_tower_of_an_open_clip_alone_gives_its_features(tmp_path, prefix):
  model = uneven(open_clip.model.CLIP(**OPEN_CLIP))
  state = {prefix + name: x.contiguous() for name, x in model.visual.state_dict().items()}
  save_file(state, tmp_path / 'x.safetensors')
  objective, params = imported(tmp_path / 'x.safetensors', tmp_path, None)
  near(objective.network.apply({'params': params}, PIXELS).output, model.encode_image(to_torch(PIXELS)))


def test_timms_siglip_gives_its_features(tmp_path):
  model = uneven(timm.create_model('vit_base_patch16_siglip_224', **SMALL, act_layer='gelu_tanh'))
  save_file(model.state_dict(), tmp_path / 'x.safetensors')
  objective, params = imported(tmp_path / 'x.safetensors', tmp_path, None)
  near(objective.network.apply({'params': params}, PIXELS).output, model(to_torch(PIXELS)))


def test_a_pair_wants_both_towers_and_says_what_is_missing():
  with torch.device('meta'):
    whole = Names(T.CLIPModel(T.CLIPConfig(vision_config=IMAGE, text_config=TEXT, projection_dim=24))).shapes
  half = {name: shape for name, shape in whole.items() if not name.startswith('text_')}
  for family in ('clip', None):
    with pytest.raises(UserError, match=r'^x: text_model\..* is missing, and all else of text$'):
      recognize(Names(half), family, 'x')


def teacher(tmp_path):
  model = uneven(timm.create_model('vit_base_patch16_224', **SMALL, num_classes=0))
  head = {'head.mlp.0.weight': torch.ones(8, 128), 'head.last_layer.weight_g': torch.ones(9, 1)}
  other = {name: x + 1 for name, x in model.state_dict().items()}
  return model, head, other


def in_chunks(state):
  """As DINOv2 trains with `block_chunks=2`, one block in each."""
  return {name.replace('blocks.1.', 'blocks.1.1.').replace('blocks.0.', 'blocks.0.0.'): x for name, x in state.items()}


def below(prefix, state):
  return {prefix + name: x for name, x in state.items()}


TRAINED = {
  'DINO': lambda s, h, o: {
    'student': below('module.', {**below('backbone.', o), **h}),
    'teacher': {**below('backbone.', s), **h},
    'epoch': 3,
  },
  'DINO, teacher alone': lambda s, h, o: {'teacher': {**below('backbone.', s), **h}},
  'DINOv2': lambda s, h, o: {
    'model': {
      **below('student.backbone.', in_chunks(o)),
      **below('student.dino_', h),
      **below('teacher.backbone.', in_chunks(s)),
      **below('teacher.dino_', h),
      'dino_loss.center': torch.ones(1, 9),
    }
  },
  'DINOv2, teacher alone': lambda s, h, o: {
    'teacher': {**below('backbone.', in_chunks(s)), **below('dino_', h), **below('ibot_', h)}
  },
}


@pytest.mark.parametrize('name', TRAINED)
def test_of_self_distillation_the_teachers_backbone_is_taken_and_said(tmp_path, name, capsys):
  model, head, other = teacher(tmp_path)
  torch.save(TRAINED[name](model.state_dict(), head, other), tmp_path / 'x.pth')
  objective, params = imported(tmp_path / 'x.pth', tmp_path, None)
  near(objective.network.apply({'params': params}, PIXELS).pooled, model(to_torch(PIXELS)))
  said = capsys.readouterr().err
  assert 'the backbone was taken; left out: ' in said
  assert ('student' in said) == ('alone' not in name)


def test_registers_with_positions_give_timms_features(tmp_path):
  model = uneven(timm.create_model('vit_base_patch16_224', **SMALL, reg_tokens=3, num_classes=5))
  assert model.pos_embed.shape[1] == 1 + 3 + 16
  save_file(model.state_dict(), tmp_path / 'x.safetensors')
  objective, params = imported(tmp_path / 'x.safetensors', tmp_path, None)
  near(objective.network.apply({'params': params}, PIXELS).output, model(to_torch(PIXELS)))


def test_positions_that_are_no_square_are_one_line_with_the_file():
  model = timm.create_model('vit_base_patch16_224', **SMALL)
  shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()} | {'pos_embed': (1, 20, 128)}
  with pytest.raises(UserError, match=r'^x\.pth: 20 positions are no square of patches$'):
    recognize(Names(shapes), None, 'x.pth')


def google(objective, form, number=0):
  """Names and shapes of a network as Google's releases have it."""
  run = conversion.Run(conversion.resolve({'objective': objective}))
  family = {'contrastive': 'siglip', 'encoder': 'vit'}[objective['name']]
  return names_of(run, [layout for name, layout in FAMILIES[family].layouts if name == form][number])


def test_pre_logits_are_left_out_with_the_head_and_said():
  vit = {'name': 'vit', 'variant': 'B/16', 'num_classes': 21_843}
  shapes = google({'name': 'encoder', 'network': vit}, 'augreg')
  more = {'pre_logits/kernel': (768, 768), 'pre_logits/bias': (768,)}
  match = conversion.matched(Names(shapes | more), 'ViT-B_16.npz')
  assert (match.name, match.run.experiment.objective.network.num_classes) == ('vit', 0)
  assert match.notes == ['pre_logits, and the head on top of it, were left out: features are read']
  assert not {'head/kernel', 'head/bias'} & set(match.tensors.shapes)


def test_all_names_of_siglip_2_g_opt_are_known():
  shapes = {
    'params/img/Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel': (40, 1536, 16, 96),
    'params/img/Transformer/encoderblock/MultiHeadDotProductAttention_0/out/kernel': (40, 16, 96, 1536),
    'params/txt/Encoder_0/encoderblock/MultiHeadDotProductAttention_0/query/kernel': (27, 1152, 16, 72),
  }
  with pytest.raises(UserError, match='is missing'):  # every name and shape is known
    recognize(Names(shapes), 'siglip', 'x')


@pytest.mark.parametrize('family', ['sd1', 'sd2'])
def test_a_whole_stable_diffusion_in_one_file_is_known_without_its_name(family):
  with torch.device('meta'):
    parts = Names(pipeline(family))
  run = conversion.matched(parts, 'x', family=family).run
  layout = next(layout for form, layout in FAMILIES[family].layouts if form == 'compvis')
  shapes = names_of(run, layout)
  expected = recognize(parts, family, 'x').shapes
  trained = {'betas': (1000,), 'model_ema.decay': (), 'first_stage_model.loss.logvar': ()}
  found = [recognize(Names(shapes), None, 'x'), recognize(Names(shapes | trained), None, 'x')]
  if family == 'sd1':
    without = {name.replace('transformer.text_model.', 'transformer.'): shape for name, shape in shapes.items()}
    assert without.keys() != shapes.keys()
    found.append(recognize(Names(without), None, 'x'))
  assert [one.name for one in found] == [family] * len(found)
  assert all(one.shapes == expected for one in found)


@pytest.mark.parametrize('form', ['compvis', 'diffusers'])
@pytest.mark.parametrize('prefix', ['', 'first_stage_model.'])
def test_an_autoencoder_alone_is_read_with_its_prefix_and_with_attention_in_other_dimensions(tmp_path, form, prefix):
  model = published(diffusers.AutoencoderKL(**CODER), tmp_path / 'theirs')
  import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'one'), 'sd_vae', ['objective.network.image_size=32'])
  export_checkpoint(str(tmp_path / 'one'), str(tmp_path / 'x.safetensors'), form)
  state, changed = load_file(tmp_path / 'x.safetensors'), 0
  for name, x in state.items():
    if '.attn_1.' in name and x.ndim == 4:
      state[name], changed = x[:, :, 0, 0].contiguous(), changed + 1
    elif '.attentions.' in name and x.ndim == 2:
      state[name], changed = x[..., None, None].contiguous(), changed + 1
  assert changed == 8
  save_file(below(prefix, state), tmp_path / 'y.safetensors')
  run = import_checkpoint(str(tmp_path / 'y.safetensors'), str(tmp_path / 'two'), None)
  assert run.experiment.objective.network.image_size
  pixels = np.random.default_rng(0).normal(size=(1, 32, 32, 3)).astype(np.float32)
  params = {'params': jax.device_get(run.restored_model()[0].params['autoencoder'])}
  ours = run.experiment.objective.network.apply(params, pixels, method='encode')
  with torch.no_grad():
    near(np.asarray(ours.mean).transpose(0, 3, 1, 2), model.encode(to_torch(pixels)).latent_dist.mean)


def test_a_unet_of_wider_words_is_known_and_says_what_else_it_needs():
  with torch.device('meta'):
    shapes = Names(diffusers.UNet2DConditionModel(**{**SD1, 'cross_attention_dim': 1280})).shapes
  with pytest.raises(UserError, match='also needs autoencoder, text, which the file does not contain'):
    conversion.matched(Names(shapes), 'x')
  match = conversion.matched(Names(shapes), 'x', overrides=APART[1:3])
  assert match.run.experiment.objective.text_condition.encoder.width == 1280


def test_clips_tokenizer_goes_with_clips_vocabulary_alone():
  for words in (92, 49_408, 901_629):
    with torch.device('meta'):
      text = {**TEXT, 'vocab_size': words}
      tensors = Names(T.CLIPModel(T.CLIPConfig(vision_config=IMAGE, text_config=text, projection_dim=24)))
    match = conversion.matched(tensors, 'x')
    assert (match.run.experiment.tokenizer is not None) == (words == 49_408)
    assert ['no known tokenizer matches' in note for note in match.notes] == [True] * (words != 49_408)
  with pytest.raises(UserError, match='the embedding table has 92 rows, but the tokenizer clip_bpe has 49408'):
    conversion.matched(Names(whole_clip(92)), 'x', overrides=['tokenizer.name=clip_bpe', 'tokenizer.length=6'])


def whole_clip(words):
  with torch.device('meta'):
    config = T.CLIPConfig(vision_config=IMAGE, text_config={**TEXT, 'vocab_size': words}, projection_dim=24)
    return Names(T.CLIPModel(config)).shapes


def test_a_surplus_array_is_named_with_its_shape():
  shapes = whole_clip(92) | {'text_model.extra.weight': (3, 4)}
  for family in ('clip', None):
    with pytest.raises(UserError, match=r'^x: no layout of .* contains text_model.extra.weight of the shape \(3, 4\)$'):
      recognize(Names(shapes), family, 'x')


def test_open_tensors_of_a_towers_folder_reads_its_config(tmp_path):
  published(IMAGE_TOWERS['siglip_image'](), tmp_path / 'theirs')
  assert recognize(open_tensors(tmp_path / 'theirs'), None, 'x').name == 'siglip_image'
