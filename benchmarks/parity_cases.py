"""The models that `parity.py` compares: references with their real configurations and random weights."""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from fmcv_jax.diffusion.condition import make_condition
from fmcv_jax.models.common.positions import sincos_2d
from fmcv_jax.models.generative.controlnet import controlnet
from fmcv_jax.run import Run

RNG = np.random.default_rng(0)

# Applies a network of ours: (network, parameters, inputs..., options of `apply`) -> output.
Apply = Callable[..., Any]


class Case(NamedTuple):
  """A model to compare: theirs(model, dtype) and ours(apply, run, params, extra) return outputs, channels last."""

  family: str
  size: str
  build: Callable[[], Any]
  theirs: Callable[[Any, torch.dtype], list[torch.Tensor]]
  ours: Callable[[Apply, Run, Any, Any], list[jax.Array]]
  overrides: tuple[str, ...] = ()
  companions: Callable[[], dict[str, Any]] = dict  # subfolder -> further network of the pipeline


def images(size: int, channels: int = 3) -> np.ndarray:
  return RNG.normal(size=(2, size, size, channels)).astype(np.float32)


def to_torch(x: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
  return torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).to(dtype)


def last(x: torch.Tensor) -> torch.Tensor:
  """[B, C, H, W] -> [B, H, W, C]."""
  return x.permute(0, 2, 3, 1)


def encoder(family: str, size: str, config: Any, model: Any, compared: str = 'logits') -> Case:
  """An image encoder; compares logits, or with compared='token' the class token."""
  x = images(config.image_size)

  def theirs(model, dtype):
    output = model(to_torch(x, dtype))
    return [output.logits if compared == 'logits' else output.last_hidden_state[:, 0]]

  def ours(apply, run, params, extra):
    output = apply(run.experiment.objective.network, params, x)
    return [output.output if compared == 'logits' else output.pooled]

  return Case(family, size, lambda: model(config), theirs, ours)


def pair(family: str, size: str, config: Any, model: Any) -> Case:
  x, text = images(config.vision_config.image_size), config.text_config
  tokens = RNG.integers(1, text.vocab_size - 2, size=(2, text.max_position_embeddings))
  tokens[:, -1] = text.vocab_size - 1

  def theirs(model, dtype):
    output = model(input_ids=torch.from_numpy(tokens), pixel_values=to_torch(x, dtype))
    return [output.image_embeds, output.text_embeds]

  def ours(apply, run, params, extra):
    output = apply(run.experiment.objective.network, params, x, jnp.asarray(tokens))
    return [output.image, output.text]

  return Case(family, size, lambda: model(config), theirs, ours)


def masked(size: str, **encoder: Any) -> Case:
  config = transformers.ViTMAEConfig(**encoder)
  x, noise = images(224), RNG.uniform(size=(2, 196)).astype(np.float32)

  def build():
    model = transformers.ViTMAEForPreTraining(config)
    for name, width in (
      ('vit.embeddings.position_embeddings', config.hidden_size),
      ('decoder.decoder_pos_embed', config.decoder_hidden_size),
    ):
      table = np.concatenate([np.zeros((1, width)), sincos_2d(14, 14, width)]).astype(np.float32)
      model.get_parameter(name).data = torch.from_numpy(table)[None]
    return model

  def theirs(model, dtype):
    return [model(to_torch(x, dtype), noise=torch.from_numpy(noise)).logits]

  def ours(apply, run, params, extra):
    objective = run.experiment.objective
    order = jnp.asarray(np.argsort(noise, axis=1))
    return [apply(objective.network, params, x, order, visible=objective.visible).pixels]

  return Case('mae_pretrain', size, build, theirs, ours)


def coder(size: str = 'kl-f8', widths: tuple[int, ...] = (128, 256, 512, 512), **more: Any) -> Case:
  config = {
    'block_out_channels': widths,
    'down_block_types': ('DownEncoderBlock2D',) * len(widths),
    'up_block_types': ('UpDecoderBlock2D',) * len(widths),
    'layers_per_block': 2,
    **more,
  }
  x = images(64)

  def theirs(model, dtype):
    latent = model.encode(to_torch(x, dtype)).latent_dist
    return [last(part) for part in (latent.mean, model.decode(latent.mean).sample)]

  def ours(apply, run, params, extra):
    network, own = run.experiment.objective.network, params['autoencoder']
    latent = apply(network, own, x, method='encode')
    return [latent.mean, apply(network, own, latent.mean, method='decode')]

  return Case('sd_vae', size, lambda: diffusers.AutoencoderKL(**config), theirs, ours)


