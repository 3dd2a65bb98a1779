"""From a config to a run: the one room that knows all the others.

`Experiment` is the root of every config: its fields, and those of what they name, are the whole schema.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from etils import epath

from fmcv_jax import config as config_lib
from fmcv_jax.data.array_record import ArrayRecord
from fmcv_jax.data.augment import AUGMENTS, Augment
from fmcv_jax.data.controls import Coarse, Control, Edges, Gray
from fmcv_jax.data.digits import Digits
from fmcv_jax.data.emoji import Emoji
from fmcv_jax.data.folder import ImageFolder
from fmcv_jax.data.loader import Pipeline
from fmcv_jax.data.mixture import Mixture
from fmcv_jax.data.parquet import Parquet
from fmcv_jax.data.scattered import Scattered
from fmcv_jax.data.source import NoData, Source
from fmcv_jax.data.tfds import Tfds
from fmcv_jax.data.tokenizers import KEPT, TOKENIZERS, Bpe, Tokenizer
from fmcv_jax.data.transforms import ImageTransform, RandomResizedCrop, Resize, ResizeCrop
from fmcv_jax.data.webdataset import WebDataset
from fmcv_jax.errors import UserError
from fmcv_jax.evaluate.accuracy import Accuracy
from fmcv_jax.evaluate.base import Evaluator, Subject
from fmcv_jax.evaluate.denoising import Denoising
from fmcv_jax.evaluate.few_shot import FewShot
from fmcv_jax.evaluate.generation import Generation
from fmcv_jax.evaluate.knn import Knn
from fmcv_jax.evaluate.linear_probe import LinearProbe
from fmcv_jax.evaluate.object_masks import ObjectMasks
from fmcv_jax.evaluate.reconstruction import Reconstruction
from fmcv_jax.evaluate.retrieval import Retrieval
from fmcv_jax.evaluate.segmentation import MeanIou
from fmcv_jax.evaluate.zero_shot import ZeroShot
from fmcv_jax.models.autoencoder import autoencoder
from fmcv_jax.models.dino import dino
from fmcv_jax.models.dit import dit
from fmcv_jax.models.dual_encoder import align, clip, dual_encoder, siglip
from fmcv_jax.models.efficientnet import efficientnet
from fmcv_jax.models.inception import inception
from fmcv_jax.models.mae import mae
from fmcv_jax.models.mmdit import mmdit
from fmcv_jax.models.segmenter import segmenter
from fmcv_jax.models.swin import swin
from fmcv_jax.models.text import text_transformer
from fmcv_jax.models.unet import unet
from fmcv_jax.models.vit import vit
from fmcv_jax.objectives.adapted import Adapted
from fmcv_jax.objectives.autoencoder import Autoencoding
from fmcv_jax.objectives.base import Objective
from fmcv_jax.objectives.classification import Classification
from fmcv_jax.objectives.contrastive import Contrastive
from fmcv_jax.objectives.diffusion import Diffusion
from fmcv_jax.objectives.dino import SelfDistillation
from fmcv_jax.objectives.encoder import Encoder
from fmcv_jax.objectives.mae import MaskedAutoencoding
from fmcv_jax.objectives.segmentation import Segmentation
from fmcv_jax.parallel.mesh import MeshShape, make_mesh
from fmcv_jax.parallel.rules import AXIS_RULES, Placement, Rules
from fmcv_jax.train.checkpoint import Checkpointing, Store
from fmcv_jax.train.flops import matmul_flops
from fmcv_jax.train.metrics import Log
from fmcv_jax.train.optim import Adafactor, AdamW, Cosine, Lamb, Linear, Lion, Muon, Optimizer, Rsqrt, Rule, Schedule
from fmcv_jax.train.state import TrainState, init_state, state_shardings
from fmcv_jax.train.step import StepFn, make_train_step
from fmcv_jax.train.warm_start import Part

# What a config may name, by kind. A name of the form 'package.module:attribute' reaches code outside this package.
KINDS: config_lib.Kinds = {
  Objective: {
    'adapted': Adapted,
    'autoencoding': Autoencoding,
    'classification': Classification,
    'contrastive': Contrastive,
    'diffusion': Diffusion,
    'dino': SelfDistillation,
    'encoder': Encoder,
    'mae': MaskedAutoencoding,
    'segmentation': Segmentation,
  },
  nn.Module: {
    'align': align,
    'autoencoder': autoencoder,
    'clip': clip,
    'dino': dino,
    'dit': dit,
    'dual_encoder': dual_encoder,
    'efficientnet': efficientnet,
    'inception': inception,
    'mae': mae,
    'mmdit': mmdit,
    'segmenter': segmenter,
    'siglip': siglip,
    'swin': swin,
    'text_transformer': text_transformer,
    'unet': unet,
    'vit': vit,
  },
  Source: {
    'none': NoData,
    'array_record': ArrayRecord,
    'digits': Digits,
    'emoji': Emoji,
    'image_folder': ImageFolder,
    'mixture': Mixture,
    'parquet': Parquet,
    'scattered': Scattered,
    'tfds': Tfds,
    'webdataset': WebDataset,
  },
  ImageTransform: {'random_resized_crop': RandomResizedCrop, 'resize': Resize, 'resize_crop': ResizeCrop},
  Tokenizer: TOKENIZERS,
  Augment: AUGMENTS,
  Control: {'coarse': Coarse, 'edges': Edges, 'gray': Gray},
  Schedule: {'cosine': Cosine, 'linear': Linear, 'rsqrt': Rsqrt},
  Rule: {'adafactor': Adafactor, 'adamw': AdamW, 'lamb': Lamb, 'lion': Lion, 'muon': Muon},
  Evaluator: {
    'accuracy': Accuracy,
    'denoising': Denoising,
    'few_shot': FewShot,
    'generation': Generation,
    'knn': Knn,
    'linear_probe': LinearProbe,
    'mean_iou': MeanIou,
    'object_masks': ObjectMasks,
    'reconstruction': Reconstruction,
    'retrieval': Retrieval,
    'zero_shot': ZeroShot,
  },
}


@dataclasses.dataclass(frozen=True)
class Training:
  """steps of a global batch each, cut into microbatches where it does not fit; `ema` is the decay of a moving average.

  max_streak: how many steps in a row may have a loss or gradient that is not finite before the run stops.
  """

  steps: int
  batch: int
  microbatches: int = 1
  ema: float | None = None
  max_streak: int = 100


@dataclasses.dataclass(frozen=True)
class Debug:
  """nans: stop at the first operation that makes a NaN and show where it stands (slow)."""

  nans: bool = False


@dataclasses.dataclass(frozen=True)
class Experiment:
  """Everything that defines a run.

  init_from  path in the state, such as 'params', 'params/image' or 'extra/teacher' -> where its values come from
  topology   the pod that the config is meant for, such as 'v5e:16x16'
  """

  objective: Objective
  data: Pipeline = Pipeline(NoData())
  optimizer: Optimizer = Optimizer(Cosine(peak=0.0))
  train: Training = Training(steps=0, batch=0)
  tokenizer: Tokenizer | None = None
  mesh: MeshShape = MeshShape()
  rules: Rules = Rules()
  evaluators: Mapping[str, Evaluator] = dataclasses.field(default_factory=dict)
  checkpoint: Checkpointing = Checkpointing()
  log: Log = Log()
  init_from: Mapping[str, Part] = dataclasses.field(default_factory=dict)
  seed: int = 0
  topology: str | None = None
  debug: Debug = Debug()


def load_config(spec: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
  """The resolved config of a file ('configs/x.py' or 'configs/x.py:arg') with 'a.b=value' overrides: plain data."""
  return resolve(config_lib.override(config_lib.load_file(spec), overrides))


def resolve(config: dict[str, Any]) -> dict[str, Any]:
  """Checks a config's every field and fills in the defaults."""
  return config_lib.resolve(Experiment, config, KINDS)


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
    e: Experiment = config_lib.build(Experiment, with_own_tokenizer(config, self._workdir), KINDS)
    with config_lib.reported_at('config.objective'):
      self.experiment = e = dataclasses.replace(e, objective=e.objective.for_run(e.train.steps))
    self.placement = Placement(make_mesh(e.mesh, devices), e.rules)
    with config_lib.reported_at('config.optimizer.schedule'):
      self.tx = e.optimizer.make(e.train.steps) if e.train.steps else optax.identity()
    self._check_batches()

  @classmethod
  def reopen(cls, workdir: str | pathlib.Path, overrides: Sequence[str] = ()) -> 'Run':
    """The run that a workdir holds; by default on all devices as replicas, whatever mesh it was trained on."""
    path = epath.Path(workdir) / 'config.json'
    if not path.exists():
      raise UserError(f'{workdir}: no run here (no config.json); give the --workdir of a training run')
    saved = json.loads(path.read_text())
    saved['mesh'] = {}
    return cls(resolve(config_lib.override(config_lib.plain(saved), overrides)), workdir)

  @property
  def workdir(self) -> epath.Path:
    """The folder of the run, local or gs://; ValueError for a config that is only looked at."""
    if self._workdir is None:
      raise ValueError('this run has no workdir')
    return self._workdir

  def init(self) -> TrainState:
    e = self.experiment
    return init_state(e.objective, self.tx, e.seed, ema=e.train.ema is not None)

  @functools.cached_property
  def abstract_state(self) -> TrainState:
    """Shapes and dtypes of the state; nothing is allocated."""
    return jax.eval_shape(self.init)

  @functools.cached_property
  def shardings(self) -> TrainState:
    return state_shardings(self.abstract_state, self.placement, self.experiment.objective.frozen_networks)

  @property
  def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the global training batch."""
    e = self.experiment
    return {
      name: jax.ShapeDtypeStruct((e.train.batch, *x.shape), x.dtype) for name, x in e.objective.example_batch.items()
    }

  def train_step(self) -> StepFn:
    e = self.experiment
    return make_train_step(
      e.objective,
      self.tx,
      e.optimizer.schedule(e.train.steps),
      self.placement,
      self.shardings,
      self.placement.batch(self.batch_shapes),
      microbatches=e.train.microbatches,
      ema=e.train.ema,
    )

  def subject(self) -> Subject:
    e = self.experiment
    return Subject(
      e.objective.functions(),
      self.placement,
      e.tokenizer,
      makes=e.objective.generator,
      reopen=lambda workdir: Run.reopen(workdir).restored_subject()[0],
      image_size=e.objective.input_size,
    )

  def restored_subject(self, step: int | None = None) -> tuple[Subject, int]:
    """The trained model of this run's workdir at `step` (default: the newest), and that step."""
    store = Store(self.workdir, self.experiment.checkpoint, create=False)
    step = store.kept(step)
    abstract, subject = self.abstract_state, self.subject()
    target, extra = (
      jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
      for tree, shardings in ((abstract.params, self.shardings.params), (abstract.extra, self.shardings.extra))
    )
    subject.params, subject.extra = store.restore_params(target, step, extra=extra)
    store.close()
    return subject, step

  def step_flops(self) -> float:
    """Model FLOPs of one step: the matrix products of the loss and its gradient, in a twin that recomputes nothing."""
    spec = {'objective': self.config['objective']}
    remat = config_lib.paths_of(spec['objective'], 'remat', 'objective')
    spec = config_lib.override(config_lib.plain(spec), [f'{path}=none' for path in remat])
    objective: Objective = config_lib.build(Objective, spec['objective'], KINDS, 'config.objective')
    objective = objective.for_run(self.experiment.train.steps)
    return float(
      matmul_flops(
        jax.grad(lambda params, batch, extra: objective.loss(params, batch, jax.random.key(0), extra)[0]),
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
      ('train.batch', e.train.batch, e.train.microbatches),
      *((f'evaluators.{name}.batch', evaluator.batch, 1) for name, evaluator in e.evaluators.items()),
    ]:
      if batch % (ways * pieces):
        parts = ' x '.join(f'{axis}={mesh.shape[axis]}' for axis in axes if mesh.shape[axis] > 1) or '1 device'
        more = f' times {pieces} microbatches' if pieces > 1 else ''
        raise UserError(f'config.{path}: {batch} does not divide over {parts}{more}; use a multiple of {ways * pieces}')


def with_own_tokenizer(config: dict[str, Any], workdir: epath.Path | None) -> dict[str, Any]:
  """The config with a tokenizer of this run's own, trained or from a file, read from the file that the run keeps."""
  spec = config.get('tokenizer')
  if not spec or workdir is None or spec['name'] not in KEPT:
    return config
  kept = workdir / KEPT[spec['name']]
  if not kept.exists():
    return config
  return {**config, 'tokenizer': {**spec, **({'corpus': None} if 'corpus' in spec else {}), 'file': str(kept)}}


def keep_tokenizer(run: Run) -> None:
  """Writes the tokenizer's file to the workdir, so that the run needs neither the corpus nor another file again."""
  tokenizer, spec = run.experiment.tokenizer, run.config.get('tokenizer')
  if spec is None or spec['name'] not in KEPT:
    return
  kept = run.workdir / KEPT[spec['name']]
  if kept.exists():
    return
  if isinstance(tokenizer, Bpe):
    tokenizer.save(kept)
  else:
    epath.Path(spec['file']).copy(kept)


def trained_tree(workdir: str) -> dict[str, Any]:
  """What a run has learnt: {'params': the parameters to evaluate, 'extra': what it carried along, 'whole': ...}.

  'whole' is the network's own parameters where the run trained but a part of them, or a LoRA beside them.
  """
  run = Run.reopen(workdir)
  subject, _ = run.restored_subject()
  whole = run.experiment.objective.whole(subject.params, subject.extra)
  return {'params': subject.params, 'extra': subject.extra, 'whole': whole}


def parameter_count(params: Any) -> int:
  return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))
