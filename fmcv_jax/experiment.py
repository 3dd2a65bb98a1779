"""Experiment schema: `Experiment` is the root of every config, and its nested fields are the whole schema."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from fmcv_jax import config as config_lib
from fmcv_jax.bounds import Decay, NonNegativeInt, PositiveInt, Seed
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.data.sources.base import NoData
from fmcv_jax.data.tokenizers import Tokenizer
from fmcv_jax.evaluate.base import Evaluator
from fmcv_jax.objectives.base import Objective
from fmcv_jax.parallel.mesh import MeshShape
from fmcv_jax.parallel.rules import Rules
from fmcv_jax.registry import KINDS
from fmcv_jax.train.checkpoint import Checkpointing
from fmcv_jax.train.metrics import Log
from fmcv_jax.train.optim import Optimizer
from fmcv_jax.train.schedules import Cosine
from fmcv_jax.train.warm_start import InitFrom


@dataclasses.dataclass(frozen=True)
class Training:
  """Length and batch of a run.

  steps                optimizer steps
  batch_size           examples per step, over all devices
  grad_accum_steps     microbatches per batch, for batches that do not fit the memory
  ema_decay            decay of the exponential moving average of the parameters, which is evaluated and exported
  max_nonfinite_steps  consecutive steps with a non-finite loss or gradient after which the run stops
  """

  steps: NonNegativeInt
  batch_size: NonNegativeInt
  grad_accum_steps: PositiveInt = 1
  ema_decay: Decay | None = None
  max_nonfinite_steps: PositiveInt = 100


@dataclasses.dataclass(frozen=True)
class Debug:
  """nans: stop at the first operation that produces a NaN and report its source line (slow)."""

  nans: bool = False


@dataclasses.dataclass(frozen=True)
class Experiment:
  """Everything that defines a run.

  init_from  path in the state, such as 'params', 'params/image' or 'extra/teacher' -> source of its values
  topology   target TPU pod of the config, such as 'v5e:16x16'
  """

  objective: Objective
  data: Pipeline = Pipeline(NoData())
  optimizer: Optimizer = Optimizer(Cosine(peak_lr=0.0))
  train: Training = Training(steps=0, batch_size=0)
  tokenizer: Tokenizer | None = None
  mesh: MeshShape = MeshShape()
  rules: Rules = Rules()
  evaluators: Mapping[str, Evaluator] = dataclasses.field(default_factory=dict)
  checkpoint: Checkpointing = Checkpointing()
  log: Log = Log()
  init_from: Mapping[str, InitFrom] = dataclasses.field(default_factory=dict)
  seed: Seed = 0
  topology: str | None = None
  debug: Debug = Debug()


def load_config(spec: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
  """The resolved config of a file ('configs/x.py' or 'configs/x.py:arg') with 'a.b=value' overrides: plain data."""
  return resolve(config_lib.load_file(spec, overrides))


def resolve(config: dict[str, Any]) -> dict[str, Any]:
  """Checks every field of a config and fills in the defaults."""
  return config_lib.resolve(Experiment, config, KINDS)
