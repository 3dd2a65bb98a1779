"""Imports published checkpoints into workdirs, and exports workdirs to files of other libraries."""

import json
import math
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from fmcv_jax import config as config_lib
from fmcv_jax.apps.package import package
from fmcv_jax.console import make_console
from fmcv_jax.errors import UserError, did_you_mean
from fmcv_jax.evaluate.base import EvaluatedModel
from fmcv_jax.experiment import resolve
from fmcv_jax.inference.class_names import class_names_of
from fmcv_jax.objectives.base import Objective
from fmcv_jax.objectives.encoder import PretrainedEncoder
from fmcv_jax.objectives.outputs import encoder_of
from fmcv_jax.parallel.rules import path_of
from fmcv_jax.pretrained import (
  export_diffusers,
  export_open_clip,
  export_timm,
  export_transformers,
  hub_classes,
  hub_config,
)
from fmcv_jax.pretrained.arrays import Tensors
from fmcv_jax.pretrained.families import FAMILIES, family_of, variant_of
from fmcv_jax.pretrained.hub_file import Findings
from fmcv_jax.pretrained.layout import Layout, Shape, check, has_places, heads_in, read, renamed, with_heads, write
from fmcv_jax.pretrained.recognition import recognize
from fmcv_jax.pretrained.shape_inference import name_of
from fmcv_jax.pretrained.tensors import TORCH, open_tensors, write_tensors
from fmcv_jax.registry import KINDS
from fmcv_jax.run import CLASSES, Run, evaluated_as, keep_tokenizer, load_trained_params
from fmcv_jax.train.checkpoint import Checkpointer
from fmcv_jax.train.state import TrainState
from fmcv_jax.train.storage import write_json
from fmcv_jax.train.warm_start import InitFrom, load_partial_state

# File name of the arrays in the folder that a library reads.
WEIGHTS = {'diffusers': 'diffusion_pytorch_model.safetensors', 'open_clip': 'open_clip_model.safetensors'}


def import_checkpoint(file: str, to: str, family: str | None = None, overrides: Sequence[str] = ()) -> Run:
  """Imports a published checkpoint into a new workdir `to`, which every command accepts; returns the run.

  file       a file or folder that `open_tensors` reads
  family     a key of FAMILIES; None detects it from names and shapes
  overrides  such as 'objective.network.num_heads=8', for hyper-parameters that the file does not contain; the
             config.json of a folder is read

  Raises UserError, and writes nothing, if the checkpoint is incomplete, of an unknown family, or if its shapes differ
  from the network's.
  """
  console = make_console(stderr=True)
  check_new(to)
  match = matched(open_tensors(file), file, to, family, overrides)
  if family is None:
    console.print(f'{file}: detected family {match.name!r}; override with --as', highlight=False, soft_wrap=True)
  for line in (*match.notes, *match.findings.lines()):
    console.print(line, highlight=False, soft_wrap=True, markup=False)
  run, sources = match.run, match.run.experiment.init_from
  values: dict[str, Any] = dict(match.leaves)  # parameters from init_from stay abstract until they are loaded
  arrays = read(match.layout, match.tensors, match.shapes, match.network, file)
  for part, value in track(arrays, 'reading', len(match.shapes), console=console, transient=True):
    path = part if part.startswith('extra/') else f'params/{part}'
    values[path] = jax.device_put(value, match.leaves[path].sharding)
  state = untrained_state(run, list(values.values()))
  if sources:
    state = load_partial_state(state, sources, load_trained_params)
  try:
    write_run(run, state, {'file': str(file), 'family': match.name})
    if names := _class_names(match):
      write_json(run.workdir / CLASSES, list(names))
      shown = f'{", ".join(names[:3])}{", ..." if len(names) > 3 else ""}'
      console.print(
        f'read: config.json: {len(names)} class names ({shown})', highlight=False, soft_wrap=True, markup=False
      )
  except UserError:
    run.workdir.rmtree(missing_ok=True)  # it was new or empty: the same command can be run again
    raise
  count = sum(math.prod(shape) for shape in match.shapes.values())
  console.print(f'{count / 1e6:.1f} M parameters of {match.name!r} in {to}', highlight=False, soft_wrap=True)
  return run


