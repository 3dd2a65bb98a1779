"""Published families against their reference implementations: random weights of the real sizes, in and out.

    pip install -e '.[parity]'; python benchmarks/parity.py [FAMILY ...] [--json FILE]

For each: the largest difference of outputs in float32, and of every layer where the reference shows its layers; the
difference of our bfloat16 and of the reference's own bfloat16 from its float32; whether what comes out went in.
"""

import argparse
import json
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file, save_file

from fmcv_jax.apps.conversion import export_checkpoint, import_checkpoint
from fmcv_jax.apps.model import dtypes_of
from fmcv_jax.experiment import Run
from fmcv_jax.models.conditioning import Condition
from fmcv_jax.models.controlnet import controlnet
from fmcv_jax.models.layers import Block
from fmcv_jax.pretrained.tensors import open_tensors

RNG = np.random.default_rng(0)
LAYERS = {'capture_intermediates': lambda module, _: isinstance(module, Block), 'mutable': ['intermediates']}


class Case(NamedTuple):
  """theirs(model, dtype) and ours(run, params, extra) give outputs in the same order, and hidden states of layers."""

  family: str
  size: str
  build: Callable[[], Any]
  theirs: Callable[[Any, torch.dtype], tuple[list[torch.Tensor], list[torch.Tensor]]]
  ours: Callable[[Run, Any, Any], tuple[list[jax.Array], list[jax.Array]]]
  overrides: tuple[str, ...] = ()
  beside: Callable[[], dict[str, Any]] = dict  # further networks of the folder, each below its name


def images(size: int, channels: int = 3) -> np.ndarray:
  return RNG.normal(size=(2, size, size, channels)).astype(np.float32)


def to_torch(x: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
  return torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).to(dtype)


def encoder(family: str, size: str, config: Any, model: Any, output: str = 'logits') -> Case:
  """A network of images; `output` of theirs is compared with what ours calls so, or with its pooled token."""
  x = images(config.image_size)

  def theirs(model, dtype):
    said = model(to_torch(x, dtype), output_hidden_states=True)
    value = said.logits if output == 'logits' else said.last_hidden_state[:, 0]
    return [value], list(said.hidden_states[1:]) if family != 'swin' else []

  def ours(run, params, extra):
    network = run.experiment.objective.network
    said, more = network.apply({'params': params}, x, **LAYERS)
    layers = jax.tree.leaves(more)[:1] if family != 'swin' else []
    return [said.output if output == 'logits' else said.pooled], [layer for stack in layers for layer in stack]

  return Case(family, size, lambda: model(config), theirs, ours)


def pair(family: str, size: str, config: Any, model: Any, length: int, vocabulary: int) -> Case:
  x = images(config.vision_config.image_size)
  tokens = RNG.integers(1, vocabulary - 2, size=(2, length))
  tokens[:, -1] = vocabulary - 1

  def theirs(model, dtype):
    said = model(input_ids=torch.from_numpy(tokens), pixel_values=to_torch(x, dtype))
    return [said.image_embeds, said.text_embeds], []

  def ours(run, params, extra):
    said = run.experiment.objective.network.apply({'params': params}, x, jnp.asarray(tokens))
    return [said.image, said.text], []

  return Case(family, size, lambda: model(config), theirs, ours)


def masked() -> Case:
  config = transformers.ViTMAEConfig()
  x, noise = images(224), RNG.uniform(size=(2, 196)).astype(np.float32)

  def build():
    from fmcv_jax.models.positions import sincos_2d

    model = transformers.ViTMAEForPreTraining(config)
    for name, width in (('vit.embeddings.position_embeddings', 768), ('decoder.decoder_pos_embed', 512)):
      table = np.concatenate([np.zeros((1, width)), sincos_2d(14, 14, width)]).astype(np.float32)
      model.get_parameter(name).data = torch.from_numpy(table)[None]
    return model

  def theirs(model, dtype):
    return [model(to_torch(x, dtype), noise=torch.from_numpy(noise)).logits], []

  def ours(run, params, extra):
    objective = run.experiment.objective
    order = jnp.asarray(np.argsort(noise, axis=1))
    return [objective.network.apply({'params': params}, x, order, visible=objective.visible).pixels], []

  return Case('mae_pretrain', 'B/16', build, theirs, ours)


