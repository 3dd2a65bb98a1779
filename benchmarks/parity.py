"""Numerical parity of published families with their reference implementations: random weights, real sizes.

    pip install -e '.[parity]'; python benchmarks/parity.py [FAMILY ...] [--json FILE]

For each case: the largest difference of outputs in float32; the largest difference of the output of any linear layer,
convolution or norm, relative to its maximum (layers are matched by their weights); the differences of our bfloat16 and
of the reference's bfloat16 outputs from its float32 outputs; and whether the exported weights equal the imported ones.
"""

import argparse
import contextlib
import json
import pathlib
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import diffusers
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file, save_file

from fmcv_jax.apps.conversion import export_checkpoint, import_checkpoint
from fmcv_jax.diffusion.condition import make_condition
from fmcv_jax.inference.model import dtypes_of
from fmcv_jax.models.common.layers import Dense
from fmcv_jax.models.common.positions import sincos_2d
from fmcv_jax.models.generative.controlnet import controlnet
from fmcv_jax.parallel.rules import path_of
from fmcv_jax.pretrained.tensors import open_tensors
from fmcv_jax.run import Run

RNG = np.random.default_rng(0)
COPIES = re.compile(r'(?<=transformer_blocks\.)\d+(?=\.norm1\.emb)')  # copies of one embedding in DiT, which stay equal
LAYERS = (Dense, nn.Conv, nn.LayerNorm, nn.GroupNorm)

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


def differences(case: Case, root: pathlib.Path) -> dict[str, Any]:
  """A row of the table: differences of outputs, layers, bfloat16 and exported weights from the reference."""
  folder = root / case.family / re.sub(r'\W+', '-', case.size)
  torch.manual_seed(0)
  several = case.companions()
  model = case.build().eval()
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if parameter.ndim < 2 or not parameter.any():  # initialized to ones or zeros: norms, biases, positions, a gate
        torch.manual_seed(zlib.crc32(COPIES.sub('', name).encode()))
        parameter += 0.1 * torch.randn(parameter.shape)
    save(model, folder / 'theirs' / ('unet' if several else ''))
    for name, part in several.items():
      save(part, folder / 'theirs' / name)
    with recorded(model) as layers:
      true = case.theirs(model, torch.float32)
    half = case.theirs(model.to(torch.bfloat16), torch.bfloat16)
  del model, several
  base = root / case.family.replace('controlnet_', '') / 'UNet' / 'ours'
  overrides = [field.replace('BASE', str(base)) for field in case.overrides]
  import_checkpoint(str(folder / 'theirs'), str(folder / 'ours'), case.family, overrides)
  found: dict[str, Any] = {'scale': max(float(x.abs().max()) for x in true), 'theirs': largest(half, true)}
  own, ours = computed(case, Run.reopen(folder / 'ours'), record=True)
  found['float32'] = largest(own, true)
  found['layers'], found['of'] = worst(ours, layers)
  del own, ours, layers
  narrow = tuple(f'{path}=bfloat16' for path in dtypes_of(folder / 'ours'))
  found['bfloat16'] = largest(computed(case, Run.reopen(folder / 'ours', narrow))[0], true)
  folder_of_parts = (folder / 'theirs' / 'unet').is_dir()
  out = folder / 'out' / ('' if folder_of_parts else 'model.safetensors')
  export_checkpoint(str(folder / 'ours'), str(out), 'transformers' if case.family in HUB else 'diffusers')
  first, again = open_tensors(folder / 'theirs'), open_tensors(folder / 'out')
  found['bitwise'] = all(np.array_equal(first[name], again[name]) for name in again.shapes)
  found['arrays'] = len(again.shapes)
  for part in ('theirs', 'out') if case.size == 'UNet' else ('',):  # a ControlNet's case needs the UNet's workdir
    shutil.rmtree(folder / part)
  return found


