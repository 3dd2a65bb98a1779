"""A config made real: objective, optimizer, mesh, shardings and the model of a workdir."""

import dataclasses
import functools
import json
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
from etils import epath

from fmcv_jax import config as config_lib
from fmcv_jax.data.pillow_resize import PillowResize, ResizeToMultiple
from fmcv_jax.data.prompts import Prompted
from fmcv_jax.data.tokenizers import KEPT, Bpe
from fmcv_jax.data.transforms import ImageTransform, Resize, ResizeCrop, ResizePad, ScaleJitter
from fmcv_jax.errors import UserError
from fmcv_jax.evaluate.base import EvaluatedModel
from fmcv_jax.experiment import Experiment, resolve
from fmcv_jax.objectives.base import Objective, size_of
from fmcv_jax.parallel.mesh import make_mesh
from fmcv_jax.parallel.rules import AXIS_RULES, Placement
from fmcv_jax.pretrained import packaged
from fmcv_jax.registry import KINDS
from fmcv_jax.train.checkpoint import Checkpointer
from fmcv_jax.train.flops import matmul_flops
from fmcv_jax.train.state import TrainState, init_state, state_shardings, trace_state
from fmcv_jax.train.step import StepFn, make_train_step
from fmcv_jax.train.storage import write_json

logger = logging.getLogger(__name__)

CLASSES = 'classes.json'  # names of the training classes by label


