"""Exports the LoRA of a fine-tuning run for PEFT, diffusers and programs that read kohya's layout."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fmcv_jax.console import make_console
from fmcv_jax.errors import UserError
from fmcv_jax.inference.adapters import by_path, family_and_layouts
from fmcv_jax.objectives.adapted import FROZEN, LORA, PartialFineTuning
from fmcv_jax.pretrained.layout import Layout, arrays, write
from fmcv_jax.pretrained.lora import export, metadata
from fmcv_jax.pretrained.lora.export import LowRank
from fmcv_jax.pretrained.lora.peft_config import CONFIG
from fmcv_jax.pretrained.tensors import write_tensors
from fmcv_jax.run import Run

FORMATS = ('peft', 'kohya')
_LIBRARIES = ('diffusers', 'transformers', 'timm')  # whose networks PEFT adapts
_NETWORKS = ('unet', 'text_encoder')  # of a pipeline that adapters are trained for


def export_adapters(workdir: str, to: str, format: str, step: int | None = None) -> None:
  """Exports what a run with LoRA learned: 'peft' a folder of adapter_config.json and adapter_model.safetensors, 'kohya'
  a .safetensors file for Stable Diffusion.

  PEFT's folder also holds the layers that were trained as a whole (its modules_to_save). A run that adapts both a UNet
  and its text tower gives PEFT two folders, `unet` and `text_encoder`. UserError for a run without LoRA, and for layers
  that the format has no names for.
  """
  run = Run.reopen(workdir)
  outer = run.experiment.objective
  if not isinstance(outer, PartialFineTuning) or outer.lora is None:
    raise UserError(f'{workdir}: has no LoRA; --format {format} writes that of a run with objective.lora')
  if (format == 'kohya') != (pathlib.Path(to).suffix == '.safetensors'):
    raise UserError(f'--to {to}: {format} is {"a .safetensors file" if format == "kohya" else "a folder"}')
  subject, _ = run.restored_model(step)
  inner: Any = outer.objective
  extra = {name: tree for name, tree in subject.extra.items() if name != FROZEN}
  own = by_path(outer.full_params(subject.params, subject.extra), extra)
  own = {path: x for path, x in own.items() if path.split('/')[0] not in inner.training_only}
  family, layouts = family_and_layouts(run, own)
  layout = _chosen(layouts, format, family, workdir)
  placed = {row.ours for row in layout.rows}
  own = {path: np.asarray(x, np.float32) for path, x in own.items() if path in placed}
  learned = by_path(subject.params, {})
  matrices = {
    path.removeprefix(f'{LORA}/'): np.asarray(x) for path, x in learned.items() if path.startswith(f'{LORA}/')
  }
  added = {
    path.removesuffix('/down'): (x, matrices[f'{path.removesuffix("/down")}/up'])
    for path, x in matrices.items()
    if path.endswith('/down')
  }
  if left := sorted(set(added) - own.keys()):
    raise UserError(f'{workdir}: {left[0]} has LoRA, but no name in the format {format}')
  adapters = export.low_rank(layout, {path: x.shape for path, x in own.items()}, added)
  whole = _whole_layers(layout, own, {path for path in learned if not path.startswith(f'{LORA}/')})
  scale = 1.0 if outer.lora.alpha is None else outer.lora.alpha / outer.lora.rank
  if format == 'kohya':
    if whole:
      raise UserError(f"{workdir}: {min(whole)} is trained as a whole, which kohya's layout has no place for; use peft")
    rank = outer.lora.rank
    header = metadata.written(family, inner.process.prediction, rank, scale * rank)
    write_tensors(pathlib.Path(to), export.kohya(adapters, scale), header)
  else:
    _write_peft(pathlib.Path(to), adapters, scale, whole)
  line = f'{len(adapters)} adapted and {len({name.rpartition(".")[0] for name in whole})} whole layers in {to}'
  make_console(stderr=True).print(line, highlight=False, soft_wrap=True)


def _chosen(layouts: Sequence[tuple[str, Layout]], format: str, family: str, workdir: str) -> Layout:
  """The layout whose names PEFT, or kohya's scripts, have for the layers of the network."""
  if format == 'kohya':
    pipelines = [layout for name, layout in layouts if name == 'diffusers' and layout.files]
    if not pipelines:
      raise UserError(f"{workdir}: kohya's layout is that of Stable Diffusion 1 and 2, not of {family!r}")
    return pipelines[0]
  for library in _LIBRARIES:
    # Of transformers its version 5 has other names in memory than in files; these come second.
    if named := [layout for name, layout in layouts if name == library]:
      return named[:2][-1]
  raise UserError(f'{workdir}: PEFT adapts networks of {", ".join(_LIBRARIES)}; {family!r} is in none of them')


def _whole_layers(layout: Layout, own: Mapping[str, np.ndarray], trained: set[str]) -> dict[str, np.ndarray]:
  """The arrays of theirs that hold parameters trained as a whole, by name."""
  shapes = {path: x.shape for path, x in own.items()}
  names = []
  for name, array in arrays(layout, shapes).items():
    inside = {row.ours for row in array.rows} & trained
    if inside and len(inside) < len({row.ours for row in array.rows}):
      raise UserError(f'{min(inside)} is trained, but only a part of {name}, which PEFT trains as a whole')
    names += [name] if inside else []
  written = write(layout, own, None) if names else {}
  return {name: np.asarray(written[name], np.float32) for name in names}


def _write_peft(
  folder: pathlib.Path, adapters: Mapping[str, LowRank], scale: float, whole: Mapping[str, np.ndarray]
) -> None:
  parts = {name.partition('.')[0] for name in (*adapters, *whole)}
  networks = sorted(parts) if parts <= set(_NETWORKS) else ['']
  for network in networks:
    start = f'{network}.' if network else ''
    own = {name.removeprefix(start): adapter for name, adapter in adapters.items() if name.startswith(start)}
    rest = {name.removeprefix(start): x for name, x in whole.items() if name.startswith(start)}
    tensors, config = export.peft(own, scale, rest)
    target = folder / network if len(networks) > 1 else folder
    write_tensors(target / 'adapter_model.safetensors', tensors)
    (target / CONFIG).write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')