def computed(case: Case, run: Run, *, record: bool = False) -> tuple[list[jax.Array], dict[int, jax.Array]]:
  """Our outputs and, if `record`, the output of every layer with a weight, by the fingerprint of the weight."""
  subject, _ = run.restored_model()
  capture = {'capture_intermediates': lambda module, _: isinstance(module, LAYERS), 'mutable': ['intermediates']}

  @jax.jit
  def compute(params, extra):
    calls = []

    def apply(network, own, *inputs, **options):
      if not record:
        return network.apply({'params': own}, *inputs, **options)
      output, more = network.apply({'params': own}, *inputs, **capture, **options)
      calls.append((own, more['intermediates']))
      return output

    return case.ours(apply, run, params, extra), calls

  outputs, calls = compute(subject.params, subject.extra)
  found = {}
  for params, intermediates in calls:
    weights = {path_of(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    for path, (value, *_) in layers_in(intermediates):
      kind = 'kernel' if f'{path}/kernel' in weights else 'scale'
      if f'{path}/{kind}' not in weights:
        continue  # a norm without parameters
      weight = np.asarray(weights[f'{path}/{kind}'])
      stacked = weight.ndim in ((3, 5) if kind == 'kernel' else (2,))
      pairs = zip(weight, value, strict=True) if stacked else [(weight, value)]
      found |= {fingerprint(x): one for x, one in pairs}
  return outputs, found


def layers_in(tree: Any, path: str = '') -> Iterator[tuple[str, tuple[jax.Array, ...]]]:
  for name, below in tree.items():
    if name == '__call__':
      yield path, below
    elif isinstance(below, dict):
      yield from layers_in(below, f'{path}/{name}' if path else name)


@contextlib.contextmanager
def recorded(model: Any) -> Iterator[dict[int, torch.Tensor]]:
  """Records the output of every layer of theirs with a weight, by the fingerprint of the weight."""
  found, handles = {}, []

  def record(module, _, output):
    if isinstance(output, torch.Tensor):
      spatial = isinstance(module, torch.nn.Conv2d | torch.nn.GroupNorm)
      found.setdefault(fingerprint(module.weight.numpy()), output.movedim(1, -1) if spatial else output)

  for module in model.modules():
    if getattr(module, 'weight', None) is not None and module.weight.dtype == torch.float32:
      handles.append(module.register_forward_hook(record))
  yield found
  for handle in handles:
    handle.remove()


def fingerprint(weight: np.ndarray) -> int:
  """A hash of the values that does not depend on the order of axes, in which layouts differ."""
  bits = np.ascontiguousarray(weight).view(np.uint32).astype(np.uint64)
  return int((bits * (bits >> np.uint64(7))).sum())  # wraps around


def worst(ours: dict[int, jax.Array], theirs: dict[int, torch.Tensor]) -> tuple[float, int]:
  """The largest difference of a layer output relative to its maximum, and the number of layers compared."""
  ratios = []
  for key in ours.keys() & theirs.keys():
    one, other = np.asarray(ours[key]), theirs[key].numpy()
    if one.size != other.size:  # CLIP's last norm: theirs reads only the class token
      one = one[:, 0]
    one, other = one.ravel(), other.ravel()
    ratios.append(float(np.abs(one - other).max() / np.abs(other).max()))
  return max(ratios), len(ratios)


def save(model: Any, folder: pathlib.Path) -> None:
  """Saves as published: two names that transformers 5 writes differ from those on the hub."""
  model.save_pretrained(folder)
  file = next(folder.glob('*.safetensors'))
  arrays = {name.replace('decoder_encoder.layer', 'decoder_layers'): x for name, x in load_file(file).items()}
  if isinstance(model, transformers.CLIPTextModel):
    arrays = {f'text_model.{name.removeprefix("text_model.")}': x for name, x in arrays.items()}
  save_file(arrays, file)


def largest(own: Any, theirs: list[torch.Tensor]) -> float:
  values = [x.float().numpy() if isinstance(x, torch.Tensor) else np.asarray(x, np.float32) for x in own]
  return max(float(np.abs(a - b.float().numpy()).max()) for a, b in zip(values, theirs, strict=True))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    'families', nargs='*', help='such as dit or dit:XL/2; controlnet_sd1 also needs sd1:UNet, controlnet_sd2 needs sd2'
  )
  parser.add_argument('--json', type=pathlib.Path)
  args = parser.parse_args()
  headings = ('family', 'size', 'scale', 'float32', 'layers', 'of', 'bfloat16', 'their bfloat16', 'arrays', 'bitwise')
  table, rows = Table(*headings), []
  with tempfile.TemporaryDirectory() as temporary:
    root = pathlib.Path(temporary)
    for case in cases():
      if args.families and not {case.family, f'{case.family}:{case.size}'} & set(args.families):
        continue
      found = differences(case, root)
      rows.append({'family': case.family, 'size': case.size, **found})
      numbers = [f'{found[name]:.1e}' for name in ('scale', 'float32', 'layers', 'bfloat16', 'theirs')]
      numbers.insert(3, str(found['of']))
      table.add_row(case.family, case.size, *numbers, str(found['arrays']), 'yes' if found['bitwise'] else 'NO')
      Console(stderr=True).print(rows[-1], highlight=False)
      if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + '\n')
  Console(width=120).print(table)
  if not all(holds(row) for row in rows):
    raise SystemExit('a difference exceeds 1e-4 of the output, or an export differs from the import')


def holds(row: dict[str, Any]) -> bool:
  return row['bitwise'] and row['float32'] < 1e-4 * max(1, row['scale']) and row['layers'] < 1e-4


HUB = ('vit', 'deit', 'dino', 'dinov2', 'mae_pretrain', 'swin', 'clip', 'clip_openai', 'siglip')

if __name__ == '__main__':
  main()
