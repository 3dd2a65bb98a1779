"""Generates and edits images with a trained diffusion model."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, TypedDict, Unpack

import numpy as np

from fmcv_jax.data.sources.base import Source
from fmcv_jax.data.tokenizers import truncated_texts
from fmcv_jax.diffusion.samplers import SOLVERS, Spacing, coefficients, sampling_timesteps
from fmcv_jax.diffusion.sharded_sampling import SamplerConfig, ShardedSampler
from fmcv_jax.errors import UserError, did_you_mean
from fmcv_jax.objectives.outputs import generator_of
from fmcv_jax.run import Run

STRENGTH = 0.6  # of an edit


class SamplingOptions(TypedDict, total=False):
  """Keywords that every way to sample takes; see `ImageGenerator.generate`."""

  steps: int
  guidance: float | Sequence[float]
  solver: str
  spacing: Spacing
  negative: str
  interval: tuple[float, float] | None
  rescale: float
  control: np.ndarray | None
  drawn: bool
  control_scale: float
  first: int
  progress: Callable[[int], Any]


def _checked(function: str, options: SamplingOptions) -> dict[str, Any]:
  """The options; TypeError in the name of the public function for one that does not exist."""
  for name in options:
    if name not in SamplingOptions.__annotations__:
      near = did_you_mean(name, SamplingOptions.__annotations__)
      raise TypeError(f'{function}() got an unexpected keyword argument {name!r}; {near}')
  return dict(options)


class ImageGenerator:
  """The diffusion model of a workdir, opened for use on all devices.

  told       what it has to be told: texts ('tokens'), classes ('label'), or nothing
  steered    whether it has a ControlNet, and so needs pictures to follow
  size       sides of its pictures, in pixels
  batch      pictures that are painted at once, on all devices together; more are painted piece by piece
  overrides  of its config, such as 'mesh.data=1', 'mesh.fsdp=-1' for a model that no one device holds
  """

  def __init__(
    self,
    workdir: str | pathlib.Path,
    *,
    step: int | None = None,
    batch: int = 64,
    overrides: Sequence[str] = (),
  ):
    if batch < 1:
      raise UserError(f'--batch: {batch} pictures at once; give at least 1')
    self.workdir, self._run = workdir, Run.reopen(workdir, overrides)
    self._objective = self._run.experiment.objective
    abstract = self._run.abstract_state
    try:
      make_generator = generator_of(self._objective.outputs())
    except UserError as error:
      raise UserError(f'{workdir}: {error}') from error
    generator = make_generator(abstract.params, abstract.extra)
    self.process, self.told, self.steered = generator.process, generator.told, generator.control is not None
    self._subject, self.step = self._run.restored_model(step)
    self.size = generator.size
    self._canvas = ShardedSampler(make_generator, self._run.placement, batch)

  @property
  def source(self) -> Source:
    """What the model was trained on."""
    return self._run.experiment.data.source

  def generate(self, prompts: Sequence[str | int], *, seed: int = 0, **options: Unpack[SamplingOptions]) -> np.ndarray:
    """One picture for each prompt: uint8 [N, H, W, 3].

    prompts    texts, or classes by name or number, as the model was told; only their count for one told nothing
    steps      of the sampler; solver: one of SOLVERS; spacing: of its times (`sampling_timesteps`)
    guidance   of the prompt (Ho & Salimans 2022), 1 for none, or one for each picture; interval: (low, high) times of
               it; rescale: see `guided`
    negative   a text to move away from, in the place of none
    control    for a model with a ControlNet, pictures uint8 [N, H, W, 3] to follow: it is shown what the model was
               shown of images in training (edges, say) or, with drawn=True, themselves; control_scale: how much
    first      number of the first picture, for a request that is made in pieces
    progress   called with the number of pictures that are ready
    """
    return self._sample(prompts, seed, **_checked('generate', options))

  def edit(
    self,
    images: np.ndarray,
    prompts: Sequence[str | int],
    *,
    strength: float = STRENGTH,
    seed: int = 0,
    **options: Unpack[SamplingOptions],
  ) -> np.ndarray:
    """Images uint8 [N, H, W, 3] painted over from a share `strength` of the noise on (Meng et al. 2022,
    SDEdit).
    """
    if not 0 < strength <= 1:
      raise UserError(f'--strength: {strength} is not above 0 and at most 1')
    return self._sample(prompts, seed, images=images, strength=strength, **_checked('edit', options))

  def fill(
    self,
    images: np.ndarray,
    masks: np.ndarray,
    prompts: Sequence[str | int],
    *,
    seed: int = 0,
    **options: Unpack[SamplingOptions],
  ) -> np.ndarray:
    """Images uint8 [N, H, W, 3] painted anew where masks bool [N, H, W] are true; the rest stays as it is."""
    if masks.shape != images.shape[:3] or masks.dtype != bool:
      raise UserError(
        f'--mask: {_kind(masks)} for images of {list(images.shape[:3])}; true where they are painted anew'
      )
    return self._sample(prompts, seed, images=images, masks=masks, **_checked('fill', options))

  def interpolate(
    self, first: str, last: str, count: int, *, seed: int = 0, **options: Unpack[SamplingOptions]
  ) -> np.ndarray:
    """`count` pictures from the same noise, from one text to another: uint8 [count, H, W, 3]."""
    if self.told != ('tokens',):
      raise UserError('--interpolate: needs a model that is told texts')
    return self._sample([first] * count, seed, other=last, **_checked('interpolate', options))

  def check(self, prompts: Sequence[str | int], *, seed: int = 0, **options: Unpack[SamplingOptions]) -> None:
    """Raises the UserError of `generate`, before anything is painted."""
    self._request(prompts, seed, **_checked('generate', options))

  def _sample(
    self,
    prompts: Sequence[str | int],
    seed: int,
    *,
    progress: Callable[[int], Any] = lambda ready: None,
    **options: Any,
  ) -> np.ndarray:
    fields, sampler_config = self._request(prompts, seed, **options)
    subject = self._subject
    return self._canvas.sample(subject.params, subject.extra, fields, sampler_config, seed=seed, progress=progress)

  def _request(
    self,
    prompts: Sequence[str | int],
    seed: int,
    *,
    steps: int = 20,
    guidance: float | Sequence[float] = 4.0,
    solver: str = 'dpm++',
    spacing: Spacing = 'trailing',
    negative: str = '',
    interval: tuple[float, float] | None = None,
    rescale: float = 0.0,
    images: np.ndarray | None = None,
    masks: np.ndarray | None = None,
    strength: float = 1.0,
    other: str | None = None,
    control: np.ndarray | None = None,
    drawn: bool = False,
    control_scale: float = 1.0,
    first: int = 0,
  ) -> tuple[dict[str, np.ndarray], SamplerConfig]:
    """What `ShardedSampler.paint` is given."""
    if isinstance(prompts, str):
      raise UserError(f'prompts: {prompts!r} is one text; give a list, one for each picture')
    count = len(prompts)
    if solver not in SOLVERS:
      raise UserError(f'--solver: unknown {solver!r}; {did_you_mean(solver, SOLVERS)}')
    try:
      times = sampling_timesteps(self.process, steps, spacing)
      times = times[len(times) - max(1, round(strength * len(times))) :]
      coefficients(self.process, SOLVERS[solver], times)
    except ValueError as error:
      raise UserError(f'--{error}') from error
    if not 0 <= seed < 2**31:
      raise UserError(f'--seed: {seed} is not from 0 to 2147483647')
    if interval is not None and not interval[0] <= interval[1]:
      raise UserError(f'--interval: {interval[0]} to {interval[1]}; give the lower time first')
    if not 0 <= rescale <= 1:
      raise UserError(f'--rescale: {rescale} is not from 0 to 1')
    fields = self._fields(prompts)
    strength_of_prompt = np.asarray(guidance, np.float32)
    if strength_of_prompt.shape not in ((), (count,)):
      raise UserError(f'--guidance: {strength_of_prompt.shape[0]} numbers for {count} pictures')
    if not np.isfinite(strength_of_prompt).all() or not np.isfinite(control_scale):
      raise UserError(f'--guidance and --control-scale: {guidance} and {control_scale} have to be finite')
    is_guided = bool(self.told) and bool((strength_of_prompt != 1).any())
    if negative and not (is_guided and 'tokens' in self.told):
      raise UserError('--negative: needs a model that is told texts, and a --guidance other than 1')
    if is_guided:
      fields['guidance'] = np.broadcast_to(strength_of_prompt, count)
      without = self._fields([negative] * count) if 'tokens' in self.told else {}
      fields.update({f'without_{name}': value for name, value in without.items()})
    if other is not None:
      fields['other_tokens'] = self._fields([other] * count)['tokens']
      fields['share'] = np.linspace(0, 1, count, dtype=np.float32)
    if images is not None:
      if images.shape != (count, self.size, self.size, 3) or images.dtype != np.uint8:
        raise UserError(f'images: {_kind(images)}, but {[count, self.size, self.size, 3]} of uint8 are needed')
      fields['image'] = images
    if masks is not None:
      fields['mask'] = masks
    if self.steered != (control is not None):
      wants = 'follows a picture; give one' if self.steered else 'has no ControlNet that could follow a picture'
      raise UserError(f'--control: {self.workdir} {wants}')
    if control is not None:
      if control.shape != (count, self.size, self.size, 3) or control.dtype != np.uint8:
        raise UserError(f'--control: {_kind(control)}, but {[count, self.size, self.size, 3]} of uint8 are needed')
      fields |= {'control': control, 'control_scale': np.full(count, control_scale, np.float32)}
    # Along an interpolation the noise is one.
    fields['number'] = np.zeros(count, np.int32) if other is not None else first + np.arange(count, dtype=np.int32)
    return fields, SamplerConfig(solver, tuple(times), is_guided, interval, rescale, drawn)

  def _fields(self, prompts: Sequence[str | int]) -> dict[str, np.ndarray]:
    if 'tokens' in self.told:
      tokenizer = self._subject.tokenizer
      assert tokenizer is not None
      return {'tokens': tokenizer([str(prompt) for prompt in prompts])}
    if 'label' in self.told:
      return {'label': np.array([self._class_of(prompt) for prompt in prompts], np.int32)}
    return {}

  def _class_of(self, prompt: str | int) -> int:
    names = self.source.names
    classes = self._run.experiment.objective.network.num_classes  # type: ignore[attr-defined]
    if prompt in names:
      return names.index(prompt)
    if str(prompt).isdigit() and int(prompt) < classes:
      return int(prompt)
    raise UserError(
      f'{prompt!r} is no class of this model, by name or by number below {classes}; {did_you_mean(str(prompt), names)}'
    )

  def truncated_prompt(self, prompt: str) -> str | None:
    """What is left of a text that is too long for the model; None for one that is not."""
    tokenizer = self._subject.tokenizer
    if 'tokens' not in self.told or tokenizer is None:
      return None
    return truncated_texts(tokenizer, [prompt]).get(prompt)


def _kind(array: np.ndarray) -> str:
  return f'{list(array.shape)} of {array.dtype}'
