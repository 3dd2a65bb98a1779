"""Checkpoints that others published become workdirs, and workdirs become files that others read."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

from fmcv_jax import config as config_lib
from fmcv_jax.errors import UserError, nearest
from fmcv_jax.experiment import Run, keep_tokenizer, resolve, trained_tree
from fmcv_jax.parallel.rules import path_of
from fmcv_jax.pretrained.families import FAMILIES, family_of, recognize
from fmcv_jax.pretrained.layout import Shape, check, read, write
from fmcv_jax.pretrained.tensors import open_tensors, write_tensors
from fmcv_jax.train.checkpoint import Store, write_json
from fmcv_jax.train.state import TrainState
from fmcv_jax.train.warm_start import Part, begin_with

BESIDE = ('discriminator', 'projector')  # parameters that training alone needs


def import_checkpoint(file: str, to: str, family: str | None = None, overrides: Sequence[str] = ()) -> Run:
  """Makes a workdir `to` of a published checkpoint, which every command takes as that of a run; returns the run.

  file      what `open_tensors` reads
  family    a key of FAMILIES; None to judge by names and shapes
  overrides 'objective.network.heads=8' and the like: what a file does not tell

  UserError, and nothing written, for what is not whole, of no known family, or of other shapes than its network.
  """
  console = Console(stderr=True)
  if pathlib.Path(to).exists() and any(pathlib.Path(to).iterdir()):
    raise UserError(f'--to {to}: is there and not empty; give a new folder')
  tensors = open_tensors(file)
  name, layout, found = recognize(tensors, family, file)
  if family is None:
    console.print(f'{file} looks like {name!r}; if it is another, name it by --as', highlight=False)
  own = FAMILIES[name].config(found)
  config = resolve(config_lib.override(config_lib.plain(own | _tokenizer_beside(file, own)), overrides))
  run = Run(config, to)
  sources: Mapping[str, Part] = run.experiment.init_from
  leaves = _leaves(run)
  shapes = {path.removeprefix('params/'): leaf.shape for path, (leaf, _) in leaves.items() if _is_held(path, sources)}
  _check_parts(file, name, shapes, found)
  network = getattr(run.experiment.objective, 'network', None)
  check(layout, tensors, shapes, network, file)
  values = {path: _zeros(*leaf) for path, leaf in leaves.items() if not _is_held(path, sources)}
  arrays = read(layout, tensors, shapes, network, file)
  for part, value in track(arrays, 'reading', len(shapes), console=console, transient=True):
    path = part if part.startswith('extra/') else f'params/{part}'
    values[path] = jax.device_put(value, leaves[path][1])
  state = _untrained_state(run, [values[path] for path in leaves])
  if sources:
    state = begin_with(state, sources, trained_tree)
  _write(run, state, {'file': str(file), 'family': name})
  count = sum(math.prod(shape) for shape in shapes.values())
  console.print(f'{count / 1e6:.1f} M parameters of {name!r} in {to}', highlight=False)
  return run


def _leaves(run: Run) -> dict[str, tuple[jax.ShapeDtypeStruct, jax.sharding.Sharding]]:
  """All that a run learns or carries along, by path, in the order of its tree."""
  flat = jax.tree_util.tree_flatten_with_path(_learnt(run.abstract_state))[0]
  placed = jax.tree.leaves(_learnt(run.shardings))
  return {path_of(path): (leaf, sharding) for (path, leaf), sharding in zip(flat, placed, strict=True)}


def _learnt(state: TrainState) -> dict[str, Any]:
  return {'params': state.params, 'extra': state.extra}


def _is_held(path: str, sources: Mapping[str, Part]) -> bool:
  """Whether a file is to hold this: what a network has learnt, but for what comes from elsewhere.

  Arrays of `extra` that are no part of a network are born.
  """
  born = path.startswith('extra/') and path.count('/') == 1
  return not born and not any(f'{path}/'.startswith(f'{target}/') for target in sources)


def _check_parts(file: str, name: str, shapes: Mapping[str, Shape], found: Mapping[str, Shape]) -> None:
  """UserError where a file has nothing of a network that the run carries along, such as an autoencoder."""

  def parts(paths: Mapping[str, Shape]) -> set[str]:
    return {path.split('/')[1] for path in paths if path.startswith('extra/')}

  if apart := sorted(parts(shapes) - parts(found)):
    raise UserError(
      f'{file}: {name!r} also needs what is not in it: {", ".join(apart)}; import that to a folder of its own, '
      f'and give --config.init_from.extra/{apart[0]}.workdir=FOLDER, with .part=params/... where it is there'
    )


def _untrained_state(run: Run, values: Sequence[jax.Array]) -> TrainState:
  """Step 0 of a run that learns nothing, with these values in the order of `_leaves`."""
  abstract = run.abstract_state
  tree = jax.tree.unflatten(jax.tree.structure(_learnt(abstract)), values)
  counters = {
    name: _zeros(getattr(abstract, name), run.placement.replicated()) for name in ('step', 'skipped', 'streak', 'rng')
  }
  return abstract.replace(**tree, opt_state=run.tx.init(tree['params']), ema=None, **counters)


def _write(run: Run, state: TrainState, imported: Mapping[str, str]) -> None:
  run.workdir.mkdir(parents=True, exist_ok=True)
  write_json(run.workdir / 'config.json', run.config)
  keep_tokenizer(run)
  store = Store(run.workdir)
  store.save(state, {'imported': imported}, {})
  store.wait()
  store.close()


def _tokenizer_beside(file: str, config: dict[str, Any]) -> dict[str, Any]:
  """The tokenizer that lies in a folder with a model whose texts no tokenizer of ours reads: SigLIP's."""
  text = config['objective']['network'].get('text')
  if text is None or 'tokenizer' in config:
    return {}
  known: dict[str, dict[str, Any]] = {
    'spiece.model': {'name': 'sentencepiece'},
    'tokenizer.json': {'name': 'tokenizer_json', 'end': '<eos>', 'lowercase': True},
  }
  for name, spec in known.items():
    beside = pathlib.Path(file) / name
    if beside.is_file():
      return {'tokenizer': {**spec, 'file': str(beside), 'length': text['length']}}
  return {}


