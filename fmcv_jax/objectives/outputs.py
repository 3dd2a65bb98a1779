"""Outputs of a trained model: what evaluators, `fmcv precompute`, `fmcv explain` and `fmcv generate` can ask of it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fmcv_jax.augment.normalize import Normalize
from fmcv_jax.decoding.language_model import LanguageModel
from fmcv_jax.diffusion.generator import Generator
from fmcv_jax.errors import UserError
from fmcv_jax.interpret.attention_maps import available_outputs

Params = Any
Batch = Mapping[str, jax.Array]
Kind = Literal['embedding', 'logits', 'image', 'video', 'tokens', 'boxes', 'masks', 'map', 'array']


class ImageEncoder(NamedTuple):
  """An image network with its trained variables: network.apply(variables, normalize(images)).

  variables  {'params': ...} and, for a network with batch norms, their statistics in 'batch_stats'
  normalize  maps images in [0, 1] to the range of the network's input
  """

  network: nn.Module
  variables: Mapping[str, Any]
  normalize: Normalize

  @property
  def params(self) -> Params:
    """The trained parameters of the network."""
    return self.variables['params']

  def normalized(self, images: jax.Array) -> jax.Array:
    """Images uint8 [B, H, W, 3] as the network's input, float32."""
    return self.normalize(images.astype(jnp.float32) / 255)

  def apply(self, images: jax.Array) -> Any:
    """The network's `Features` of images uint8 [B, H, W, 3]."""
    return self.network.apply(self.variables, self.normalized(images))


@dataclasses.dataclass(frozen=True)
class Output:
  """A function of a trained model, by the name under which `Objective.outputs` has it.

  call       (params, extra, batch) -> a tree of arrays [B, ...], pure and jittable
  kind       the meaning of the arrays, for what draws or writes them: 'embedding' [B, D], 'logits' [B, classes],
             'image' [B, ..., H, W, 3] and 'video' [B, T, H, W, 3] in [0, 1] or uint8, 'tokens' int [B, L] as they are
             generated, without the start id, 'masks' bool [B, ..., rows, columns], 'map' [B, ..., rows, columns(, D)],
             'boxes' a mapping of 'boxes' float [B, N, 4] (left, top, right, bottom in pixels of the input) and what
             belongs to each, such as 'classes' int and 'scores' float [B, N], 'array' anything else
  reads      names of the batch fields that `call` needs. Over a data set the batch also has 'index', int32 [B], the
             number of each record, and 'rng', a PRNG key that is the same in every pass
  encoder    (params, extra) -> the image network that computes it, for looking inside; None where there is no such one
  generator  (params, extra) -> the model that samples it, step by step; None where it is not sampled
  language   (params, extra) -> the model that continues its texts, token by token; None where it is not a text
  """

  call: Callable[[Params, Any, Batch], Any] = dataclasses.field(repr=False)
  kind: Kind = 'array'
  reads: tuple[str, ...] = ('image',)
  encoder: Callable[[Params, Any], ImageEncoder] | None = dataclasses.field(default=None, repr=False)
  generator: Callable[[Params, Any], Generator] | None = dataclasses.field(default=None, repr=False)
  language: Callable[[Params, Any], LanguageModel] | None = dataclasses.field(default=None, repr=False)


Outputs = Mapping[str, Output]


def encoder_of(outputs: Outputs) -> Callable[[Params, Any], ImageEncoder]:
  """The image network behind a model's outputs, as (params, extra) -> ImageEncoder; UserError where there is none."""
  for output in outputs.values():
    if output.encoder is not None:
      return output.encoder
  raise UserError(f'this model has no image encoder; its outputs are {listed(outputs)}')


def generator_of(outputs: Outputs) -> Callable[[Params, Any], Generator]:
  """The sampler behind a model's outputs, as (params, extra) -> Generator; UserError where there is none."""
  for output in outputs.values():
    if output.generator is not None:
      return output.generator
  raise UserError(f'this model does not generate images; its outputs are {listed(outputs)}')


def language_of(outputs: Outputs) -> Callable[[Params, Any], LanguageModel]:
  """The language model behind a model's outputs, as (params, extra) -> LanguageModel; UserError where there is none."""
  for output in outputs.values():
    if output.language is not None:
      return output.language
  raise UserError(f'this model does not generate texts; its outputs are {listed(outputs)}')


def listed(outputs: Outputs) -> str:
  """Names of outputs for an error message, 'none' without any."""
  return ', '.join(outputs) or 'none'


def encoder_outputs(network: nn.Module, encoder: Callable[[Params, Any], ImageEncoder]) -> dict[str, Output]:
  """Outputs that every image encoder has, of a `network` that `encoder` gives with its variables.

  'features' [B, D]; of a network with classes 'logits' [B, classes]; of a network of patches 'patch_features'
  [B, rows, columns, D]; of a ViT 'attention' [B, heads, rows, columns]. All are float32.
  """

  def field(name: str) -> Callable[[Params, Any, Batch], jax.Array]:
    return lambda params, extra, batch: getattr(encoder(params, extra).apply(batch['image']), name).astype(jnp.float32)

  def of_patches(read: Callable[[Any, Any, jax.Array], jax.Array]) -> Callable[[Params, Any, Batch], jax.Array]:
    def call(params: Params, extra: Any, batch: Batch) -> jax.Array:
      found = encoder(params, extra)
      return read(found.network, found.params, found.normalized(batch['image']))

    return call

  outputs = {'features': Output(field('pooled'), 'embedding', encoder=encoder)}
  if getattr(network, 'num_classes', 0):
    outputs['logits'] = Output(field('output'), 'logits', encoder=encoder)
  for name, read in available_outputs(network).items():
    outputs[name] = Output(of_patches(read), 'map', encoder=encoder)
  return outputs