class Run:
  """A config made real on the devices of this process group: what train, evaluate and the apps all begin with."""

  def __init__(
    self,
    config: dict[str, Any],
    workdir: str | pathlib.Path | None = None,
    devices: Sequence[jax.Device] | None = None,
  ):
    self.config = config
    self._workdir = epath.Path(workdir) if workdir is not None else None
    e: Experiment = config_lib.build(Experiment, use_saved_tokenizer(config, self._workdir), KINDS)
    with config_lib.config_path_context('config.objective'):
      objective = _in_run(e.objective, e)
    self.experiment = e = dataclasses.replace(e, objective=objective, data=e.data.padded_as(objective.example_batch))
    self.placement = Placement(make_mesh(e.mesh, devices), e.rules)
    with config_lib.config_path_context('config.optimizer.schedule'):
      self.tx = e.optimizer.make(e.train.steps) if e.train.steps else optax.identity()
    self._check_batches()

  @classmethod
  def reopen(cls, workdir: str | pathlib.Path, overrides: Sequence[str] = ()) -> 'Run':
    """The run of a workdir or of an exported folder; by default on all devices as replicas."""
    path = epath.Path(workdir) / 'config.json'
    if not path.exists():
      raise UserError(f'{workdir}: no run here (no config.json); give the --workdir of a training run')
    saved = json.loads(path.read_text())
    saved['mesh'] = {}
    # Resolved before the overrides, whose names are those of today, even where the file has earlier ones.
    return cls(resolve(config_lib.override(resolve(config_lib.to_plain_dict(saved)), overrides)), workdir)

  @property
  def workdir(self) -> epath.Path:
    """The folder of the run, local or gs://; ValueError for a config that is only looked at."""
    if self._workdir is None:
      raise ValueError('this run has no workdir')
    return self._workdir

  def init(self) -> TrainState:
    """The initial state of training, on the mesh."""
    e = self.experiment
    return init_state(e.objective, self.tx, e.seed, ema=e.train.ema_decay is not None)

  @functools.cached_property
  def _traced(self) -> Any:
    e = self.experiment
    return trace_state(e.objective, self.tx, e.seed, ema=e.train.ema_decay is not None)

  @property
  def abstract_state(self) -> TrainState:
    """Shapes and dtypes of the state; nothing is allocated."""
    return self._traced[0]

  @functools.cached_property
  def shardings(self) -> TrainState:
    """Shardings of every array of the training state."""
    state, rows = self._traced
    return state_shardings(state, self.placement, rows, self.experiment.objective.frozen_networks)

  @property
  def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the global training batch."""
    e = self.experiment
    return {
      name: jax.ShapeDtypeStruct((e.train.batch_size, *x.shape), x.dtype)
      for name, x in e.objective.example_batch.items()
    }

  def train_step(self) -> StepFn:
    """The jitted train step of the config; built once."""
    e = self.experiment
    return make_train_step(
      e.objective,
      self.tx,
      e.optimizer.schedule(e.train.steps),
      self.placement,
      self.shardings,
      self.placement.batch(self.batch_shapes),
      microbatches=e.train.grad_accum_steps,
      ema=e.train.ema_decay,
    )

  def subject(self) -> EvaluatedModel:
    """The model under evaluation, without parameters: see `restored_model`."""
    e = self.experiment
    return EvaluatedModel(
      e.objective.outputs(),
      self.placement,
      e.tokenizer,
      reopen=lambda model: Run.reopen(packaged.locate(model)).restored_model()[0],
      image_size=e.objective.input_size,
      image=evaluated_as(self),
      example_batch=e.objective.example_batch,
      class_names=self.class_names,
    )

  def class_names(self) -> Sequence[str]:
    """The names of the training classes by label; empty where the training data has none, or is not here.

    The names that the run wrote to its workdir are used, whatever the data holds today.
    """
    if self._workdir is not None and (kept := self._workdir / CLASSES).exists():
      return tuple(json.loads(kept.read_text()))
    source = self.experiment.data.source
    try:
      return source.names
    except (UserError, OSError) as error:
      logger.warning(
        'labels are taken as they are: the training data, which has the class names, is not here: %s', error
      )
      return ()

  def resolve_step(self, step: int | None = None) -> int:
    """The step that `restored_model` takes; UserError for one that does not exist."""
    if (file := self.workdir / packaged.PARAMS).exists():
      only = packaged.step_of(file)
      if step not in (None, only):
        raise UserError(f'{self.workdir}: has step {only} only, not {step}')
      return only
    checkpointer = Checkpointer(self.workdir, self.experiment.checkpoint, create=False)
    step = checkpointer.resolve_step(step)
    checkpointer.close()
    return step

  def restored_model(self, step: int | None = None) -> tuple[EvaluatedModel, int]:
    """The trained model of this run's workdir at `step` (default: the newest), and that step."""
    subject, abstract, shardings = self.subject(), self.abstract_state, self.shardings
    target = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      {'params': abstract.params, 'extra': abstract.extra},
      {'params': shardings.params, 'extra': shardings.extra},
    )
    step = self.resolve_step(step)
    if (file := self.workdir / packaged.PARAMS).exists():
      stored = packaged.read_params(file, target)
      subject.params, subject.extra = stored['params'], stored['extra']
      return subject, step
    checkpointer = Checkpointer(self.workdir, self.experiment.checkpoint, create=False)
    subject.params, subject.extra = checkpointer.restore_params(target['params'], step, extra=target['extra'])
    checkpointer.close()
    return subject, step

  def step_flops(self) -> float:
    """Model FLOPs of one step: the matrix products of the loss and its gradient, in a twin that recomputes nothing."""
    spec = {'objective': self.config['objective']}
    remat = config_lib.paths_of(spec['objective'], 'remat', 'objective')
    spec = config_lib.override(config_lib.to_plain_dict(spec), [f'{path}=none' for path in remat])
    objective: Objective = config_lib.build(Objective, spec['objective'], KINDS, 'config.objective')
    objective = _in_run(objective, self.experiment)
    return float(
      matmul_flops(
        jax.grad(lambda params, batch, extra: objective.loss(params, batch, jax.random.key(0), extra).value),
        self.abstract_state.params,
        self.batch_shapes,
        self.abstract_state.extra,
      )
    )

  def _check_batches(self) -> None:
    e, mesh = self.experiment, self.placement.mesh
    axes = {**AXIS_RULES, **e.rules.axes}['batch']
    ways = int(np.prod([mesh.shape[axis] for axis in axes]))
    for path, batch, pieces in [
      ('train.batch_size', e.train.batch_size, e.train.grad_accum_steps),
      *((f'evaluators.{name}.batch_size', evaluator.batch_size, 1) for name, evaluator in e.evaluators.items()),
    ]:
      if batch % (ways * pieces):
        parts = ' x '.join(f'{axis}={mesh.shape[axis]}' for axis in axes if mesh.shape[axis] > 1) or '1 device'
        more = f' times {pieces} microbatches' if pieces > 1 else ''
        raise UserError(f'config.{path}: {batch} is not divisible by {parts}{more}; use a multiple of {ways * pieces}')


