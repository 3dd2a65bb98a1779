"""How far a diffusion model's pictures are from real ones, as another network sees them."""

import dataclasses
from typing import Any

import numpy as np

from fmcv_jax.data.loader import Pipeline, evaluation_batches
from fmcv_jax.data.sources.subset import evenly_spaced
from fmcv_jax.diffusion.options import SamplingOptions
from fmcv_jax.diffusion.samplers import Spacing
from fmcv_jax.diffusion.sharded_sampling import NEGATIVE, SamplerConfig, ShardedSampler
from fmcv_jax.errors import UserError
from fmcv_jax.evaluate.base import Evaluator
from fmcv_jax.evaluate.feature_extractor import FeatureExtractor
from fmcv_jax.objectives.outputs import generator_of


@dataclasses.dataclass(frozen=True)
class Generation(Evaluator):
  """Paints as many pictures as there are real ones, told the same, and compares the two sets
  (`FeatureExtractor.compare`).

  Of a judge that knows texts and a model that is told them there is also 'clip_score': 100 times the mean cosine of a
  picture and its text, none below 0 (Hessel et al. 2021).

  data      real pictures, with the labels or captions that the model is told; every process reads all of them
  judge     workdir of the network that looks, such as `fmcv import` makes of published Inception weights
  count     how many, at most, evenly spaced in the data; a FID of few pictures is too large, and compares only with one
            of as many
  steps, guidance, solver, spacing, seed   as in `fmcv generate`
  """

  data: Pipeline
  feature_extractor: str
  count: int = 10_000
  steps: int = 50
  guidance: float = 1.0
  solver: str = 'dpm++'
  spacing: Spacing = 'trailing'
  seed: int = 0
  batch_size: int = 256
  every: int = 0

  def __post_init__(self):
    try:
      self._options  # noqa: B018 (it checks itself)
    except UserError as error:
      raise ValueError(str(error)) from error
    if self.count < 4:
      raise ValueError(f'count: expected at least 4, got {self.count}')

  @property
  def _options(self) -> SamplingOptions:
    return SamplingOptions(self.steps, self.guidance, solver=self.solver, spacing=self.spacing, seed=self.seed)

  def prepare(self, subject):
    FeatureExtractor(subject, self.feature_extractor, self.batch_size)

  def __call__(self, subject):
    make_generator = generator_of(subject.outputs)
    generator = make_generator(subject.params, subject.extra)
    if other := [name for name in generator.condition_fields if name not in ('tokens', 'label')]:
      raise UserError(f'config.evaluators: generation is conditioned on texts and classes only, not on {other}')
    judge = FeatureExtractor(subject, self.feature_extractor, self.batch_size)
    sampler = subject.cached(
      ('sampler', self.batch_size), lambda: ShardedSampler(make_generator, subject.placement, self.batch_size)
    )
    guided = bool(generator.condition_fields) and self._options.guided
    try:
      times = self._options.times(generator.process)
    except UserError as error:
      raise UserError(f'config.evaluators: {error}') from error
    sampler_config = SamplerConfig(self.solver, times, guided)
    made, real, scores, first = [], [], [], 0
    data = dataclasses.replace(self.data, source=evenly_spaced(self.data.source, self.count))
    fields = ('image', *generator.condition_fields)
    for batch in evaluation_batches(data, batch=self.batch_size, fields=fields, tokenizer=subject.tokenizer):
      batch = {name: batch[name][batch['mask']] for name in fields}
      count = len(batch['image'])
      if not count:
        continue
      inputs: dict[str, Any] = {name: batch[name] for name in generator.condition_fields}
      inputs['number'] = first + np.arange(count, dtype=np.int32)
      if guided:
        inputs['guidance'] = np.full(count, self.guidance, np.float32)
      if guided and 'tokens' in inputs:
        inputs[f'{NEGATIVE}tokens'] = np.repeat(subject.tokenizer(['']), count, axis=0)
      if generator.control is not None:
        inputs |= {'control': batch['image'], 'control_scale': np.ones(count, np.float32)}
      images = sampler.sample(subject.params, subject.extra, inputs, sampler_config, seed=self.seed)
      made.append(judge(images))
      real.append(judge(batch['image']))
      if 'tokens' in inputs and judge.reads:
        texts = judge.read(subject.tokenizer.decode(inputs['tokens']))
        scores.append(100 * np.maximum((made[-1] * texts).sum(axis=1), 0))
      first += count
    figures = judge.compare(np.concatenate(made), np.concatenate(real))
    return figures | ({'clip_score': float(np.concatenate(scores).mean())} if scores else {})
