"""Outputs, losses and gradients equal the reference implementations' in torch, on random weights in float32."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmcv_jax.models.backbones.swin import swin
from fmcv_jax.models.backbones.text import text_transformer
from fmcv_jax.models.backbones.vit import vit
from fmcv_jax.models.common.positions import resize_grid
from fmcv_jax.models.multimodal.dual_encoder import clip, dual_encoder, siglip
from fmcv_jax.objectives.contrastive import Contrastive
from fmcv_jax.parallel.rules import path_of

torch = pytest.importorskip('torch', reason='pip install fmcv-jax[parity]')
transformers = pytest.importorskip('transformers', reason='pip install fmcv-jax[parity]')

PAIR = ('plain', 'shifted')

# transformers' names in ours, one substitution after the other.
SPELLING = (
  (r'\.', '/'),
  ('^swin/embeddings/norm', 'patch_norm'),
  (r'^swin/encoder/layers/(\d)/blocks/(\d)', lambda m: f'stage{int(m[1]) + 1}/blocks/0/{PAIR[int(m[2]) % 2]}'),
  (r'^swin/encoder/layers/(\d)/downsample', lambda m: f'stage{int(m[1]) + 2}/merge'),
  ('relative_position_bias/relative_position_bias_table', 'relative'),
  ('reduction', 'reduce'),
  (r'^(vit|deit|swin)/|\b(embeddings|encoder)/', ''),
  ('vision_model', 'image'),
  ('text_model', 'text'),
  ('visual_projection', 'image/head'),
  ('text_projection', 'text/head'),
  ('(cls_)?classifier', 'head'),
  (r'layers?/(\d)', r'blocks/\1'),
  (r'patch_embedding(s/projection)?', 'patch'),
  ('cls_token|class_embedding', 'class_token'),
  (r'position_embeddings?(/weight)?', 'position'),
  ('register_tokens', 'registers'),
  ('token_embedding/weight', 'tokens/embedding'),
  ('self_attn', 'attention'),
  ('q_proj', 'query'),
  ('k_proj', 'key'),
  ('v_proj', 'value'),
  ('(out|o)_proj', 'out'),
  ('fc1', 'up'),
  ('fc2', 'down'),
  ('(gate|up|down)_proj', r'\1'),
  (r'image/head/(probe|attention|layernorm|mlp)', r'image/map_pool/\1'),
  ('layernorm_before|layer_norm1', 'norm1'),
  ('layernorm_after|layer_norm2', 'norm2'),
  ('pre_layrnorm', 'pre_norm'),
  ('(post_|final_)?layer_?norm', 'norm'),
  (r'layer_scale(\d)/lambda1', r'scale\1'),
  ('logit_scale', 'temperature'),
  ('logit_bias', 'bias'),
  (r'(norm\d?)/weight', r'\1/scale'),
  ('weight$', 'kernel'),
)


def to_ours(tensors, shapes):
  """A dict of torch parameters (or of their gradients) as our tree of these shapes; none is missing or left over."""
  split, found = {}, {}
  for name, tensor in tensors.items():
    x = tensor.detach().numpy()
    if 'in_proj_' in name:  # nn.MultiheadAttention keeps query, key and value in one
      split |= {name.replace('in_proj_', f'{letter}_proj.'): part for letter, part in zip('qkv', np.split(x, 3))}
    else:
      split[name] = x
  for name, x in split.items():
    for pattern, replacement in SPELLING:
      name = re.sub(pattern, replacement, name)
    if name.endswith('kernel'):
      x = x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T
    found.setdefault(re.sub(r'blocks/\d+', 'blocks', name), []).append(x)

  paths = jax.tree_util.tree_map_with_path(lambda path, _: path_of(path), shapes)
  assert set(jax.tree.leaves(paths)) == set(found)
  return jax.tree.map(lambda path, shape: np.stack(found[path]).reshape(shape.shape), paths, shapes)


def randomized(model, seed=0):
  """Every parameter away from its initial value, so that no zero bias or unit scale hides a fault."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
  return model.eval()


def assert_same_gradients(ours, reference, shapes, unused=(), near=1e-5):
  """Every parameter's gradient, to 1e-5 (or `near`) of its own largest entry and 1e-6 of the largest of all."""
  theirs = to_ours({k: p.grad for k, p in reference.named_parameters() if k not in unused}, shapes)
  largest = max(np.abs(g).max() for g in jax.tree.leaves(theirs))
  for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(ours)[0], jax.tree.leaves(theirs)):
    atol = near * np.abs(b).max() + 1e-6 * largest
    np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=path_of(path))