class Match(NamedTuple):
  """A recognized checkpoint: family `name`, layout, and a run of its network.

  tensors  arrays of the file, by the names of the layout
  leaves   path -> shape, dtype and sharding of every array in `params` and `extra`, in tree order
  shapes   path without 'params/' -> shape, of the arrays that the file must contain
  findings  settings read from the files next to the weights, and those that were assumed
  """

  name: str
  layout: Layout
  tensors: Tensors
  run: Run
  leaves: Mapping[str, jax.ShapeDtypeStruct]
  shapes: Mapping[str, Shape]
  findings: Findings

  @property
  def network(self) -> Any:
    """The network of the objective; None for an objective without a field `network`."""
    return getattr(self.run.experiment.objective, 'network', None)

  @property
  def notes(self) -> list[str]:
    """Notes for the user: arrays that were selected or ignored, and a missing tokenizer."""
    own, e = list(self.tensors.notes), self.run.experiment
    if 'tokens' in e.objective.example_batch and e.tokenizer is None:
      own.append('no known tokenizer matches its vocabulary; set one with --config.tokenizer.name=...')
    return own


def matched(
  tensors: Tensors, file: str, to: str | None = None, family: str | None = None, overrides: Sequence[str] = ()
) -> Match:
  """Recognizes a checkpoint and checks its names and shapes against the network; reads no arrays, writes nothing."""
  name, form, layout, found, tensors, own = recognize(tensors, family, file)
  folder = hub_config.folder_of(pathlib.Path(file))
  findings = hub_config.read(folder, form, own, _objective(own))
  for prefix, heads in heads_in(layout, tensors).items():
    findings.overrides[f'objective.network.{prefix.replace("/", ".")}num_heads'] = heads
    findings.said.append(f'arrays of attention: {prefix}num_heads={heads}')
  layout = renamed(layout, findings.renamed)
  run = Run(resolve(hub_config.configured(own, folder, findings, overrides)), to)
  _check_vocabulary(file, run)
  if assumed := hub_config.unsaid(run.config, run.experiment.objective, findings, overrides):
    findings.assumed.append(f'no file says: {", ".join(assumed)}')
  layout = with_heads(layout, lambda path: _heads(run.experiment.objective, path))
  with config_lib.config_path_context(f'{file}: config.objective'):
    leaves, sources = _leaves(run), run.experiment.init_from
  shapes = {path.removeprefix('params/'): leaf.shape for path, leaf in leaves.items() if _is_held(path, sources)}
  _check_parts(file, name, layout, shapes, found)
  match = Match(name, layout, tensors, run, leaves, shapes, findings)
  check(layout, tensors, shapes, match.network, file)
  return match


def _class_names(match: Match) -> tuple[str, ...]:
  """The names that the files give, if there is one for each class of the network."""
  names = match.findings.class_names
  return names if len(names) == getattr(match.network, 'num_classes', 0) else ()


def _check_vocabulary(file: str, run: Run) -> None:
  """Raises UserError if the tokenizer has more ids than the text encoder's embedding table has rows."""
  objective, tokenizer = run.experiment.objective, run.experiment.tokenizer
  network = getattr(objective, 'network', None)
  condition = getattr(objective, 'text_condition', None)
  text = condition.encoder if condition is not None else getattr(network, 'text', network)
  rows = getattr(text, 'vocab_size', None)
  if tokenizer is not None and rows is not None and tokenizer.vocab_size > rows:
    raise UserError(
      f'{file}: the embedding table has {rows} rows, but the tokenizer {run.config["tokenizer"]["name"]} has '
      f'{tokenizer.vocab_size}; set the matching one with --config.tokenizer.name=...'
    )


def _objective(config: Mapping[str, Any]) -> Objective:
  resolved = resolve(config_lib.to_plain_dict(config))
  return config_lib.build(Objective, resolved['objective'], KINDS, 'config.objective')


def _heads(objective: Any, path: str) -> int:
  """Number of heads of the attention at a path of the parameters."""
  tower = objective.network
  if path.startswith(('image/', 'text/')):
    tower = getattr(tower, path.partition('/')[0])
  return tower.stack.block.num_heads