def parts(act: str, **text: Any) -> dict[str, Any]:
  """The other networks of Stable Diffusion: VAE and text encoder."""
  tokens = {'vocab_size': 49_408, 'max_position_embeddings': 77, 'eos_token_id': 49_407, 'bos_token_id': 49_406}
  config = transformers.CLIPTextConfig(**tokens, hidden_act=act, **text)
  return {'vae': coder().build(), 'text_encoder': transformers.CLIPTextModel(config)}


def denoiser(family: str, size: str = 'UNet', channels: int = 4) -> Case:
  """Stable Diffusion: all networks are imported and exported, the outputs of the UNet are compared."""
  second = family == 'sd2'
  context = 1024 if second else 768
  config = {
    'in_channels': channels,
    'block_out_channels': (320, 640, 1280, 1280),
    'cross_attention_dim': context,
    'attention_head_dim': (5, 10, 20, 20) if second else 8,
    'use_linear_projection': second,
  }
  x, words, time = images(32, channels), RNG.normal(size=(2, 77, context)).astype(np.float32), np.array([7, 900])

  def theirs(model, dtype):
    output = model(to_torch(x, dtype), torch.from_numpy(time), torch.from_numpy(words).to(dtype)).sample
    return [last(output)]

  def ours(apply, run, params, extra):
    condition = make_condition(text=jnp.asarray(words), image=jnp.asarray(x[..., 4:]) if channels > 4 else None)
    return [apply(run.experiment.objective.network, params['network'], x[..., :4], jnp.asarray(time), condition)]

  def companions():
    if not second:
      return parts('quick_gelu', hidden_size=768, num_attention_heads=12, intermediate_size=3072)
    return parts('gelu', hidden_size=1024, num_attention_heads=16, intermediate_size=4096, num_hidden_layers=23)

  return Case(family, size, lambda: diffusers.UNet2DConditionModel(**config), theirs, ours, (), companions)


def control_network(family: str, **config: Any) -> Case:
  """A ControlNet; its Stable Diffusion is loaded from the workdir of another case."""
  config = {'block_out_channels': (320, 640, 1280, 1280), **config}
  context = config['cross_attention_dim']
  x, words, time = images(32, 4), RNG.normal(size=(2, 77, context)).astype(np.float32), np.array([7, 900])
  hint = RNG.uniform(size=(2, 256, 256, 3)).astype(np.float32)

  def theirs(model, dtype):
    condition = torch.from_numpy(words).to(dtype), to_torch(hint, dtype)
    down, middle = model(to_torch(x, dtype), torch.from_numpy(time), *condition, return_dict=False)
    return [last(part) for part in (*down, middle)]

  def ours(apply, run, params, extra):
    network = controlnet(run.experiment.objective.network, 8)
    condition = make_condition(text=jnp.asarray(words), control=jnp.asarray(hint))
    down, middle = apply(network, params['control'], x, jnp.asarray(time), condition)
    return [*down, middle]

  given = {'network': 'params/network', 'autoencoder': 'extra/autoencoder', 'text': 'extra/text'}
  overrides = [f'init_from.extra/{name}.part={part}' for name, part in given.items()]
  overrides += [f'init_from.extra/{name}.workdir=BASE' for name in given]
  return Case(family, 'SD', lambda: diffusers.ControlNetModel(**config), theirs, ours, tuple(overrides))


def class_denoiser(size: str, heads: int, layers: int) -> Case:
  config = {'num_attention_heads': heads, 'attention_head_dim': 72 if size == 'XL/2' else 64, 'num_layers': layers}
  x, label, time = images(32, 4), np.array([1, 400]), np.array([7, 900])

  def build():
    model = diffusers.DiTTransformer2DModel(**config)
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
      block.norm1.emb.load_state_dict(first)  # published files have a copy in every block
      block.norm1.emb.time_proj.downscale_freq_shift = 0  # as in the original code, with which the weights were trained
    return model

  def theirs(model, dtype):
    return [last(model(to_torch(x, dtype), torch.from_numpy(time), torch.from_numpy(label)).sample)]

  def ours(apply, run, params, extra):
    condition = make_condition(label=jnp.asarray(label))
    return [apply(run.experiment.objective.network, params['network'], x, jnp.asarray(time), condition)]

  return Case('dit', size, build, theirs, ours, ('objective.latent_space.autoencoder=None',))