def evaluated_as(run: Run) -> ImageTransform | None:
  """Evaluation transform of a model: data.image of the config if it is deterministic; of scale_jitter the whole image,
  padded; otherwise resize and center crop.

  None for a model without image inputs.
  """
  if isinstance(run.experiment.data.image, PillowResize | ResizeToMultiple):
    return run.experiment.data.image
  objective: Any = run.experiment.objective
  image, given = objective.example_batch.get('image'), run.experiment.data.image
  size = size_of(image.shape) if image is not None else getattr(getattr(objective, 'network', None), 'image_size', None)
  if size is None:
    return None
  if isinstance(given, Resize | ResizeCrop | ResizePad):
    return dataclasses.replace(given, size=size)
  if isinstance(given, ScaleJitter):
    return ResizePad(size, given.fill, given.interpolation)
  return ResizeCrop(size, crop=1.0)


def _in_run(objective: Objective, e: Experiment) -> Objective:
  """The objective with what a run adds to it: the number of steps and the tokenizer."""
  objective = objective.with_total_steps(e.train.steps)
  return objective if e.tokenizer is None else objective.with_tokenizer(e.tokenizer)


def use_saved_tokenizer(config: dict[str, Any], workdir: epath.Path | None) -> dict[str, Any]:
  """The config with a tokenizer of this run's own, trained or from a file, read from the file that the run keeps."""
  spec = config.get('tokenizer')
  if not spec or workdir is None:
    return config
  words, name = _vocabulary(spec), tokenizer_file(spec)
  if name is None or not (kept := workdir / name).exists():
    return config
  words = {**words, **({'corpus': None} if 'corpus' in words else {}), 'file': str(kept)}
  return {**config, 'tokenizer': words if _vocabulary(spec) is spec else {**spec, 'words': words}}


def _vocabulary(spec: dict[str, Any]) -> dict[str, Any]:
  """The part of a tokenizer's config that names its vocabulary: of a `prompted` one, its words."""
  return spec['words'] if spec['name'] == 'prompted' else spec


def tokenizer_file(spec: dict[str, Any]) -> str | None:
  """Name of the file in which a run keeps the vocabulary of a tokenizer; None for one that comes with the package."""
  return KEPT.get(_vocabulary(spec)['name'])


def keep_tokenizer(run: Run) -> None:
  """Writes the tokenizer's file to the workdir, so that the run needs neither the corpus nor another file again."""
  tokenizer, spec = run.experiment.tokenizer, run.config.get('tokenizer')
  if spec is None or (name := tokenizer_file(spec)) is None or (kept := run.workdir / name).exists():
    return
  tokenizer = tokenizer.words if isinstance(tokenizer, Prompted) else tokenizer
  if isinstance(tokenizer, Bpe):
    tokenizer.save(kept)
  else:
    epath.Path(_vocabulary(spec)['file']).copy(kept)


def keep_class_names(run: Run) -> None:
  """Writes the class names of the training data to the workdir, so that predictions are named without the data.

  Raises UserError if the workdir has other names: labels would change their meaning during the run.
  """
  names = run.experiment.data.source.names
  if not run.experiment.objective.class_counts or not names:
    return
  kept = run.workdir / CLASSES
  if not kept.exists():
    write_json(kept, list(names))
  elif (before := tuple(json.loads(kept.read_text()))) != tuple(names):
    changed = sorted(set(before) ^ set(names)) or ['their order']
    raise UserError(
      f'config.data.source: the classes have changed since the run began ({", ".join(changed[:3])}); restore them, or '
      f'start a new --workdir'
    )


def load_trained_params(workdir: str) -> dict[str, Any]:
  """Arrays of a run: {'params': parameters to evaluate, 'extra': frozen networks and other state, 'whole': ...}.

  'whole' holds all parameters of the network, also where the run trained only a part of them, with LoRA merged.
  """
  run = Run.reopen(workdir)
  subject, _ = run.restored_model()
  whole = run.experiment.objective.full_params(subject.params, subject.extra)
  return {'params': subject.params, 'extra': subject.extra, 'whole': whole}


def parameter_count(params: Any) -> int:
  """Number of parameters of a tree of arrays or ShapeDtypeStructs."""
  return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))