def parameters_of(reference, network, *inputs, unused=()):
  shapes = jax.eval_shape(network.init, jax.random.key(0), *inputs)['params']
  return to_ours({k: p for k, p in reference.named_parameters() if k not in unused}, shapes), shapes


# eps is large, so that a norm with another one would show.
TOWER = {'hidden_size': 48, 'num_hidden_layers': 2, 'num_attention_heads': 4, 'layer_norm_eps': 0.01}
OURS = {'width': 48, 'depth': 2, 'num_heads': 4, 'mlp_dim': 96, 'eps': 0.01}
IMAGES = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)
TOKENS = np.array([[90, 5, 7, 91, 0, 0], [90, 91, 0, 0, 0, 0], [90, 3, 3, 8, 44, 91], [90, 62, 9, 11, 91, 0]], np.int32)


def to_torch(x):
  return torch.from_numpy(x.transpose(0, 3, 1, 2).copy() if x.ndim == 4 else x).to(torch.long if x.ndim == 2 else None)


def check_tower(reference, network, output, unused=(), images=IMAGES):
  """`output` reads the reference's features or logits; both are weighed at random to get gradients."""
  params, shapes = parameters_of(reference, network, images, unused=unused)
  theirs = output(reference(to_torch(images)))
  weights = np.random.default_rng(1).normal(size=theirs.shape).astype(np.float32)
  (theirs * torch.from_numpy(weights)).sum().backward()

  def weighed(params):
    features = network.apply({'params': params}, images)
    ours = features.output if network.num_classes else features.tokens
    return (ours * weights).sum(), ours

  gradients, ours = jax.jit(jax.grad(weighed, has_aux=True))(params)
  np.testing.assert_allclose(ours, theirs.detach(), rtol=0, atol=1e-5)
  assert_same_gradients(gradients, reference, shapes, unused)


def test_vit_classifier():
  config = transformers.ViTConfig(**TOWER, intermediate_size=96, image_size=32, patch_size=8, num_labels=7)
  network = vit('mu/8', image_size=32, num_classes=7, **OURS)
  check_tower(randomized(transformers.ViTForImageClassification(config)), network, lambda y: y.logits)


def test_deit_with_a_distillation_token():
  config = transformers.DeiTConfig(**TOWER, intermediate_size=96, image_size=32, patch_size=8, num_labels=7)
  network = vit('mu/8', image_size=32, num_classes=7, distilled=True, **OURS)
  check_tower(randomized(transformers.DeiTForImageClassificationWithTeacher(config)), network, lambda y: y.logits)


@pytest.mark.parametrize('gated_mlp', [False, True])
def test_dinov2_with_registers(gated_mlp):
  config = transformers.Dinov2WithRegistersConfig(
    **TOWER, mlp_ratio=2, image_size=32, patch_size=8, num_register_tokens=4, use_swiglu_ffn=gated_mlp
  )
  mlp = {'gated_mlp': True, 'activation': 'silu', 'mlp_dim': 64} if gated_mlp else {}
  network = vit('mu/8', image_size=32, registers=4, layer_scale=1.0, **{**OURS, **mlp})
  reference = randomized(transformers.Dinov2WithRegistersModel(config))
  check_tower(reference, network, lambda y: y.last_hidden_state, unused={'embeddings.mask_token'})


def swin_and_its_reference():
  config = transformers.SwinConfig(
    image_size=32, patch_size=4, embed_dim=24, depths=[2, 4], num_heads=[2, 4], window_size=3, num_labels=7
  )
  network = swin('mu', image_size=32, window=3, width=24, depths=(2, 4), num_heads=(2, 4), num_classes=7)
  images = IMAGES[:, :28]  # 7 x 8, then 4 x 4 tokens
  return network, randomized(transformers.SwinForImageClassification(config)), images


def test_swin_whose_windows_and_merges_do_not_fit_the_image():
  network, reference, images = swin_and_its_reference()
  check_tower(reference, network, lambda y: y.logits, images=images)