def cases() -> list[Case]:
  t = transformers
  tiny = {'hidden_size': 192, 'num_attention_heads': 3, 'intermediate_size': 768}
  small = {'hidden_size': 384, 'num_attention_heads': 6, 'intermediate_size': 1536}
  wide = {'hidden_size': 768, 'num_attention_heads': 12, 'intermediate_size': 3072}
  large = {'hidden_size': 1024, 'num_hidden_layers': 24, 'num_attention_heads': 16, 'intermediate_size': 4096}
  shape = {'hidden_size': 1152, 'num_hidden_layers': 27, 'num_attention_heads': 16, 'intermediate_size': 4304}
  exact = {'layer_norm_eps': 1e-6, 'num_labels': 1000}
  base = {'embed_dim': 128, 'depths': [2, 2, 18, 2], 'num_heads': [4, 8, 16, 32]}
  dino = {'image_size': 224, 'patch_size': 14}
  eps = {'layer_norm_eps': 1e-6}

  def clip(act: str, vision: dict[str, Any], text: dict[str, Any], projection: int = 512) -> Any:
    both = {'hidden_act': act, 'projection_dim': projection}
    return t.CLIPConfig(vision_config={**vision, **both}, text_config={**text, **both}, projection_dim=projection)

  so400m = t.SiglipConfig(vision_config={**shape, 'patch_size': 14}, text_config=shape)
  l14 = {**large, 'patch_size': 14}, wide, 768
  two = {'vocab_size': 256_000, 'bos_token_id': 2, 'eos_token_id': 1, 'pad_token_id': 0}
  first = {'cross_attention_dim': 768, 'attention_head_dim': 8}
  second = {'cross_attention_dim': 1024, 'attention_head_dim': (5, 10, 20, 20), 'use_linear_projection': True}
  return [
    encoder('vit', 'B/16', t.ViTConfig(**exact), t.ViTForImageClassification),
    encoder('vit', 'L/16', t.ViTConfig(**large, **exact), t.ViTForImageClassification),
    encoder('deit', 'Ti/16', t.DeiTConfig(**tiny, **exact), t.DeiTForImageClassificationWithTeacher),
    encoder('deit', 'B/16', t.DeiTConfig(**exact), t.DeiTForImageClassificationWithTeacher),
    encoder('dino', 'S/16', t.ViTConfig(**small, **eps), t.ViTModel, 'token'),
    encoder('dino', 'B/8', t.ViTConfig(patch_size=8, **eps), t.ViTModel, 'token'),
    encoder('dinov2', 'B/14, registers', t.Dinov2WithRegistersConfig(**dino), t.Dinov2WithRegistersModel, 'token'),
    encoder('dinov2', 'L/14', t.Dinov2Config(**dino, **large), t.Dinov2Model, 'token'),
    masked('B/16'),
    masked('L/16', **large),
    encoder('swin', 'T', t.SwinConfig(num_labels=1000), t.SwinForImageClassification),
    encoder('swin', 'B', t.SwinConfig(**base, num_labels=1000), t.SwinForImageClassification),
    pair('clip', 'B/32', clip('gelu', {}, {}), t.CLIPModel),
    pair('clip', 'L/14', clip('gelu', *l14), t.CLIPModel),
    pair('clip_openai', 'B/32', clip('quick_gelu', {}, {}), t.CLIPModel),
    pair('clip_openai', 'L/14', clip('quick_gelu', *l14), t.CLIPModel),
    pair('siglip', 'B/16', t.SiglipConfig(), t.SiglipModel),
    pair('siglip', 'So400m/14', so400m, t.SiglipModel),
    pair('siglip', '2 B/16', t.SiglipConfig(text_config=two), t.SiglipModel),
    class_denoiser('S/2', 6, 12),
    class_denoiser('XL/2', 16, 28),
    coder(),
    coder('kl-f4', (128, 256, 512), latent_channels=3),
    denoiser('sd1'),
    denoiser('sd1', 'inpainting', 9),
    denoiser('sd2'),
    control_network('controlnet_sd1', **first),
    control_network('controlnet_sd2', **second),
  ]