def coder() -> Case:
  widths = (128, 256, 512, 512)
  config = {
    'block_out_channels': widths,
    'down_block_types': ('DownEncoderBlock2D',) * 4,
    'up_block_types': ('UpDecoderBlock2D',) * 4,
    'layers_per_block': 2,
  }
  x = images(64)

  def theirs(model, dtype):
    latent = model.encode(to_torch(x, dtype)).latent_dist
    return [part.permute(0, 2, 3, 1) for part in (latent.mean, model.decode(latent.mean).sample)], []

  def ours(run, params, extra):
    network, variables = run.experiment.objective.network, {'params': params['autoencoder']}
    latent = network.apply(variables, x, method='encode')
    return [latent.mean, network.apply(variables, latent.mean, method='decode')], []

  return Case('sd_vae', 'kl-f8', lambda: diffusers.AutoencoderKL(**config), theirs, ours)


def parts(act: str, **text: Any) -> dict[str, Any]:
  """What stands beside a UNet in Stable Diffusion."""
  tokens = {'vocab_size': 49_408, 'max_position_embeddings': 77, 'eos_token_id': 49_407, 'bos_token_id': 49_406}
  config = transformers.CLIPTextConfig(**tokens, hidden_act=act, **text)
  return {'vae': coder().build(), 'text_encoder': transformers.CLIPTextModel(config)}


def denoiser(family: str) -> Case:
  """All parts of Stable Diffusion go in and out; outputs are those of the UNet."""
  second = family == 'sd2'
  wide, context = (320, 640, 1280, 1280), 1024 if second else 768
  config = {
    'block_out_channels': wide,
    'cross_attention_dim': context,
    'attention_head_dim': (5, 10, 20, 20) if second else 8,
    'use_linear_projection': second,
  }
  x, words, time = images(32, 4), RNG.normal(size=(2, 77, context)).astype(np.float32), np.array([7, 900])

  def theirs(model, dtype):
    said = model(to_torch(x, dtype), torch.from_numpy(time), torch.from_numpy(words).to(dtype)).sample
    return [said.permute(0, 2, 3, 1)], []

  def ours(run, params, extra):
    told = Condition(text=jnp.asarray(words))
    return [run.experiment.objective.network.apply({'params': params['network']}, x, jnp.asarray(time), told)], []

  def beside():
    if not second:
      return parts('quick_gelu', hidden_size=768, num_attention_heads=12, intermediate_size=3072)
    return parts('gelu', hidden_size=1024, num_attention_heads=16, intermediate_size=4096, num_hidden_layers=23)

  return Case(family, 'UNet', lambda: diffusers.UNet2DConditionModel(**config), theirs, ours, (), beside)


def steering() -> Case:
  x, words, time = images(32, 4), RNG.normal(size=(2, 77, 768)).astype(np.float32), np.array([7, 900])
  hint = RNG.uniform(size=(2, 256, 256, 3)).astype(np.float32)

  def theirs(model, dtype):
    said = model(
      to_torch(x, dtype),
      torch.from_numpy(time),
      torch.from_numpy(words).to(dtype),
      to_torch(hint, dtype),
      return_dict=False,
    )
    return [part.permute(0, 2, 3, 1) for part in (*said[0], said[1])], []

  def ours(run, params, extra):
    network = controlnet(run.experiment.objective.network, 8)
    told = Condition(text=jnp.asarray(words), control=jnp.asarray(hint))
    said = network.apply({'params': params['control']}, x, jnp.asarray(time), told)
    return [*said[0], said[1]], []

  given = {'network': 'params/network', 'autoencoder': 'extra/autoencoder', 'text': 'extra/text'}
  overrides = [f'init_from.extra/{name}.part={part}' for name, part in given.items()]
  overrides += [f'init_from.extra/{name}.workdir=BASE' for name in given]

  def build():
    return diffusers.ControlNetModel(cross_attention_dim=768)

  return Case('controlnet_sd1', 'SD 1', build, theirs, ours, tuple(overrides))