def test_the_pyramid_of_a_swin_is_what_its_stages_give_before_they_are_merged():
  network, reference, images = swin_and_its_reference()
  params, _ = parameters_of(reference, network, images)
  asked = {'output_hidden_states': True, 'output_hidden_states_before_downsampling': True}
  _, *theirs = reference.swin(to_torch(images), **asked).reshaped_hidden_states
  ours = jax.jit(lambda params: network.apply({'params': params}, images, method='pyramid'))(params)
  assert [level.grid for level in ours] == [(7, 8), (4, 4)]
  for level, reshaped in zip(ours, theirs, strict=True):
    expected = reshaped.detach().permute(0, 2, 3, 1)
    np.testing.assert_allclose(level.map(), expected, rtol=0, atol=1e-5 * expected.abs().max())


def check_pair(reference, network, loss_name):
  params, shapes = parameters_of(reference, network, IMAGES, TOKENS)
  theirs = reference(input_ids=to_torch(TOKENS), pixel_values=to_torch(IMAGES), return_loss=True)
  theirs.loss.backward()
  objective = Contrastive(network, loss_name)

  def loss(params):
    pairs = network.apply({'params': params}, IMAGES, TOKENS)
    return objective.couple(params, (pairs.image, pairs.text), {}, {})[0], pairs

  (ours, pairs), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  np.testing.assert_allclose(pairs.image, theirs.image_embeds.detach(), rtol=0, atol=1e-5)
  np.testing.assert_allclose(pairs.text, theirs.text_embeds.detach(), rtol=0, atol=1e-5)
  np.testing.assert_allclose(ours, theirs.loss.detach(), rtol=1e-5)
  assert_same_gradients(gradients, reference, shapes)


VISION = {**TOWER, 'intermediate_size': 96, 'image_size': 32, 'patch_size': 8}
SPECIAL = {'bos_token_id': 90, 'eos_token_id': 91, 'pad_token_id': 0}
TEXT = {**TOWER, 'intermediate_size': 96, 'vocab_size': 92, 'max_position_embeddings': 6, **SPECIAL}


@pytest.mark.parametrize('activation', ['quick_gelu', 'gelu'])
def test_clip(activation):
  config = transformers.CLIPConfig(
    vision_config={**VISION, 'hidden_act': activation},
    text_config={**TEXT, 'hidden_act': activation},
    projection_dim=24,
  )
  shared = {**OURS, 'num_classes': 24, 'head_bias': False, 'activation': activation}
  network = dual_encoder(
    vit('mu/8', image_size=32, pre_norm=True, patch_bias=False, **shared), text_transformer(92, 6, **shared)
  )
  check_pair(randomized(transformers.CLIPModel(config)), network, 'softmax')


def test_siglip():
  config = transformers.SiglipConfig(vision_config=VISION, text_config=TEXT)
  shared = {**OURS, 'activation': 'gelu_tanh'}
  network = dual_encoder(
    vit('mu/8', image_size=32, pool='map', **shared),
    text_transformer(92, 6, causal=False, pool='last', num_classes=48, head_bias=True, **shared),
    initial_bias=0.0,
  )
  check_pair(randomized(transformers.SiglipModel(config)), network, 'sigmoid')


def test_the_named_networks_have_the_published_settings():
  spelling = {'gelu_pytorch_tanh': 'gelu_tanh'}
  for network, config in (
    (clip('B/32', activation='quick_gelu'), transformers.CLIPConfig()),
    (siglip('B/16'), transformers.SiglipConfig()),
  ):
    for tower, theirs in ((network.image, config.vision_config), (network.text, config.text_config)):
      block = tower.stack.block
      assert (block.eps, block.activation) == (
        theirs.layer_norm_eps,
        spelling.get(theirs.hidden_act, theirs.hidden_act),
      )
      assert (tower.width, tower.stack.depth) == (theirs.hidden_size, theirs.num_hidden_layers)
      assert (block.num_heads, block.mlp_dim) == (theirs.num_attention_heads, theirs.intermediate_size)
    assert network.text.length == config.text_config.max_position_embeddings
  assert vit('B/14').stack.block.eps == transformers.Dinov2Config().layer_norm_eps


@pytest.mark.parametrize('new', [(4, 4), (9, 12), (14, 5)])
def test_a_learned_table_is_resized_as_timm_does_it(new):
  table = np.random.default_rng(0).normal(size=(49, 8)).astype(np.float32)
  grid = torch.from_numpy(table).reshape(1, 7, 7, 8).permute(0, 3, 1, 2)
  theirs = torch.nn.functional.interpolate(grid, size=new, mode='bicubic', antialias=True, align_corners=False)
  ours = resize_grid(jnp.asarray(table), (7, 7), new)
  np.testing.assert_allclose(ours, theirs[0].flatten(1).T, rtol=0, atol=1e-5)
