"""Generates and edits images with a trained diffusion model."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fmcv_jax.data.sources.base import Source
from fmcv_jax.data.tokenizers import truncated_texts
from fmcv_jax.diffusion.options import SamplingOptions
from fmcv_jax.diffusion.sharded_sampling import NEGATIVE, SamplerConfig, ShardedSampler
from fmcv_jax.errors import UserError, did_you_mean
from fmcv_jax.inference.adapters import Adapters, add_adapters
from fmcv_jax.objectives.outputs import generator_of
from fmcv_jax.pretrained import packaged
from fmcv_jax.run import Run

PROMPTS = ('tokens', 'label')  # condition fields that prompts are turned into
_ARGUMENTS = ('control', 'conditions', 'first', 'progress')  # keywords of every method that are not options

Progress = Callable[[int], Any]


def _no_progress(ready: int) -> None:
  del ready


@dataclasses.dataclass(frozen=True)
class Request:
  """The inputs of one call for N images, next to its options.

  prompts     one for each image
  images      uint8 [N, H, W, 3], to edit; with masks bool [N, H, W] only where these are True
  last        a prompt towards which those of the N images are interpolated
  control     control images uint8 [N, H, W, 3]
  conditions  further batch fields [N, ...]
  first       index of the first image
  """

  prompts: Sequence[str | int]
  images: np.ndarray | None = None
  masks: np.ndarray | None = None
  last: str | None = None
  control: np.ndarray | None = None
  conditions: Mapping[str, np.ndarray] | None = None
  first: int = 0

  @property
  def is_edit(self) -> bool:
    """True for images that are noised in part, by the option `strength`, and denoised again."""
    return self.images is not None and self.masks is None


class ImageGenerator:
  """The diffusion model of a workdir, or of the package ('demo'), opened for use on all devices.

  Every method takes a `SamplingOptions`, and its fields as keywords: `generate(prompts, steps=50)`; TypeError for an
  unknown keyword. Further keyword arguments:

    control     control images uint8 [N, H, W, 3] (ControlNet models)
    conditions  batch fields [N, ...] that the network reads in addition to the prompts, such as `action`
    first       index of the first image, for a request that is split into parts
    progress    called with the number of images that have been completed

  Attributes:
    condition_fields  fields the model is conditioned on: 'tokens' (texts), 'label' (classes), other batch fields; or ()
    has_controlnet    True if the model needs control images
    image_shape       shape of one image: (H, W, 3)

  batch      global batch size for sampling
  overrides  config overrides, such as 'mesh.data=1', 'mesh.fsdp=-1' for a model that does not fit one device
  lora       adapter files, each alone or with its scale: see `add_adapters`
  """

  def __init__(
    self,
    workdir: str | pathlib.Path,
    *,
    step: int | None = None,
    batch: int = 64,
    overrides: Sequence[str] = (),
    lora: Adapters = (),
  ):
    if batch < 1:
      raise UserError(f'batch: {batch} images at once; give at least 1')
    self.workdir, self._run = workdir, Run.reopen(packaged.locate(workdir, 'generate'), overrides)
    self._objective = self._run.experiment.objective
    abstract = self._run.abstract_state
    try:
      make_generator = generator_of(self._objective.outputs())
    except UserError as error:
      raise UserError(f'{workdir}: {error}') from error
    generator = make_generator(abstract.params, abstract.extra)
    self.process, self.condition_fields = generator.process, generator.condition_fields
    self.has_controlnet, self.image_shape = generator.control is not None, generator.image_shape
    self._model, self.step = self._run.restored_model(step)
    add_adapters(self._run, self._model, lora)
    self._sampler = ShardedSampler(make_generator, self._run.placement, batch)

  @property
  def source(self) -> Source:
    """The data that the model was trained on."""
    return self._run.experiment.data.source

  @property
  def takes_prompts(self) -> bool:
    """True if the model is conditioned on texts or classes."""
    return any(name in PROMPTS for name in self.condition_fields)

  def generate(
    self,
    prompts: Sequence[str | int],
    options: SamplingOptions = SamplingOptions(),
    *,
    control: np.ndarray | None = None,
    conditions: Mapping[str, np.ndarray] | None = None,
    first: int = 0,
    progress: Progress = _no_progress,
    **changes: Any,
  ) -> np.ndarray:
    """One image for each prompt: uint8 [N, H, W, 3].

    prompts  texts, or classes by name or index; an unconditional model uses only their number
    """
    options = options.changed(changes, 'generate', _ARGUMENTS)
    return self._sample(Request(prompts, control=control, conditions=conditions, first=first), options, progress)

  def edit(
    self,
    images: np.ndarray,
    prompts: Sequence[str | int],
    options: SamplingOptions = SamplingOptions(),
    *,
    control: np.ndarray | None = None,
    conditions: Mapping[str, np.ndarray] | None = None,
    first: int = 0,
    progress: Progress = _no_progress,
    **changes: Any,
  ) -> np.ndarray:
    """Img2img: images uint8 [N, H, W, 3] noised to `strength` and denoised again (Meng et al. 2022, SDEdit)."""
    options = options.changed(changes, 'edit', _ARGUMENTS)
    request = Request(prompts, images, control=control, conditions=conditions, first=first)
    return self._sample(request, options, progress)

  def fill(
    self,
    images: np.ndarray,
    masks: np.ndarray,
    prompts: Sequence[str | int],
    options: SamplingOptions = SamplingOptions(),
    *,
    control: np.ndarray | None = None,
    conditions: Mapping[str, np.ndarray] | None = None,
    first: int = 0,
    progress: Progress = _no_progress,
    **changes: Any,
  ) -> np.ndarray:
    """Inpainting: regenerates images uint8 [N, H, W, 3] where masks bool [N, H, W] are True; the rest is unchanged."""
    options = options.changed(changes, 'fill', _ARGUMENTS)
    if masks.shape != images.shape[:-1] or masks.dtype != bool:
      expected = f'{list(images.shape[:-1])} of bool'
      raise UserError(f'masks: {_kind(masks)}, but {expected} are needed, true where the images are replaced')
    request = Request(prompts, images, masks, control=control, conditions=conditions, first=first)
    return self._sample(request, options, progress)

  def interpolate(
    self,
    first: str,
    last: str,
    count: int,
    options: SamplingOptions = SamplingOptions(),
    *,
    control: np.ndarray | None = None,
    progress: Progress = _no_progress,
    **changes: Any,
  ) -> np.ndarray:
    """Interpolates between two prompts with the same noise: `count` images, uint8 [count, H, W, 3]."""
    options = options.changed(changes, 'interpolate', ('control', 'progress'))
    if self.condition_fields != ('tokens',):
      raise UserError('interpolate: needs a model that is conditioned on texts')
    return self._sample(Request([first] * count, last=last, control=control), options, progress)

  def check(self, prompts: Sequence[str | int], options: SamplingOptions = SamplingOptions(), **changes: Any) -> None:
    """Raises any UserError of `generate` without sampling."""
    self._inputs(Request(prompts), options.changed(changes, 'check'))

  def truncated_prompt(self, prompt: str) -> str | None:
    """The text truncated to the model's maximum length; None if it is short enough."""
    tokenizer = self._model.tokenizer
    if 'tokens' not in self.condition_fields or tokenizer is None:
      return None
    return truncated_texts(tokenizer, [prompt]).get(prompt)

  def _sample(self, request: Request, options: SamplingOptions, progress: Progress) -> np.ndarray:
    fields, config = self._inputs(request, options)
    model = self._model
    return self._sampler.sample(model.params, model.extra, fields, config, seed=options.seed, progress=progress)

  def _inputs(self, request: Request, options: SamplingOptions) -> tuple[dict[str, np.ndarray], SamplerConfig]:
    """The arguments of `ShardedSampler.sample`."""
    prompts = request.prompts
    if isinstance(prompts, str):
      raise UserError(f'prompts: {prompts!r} is one text; give a list, one for each image')
    count = len(prompts)
    times = options.times(self.process, options.strength if request.is_edit else 1.0)
    fields = self._fields(prompts) | self._other_fields(request.conditions or {}, count)
    scales = np.asarray(options.guidance, np.float32)
    if scales.shape not in ((), (count,)):
      raise UserError(f'guidance: {len(scales)} numbers for {count} images')
    guided = bool(self.condition_fields) and options.guided
    if options.negative and not (guided and 'tokens' in self.condition_fields):
      raise UserError('negative: needs a model that is conditioned on texts, and a guidance other than 1')
    if guided:
      fields['guidance'] = np.broadcast_to(scales, count)
      if 'tokens' in self.condition_fields:
        fields[f'{NEGATIVE}tokens'] = self._fields([options.negative] * count)['tokens']
    if request.last is not None:
      fields['other_tokens'] = self._fields([request.last] * count)['tokens']
      fields['fraction'] = np.linspace(0, 1, count, dtype=np.float32)
    if request.images is not None:
      fields['image'] = self._images('images', request.images, count)
    if request.masks is not None:
      fields['mask'] = request.masks
    if self.has_controlnet != (request.control is not None):
      wants = 'needs a control image' if self.has_controlnet else 'has no ControlNet'
      raise UserError(f'control: {self.workdir} {wants}')
    if request.control is not None:
      fields['control'] = self._images('control', request.control, count)
      fields['control_scale'] = np.full(count, options.control_scale, np.float32)
    # All images of an interpolation start from the same noise.
    numbers = request.first + np.arange(count, dtype=np.int32)
    fields['number'] = numbers if request.last is None else np.zeros_like(numbers)
    config = SamplerConfig(
      options.solver, times, guided, options.interval, options.rescale, options.control_preprocessed
    )
    return fields, config

  def _images(self, name: str, images: np.ndarray, count: int) -> np.ndarray:
    if images.shape != (count, *self.image_shape) or images.dtype != np.uint8:
      raise UserError(f'{name}: {_kind(images)}, but {[count, *self.image_shape]} of uint8 are needed')
    return images

  def _fields(self, prompts: Sequence[str | int]) -> dict[str, np.ndarray]:
    fields = {}
    if 'tokens' in self.condition_fields:
      tokenizer = self._model.tokenizer
      if tokenizer is None:
        raise UserError(f'{self.workdir}: its config has no tokenizer; set config.tokenizer')
      fields['tokens'] = tokenizer([str(prompt) for prompt in prompts])
    if 'label' in self.condition_fields:
      fields['label'] = np.array([self._class_of(prompt) for prompt in prompts], np.int32)
    return fields

  def _other_fields(self, conditions: Mapping[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    names = [name for name in self.condition_fields if name not in PROMPTS]
    if sorted(conditions) != sorted(names):
      raise UserError(
        f'conditions: the network reads {names or "none"} in addition to prompts, got {sorted(conditions)}'
      )
    fields = {}
    for name, x in self._objective.example_batch.items():
      if name in names:
        if np.shape(conditions[name]) != (count, *x.shape):
          raise UserError(f'conditions: {name} is {list(np.shape(conditions[name]))}, expected {[count, *x.shape]}')
        fields[name] = np.asarray(conditions[name], x.dtype)
    return fields

  def _class_of(self, prompt: str | int) -> int:
    names = self._run.class_names()
    classes = self._run.experiment.objective.network.num_classes  # type: ignore[attr-defined]
    if prompt in names:
      return names.index(prompt)
    if str(prompt).isdigit() and int(prompt) < classes:
      return int(prompt)
    raise UserError(
      f'{prompt!r} is not a class of this model, by name or by index below {classes}; '
      f'{did_you_mean(str(prompt), names)}'
    )


def _kind(array: np.ndarray) -> str:
  return f'{list(array.shape)} of {array.dtype}'