def class_denoiser(size: str, heads: int, layers: int) -> Case:
  config = {'num_attention_heads': heads, 'attention_head_dim': 72 if size == 'XL/2' else 64, 'num_layers': layers}
  x, label, time = images(32, 4), np.array([1, 400]), np.array([7, 900])

  def build():
    model = diffusers.DiTTransformer2DModel(**config)
    for block in model.transformer_blocks:
      block.norm1.emb = model.transformer_blocks[0].norm1.emb
      block.norm1.emb.time_proj.downscale_freq_shift = 0  # as in the original, with which the weights were learnt
    return model

  def theirs(model, dtype):
    said = model(to_torch(x, dtype), torch.from_numpy(time), torch.from_numpy(label)).sample
    return [said.permute(0, 2, 3, 1)], []

  def ours(run, params, extra):
    told = Condition(label=jnp.asarray(label))
    return [run.experiment.objective.network.apply({'params': params['network']}, x, jnp.asarray(time), told)], []

  return Case('dit', size, build, theirs, ours, ('objective.autoencoder=None',))


def cases() -> list[Case]:
  t = transformers
  large = {'hidden_size': 1024, 'num_hidden_layers': 24, 'num_attention_heads': 16, 'intermediate_size': 4096}
  exact = {'layer_norm_eps': 1e-6, 'num_labels': 1000}
  tiny = {'hidden_size': 192, 'num_attention_heads': 3, 'intermediate_size': 768}
  base = {'embed_dim': 128, 'depths': [2, 2, 18, 2], 'num_heads': [4, 8, 16, 32]}
  dino = {'image_size': 224, 'patch_size': 14}

  def clip(**vision):
    text = {'projection_dim': vision.pop('projection', 512), **vision.pop('text', {})}
    act = {'hidden_act': vision.pop('act', 'gelu')}
    return t.CLIPConfig(
      vision_config={**vision, **act}, text_config={**text, **act}, projection_dim=text['projection_dim']
    )

  l14 = {**large, 'patch_size': 14, 'projection': 768}
  wide = {'hidden_size': 768, 'num_attention_heads': 12, 'intermediate_size': 3072}
  so = {'hidden_size': 1152, 'num_hidden_layers': 27, 'num_attention_heads': 16, 'intermediate_size': 4304}
  siglip = t.SiglipConfig()
  shape = t.SiglipConfig(vision_config={**so, 'patch_size': 14}, text_config=so)
  return [
    encoder('vit', 'B/16', t.ViTConfig(**exact), t.ViTForImageClassification),
    encoder('vit', 'L/16', t.ViTConfig(**large, **exact), t.ViTForImageClassification),
    encoder('deit', 'Ti/16', t.DeiTConfig(**tiny, **exact), t.DeiTForImageClassificationWithTeacher),
    encoder('deit', 'B/16', t.DeiTConfig(**exact), t.DeiTForImageClassificationWithTeacher),
    encoder('dinov2', 'B/14', t.Dinov2WithRegistersConfig(**dino), t.Dinov2WithRegistersModel, 'token'),
    encoder('dinov2', 'L/14', t.Dinov2WithRegistersConfig(**dino, **large), t.Dinov2WithRegistersModel, 'token'),
    masked(),
    encoder('swin', 'T', t.SwinConfig(num_labels=1000), t.SwinForImageClassification),
    encoder('swin', 'B', t.SwinConfig(**base, num_labels=1000), t.SwinForImageClassification),
    pair('clip', 'B/32', clip(), t.CLIPModel, 77, 49_408),
    pair('clip', 'L/14', clip(**l14, text=wide), t.CLIPModel, 77, 49_408),
    pair('clip_openai', 'B/32', clip(act='quick_gelu'), t.CLIPModel, 77, 49_408),
    pair('siglip', 'B/16', siglip, t.SiglipModel, 64, 32_000),
    pair('siglip', 'So400m/14', shape, t.SiglipModel, 64, 32_000),
    class_denoiser('S/2', 6, 12),
    class_denoiser('XL/2', 16, 28),
    coder(),
    denoiser('sd1'),
    denoiser('sd2'),
    steering(),
  ]