def export_checkpoint(workdir: str, to: str, format: str, step: int | None = None) -> None:
  """Writes what a workdir has learnt, the average where one is kept, with the names of `format`.

  `to` is a file, .safetensors or .npz, or, where the format is of several networks in a folder, that folder.
  """
  run = Run.reopen(workdir)
  subject, _ = run.restored_subject(step)
  objective = run.experiment.objective
  params = _arrays(objective.whole(subject.params, subject.extra))
  params = {path: x for path, x in params.items() if path.split('/')[0] not in BESIDE}
  variant = run.config['objective'].get('network', {}).get('variant', '')
  family = family_of({path: x.shape for path, x in params.items()}, variant)
  layouts = [layout for name, layout in FAMILIES[family].layouts if name == format]
  if not layouts:
    known = sorted({name for name, _ in FAMILIES[family].layouts})
    raise UserError(f'--format {format}: unknown for a model such as {family!r}; {nearest(format, known)}')
  frozen = {f'extra/{path}': x for path, x in _arrays(subject.extra).items() if '/' in path}
  written, complaints = None, []
  for layout in layouts:
    several = any(row.ours.startswith('extra/') for row in layout.rows)
    try:
      written = write(layout, params | (frozen if several else {}), getattr(objective, 'network', None))
      break
    except UserError as error:
      complaints.append(error)
  if written is None:
    raise UserError(f'{workdir}: cannot be written as {format}: {complaints[0]}')
  for prefix, file in layout.files or (('', ''),):
    of_file = {name.removeprefix(prefix): x for name, x in written.items() if name.startswith(prefix)}
    write_tensors(pathlib.Path(to) / file, of_file)
  Console(stderr=True).print(f'{len(written)} arrays in {to}', highlight=False)


def _arrays(tree: Any) -> dict[str, np.ndarray]:
  flat = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {path_of(path): np.asarray(leaf, np.float32) for path, leaf in flat}


def _zeros(leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.Array:
  return jnp.zeros(leaf.shape, leaf.dtype, device=sharding)
