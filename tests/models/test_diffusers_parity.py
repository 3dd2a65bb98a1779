"""Denoisers and autoencoders in float32 equal diffusers' on the same random weights: outputs and every gradient."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmcv_jax.diffusion.condition import make_condition
from fmcv_jax.models.generative.autoencoder import Autoencoder
from fmcv_jax.models.generative.conditioning import timestep_embedding
from fmcv_jax.models.generative.controlnet import controlnet
from fmcv_jax.models.generative.dit import dit
from fmcv_jax.models.generative.mmdit import mmdit
from fmcv_jax.models.generative.unet import unet
from fmcv_jax.parallel.rules import path_of

torch = pytest.importorskip('torch', reason='pip install fmcv-jax[parity]')
diffusers = pytest.importorskip('diffusers', reason='pip install diffusers')

# diffusers' names in ours, one substitution after the other.
SPELLING = (
  (r'\.', '/'),
  (r'pos_embed/proj', 'patch'),
  (r'transformer_blocks/(\d+)/norm1/(emb/)?linear/', r'blocks/\1/modulation/'),
  (r'transformer_blocks/(\d+)', r'blocks/\1'),
  (r'attn1', 'attention'),
  (r'to_q', 'query'),
  (r'to_k', 'key'),
  (r'to_v', 'value'),
  (r'to_out/0', 'out'),
  (r'ff/net/0/proj', 'mlp/up'),
  (r'ff/net/2', 'mlp/down'),
  (r'proj_out_1', 'modulation'),
  (r'proj_out_2', 'head'),
  (r'timestep_embedder', 'time_embedding'),
  (r'linear_(\d)', r'hidden\1'),
  (r'class_embedder/embedding_table/weight', 'classes/embedding'),
  (r'conv_shortcut', 'shortcut'),
  (r'mid_block/resnets/', 'middle/block'),
  (r'mid_block/attentions/', 'middle/attention'),
  (r'(down|up)_blocks/(\d)/resnets/', r'\1\2_block'),
  (r'(down|up)_blocks/(\d)/attentions/', r'\1\2_attention'),
  (r'(down|up)_blocks/(\d)/(down|up)samplers/0', r'\1\2_\3'),
  (r'attention(\d+)/(query|key|value|out)', r'attention\1/attention/\2'),
  (r'attention(\d+)/group_norm', r'attention\1/norm'),
  (r'post_quant_conv', 'unquantize'),
  (r'quant_conv', 'quantize'),
  (r'conv_norm_out', 'norm'),
  (r'(norm\d?)/weight', r'\1/scale'),
  (r'weight$', 'kernel'),
)


def adopted(tensors, shapes, spelling=()):
  """A dict of torch parameters (or of their gradients) as our tree of these shapes; none is missing or left over."""
  paths = jax.tree_util.tree_map_with_path(lambda path, _: path_of(path), shapes)
  known = set(jax.tree.leaves(paths))
  found = {}
  for name, tensor in tensors.items():
    x = tensor.detach().numpy()
    for pattern, replacement in (*SPELLING, *spelling):
      name = re.sub(pattern, replacement, name)
    if name.endswith('kernel'):
      x = x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T
    name = re.sub(r'blocks/\d+', 'blocks', name)
    gate = name.replace('mlp/up', 'mlp/gate')
    if gate != name and gate in known:  # theirs is one projection
      x, other = np.split(x, 2, axis=-1)
      found.setdefault(gate, []).append(other)
    found.setdefault(name, []).append(x)
  assert known == set(found)
  return jax.tree.map(lambda path, shape: np.stack(found[path]).reshape(shape.shape), paths, shapes)


def randomized(model):
  """Every parameter away from its initial value, in float64: in float32 torch rounds as much as the tolerance."""
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
  return model.eval().double()


def nchw(x):
  return torch.from_numpy(np.moveaxis(x, -1, 1).astype(np.float64))


def compare(reference, theirs, apply, shapes, spelling=(), shared=()):
  """theirs: the reference's output [B, C, H, W]; apply(params): ours. Weighed at random to get the gradients."""
  own = dict(reference.named_parameters())
  params = adopted({k: v for k, v in own.items() if k not in shared}, shapes, spelling)
  expected = np.moveaxis(theirs.detach().numpy(), 1, -1)
  weights = np.random.default_rng(1).normal(size=expected.shape).astype(np.float32)
  (theirs * nchw(weights)).sum().backward()

  def loss(params):
    output = apply(params)
    return jnp.sum(output * weights), output

  gradients, output = jax.jit(jax.grad(loss, has_aux=True))(params)
  np.testing.assert_allclose(output, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
  wanted = adopted({k: v.grad for k, v in own.items() if k not in shared}, shapes, spelling)
  largest = max(np.abs(g).max() for g in jax.tree.leaves(wanted))
  for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(gradients)[0], jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max() + 2e-6 * largest, err_msg=path_of(path))


