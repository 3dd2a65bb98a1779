"""Checkpoints that others published become workdirs, and workdirs become files that others read."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

from fmcv_jax import config as config_lib
from fmcv_jax.errors import UserError, nearest
from fmcv_jax.experiment import Run, resolve
from fmcv_jax.parallel.rules import path_of
from fmcv_jax.pretrained.families import FAMILIES, family_of, recognize
from fmcv_jax.pretrained.layout import check, read, write
from fmcv_jax.pretrained.tensors import open_tensors, write_safetensors
from fmcv_jax.train.checkpoint import Store, write_json
from fmcv_jax.train.state import init_state


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
  config = resolve(config_lib.override(config_lib.plain(FAMILIES[name].config(found)), overrides))
  run = Run(config, to)
  objective = run.experiment.objective
  abstract = jax.eval_shape(lambda: objective.init(jax.random.key(0))[0])
  flat, treedef = jax.tree_util.tree_flatten_with_path(abstract)
  shapes = {path_of(path): leaf.shape for path, leaf in flat}
  check(layout, tensors, shapes, file)
  shardings = dict(zip(shapes, jax.tree.leaves(run.placement.parameters(abstract)), strict=True))
  values = {}
  for path, value in track(
    read(layout, tensors, shapes, file),
    'reading',
    len(shapes),
    console=console,
    transient=True,
    disable=len(shapes) < 1,
  ):
    values[path] = jax.device_put(value, shardings[path])
  params = jax.tree_util.tree_unflatten(treedef, [values[path] for path in shapes])
  # An import is step 0 of a run that learns nothing.
  born = jax.eval_shape(lambda: init_state(objective, run.tx, 0, ema=False))
  counters = {
    name: jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), run.placement.replicated())
    for name, leaf in dataclasses.asdict(born).items()
    if name in ('step', 'skipped', 'streak', 'rng')
  }
  state = born.replace(params=params, opt_state=run.tx.init(params), **counters)
  run.workdir.mkdir(parents=True, exist_ok=True)
  write_json(run.workdir / 'config.json', config)
  store = Store(run.workdir)
  store.save(state, {'imported': {'file': str(file), 'family': name}}, {})
  store.wait()
  store.close()
  count = sum(int(np.prod(shape)) for shape in shapes.values())
  console.print(f'{count / 1e6:.1f} M parameters of {name!r} in {to}', highlight=False)
  return run


def export_checkpoint(workdir: str, to: str, format: str, step: int | None = None) -> None:
  """Writes what a workdir has learnt (the average where one is kept) as safetensors with the names of `format`."""
  run = Run.reopen(workdir)
  params = {
    path_of(path): np.asarray(leaf, np.float32)
    for path, leaf in jax.tree_util.tree_flatten_with_path(_network_params(run, step))[0]
  }
  family = family_of({path: x.shape for path, x in params.items()})
  layouts = [layout for name, layout in FAMILIES[family].layouts if name == format]
  if not layouts:
    known = sorted({name for name, _ in FAMILIES[family].layouts})
    raise UserError(f'--format {format}: unknown for a model such as {family!r}; {nearest(format, known)}')
  written, complaints = None, []
  for layout in layouts:
    try:
      written = write(layout, params)
      break
    except UserError as error:
      complaints.append(error)
  if written is None:
    raise UserError(f'{workdir}: cannot be written as {format}: {complaints[0]}')
  write_safetensors(pathlib.Path(to), written)
  Console(stderr=True).print(f'{len(written)} arrays in {to}', highlight=False)


def _network_params(run: Run, step: int | None) -> Any:
  subject, _ = run.restored_subject(step)
  return run.experiment.objective.whole(subject.params, subject.extra)
