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
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import torch
import transformers
from parity_cases import Case, cases
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file, save_file

from fmcv_jax.apps.conversion import export_checkpoint, import_checkpoint
from fmcv_jax.inference.dtypes import dtypes_of
from fmcv_jax.models.common.layers import Dense
from fmcv_jax.parallel.rules import path_of
from fmcv_jax.pretrained.tensors import open_tensors
from fmcv_jax.run import Run

COPIES = re.compile(r'(?<=transformer_blocks\.)\d+(?=\.norm1\.emb)')  # copies of one embedding in DiT, which stay equal
LAYERS = (Dense, nn.Conv, nn.LayerNorm, nn.GroupNorm)


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