def test_dit():
  reference = randomized(
    diffusers.DiTTransformer2DModel(
      num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
      patch_size=2, norm_eps=1e-6, num_embeds_ada_norm=10,
    )
  )  # fmt: skip
  shared = []
  first = reference.transformer_blocks[0].norm1.emb
  for index, block in enumerate(reference.transformer_blocks):
    # diffusers embeds time and class in every block, and ends its frequencies elsewhere than the authors' DiT.
    block.norm1.emb = first
    if index:
      shared += [f'transformer_blocks.{index}.norm1.emb.{name}' for name, _ in first.named_parameters()]
  first.time_proj.downscale_freq_shift = 0
  network = dit('mu/2', image_size=8, out_channels=8, num_classes=10, num_heads=4)
  rng = np.random.default_rng(0)
  # Early times: torch's frequencies are rounded to float32 by their exponent, and late times magnify that.
  x, t = rng.normal(size=(3, 8, 8, 4)).astype(np.float32), np.array([0.0, 3.0, 90.0], np.float32)
  label = np.array([1, 10, 4], np.int32)
  shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), x, t, make_condition(label=label)))['params']
  theirs = reference(nchw(x), torch.from_numpy(t), torch.from_numpy(label).long()).sample
  spelling = ((r'blocks/0/norm1/emb/', ''),)
  compare(
    reference,
    theirs,
    lambda p: network.apply({'params': p}, x, t, make_condition(label=label)),
    shapes,
    spelling,
    shared,
  )


def test_autoencoder():
  channels = (128, 160)  # enough that all norms have 32 groups, as theirs
  reference = randomized(
    diffusers.AutoencoderKL(
      block_out_channels=channels, down_block_types=('DownEncoderBlock2D',) * 2,
      up_block_types=('UpDecoderBlock2D',) * 2, latent_channels=4, layers_per_block=2, sample_size=16,
    )
  )  # fmt: skip
  network = Autoencoder(channels, 2, 4, (False, False), image_size=16)
  x = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
  shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), x))['params']
  spelling = (
    (r'encoder/down(\d)_', r'encoder/level\1_'),
    (r'decoder/up(\d)_', lambda found: f'decoder/level{1 - int(found[1])}_'),
    (r'decoder/conv_out', 'conv_out'),
  )
  latent = reference.encode(nchw(x)).latent_dist
  ours = network.apply({'params': adopted(dict(reference.named_parameters()), shapes, spelling)}, x, method='encode')
  for a, b in ((ours.mean, latent.mean), (ours.log_variance, latent.logvar)):
    np.testing.assert_allclose(a, np.moveaxis(b.detach().numpy(), 1, -1), rtol=0, atol=1e-5)
  np.testing.assert_allclose(ours.kl(), latent.kl().detach(), rtol=1e-5)
  # Decoding the mean alone would not test the variance half of the encoder's output, so add it.
  theirs = reference.decode(latent.mean + latent.logvar).sample

  def apply(params):
    moments = network.apply({'params': params}, x, method='encode')
    return network.apply({'params': params}, moments.mean + moments.log_variance, method='decode')

  compare(reference, theirs, apply, shapes, spelling)


UNET = (
  (r'(blocks/\d+)/norm2', r'\1/cross_norm'),
  (r'(blocks/\d+)/norm3', r'\1/norm2'),
  (r'attn2', 'cross_attention'),
  (r'time_emb_proj', 'modulation'),
  (r'proj_in', 'enter'),
  (r'proj_out', 'leave'),
  (r'middle/', 'middle_'),
  (r'class_embedding/kernel', 'classes/embedding'),
  (r'add_embedding', 'text_embedding'),
  (r'^up(\d)_', lambda found: f'decoder/up{1 - int(found[1])}_'),
  (r'^(norm|conv_out)/', r'decoder/\1/'),
  (r'^(conv_in|time_embedding|text_embedding|classes|down\d|middle)', r'encoder/\1'),
)
EARLY = np.array([0.0, 3.0], np.float32)  # torch's frequencies are rounded to float32 by their exponent


