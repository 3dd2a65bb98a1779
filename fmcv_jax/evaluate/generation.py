"""FID, KID, CMMD, precision, recall and CLIP score of the samples of a diffusion model."""

import dataclasses
from typing import Any

import numpy as np
from typing_extensions import override

from fmcv_jax.bounds import Finite, NonNegativeInt, PositiveInt, Seed
from fmcv_jax.data.loader import evaluation_batches
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.data.sources.subset import evenly_spaced
from fmcv_jax.diffusion.options import SamplingOptions
from fmcv_jax.diffusion.samplers import Spacing
from fmcv_jax.diffusion.sharded_sampling import NEGATIVE, SamplerConfig, ShardedSampler
from fmcv_jax.errors import UserError
from fmcv_jax.evaluate.base import EvaluatedModel, Evaluator, Metrics
from fmcv_jax.evaluate.feature_extractor import FeatureExtractor
from fmcv_jax.objectives.outputs import generator_of


@dataclasses.dataclass(frozen=True)
class Generation(Evaluator):
  """Generates one image per real example with the same conditioning, and compares both sets.

  An image-text feature extractor and a text-conditional model also give 'clip_score': 100 times the mean cosine
  similarity of images and texts, clipped at 0 (Hessel et al. 2021). See `FeatureExtractor.compare` for the others.

  data               real images with labels or captions for conditioning; every process reads all of them
  feature_extractor  workdir of the feature extractor, such as Inception weights imported by `fmcv import`
  count              maximum number of images, evenly spaced in the data; FID is biased upwards for few images, so
                     compare only values for equal numbers
  steps, guidance, solver, spacing, seed   as in `fmcv generate`
  """

  data: Pipeline
  feature_extractor: str
  count: PositiveInt = 10_000
  steps: PositiveInt = 50
  guidance: Finite = 1.0
  solver: str = 'dpm++'
  spacing: Spacing = 'trailing'
  seed: Seed = 0
  batch_size: PositiveInt = 256
  every: NonNegativeInt = 0

  def __post_init__(self) -> None:
    try:
      self._options  # noqa: B018 (the constructor validates)
    except UserError as error:
      raise ValueError(str(error)) from error
    if self.count < 4:
      raise ValueError(f'count: expected at least 4, got {self.count}')

  @property
  def _options(self) -> SamplingOptions:
    return SamplingOptions(self.steps, self.guidance, solver=self.solver, spacing=self.spacing, seed=self.seed)

  @override
  def prepare(self, subject: EvaluatedModel) -> None:
    FeatureExtractor(subject, self.feature_extractor, self.batch_size)

  @override
  def __call__(self, subject: EvaluatedModel) -> Metrics:
    make_generator = generator_of(subject.outputs)
    generator = make_generator(subject.params, subject.extra)
    if other := [name for name in generator.condition_fields if name not in ('tokens', 'label')]:
      raise UserError(f'config.evaluators: generation is conditioned on texts and classes only, not on {other}')
    extractor = FeatureExtractor(subject, self.feature_extractor, self.batch_size)
    sampler = subject.cached(
      ('sampler', self.batch_size), lambda: ShardedSampler(make_generator, subject.placement, self.batch_size)
    )
    guided = bool(generator.condition_fields) and self._options.guided
    try:
      times = self._options.times(generator.process)
    except UserError as error:
      raise UserError(f'config.evaluators: {error}') from error
    sampler_config = SamplerConfig(self.solver, times, guided)
    generated, real, scores, first = [], [], [], 0
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
        assert subject.tokenizer is not None  # the pipeline made the tokens with it
        inputs[f'{NEGATIVE}tokens'] = np.repeat(subject.tokenizer(['']), count, axis=0)
      if generator.control is not None:
        inputs |= {'control': batch['image'], 'control_scale': np.ones(count, np.float32)}
      images = sampler.sample(subject.params, subject.extra, inputs, sampler_config, seed=self.seed)
      generated.append(extractor(images))
      real.append(extractor(batch['image']))
      if 'tokens' in inputs and extractor.reads:
        assert subject.tokenizer is not None
        texts = extractor.read(subject.tokenizer.decode(inputs['tokens']))
        scores.append(100 * np.maximum((generated[-1] * texts).sum(axis=1), 0))
      first += count
    metrics = extractor.compare(np.concatenate(generated), np.concatenate(real))
    return metrics | ({'clip_score': float(np.concatenate(scores).mean())} if scores else {})
