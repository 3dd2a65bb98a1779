"""Denoising (Ho et al. 2020) of pictures or an autoencoder's latents (Rombach et al. 2022), told classes or texts."""

import dataclasses
import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fmcv_jax.augment.base import Augment, apply_augments
from fmcv_jax.augment.control_maps import Control
from fmcv_jax.augment.inpaint_masks import RandomInpaintMask
from fmcv_jax.augment.normalize import Normalize
from fmcv_jax.diffusion.condition import Condition, make_condition
from fmcv_jax.diffusion.generator import Generator
from fmcv_jax.diffusion.process import Process, TimesName, WeightName, alphas_cumprod
from fmcv_jax.diffusion.samplers import sampling_timesteps
from fmcv_jax.diffusion.sharded_sampling import SamplerConfig, sample_batch
from fmcv_jax.models.backbones.text import TextTransformer
from fmcv_jax.models.common.layers import l2_normalize
from fmcv_jax.models.common.patches import patch_features
from fmcv_jax.models.generative.autoencoder import Autoencoder, Gaussian
from fmcv_jax.models.generative.controlnet import ControlNet, controlnet
from fmcv_jax.models.generative.unet import UNet
from fmcv_jax.objectives.base import Objective, mean_loss
from fmcv_jax.objectives.outputs import Output
from fmcv_jax.objectives.repa import Alignment, Projector

LEVELS = 8  # noise levels at which the validation error is told
SAMPLER_STEPS = 20  # of the output 'samples'; `fmcv generate` has its own