def test_ddpm_unet():
  widths = (128, 160)
  reference = randomized(
    diffusers.UNet2DModel(
      sample_size=8, block_out_channels=widths, layers_per_block=1, down_block_types=('DownBlock2D', 'AttnDownBlock2D'),
      up_block_types=('AttnUpBlock2D', 'UpBlock2D'), attention_head_dim=None, norm_eps=1e-6, downsample_padding=0,
      flip_sin_to_cos=True, freq_shift=1,
    )
  )  # fmt: skip
  network = unet('ddpm-32', image_size=8, block_out_channels=widths, depths=(0, 1), layers=1)
  x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
  shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), x, EARLY))['params']
  theirs = reference(nchw(x), torch.from_numpy(EARLY)).sample
  compare(reference, theirs, lambda p: network.apply({'params': p}, x, EARLY), shapes, UNET)


def test_stable_diffusions_unet():
  widths = (128, 160)
  reference = randomized(
    diffusers.UNet2DConditionModel(
      sample_size=8, in_channels=9, block_out_channels=widths, layers_per_block=1, cross_attention_dim=24,
      attention_head_dim=4, down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'),
      up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'),
    )
  )  # fmt: skip
  network = dataclasses.replace(
    made := unet(
      'sd1',
      image_size=8,
      block_out_channels=widths,
      depths=(1, 0),
      layers=1,
      cross_attention_dim=24,
      extra_in_channels=5,
    ),
    config=dataclasses.replace(made.config, num_heads=(4, 4)),
  )
  rng = np.random.default_rng(0)
  x, concatenated, text = (rng.normal(size=s).astype(np.float32) for s in ((2, 8, 8, 4), (2, 8, 8, 5), (2, 7, 24)))
  condition = make_condition(text=text, image=concatenated)
  shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), x, EARLY, condition))['params']
  both = nchw(np.concatenate([x, concatenated], axis=-1))
  theirs = reference(both, torch.from_numpy(EARLY), torch.from_numpy(text).double()).sample
  compare(reference, theirs, lambda p: network.apply({'params': p}, x, EARLY, condition), shapes, UNET)


def test_stable_diffusion_xls_unet():
  widths = (128, 160)
  reference = randomized(
    diffusers.UNet2DConditionModel(
      sample_size=8, block_out_channels=widths, layers_per_block=1, cross_attention_dim=24, attention_head_dim=(4, 5),
      transformer_layers_per_block=(1, 2), use_linear_projection=True, addition_embed_type='text_time',
      addition_time_embed_dim=8, projection_class_embeddings_input_dim=20 + 6 * 8,
      down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'), up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'),
    )
  )  # fmt: skip
  network = unet('sdxl', image_size=8, block_out_channels=widths, depths=(0, 2), layers=1, cross_attention_dim=24)
  network = dataclasses.replace(network, config=dataclasses.replace(network.config, num_heads=(4, 5)))
  rng = np.random.default_rng(0)
  x, text, whole = (rng.normal(size=s).astype(np.float32) for s in ((2, 8, 8, 4), (2, 7, 24), (2, 20)))
  sizes = rng.integers(0, 64, (2, 6)).astype(np.float32)  # of the original and of the crop, and where it begins
  condition = make_condition(
    text=text, pooled_text=np.concatenate([whole, timestep_embedding(sizes.ravel(), 8).reshape(2, -1)], axis=-1)
  )
  shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), x, EARLY, condition))['params']
  added = {'text_embeds': torch.from_numpy(whole).double(), 'time_ids': torch.from_numpy(sizes)}
  theirs = reference(nchw(x), torch.from_numpy(EARLY), torch.from_numpy(text).double(), added_cond_kwargs=added).sample
  compare(reference, theirs, lambda p: network.apply({'params': p}, x, EARLY, condition), shapes, UNET)


