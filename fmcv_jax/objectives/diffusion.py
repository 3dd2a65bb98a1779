"""Denoising diffusion (Ho et al. 2020) of images or of an autoencoder's latents (Rombach et al. 2022)."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from typing_extensions import override

from fmcv_jax.augment.apply import augment_fields, check_augments
from fmcv_jax.augment.base import Augment
from fmcv_jax.augment.normalize import Normalize
from fmcv_jax.bounds import Finite, Fraction, PositiveFloat
from fmcv_jax.data.tokenizers import Tokenizer
from fmcv_jax.diffusion.condition import NEVER_DROPPED, Condition
from fmcv_jax.diffusion.generator import Generator
from fmcv_jax.diffusion.learned_variance import variance_bits
from fmcv_jax.diffusion.process import Process, TimesName, WeightName
from fmcv_jax.diffusion.samplers import sampling_timesteps
from fmcv_jax.diffusion.sharded_sampling import SamplerConfig, sample_batch
from fmcv_jax.errors import UserError
from fmcv_jax.fields import Field
from fmcv_jax.objectives.base import Loss, Objective, mean_loss
from fmcv_jax.objectives.image_condition import ImageCondition, inpaint_condition
from fmcv_jax.objectives.latent_space import LatentSpace
from fmcv_jax.objectives.outputs import Batch, Kind, Output, Params
from fmcv_jax.objectives.repa import REPA
from fmcv_jax.objectives.text_condition import TextCondition

LEVELS = 8  # noise levels of the validation error
SAMPLER_STEPS = 20  # for the output 'samples'; `fmcv generate` has its own

# Where each condition key of the package comes from, for the error about one that nothing provides.
_PROVIDERS = {
  'text': 'set text_condition.encoder',
  'text_mask': 'set text_condition.encoder',
  'pooled_text': 'set text_condition.encoder',
  'image': 'set image_condition.inpainting',
  'control': 'set image_condition.control',
}


@dataclasses.dataclass(frozen=True)
class Diffusion(Objective):
  """Mean squared error of the network's output from the process' target, at a random time.

  The network is any module called as network(x [B, *input_shape], time [B], condition, train=False) that has

    input_shape       shape of one x, channels last: (H, W, C), or (T, H, W, C) of clips
    condition_keys    the keys of the condition that it reads (fmcv_jax/diffusion/condition.py)
    condition_shapes  of those that are batch fields of the same name, if any
    never_dropped     of those the ones that are never dropped, if any
    num_classes       if it reads 'label'

  network            the denoiser
  process            noise schedule and prediction
  latent_space       latents of an autoencoder in place of images
  text_condition     captions, for a network that reads 'text' or 'pooled_text'
  image_condition    a ControlNet, or inpainting
  repa               representation alignment of the network's tokens
  condition_dropout  fraction of examples without condition, for classifier-free guidance: no class, an empty text, and
                     zeros for every other key but those of NEVER_DROPPED and of the network's never_dropped
  weighting          of the error by noise level (`Process.weight`), and its `weighting_gamma` (None: the published one)
  timestep_sampling  distribution of the times (`Process.sample_timesteps`), with `timestep_mean` and `timestep_std`
                     where it is normal
  """

  network: nn.Module
  process: Process = Process()
  latent_space: LatentSpace = LatentSpace()
  text_condition: TextCondition = TextCondition()
  image_condition: ImageCondition = ImageCondition()
  repa: REPA | None = None
  condition_dropout: Fraction = 0.1
  weighting: WeightName = 'simple'
  weighting_gamma: PositiveFloat | None = None
  timestep_sampling: TimesName = 'uniform'
  timestep_mean: Finite = 0.0
  timestep_std: PositiveFloat = 1.0
  augment: tuple[Augment, ...] = ()
  normalize: Normalize = Normalize()

  def __post_init__(self) -> None:
    network: Any = self.network
    if not hasattr(network, 'input_shape') or not hasattr(network, 'condition_keys'):
      raise ValueError('network: needs a denoiser with input_shape and condition_keys, such as network.name=dit')
    channels = getattr(network, 'out_channels', self._out_channels)
    if channels != self._out_channels:
      raise ValueError(
        f'network: out_channels is {channels} for {self.input_shape[-1]} channels; expected as many, or twice as many '
        f'with process.learned_variance'
      )
    edm = self.process.schedule == 'edm'
    if self.timestep_sampling == ('logit_normal' if edm else 'log_normal'):
      raise ValueError(
        f'timestep_sampling: {self.timestep_sampling} is {"not" if edm else "only"} for the schedule edm'
      )
    self.latent_space.check(self.input_shape)
    self.image_condition.check(network, self.image_shape)
    self.text_condition.check(network.condition_keys)
    if self.repa is not None:
      self.repa.check(network)
    if self.latent_space.precomputed and (self.augment or self.repa or self.image_condition.active):
      raise ValueError('latent_space.precomputed: augment, repa and image_condition need the images; leave them out')
    if self.text_condition.train and self.image_condition.control is not None:
      raise ValueError('text_condition.train: a ControlNet alone is trained; leave it out')
    for key in self._batch_keys:
      if key not in getattr(network, 'condition_shapes', {}):
        how = _PROVIDERS.get(key, 'a network names the shapes of its batch fields in condition_shapes')
        raise ValueError(f'network: reads the condition {key!r}, which nothing provides; {how}')
    if unknown := set(self._never_dropped) - set(self._batch_keys) - NEVER_DROPPED:
      raise ValueError(f'network.never_dropped: {sorted(unknown)} are not in its condition_shapes')
    kinds = self._condition_kinds
    check_augments(self.augment, kinds)
    for augment in self.augment:
      if augment.moves and (unknown := set(self._batch_keys) - set(kinds)):
        raise ValueError(
          f'augment: {type(augment).__name__} moves the pixels of the image, and the network does not state in '
          f'condition_kinds whether {sorted(unknown)[0]} moves with them'
        )

  @override
  def with_tokenizer(self, tokenizer: Tokenizer) -> 'Diffusion':
    return dataclasses.replace(self, text_condition=self.text_condition.with_tokenizer(tokenizer))

  @property
  @override
  def frozen_networks(self) -> tuple[str, ...]:
    return ('network',) if self.image_condition.control is not None else ()

  @property
  def input_shape(self) -> tuple[int, ...]:
    """Shape of one x."""
    network: Any = self.network
    return tuple(network.input_shape)

  @property
  def image_shape(self) -> tuple[int, ...]:
    """Shape of one image."""
    return self.latent_space.image_shape(self.input_shape)

  @property
  def _out_channels(self) -> int:
    return self.input_shape[-1] * (2 if self.process.learned_variance else 1)

  @property
  def _keys(self) -> tuple[str, ...]:
    network: Any = self.network
    return tuple(network.condition_keys)

  @property
  def _batch_keys(self) -> tuple[str, ...]:
    """The condition keys that are batch fields of the same name."""
    provided = ('label', *self.text_condition.keys, *self.image_condition.keys)
    return tuple(key for key in self._keys if key not in provided)

  @property
  def _condition_kinds(self) -> Mapping[str, Field]:
    """The kinds of batch fields that the network states, for augmentations that move the pixels of the image."""
    kinds = getattr(self.network, 'condition_kinds', {})
    return {key: kinds[key] for key in self._batch_keys if key in kinds}

  @property
  def _never_dropped(self) -> frozenset[str]:
    return NEVER_DROPPED | frozenset(getattr(self.network, 'never_dropped', ()))

  @property
  def condition_fields(self) -> tuple[str, ...]:
    """Batch fields that `condition` reads."""
    tokens = ('tokens',) * (self.text_condition.encoder is not None)
    return ('label',) * ('label' in self._keys) + tokens + self._batch_keys

  @property
  @override
  def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
    network: Any = self.network
    shapes = self.latent_space.example_fields(self.input_shape)
    if 'label' in self._keys:
      shapes['label'] = jax.ShapeDtypeStruct((), jnp.int32)
    shapes |= self.text_condition.example_fields()
    return shapes | {key: network.condition_shapes[key] for key in self._batch_keys}

  @property
  @override
  def training_only(self) -> tuple[str, ...]:
    return () if self.repa is None else ('projector',)

  @property
  @override
  def class_counts(self) -> Mapping[str, tuple[int, int | None]]:
    return {'label': (self.network.num_classes, None)} if 'label' in self.condition_fields else {}

  @override
  def init(self, rng: jax.Array) -> tuple[Params, Any]:
    keys = iter(jax.random.split(rng, 7))
    images = jnp.zeros((1, *self.image_shape))
    extra: dict[str, Any] = {}
    if self.latent_space.autoencoder is not None:
      extra |= self.latent_space.init(next(keys), images)
    if self.text_condition.encoder is not None:
      extra |= self.text_condition.init(next(keys))
    batch = {name: jnp.zeros((1, *x.shape), x.dtype) for name, x in self.example_batch.items()}
    condition = self._condition(extra, batch, images, jax.random.split(next(keys), 1))
    x = jnp.zeros((1, *self.input_shape))
    params = {'network': self.network.init(next(keys), x, jnp.zeros(1), condition).get('params', {})}
    if self.image_condition.control is not None:
      extra |= params
      params = {'control': self._controlnet.init(next(keys), x, jnp.zeros(1), condition)['params']}
    if self.text_condition.train:
      params['text'] = extra.pop('text')
    if self.repa is not None:
      projector, teacher = self.repa.init(keys, images, self.network)
      params, extra = {**params, **projector}, {**extra, **teacher}
    return params, extra

  @override
  def loss(self, params: Params, batch: Batch, rng: jax.Array, extra: Any) -> Loss:
    augment_rng, latent_rng, drop_rng, time_rng, noise_rng = jax.random.split(rng, 5)
    mask_rng, extra = jax.random.fold_in(rng, 6), self.text_condition.parameters(params, extra)
    if self.latent_space.precomputed:
      images, x0 = None, self.latent_space.sample(batch['latents'], latent_rng)
    else:
      batch = augment_fields(batch, self._condition_kinds, self.augment, augment_rng)
      images = batch['image']
      x0 = self.encode(extra, images, latent_rng)
    count = x0.shape[0]
    keep = jax.random.uniform(drop_rng, (count,)) >= self.condition_dropout
    time = self.process.sample_timesteps(
      jax.random.split(time_rng, count), self.timestep_sampling, self.timestep_mean, self.timestep_std
    )
    noise = jax.random.normal(noise_rng, x0.shape)
    x = self.process.add_noise(x0, noise, time)
    tap = self.repa.layer if self.repa else None
    condition = self._condition(extra, batch, images, jax.random.split(mask_rng, count), keep)
    output = self._apply(params, extra, x, time, condition, rng=rng, **({'tap': tap} if tap else {}))
    output, tokens = output if tap else (output, None)
    errors = self._errors(output, x0, noise, time)
    loss = jnp.mean(self.process.weight(time, self.weighting, self.weighting_gamma) * errors)
    metrics = {'denoising': jnp.mean(errors)}
    if self.process.learned_variance:
      metrics['vlb_bits_per_dim'] = variance_bits(self.process, output, x, x0, time)
      loss += metrics['vlb_bits_per_dim']
    if self.repa is not None:
      assert images is not None  # repa refuses precomputed latents
      metrics['alignment'] = self.repa.alignment(params, extra, self.network, tokens, images)
      loss -= self.repa.weight * metrics['alignment']
    return mean_loss(loss, metrics)

  def condition(self, extra: Any, batch: Batch, keep: jax.Array | None = None) -> dict[str, jax.Array]:
    """The condition of a batch, but for that of its images; dropped for examples whose `keep` (bool [B]) is false."""
    network: Any = self.network
    condition = {}
    if 'label' in self._keys:
      label = batch['label']
      condition['label'] = label if keep is None else jnp.where(keep, label, network.num_classes)
    text = self.text_condition(extra, batch, keep)
    condition |= {key: value for key, value in text.items() if key in self._keys}
    for key in self._batch_keys:
      value = batch[key]
      if keep is not None and key not in self._never_dropped:
        value = jnp.where(keep.reshape(-1, *(1,) * (value.ndim - 1)), value, jnp.zeros_like(value))
      condition[key] = value
    return condition

  def _condition(
    self, extra: Any, batch: Batch, images: jax.Array | None, keys: jax.Array, keep: jax.Array | None = None
  ) -> Condition:
    """The whole condition; images [B, *image_shape] in [0, 1], and keys [B] for what is drawn at random of each."""
    condition = self.condition(extra, batch, keep)
    if not self.image_condition.active:
      return condition
    assert images is not None  # image conditions refuse precomputed latents
    encode = functools.partial(self.encode, extra)
    return {**condition, **self.image_condition(images, keys, encode, self.normalize.mean)}

  def encode(self, extra: Any, images: jax.Array, rng: jax.Array | None = None) -> jax.Array:
    """x of images [B, *image_shape] in [0, 1], from the mean of each latent or, with an rng, from a sample."""
    return self.latent_space.encode(extra, self.normalize(images), rng)

  def outputs(self) -> Mapping[str, Output]:
    """'latents', 'words' and 'whole_text' are float16, as the batch fields of these names that they are stored for."""
    control = ('image',) if self.image_condition.control is not None else ()
    kind: Kind = 'video' if len(self.image_shape) == 4 else 'image'
    offered = {
      'denoising_errors': Output(self.denoising_errors, 'array', ('image', *self.condition_fields)),
      'samples': Output(self.samples, kind, (*control, *self.condition_fields), generator=self.generator),
    }
    if self.latent_space.autoencoder is not None:
      offered['latents'] = Output(self.latents_of, 'map')
    if self.text_condition.encoder is not None:
      offered['words'] = Output(self.words_of, 'array', ('tokens',))
      offered['whole_text'] = Output(self.whole_text_of, 'embedding', ('tokens',))
    return offered

  def samples(self, params: Params, extra: Any, batch: Batch) -> jax.Array:
    """uint8 [B, H, W, 3]: an image for each record's label, first text and control image, by its own noise, without
    guidance."""
    fields = {name: batch[name] for name in self.condition_fields} | {'number': batch['index']}
    if self.image_condition.control is not None:
      fields |= {'control': batch['image'], 'control_scale': jnp.ones(len(batch['image']))}
    times = sampling_timesteps(self.process, SAMPLER_STEPS, 'trailing')
    config = SamplerConfig('dpm++', tuple(times), guided=False)
    return sample_batch(self.generator(params, extra), fields, 0, config)

  def latents_of(self, params: Params, extra: Any, batch: Batch) -> jax.Array:
    """float16 [B, h, w, 2 z], `LatentSpace.moments`."""
    return self.latent_space.moments(extra, self.normalize(batch['image'].astype(jnp.float32) / 255)).astype(
      jnp.float16
    )

  def words_of(self, params: Params, extra: Any, batch: Batch) -> jax.Array:
    """float16 [B, L, E]: the text encoder's output for each token, and zeros where the network does not attend."""
    text, mask, _ = self._encode_text(params, extra, batch)
    return (text if mask is None else jnp.where(mask[..., None], text, 0)).astype(jnp.float16)

  def whole_text_of(self, params: Params, extra: Any, batch: Batch) -> jax.Array:
    """float16 [B, P]: the text encoder's output for the whole text."""
    return self._encode_text(params, extra, batch)[2].astype(jnp.float16)

  def _encode_text(self, params: Params, extra: Any, batch: Batch) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    return self.text_condition.encode(self.text_condition.parameters(params, extra), batch['tokens'])

  def denoising_errors(self, params: Params, extra: Any, batch: Batch) -> jax.Array:
    """float32 [B, LEVELS]: squared errors at evenly spaced times from no noise to all, drawn by each record's index."""
    images, extra = batch['image'].astype(jnp.float32) / 255, self.text_condition.parameters(params, extra)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(0), batch['index'])
    condition = self._condition(extra, batch, images, keys)
    x0 = self.encode(extra, images)

    def at(time: Any, level: Any) -> jax.Array:
      noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, level), x0.shape[1:]))(keys)
      times = jnp.full(x0.shape[:1], time)
      output = self._apply(params, extra, self.process.add_noise(x0, noise, times), times, condition)
      return self._errors(output, x0, noise, times)

    times = jnp.asarray((np.arange(LEVELS) + 0.5) / LEVELS * self.process.last, jnp.float32)
    return jax.lax.map(lambda args: at(*args), (times, jnp.arange(LEVELS))).T

  def generator(self, params: Params, extra: Any) -> Generator:
    """The denoiser with its condition, encoder and decoder, for a sampler."""
    extra = self.text_condition.parameters(params, extra)
    encode = functools.partial(self.encode, extra)

    def decode(x: jax.Array) -> jax.Array:
      return jnp.clip(self.normalize.undo(self.latent_space.decode(extra, x)), 0, 1)

    def condition(batch: Batch, conditional: bool = True) -> dict[str, jax.Array]:
      count = len(next(iter(batch.values())))
      return self.condition(extra, batch, None if conditional else jnp.zeros(count, bool))

    def inpaint(images: jax.Array, masks: jax.Array) -> jax.Array:
      return inpaint_condition(images, masks, encode, self.normalize.mean)

    return Generator(
      self.process,
      self.image_shape,
      self.input_shape,
      functools.partial(self._apply, params, extra),
      condition,
      self.condition_fields,
      encode,
      decode,
      self.image_condition.control,
      None if self.image_condition.inpainting is None else inpaint,
    )

  def _apply(
    self,
    params: Params,
    extra: Any,
    x: jax.Array,
    time: jax.Array,
    condition: Condition,
    *,
    rng: jax.Array | None = None,
    **options: Any,
  ) -> Any:
    """The network's output; with an rng as in training, with dropout."""
    train: dict[str, Any] = {} if rng is None else {'train': True, 'rngs': {'dropout': jax.random.fold_in(rng, 5)}}
    if self.image_condition.control is None:
      return self.network.apply({'params': params['network']}, x, time, condition, **train, **options)
    residuals = self._controlnet.apply({'params': params['control']}, x, time, condition, **train)
    return self.network.apply({'params': extra['network']}, x, time, condition, residuals=residuals)

  @property
  def _controlnet(self) -> Any:
    return self.image_condition.controlnet(self.network, self.image_shape)

  def _errors(self, output: jax.Array, x0: jax.Array, noise: jax.Array, time: jax.Array) -> jax.Array:
    """Mean squared error of each example, [B]."""
    expected = (*x0.shape[:-1], self._out_channels)
    if output.shape != expected:
      raise UserError(f'network: gave an output of shape {output.shape} for x of {x0.shape}; expected {expected}')
    output = output[..., : x0.shape[-1]].astype(jnp.float32)
    return jnp.square(output - self.process.target(x0, noise, time)).mean(tuple(range(1, x0.ndim)))