@dataclasses.dataclass(frozen=True)
class Diffusion(Objective):
  """Mean squared error of what the network says of a noisy x, at a random time.

  network        told by `classes` a label, by `cross_attention` or `pooled_text` a text, or nothing
  autoencoder    x is its latent, (latent - latent_shift) * latent_scale; frozen, by init_from at 'extra/autoencoder'
  precomputed_latents  the batch holds what the autoencoder makes of the images, written by `fmcv precompute latents`,
                       instead
                 of the images
  text_encoder   the tower that reads the captions; frozen, by init_from at 'extra/text', or with `train_text` trained
                 as well, and at 'params/text'
  precomputed_text  the batch holds, beside the tokens, what the text tower says of each record's first text, written by
                 `fmcv precompute words whole_text`
  padding        of texts: 'masked', the network does not see it; 'zeros', it does (Stable Diffusion 2); 'end', the end
                 id stands in its place, and the network sees it (Stable Diffusion 1)
  condition_dropout  share of examples that are told nothing, for classifier-free guidance
  weighting      of the error by noise level (`Process.weight`), and its `weighting_gamma` (None: the published one)
  timestep_sampling  distribution of the times (`Process.sample_timesteps`), with mean and standard deviation where it
                     is
                 normal
  repa           REPA
  control        what a ControlNet is shown of each image; it alone is trained, and begins with a copy of the network's
                 way down, which is frozen: by init_from at 'extra/network' and 'params/control/encoder'
  inpainting     what is missing of each image, for a UNet that is told what is around: its `extra_in_channels` are one
                 channel for the hole and those of x for the rest, as in Stable Diffusion's inpainting model
  """

  network: nn.Module
  process: Process = Process()
  autoencoder: nn.Module | None = None
  latent_scale: float = 1.0
  latent_shift: float = 0.0
  precomputed_latents: bool = False
  text_encoder: nn.Module | None = None
  train_text: bool = False
  precomputed_text: bool = False
  padding: Literal['masked', 'zeros', 'end'] = 'masked'
  condition_dropout: float = 0.1
  weighting: WeightName = 'simple'
  weighting_gamma: float | None = None
  timestep_sampling: TimesName = 'uniform'
  timestep_mean: float = 0.0
  timestep_std: float = 1.0
  repa: Alignment | None = None
  control: Control | None = None
  inpainting: RandomInpaintMask | None = None
  augment: tuple[Augment, ...] = ()
  normalize: Normalize = Normalize()

  def __post_init__(self):
    network, coder = self.network, self.autoencoder
    if not hasattr(network, 'image_size') or not hasattr(network, 'cross_attention'):
      raise ValueError('network: diffusion needs a denoiser, such as network.name=dit')
    if network.out_channels != network.channels * (2 if self.process.learned_variance else 1):
      raise ValueError(
        f'network: out_channels is {network.out_channels} for {network.channels} channels; expected as many, or twice '
        f'as many with process.learned_variance'
      )
    edm = self.process.schedule == 'edm'
    if self.timestep_sampling == ('logit_normal' if edm else 'log_normal'):
      raise ValueError(
        f'timestep_sampling: {self.timestep_sampling} is {"not" if edm else "only"} for the schedule edm'
      )
    if coder is not None:
      if not isinstance(coder, Autoencoder):
        raise ValueError('autoencoder: needs autoencoder.name=autoencoder')
      given = (coder.image_size // coder.factor, coder.latent_channels)
      if given != (network.image_size, network.channels):
        raise ValueError(
          f'network: image_size and channels are {(network.image_size, network.channels)}, but the latents of the '
          f'autoencoder have {given}'
        )
    if self.precomputed_latents and coder is None:
      raise ValueError('precomputed_latents: they are those of an autoencoder; set it')
    if self.precomputed_latents and (self.augment or self.repa or self.control or self.inpainting):
      raise ValueError('precomputed_latents: augment, repa, control and inpainting need the images; leave them out')
    if (network.cross_attention or network.pooled_text) != (self.text_encoder is not None):
      raise ValueError(
        'text_encoder: a network with cross_attention or pooled_text needs a text tower, and no other does'
      )
    if self.text_encoder is not None and not isinstance(self.text_encoder, TextTransformer):
      raise ValueError('text_encoder: needs text_encoder.name=text_transformer')
    if self.train_text and (self.text_encoder is None or self.control is not None):
      raise ValueError('train_text: there is no text tower, or a ControlNet alone is trained')
    if self.precomputed_text and (self.text_encoder is None or self.train_text):
      raise ValueError('precomputed_text: they are those of a frozen text tower; set text, and leave out train_text')
    beside, wanted = getattr(network, 'extra_in_channels', 0), 0 if self.inpainting is None else 1 + network.channels
    if beside != wanted:
      raise ValueError(
        f'network: extra_in_channels is {beside}, but what is told beside x has {wanted} channels '
        f'{"(the hole, and x around it)" if wanted else "(without holes)"}'
      )
    if self.repa is not None and not hasattr(network, 'patch_size'):
      raise ValueError('repa: reads the tokens of a transformer; use network.name=dit')
    if self.repa is not None and not 1 <= self.repa.layer <= network.depth:
      raise ValueError(f'repa.layer: {self.repa.layer} is not one of the {network.depth} layers')
    if self.control is not None:
      if not isinstance(network, UNet):
        raise ValueError('control: steers a convolutional network; use network.name=unet')
      controlnet(network, self.image_size // network.image_size)

  @property
  def frozen_networks(self):
    return ('network',) if self.control is not None else ()

  @property
  def image_size(self) -> int:
    return self.autoencoder.image_size if self.autoencoder else self.network.image_size

  @property
  def shape(self) -> tuple[int, int, int]:
    """That of one x."""
    return (self.network.image_size, self.network.image_size, self.network.channels)

  @property
  def told(self) -> tuple[str, ...]:
    return ('label',) * bool(self.network.num_classes) + ('tokens',) * (self.text_encoder is not None)

  @property
  def example_batch(self):
    size, (rows, columns, channels) = self.image_size, self.shape
    shapes = {'image': jax.ShapeDtypeStruct((size, size, 3), jnp.uint8)}
    if self.precomputed_latents:
      shapes = {'latents': jax.ShapeDtypeStruct((rows, columns, 2 * channels), jnp.float16)}
    if 'label' in self.told:
      shapes['label'] = jax.ShapeDtypeStruct((), jnp.int32)
    if self.text_encoder is not None:
      shapes['tokens'] = jax.ShapeDtypeStruct((self.text_encoder.length,), jnp.int32)
    if self.precomputed_text:
      text: Any = self.text_encoder
      shapes['words'] = jax.ShapeDtypeStruct((text.length, text.width), jnp.float16)
      shapes['whole_text'] = jax.ShapeDtypeStruct((text.width,), jnp.float16)
    return shapes

  def init(self, rng):
    keys = iter(jax.random.split(rng, 7))
    images = jnp.zeros((1, self.image_size, self.image_size, 3))
    extra = {}
    if self.autoencoder is not None:
      extra['autoencoder'] = self.autoencoder.init(next(keys), images)['params']
    if self.text_encoder is not None:
      extra['text'] = self.text_encoder.init(next(keys), jnp.zeros((1, self.text_encoder.length), jnp.int32))['params']
    batch = {name: jnp.zeros((1, *x.shape), x.dtype) for name, x in self.example_batch.items()}
    condition = self._shown(self.condition(extra, batch), extra, images, jax.random.split(next(keys), 1))
    x = jnp.zeros((1, *self.shape))
    params = {'network': self.network.init(next(keys), x, jnp.zeros(1), condition)['params']}
    if self.control is not None:
      extra |= params
      params = {'control': self._controlnet.init(next(keys), x, jnp.zeros(1), condition)['params']}
    if self.train_text:
      params['text'] = extra.pop('text')
    if self.repa is not None:
      extra['teacher'] = self.repa.teacher.init(next(keys), self._for_teacher(images))['params']
      tokens = jnp.zeros((1, 1, self.network.width))
      params['projector'] = self._projector.init(next(keys), tokens)['params']
    return params, extra

  def loss(self, params, batch, rng, extra):
    augment_rng, latent_rng, drop_rng, time_rng, noise_rng = jax.random.split(rng, 5)
    hole_rng, extra = jax.random.fold_in(rng, 6), self._towers(params, extra)
    if self.precomputed_latents:
      images, x0 = None, self._scaled(as_gaussian(batch['latents']).sample(latent_rng))
    else:
      images = apply_augments(batch['image'], self.augment, augment_rng)
      x0 = self._encode(extra, images, latent_rng)
    count = x0.shape[0]
    keep = jax.random.uniform(drop_rng, (count,)) >= self.condition_dropout
    time = self.process.sample_timesteps(
      jax.random.split(time_rng, count), self.timestep_sampling, self.timestep_mean, self.timestep_std
    )
    noise = jax.random.normal(noise_rng, x0.shape)
    x = self.process.add_noise(x0, noise, time)
    tap = self.repa.layer if self.repa else None
    condition = self._shown(self.condition(extra, batch, keep), extra, images, jax.random.split(hole_rng, count))
    output = self._apply(params, extra, x, time, condition, rng=rng, **({'tap': tap} if tap else {}))
    output, tokens = output if tap else (output, None)
    errors = self._errors(output, x0, noise, time)
    loss = jnp.mean(self.process.weight(time, self.weighting, self.weighting_gamma) * errors)
    metrics = {'denoising': jnp.mean(errors)}
    if self.process.learned_variance:
      metrics['variance_bits'] = self._variance_bits(output, x, x0, time)
      loss += metrics['variance_bits']
    if self.repa is not None:
      metrics['alignment'] = self._alignment(params, extra, tokens, images)
      loss -= self.repa.weight * metrics['alignment']
    return mean_loss(loss, metrics)

  def _towers(self, params, extra):
    """`extra` with the text tower in it, wherever it is kept."""
    return {**extra, 'text': params['text']} if self.train_text else extra

  def condition(self, extra, batch, keep=None) -> Condition:
    """What a batch tells the network; nothing of examples whose `keep` (bool [B]) is false."""
    label = text = mask = pooled = None
    if self.network.num_classes:
      label = batch['label'] if keep is None else jnp.where(keep, batch['label'], self.network.num_classes)
    if self.text_encoder is not None and 'words' in batch:
      words, pooled = (batch[name].astype(jnp.float32) for name in ('words', 'whole_text'))
      told = words, (words != 0).any(axis=-1) if self.padding == 'masked' else None, pooled
      if keep is not None:
        nothing = self._read(extra, empty_text(batch['tokens'][:1]))
        told = jax.tree.map(lambda a, b: jnp.where(keep.reshape(-1, *(1,) * (a.ndim - 1)), a, b), told, nothing)
      text, mask, pooled = told
    elif self.text_encoder is not None:
      tokens = batch['tokens']
      if keep is not None:
        tokens = jnp.where(keep[:, None], tokens, empty_text(tokens))
      text, mask, pooled = self._read(extra, tokens)
    return make_condition(label=label, text=text, text_mask=mask, pooled_text=pooled)

  def _read(self, extra, tokens):
    """What the tower says of each word of texts [B, L], which of them are words (None: all), and what of the whole."""
    after = jnp.arange(tokens.shape[1]) > jnp.argmax(tokens, axis=1)[:, None]
    if self.padding == 'end':
      tokens = jnp.where(after, tokens.max(axis=1, keepdims=True), tokens)
    text: Any = self.text_encoder
    features = text.apply({'params': extra['text']}, tokens)
    return features.tokens, ~after if self.padding == 'masked' else None, features.pooled

  def _shown(self, condition, extra, images, keys) -> Condition:
    """The condition with what is told of the images [B, H, W, 3] themselves, always: what steers, what is around a
    hole, which a key [B] draws."""
    if self.control is not None:
      condition = {**condition, 'control': self.control(images)}
    if self.inpainting is not None:
      condition = {**condition, 'image': self._around(extra, images, self.inpainting(keys, self.image_size))}
    return condition

  def _around(self, extra, images, masks):
    """Of images with holes where masks [B, H, W] are true, [B, h, w, 1 + C]: the mask, and x without what is there."""
    factor = self.image_size // self.network.image_size
    known = jnp.where(masks[..., None], jnp.array(self.normalize.mean), images)
    mask = masks[:, ::factor, ::factor, None].astype(jnp.float32)
    return jnp.concatenate([mask, self._encode(extra, known)], axis=-1)

  def outputs(self):
    """'latents', 'words' and 'whole_text' are float16, as the batch fields of these names that they are stored for."""
    steered = ('image',) if self.control is not None else ()
    offered = {
      'denoising_errors': Output(self.denoising_errors, 'array', ('image', *self.told)),
      'samples': Output(self.samples, 'image', (*steered, *self.told), generator=self.generator),
    }
    if self.autoencoder is not None:
      offered['latents'] = Output(self.latents_of, 'map')
    if self.text_encoder is not None:
      offered['words'] = Output(self.words_of, 'array', ('tokens',))
      offered['whole_text'] = Output(self.whole_text_of, 'embedding', ('tokens',))
    return offered

  def samples(self, params, extra, batch):
    """uint8 [B, H, W, 3]: an image for each record's label, first text and control image, by its own noise, without
    guidance."""
    fields = {name: batch[name] for name in self.told} | {'number': batch['index']}
    if self.control is not None:
      fields |= {'control': batch['image'], 'control_scale': jnp.ones(len(batch['image']))}
    times = sampling_timesteps(self.process, SAMPLER_STEPS, 'trailing')
    config = SamplerConfig('dpm++', tuple(times), guided=False)
    return sample_batch(self.generator(params, extra), fields, 0, config)

  def latents_of(self, params, extra, batch):
    """float16 [B, h, w, 2 z]: means and log variances of the autoencoder's latents, for `precomputed_latents`."""
    images = self.normalize(batch['image'].astype(jnp.float32) / 255)
    latent: Any = self.autoencoder.apply({'params': extra['autoencoder']}, images, method='encode')  # type: ignore[union-attr]
    return jnp.concatenate([latent.mean, latent.log_variance], axis=-1).astype(jnp.float16)

  def words_of(self, params, extra, batch):
    """float16 [B, L, E]: the text encoder's embedding of each token, and zeros where the network sees none."""
    text, mask, _ = self._read(self._towers(params, extra), batch['tokens'])
    return (text if mask is None else jnp.where(mask[..., None], text, 0)).astype(jnp.float16)

  def whole_text_of(self, params, extra, batch):
    """float16 [B, P]: the text encoder's embedding of the whole text."""
    return self._read(self._towers(params, extra), batch['tokens'])[2].astype(jnp.float16)

  def denoising_errors(self, params, extra, batch):
    """float32 [B, LEVELS]: the squared error at as many times from none to all of the noise, drawn for each record."""
    images, extra = batch['image'].astype(jnp.float32) / 255, self._towers(params, extra)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(0), batch['index'])
    condition = self._shown(self.condition(extra, batch), extra, images, keys)
    x0 = self._encode(extra, images)

    def at(time, level):
      noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, level), x0.shape[1:]))(keys)
      times = jnp.full(x0.shape[:1], time)
      output = self._apply(params, extra, self.process.add_noise(x0, noise, times), times, condition)
      return self._errors(output, x0, noise, times)

    times = jnp.asarray((np.arange(LEVELS) + 0.5) / LEVELS * self.process.last, jnp.float32)
    return jax.lax.map(lambda args: at(*args), (times, jnp.arange(LEVELS))).T

  def generator(self, params, extra):
    extra = self._towers(params, extra)

    def encode(images):
      return self._encode(extra, images)

    def decode(x):
      if self.autoencoder is not None:
        latent = x / self.latent_scale + self.latent_shift
        x = self.autoencoder.apply({'params': extra['autoencoder']}, latent, method='decode')
      return jnp.clip(self.normalize.undo(x), 0, 1)

    def denoise(x, time, condition):
      return self._apply(params, extra, x, time, condition)

    def condition(batch, told=True):
      count = len(next(iter(batch.values())))
      return self.condition(extra, batch, None if told else jnp.zeros(count, bool))

    around = None if self.inpainting is None else functools.partial(self._around, extra)
    return Generator(
      self.process, self.image_size, self.shape, denoise, condition, self.told, encode, decode, self.control, around
    )

  def _apply(self, params, extra, x, time, condition, *, rng=None, **options) -> Any:
    """With an rng, as in training."""
    train: dict[str, Any] = {} if rng is None else {'train': True, 'rngs': {'dropout': jax.random.fold_in(rng, 5)}}
    if self.control is None:
      return self.network.apply({'params': params['network']}, x, time, condition, **train, **options)
    residuals = self._controlnet.apply({'params': params['control']}, x, time, condition, **train)
    return self.network.apply({'params': extra['network']}, x, time, condition, residuals=residuals)

  def _encode(self, extra, images, rng=None):
    """x of images [B, H, W, 3] in [0, 1]; with an rng, a sample of the autoencoder's latent, without one its mean."""
    x = self.normalize(images)
    if self.autoencoder is None:
      return x
    latent: Any = self.autoencoder.apply({'params': extra['autoencoder']}, x, method='encode')
    return self._scaled(latent.mean if rng is None else latent.sample(rng))

  def _scaled(self, latent):
    return (latent - self.latent_shift) * self.latent_scale

  def _errors(self, output, x0, noise, time):
    output = output[..., : x0.shape[-1]].astype(jnp.float32)
    return jnp.square(output - self.process.target(x0, noise, time)).mean((1, 2, 3))

  def _variance_bits(self, output, x, x0, time):
    """Mean of the divergence of the step's true posterior from the network's, in bits a value, by its variance only
    (Nichol & Dhariwal 2021, eq. 16 with lambda = 1 / STEPS). The last step, at time 0, is left out: it draws nothing.
    """
    table = alphas_cumprod(self.process.schedule)
    before = np.append(1.0, table[:-1])
    beta = 1 - table / before
    small = beta * (1 - before) / (1 - table)
    small[0] = small[1]
    index = time.astype(jnp.int32)

    def at(values):
      return jnp.asarray(values, jnp.float32)[index].reshape(-1, 1, 1, 1)

    predicted, between = jnp.split(output.astype(jnp.float32), 2, axis=-1)
    image = jax.lax.stop_gradient(self.process.image(predicted, x, time))
    off = at(np.sqrt(before) * beta / (1 - table)) * (image - x0)
    ratio = at(np.log(beta) - np.log(small)) * (between + 1) / 2  # log of the network's variance over the smallest
    divergence = 0.5 * (ratio - 1 + jnp.exp(-ratio) * (1 + jnp.square(off) / at(small)))
    bits = divergence.mean((1, 2, 3)) / np.log(2)
    return jnp.mean(jnp.where(time > 0, bits, 0))

  @property
  def _controlnet(self) -> ControlNet:
    unet: Any = self.network
    return controlnet(unet, self.image_size // unet.image_size)

  @property
  def _projector(self) -> Projector:
    assert self.repa is not None
    teacher: Any = self.repa.teacher
    return Projector(self.repa.hidden, teacher.width)

  def _for_teacher(self, images):
    assert self.repa is not None
    teacher: Any = self.repa.teacher
    shape = (images.shape[0], teacher.image_size, teacher.image_size, 3)
    return self.repa.normalize(images if images.shape == shape else jax.image.resize(images, shape, 'cubic'))

  def _alignment(self, params, extra, tokens, images):
    """Mean cosine of the denoiser's projected tokens and the teacher's patches, which are resized to their grid."""
    assert self.repa is not None
    teacher: Any = self.repa.teacher
    side = self.network.image_size // self.network.patch_size
    seen = patch_features(teacher, extra['teacher'], self._for_teacher(images)).astype(jnp.float32)
    if seen.shape[1] != side:
      seen = jax.image.resize(seen, (seen.shape[0], side, side, seen.shape[-1]), 'bilinear')
    said: Any = self._projector.apply({'params': params['projector']}, tokens.astype(jnp.float32))
    return jnp.mean(jnp.sum(l2_normalize(said) * l2_normalize(seen.reshape(said.shape)), axis=-1))


def as_gaussian(latents: jax.Array) -> Gaussian:
  """What `latents_of` gave, of any precision."""
  return Gaussian(*jnp.split(latents.astype(jnp.float32), 2, axis=-1))


def empty_text(tokens: jax.Array) -> jax.Array:
  """The tokens [B, L] of an empty text, by any tokenizer's rule: a start, the end, which is the largest id, padding."""
  start, end = tokens[:, :1], tokens.max(axis=1, keepdims=True)
  return jnp.concatenate([start, end, jnp.zeros_like(tokens[:, 2:])], axis=1)