def test_controlnet_residuals_enter_the_unet():
  widths = (128, 160)
  shape = dict(block_out_channels=widths, layers_per_block=1, cross_attention_dim=24, attention_head_dim=4)
  down = ('CrossAttnDownBlock2D', 'DownBlock2D')
  base = diffusers.UNet2DConditionModel(
    sample_size=4, **shape, down_block_types=down, up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D')
  )
  base = randomized(base).requires_grad_(False)
  reference = randomized(diffusers.ControlNetModel(**shape, down_block_types=down))
  made = unet('sd1', image_size=4, block_out_channels=widths, depths=(1, 0), layers=1, cross_attention_dim=24)
  network = dataclasses.replace(made, config=dataclasses.replace(made.config, num_heads=(4, 4)))
  control_network = controlnet(network, 8)
  rng = np.random.default_rng(0)
  x, text = (rng.normal(size=s).astype(np.float32) for s in ((2, 4, 4, 4), (2, 7, 24)))
  condition = make_condition(text=text, control=rng.uniform(size=(2, 32, 32, 3)).astype(np.float32))
  condition = {**condition, 'control_scale': np.array([0.7, 0.7], np.float32)}
  shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), x, EARLY, condition))['params']
  unet_params = adopted(dict(base.named_parameters()), shapes, UNET)
  shapes = jax.eval_shape(lambda: control_network.init(jax.random.key(0), x, EARLY, condition))['params']
  inputs = nchw(x), torch.from_numpy(EARLY), torch.from_numpy(text).double()
  down, middle = reference(*inputs, nchw(condition['control']), conditioning_scale=0.7, return_dict=False)
  theirs = base(*inputs, down_block_additional_residuals=down, mid_block_additional_residual=middle).sample

  def apply(params):
    residuals = control_network.apply({'params': params}, x, EARLY, condition)
    return network.apply({'params': unet_params}, x, EARLY, condition, residuals=residuals)

  spelling = (
    (r'controlnet_cond_embedding/blocks/', 'hint/conv'),
    (r'controlnet_cond_embedding/', 'hint/'),
    (r'controlnet_down_blocks/', 'zero_'),
    *UNET,
    (r'controlnet_mid_block/', 'zero_middle/'),
  )
  compare(reference, theirs, apply, shapes, spelling)


MMDIT = (
  (r'pos_embed/proj', 'patch'),
  (r'time_text_embed/timestep_embedder', 'time_embedding'),
  (r'time_text_embed/time_embedding', 'time_embedding'),
  (r'time_text_embed/text_embedder', 'text_embedding'),
  (r'context_embedder', 'enter'),
  (r'norm_out/linear', 'modulation'),
  (r'proj_out', 'head'),
  (r'blocks/2/', 'last/'),
  (r'(blocks/\d|last)/norm1_context/linear', r'\1/text/modulation'),
  (r'(blocks/\d|last)/modulation', r'\1/image/modulation'),
  (r'ff_context/net/0/proj', 'text/mlp/up'),
  (r'ff_context/net/2', 'text/mlp/down'),
  (r'(blocks/\d|last)/mlp', r'\1/image/mlp'),
  (r'attn/add_q_proj', 'text/attention/query'),
  (r'attn/add_k_proj', 'text/attention/key'),
  (r'attn/add_v_proj', 'text/attention/value'),
  (r'attn/to_add_out', 'text/attention/out'),
  (r'attn/norm_added_q/kernel', 'text/attention/query_norm/scale'),
  (r'attn/norm_added_k/kernel', 'text/attention/key_norm/scale'),
  (r'attn/norm_q/kernel', 'image/attention/query_norm/scale'),
  (r'attn/norm_k/kernel', 'image/attention/key_norm/scale'),
  (r'attn/', 'image/attention/'),
)


@pytest.mark.parametrize('qk_norm', [False, True])
def test_mmdit(qk_norm):
  reference = randomized(
    diffusers.SD3Transformer2DModel(
      sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8,
      num_attention_heads=4, joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=20,
      pos_embed_max_size=6, qk_norm='rms_norm' if qk_norm else None,
    )
  )  # fmt: skip
  network = mmdit('mu/2', image_size=8, channels=4, depth=3, num_heads=4, qk_norm=qk_norm, positions=(4, 6))
  rng = np.random.default_rng(0)
  x, text, pooled = (rng.normal(size=s).astype(np.float32) for s in ((2, 8, 8, 4), (2, 7, 24), (2, 20)))
  condition = make_condition(text=text, pooled_text=pooled)
  shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), x, EARLY, condition))['params']
  theirs = reference(
    nchw(x), torch.from_numpy(text).double(), torch.from_numpy(pooled).double(), torch.from_numpy(EARLY)
  ).sample

  def apply(params):
    # Two of their modulations give the scale before the shift.
    for part in (params, params['last']['text']):
      part['modulation'] = jax.tree.map(lambda x: jnp.roll(x, x.shape[-1] // 2, axis=-1), part['modulation'])
    return network.apply({'params': params}, x, EARLY, condition)

  compare(reference, theirs, apply, shapes, MMDIT)