def _leaves(run: Run) -> dict[str, jax.ShapeDtypeStruct]:
  placed = jax.tree.map(_placed, _trained_arrays(run.abstract_state), _trained_arrays(run.shardings))
  return {path_of(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(placed)[0]}


def _trained_arrays(state: TrainState) -> dict[str, Any]:
  return {'params': state.params, 'extra': state.extra}


def _is_held(path: str, sources: Mapping[str, InitFrom]) -> bool:
  """True if the file must contain this array: every array of a network, except those that init_from loads.

  Arrays directly in `extra`, outside a network, are initialized.
  """
  initialized = path.startswith('extra/') and path.count('/') == 1
  return not initialized and not any(f'{path}/'.startswith(f'{target}/') for target in sources)


def _check_parts(file: str, name: str, layout: Layout, shapes: Mapping[str, Shape], found: Mapping[str, Shape]) -> None:
  """Raises UserError if a frozen network of the run, such as an autoencoder, is missing from the file."""

  def parts(paths: Mapping[str, Shape]) -> set[str]:
    return {path.split('/')[1] for path in paths if path.startswith('extra/')}

  if apart := sorted(parts(shapes) - parts(found)):
    placed = {row.ours for row in layout.rows}  # of a file that could hold it, the first array is named
    theirs = next(
      (name_of(layout, path) for path in shapes if path in placed and path.startswith(f'extra/{apart[0]}/')), ''
    )
    missing = f'{theirs} is missing: ' if theirs else ''
    raise UserError(
      f'{file}: {missing}{name!r} also needs {", ".join(apart)}, which the file does not contain; import it into '
      f'another folder and set --config.init_from.extra/{apart[0]}.workdir=FOLDER (and .part=params/... for a part)'
    )


def untrained_state(run: Run, values: Sequence[Any]) -> TrainState:
  """The state at step 0, with these arrays of `params` and `extra` in tree order."""
  abstract = run.abstract_state
  tree = jax.tree.unflatten(jax.tree.structure(_trained_arrays(abstract)), values)
  counters = {
    name: _placed(getattr(abstract, name), run.placement.replicated()) for name in ('step', 'skipped', 'streak', 'rng')
  }
  return abstract.replace(**tree, opt_state=run.tx.init(tree['params']), ema=None, **counters)


def check_new(to: str) -> None:
  """Raises UserError for a folder with something in it."""
  if pathlib.Path(to).exists() and any(pathlib.Path(to).iterdir()):
    raise UserError(f'--to {to}: already exists and is not empty; choose a new folder')


def write_run(run: Run, state: TrainState, imported: Mapping[str, Any]) -> None:
  """Writes a workdir with a state at step 0; `imported` says where it is from. Arrays that are abstract are zeros."""
  state = jax.tree.map(lambda x: _zeros(x) if isinstance(x, jax.ShapeDtypeStruct) else x, state)
  run.workdir.mkdir(parents=True, exist_ok=True)
  write_json(run.workdir / 'config.json', run.config)
  keep_tokenizer(run)
  store = Checkpointer(run.workdir)
  store.save(state, {'imported': imported})
  store.wait()
  store.close()


def export_checkpoint(workdir: str, to: str, format: str, step: int | None = None) -> None:
  """Exports the trained parameters of a workdir (their EMA where there is one) under the names of `format`.

  `to` is a .safetensors or .npz file for the arrays alone, or a folder that the library of the format opens, with its
  configs of the network, the image transform and the tokenizer. A pipeline of several networks needs a folder. 'fmcv'
  writes a folder for this package, from any model.
  Raises UserError for a model that the format cannot represent.
  """
  if format == 'fmcv':
    size = package(workdir, to, step)
    make_console(stderr=True).print(f'{size / 1e6:.1f} MB of parameters in {to}', highlight=False, soft_wrap=True)
    return
  run = Run.reopen(workdir)
  subject, _ = run.restored_model(step)
  objective, params, omitted = _exported(run, subject)
  family = family_of({path: x.shape for path, x in params.items()}, variant_of(run.config['objective']))
  layouts = [layout for name, layout in FAMILIES[family].layouts if name == format]
  if not layouts:
    known = sorted({'fmcv', *(name for name, _ in FAMILIES[family].layouts)})
    raise UserError(f'--format {format}: not supported for family {family!r}; {did_you_mean(format, known)}')
  frozen = {f'extra/{path}': x for path, x in _arrays(subject.extra).items() if '/' in path}

  def held(layout: Layout) -> dict[str, np.ndarray]:
    several = any(row.ours.startswith('extra/') for row in layout.rows)
    return params | (frozen if several else {})

  layouts = [with_heads(layout, lambda path: _heads(objective, path)) for layout in layouts]
  fits = (layout for layout in layouts if has_places(layout, {path: x.shape for path, x in held(layout).items()}))
  layout = next(fits, layouts[0])
  try:
    written = write(layout, held(layout), objective.network)
  except UserError as error:
    raise UserError(f'{workdir}: cannot be written as {format}: {error}') from error
  if pathlib.Path(to).suffix in TORCH:
    raise UserError(f'--to {to}: only .safetensors, .npz and folders are written')
  target, is_tower = pathlib.Path(to), family.endswith(('_image', '_text'))
  if is_tower and target.suffix not in ('.safetensors', '.npz'):
    raise UserError(f'--to {to}: {family!r} is a single encoder; give a file name ending in .safetensors or .npz')
  more = {} if is_tower else _companions(format, family, run, objective, whole=bool(layout.files))
  if target.suffix in ('.safetensors', '.npz'):
    if layout.files:
      raise UserError(f'--to {to}: {format} stores several networks; --to must be a folder')
    write_tensors(target, written)
  else:
    _make_folder(target)
    for prefix, file in layout.files or (('', WEIGHTS.get(format, 'model.safetensors')),):
      of_file = {name.removeprefix(prefix): x for name, x in written.items() if name.startswith(prefix)}
      write_tensors(target / file, of_file)
    for name, content in more.items():
      _write_companion(target / name, content)
  console = make_console(stderr=True)
  for line in export_open_clip.differences(family, objective) if format == 'open_clip' else ():
    console.print(line, highlight=False, soft_wrap=True)
  if omitted:
    line = f'not exported, used in training only: {", ".join(omitted)} (--format fmcv writes everything)'
    console.print(line, highlight=False, soft_wrap=True)
  console.print(f'{len(written)} arrays in {to}', highlight=False, soft_wrap=True)


def _exported(run: Run, subject: EvaluatedModel) -> tuple[Any, dict[str, np.ndarray], list[str]]:
  """The objective, its parameters by path, and what is omitted: subtrees that are used in training only.

  Of self-distillation the encoder.
  """
  outer = run.experiment.objective
  objective = getattr(outer, 'objective', outer)
  params = _arrays(outer.full_params(subject.params, subject.extra))
  top = {path.split('/')[0] for path in params}
  if 'head/prototypes' in params:
    encoder = encoder_of(outer.outputs())(subject.params, subject.extra)
    kept = PretrainedEncoder(encoder.network, encoder.normalize)
    return kept, _arrays(encoder.params), sorted(top - {'encoder'})
  omitted = sorted(top & set(objective.training_only))
  params = {path: x for path, x in params.items() if path.split('/')[0] not in omitted}
  return objective, params, omitted


def _companions(format: str, family: str, run: Run, objective: Any, *, whole: bool) -> export_transformers.Files:
  """Config files that the library of a format expects next to the arrays: file name -> content."""
  tokenizer, image = run.experiment.tokenizer, evaluated_as(run)
  match format:
    case 'transformers':
      files = export_transformers.files(family, objective, image, tokenizer)
    case 'diffusers':
      files = export_diffusers.files(family, objective, tokenizer, whole=whole)
    case 'timm':
      files = export_timm.files(objective, image)
    case 'open_clip':
      files = export_open_clip.files(family, objective, image)
    case _:
      return {}
  classes = getattr(objective.network, 'num_classes', 0)
  names = class_names_of(run) if classes else ()
  if format in ('timm', 'transformers') and classes and len(names) == classes:
    files = {**files, 'config.json': hub_classes.with_names(files['config.json'], format, names)}
  return files


def _make_folder(folder: pathlib.Path) -> None:
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f'--to {folder}: cannot create the folder ({error.strerror})') from error


def _write_companion(file: pathlib.Path, content: Any) -> None:
  file.parent.mkdir(parents=True, exist_ok=True)
  if isinstance(content, pathlib.Path):
    shutil.copy(content, file)
  else:
    file.write_text(content if isinstance(content, str) else json.dumps(content, indent=2) + '\n', encoding='utf-8')


def _arrays(tree: Any) -> dict[str, np.ndarray]:
  flat = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {path_of(path): np.asarray(leaf, np.float32) for path, leaf in flat}


def _placed(leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _zeros(leaf: jax.ShapeDtypeStruct) -> jax.Array:
  return jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