def differences(case: Case, root: pathlib.Path) -> dict[str, Any]:
  folder = root / case.family / case.size.replace('/', '-')
  torch.manual_seed(0)
  several = case.beside()
  model = case.build().eval()
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.ndim < 2:  # norms and biases, which begin as ones and zeros
        parameter += 0.1 * torch.randn(parameter.shape)
    save(model, folder / 'theirs' / ('unet' if several else ''))
    for name, part in several.items():
      save(part, folder / 'theirs' / name)
    true, layers = case.theirs(model, torch.float32)
    half, _ = case.theirs(model.to(torch.bfloat16), torch.bfloat16)
  del model, several
  overrides = [field.replace('BASE', str(root / 'sd1' / 'UNet' / 'ours')) for field in case.overrides]
  import_checkpoint(str(folder / 'theirs'), str(folder / 'ours'), case.family, overrides)
  narrow = tuple(f'{path}=bfloat16' for path in dtypes_of(folder / 'ours'))
  found: dict[str, Any] = {'scale': max(float(x.abs().max()) for x in true), 'theirs': largest(half, true)}
  for name, changed in (('float32', ()), ('bfloat16', narrow)):
    run = Run.reopen(folder / 'ours', changed)
    subject, _ = run.restored_subject()
    compute = jax.jit(lambda params, extra, run=run: case.ours(run, params, extra))
    own, own_layers = compute(subject.params, subject.extra)
    found[name] = largest(own, true)
    if name == 'float32' and layers:
      found['layers'] = largest(own_layers, layers)
  del run, subject, compute, own, own_layers
  folder_of_parts = (folder / 'theirs' / 'unet').is_dir()
  out = folder / 'out' / ('' if folder_of_parts else 'model.safetensors')
  export_checkpoint(str(folder / 'ours'), str(out), 'transformers' if case.family in HUB else 'diffusers')
  first, again = open_tensors(folder / 'theirs'), open_tensors(folder / 'out')
  found['bitwise'] = all(np.array_equal(first[name], again[name]) for name in again.shapes)
  found['arrays'] = len(again.shapes)
  return found


def save(model: Any, folder: pathlib.Path) -> None:
  """As published: transformers 5 writes two names otherwise than the hub has them."""
  model.save_pretrained(folder)
  file = next(folder.glob('*.safetensors'))
  arrays = {name.replace('decoder_encoder.layer', 'decoder_layers'): x for name, x in load_file(file).items()}
  if isinstance(model, transformers.CLIPTextModel):
    arrays = {f'text_model.{name.removeprefix("text_model.")}': x for name, x in arrays.items()}
  if isinstance(model, diffusers.DiTTransformer2DModel):
    arrays = {name: x.numpy() for name, x in model.state_dict().items()}  # the file leaves out what is shared
  save_file(arrays, file)


def largest(own: Any, theirs: list[torch.Tensor]) -> float:
  values = [x.float().numpy() if isinstance(x, torch.Tensor) else np.asarray(x, np.float32) for x in own]
  return max(float(np.abs(a - b.float().numpy()).max()) for a, b in zip(values, theirs, strict=True))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('families', nargs='*', help='by default all; controlnet_sd1 stands on sd1')
  parser.add_argument('--json', type=pathlib.Path)
  args = parser.parse_args()
  table = Table(
    'family', 'size', 'output scale', 'float32', 'every layer', 'bfloat16', 'their bfloat16', 'arrays', 'bitwise'
  )
  rows = []
  with tempfile.TemporaryDirectory() as temporary:
    root = pathlib.Path(temporary)
    for case in cases():
      if args.families and case.family not in args.families:
        continue
      found = differences(case, root)
      rows.append({'family': case.family, 'size': case.size, **found})
      numbers = [f'{found[name]:.1e}' if name in found else '' for name in ('scale', 'float32', 'layers')]
      numbers += [f'{found["bfloat16"]:.1e}', f'{found["theirs"]:.1e}', str(found['arrays'])]
      table.add_row(case.family, case.size, *numbers, 'yes' if found['bitwise'] else 'NO')
      Console(stderr=True).print(rows[-1], highlight=False)
      if case.family != 'sd1':
        shutil.rmtree(root / case.family)
  Console(width=120).print(table)
  if args.json:
    args.json.write_text(json.dumps(rows, indent=2) + '\n')
  if not all(row['bitwise'] and row['float32'] < 1e-4 * max(1, row['scale']) for row in rows):
    raise SystemExit('a difference is larger than 1e-4 of the output, or an export is not what was imported')


HUB = ('vit', 'deit', 'dinov2', 'mae_pretrain', 'swin', 'clip', 'clip_openai', 'siglip')

if __name__ == '__main__':
  main()
