"""Image-text contrast: CLIP's softmax (Radford et al. 2021) and SigLIP's sigmoid (Zhai et al. 2023)."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from typing_extensions import override

from fmcv_jax.augment.apply import apply_augments
from fmcv_jax.augment.base import Augment
from fmcv_jax.augment.normalize import Normalize
from fmcv_jax.bounds import Decay, PositiveFraction
from fmcv_jax.models.backbones.vit import ViT
from fmcv_jax.models.common.patches import random_keep
from fmcv_jax.objectives.base import BATCH_STATS, CoupledObjective, Loss, flax_variables, image_field, mean_loss
from fmcv_jax.objectives.outputs import Batch, ImageEncoder, Output, Params
from fmcv_jax.objectives.ring_contrastive import LossName, pair_loss


@dataclasses.dataclass(frozen=True)
class Contrastive(CoupledObjective):
  """Pulls the embeddings of a pair together and pushes those of other pairs in the global batch apart.

  loss_name         'softmax': each image finds its text among all of the batch and each text its image; 'sigmoid':
                    each of the B x B pairs is a yes-or-no question
  label_smoothing   of the softmax (ALIGN, Jia et al. 2021)
  patch_keep_ratio  fraction of the patches of each image that the network sees (FLIP, Li et al. 2023)
  """

  network: nn.Module
  loss_name: LossName = 'softmax'
  label_smoothing: Decay = 0.0
  patch_keep_ratio: PositiveFraction = 1.0
  augment: tuple[Augment, ...] = ()
  normalize: Normalize = Normalize()

  def __post_init__(self) -> None:
    if self.label_smoothing and self.loss_name == 'sigmoid':
      raise ValueError('label_smoothing is for the softmax loss')
    if not hasattr(self.network, 'encode_text'):
      raise ValueError(
        'contrastive needs a dual encoder: network.name is clip, siglip, align or dual_encoder (with '
        'contrastive_captioning coca too)'
      )
    if self.patch_keep_ratio < 1 and not isinstance(self.network.image, ViT):
      raise ValueError('patch_keep_ratio: only a ViT image encoder can drop patches')

  @property
  @override
  def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
    length = self.network.text.length
    return {
      'image': image_field(self.network.image),
      'tokens': jax.ShapeDtypeStruct((length,), jnp.int32),
    }

  @override
  def init(self, rng: jax.Array) -> tuple[Params, Any]:
    image, tokens = (jnp.zeros((1, *x.shape), x.dtype) for x in self.example_batch.values())
    extra = dict(self.network.init(rng, image.astype(jnp.float32), tokens))
    return extra.pop('params'), extra

  @override
  def embed(self, params: Params, batch: Batch, rng: jax.Array, extra: Any) -> tuple[Any, dict[str, Any]]:
    augment_rng, keep_rng, dropout_rng = jax.random.split(rng, 3)
    images = self.normalize(apply_augments(batch['image'], self.augment, augment_rng))
    keep = None
    if self.patch_keep_ratio < 1:
      patches = math.prod(self.network.image.grid)
      keep = random_keep(keep_rng, images.shape[0], patches, self.patch_keep_ratio)
    embeddings_and_state: Any = self.network.apply(
      flax_variables(params, extra),
      images,
      batch['tokens'],
      keep=keep,
      train=True,
      rngs={'dropout': dropout_rng},
      mutable=[BATCH_STATS],
    )
    return embeddings_and_state

  @override
  def update_extra(self, extra: Any, params: Params, aux: Any, step: jax.Array) -> Any:
    return {**extra, **aux}

  @override
  def couple(self, params: Params, embeddings: Any, batch: Batch, extra: Any) -> Loss:
    image, text = embeddings
    scale_and_bias: Any = self.network.apply({'params': params}, method='logit_scale_and_bias')
    scale, bias = scale_and_bias
    loss, accuracy = pair_loss(image, text, scale, bias, self.loss_name, self.label_smoothing)
    return mean_loss(loss, {'accuracy': accuracy, 'logit_scale': scale, 'logit_bias': bias})

  @override
  def outputs(self) -> Mapping[str, Output]:
    def encode_image(params: Params, extra: Any, batch: Batch) -> Any:
      images = self.normalize(batch['image'].astype(jnp.float32) / 255)
      return self.network.apply(flax_variables(params, extra), images, method='encode_image')

    def encode_text(params: Params, extra: Any, batch: Batch) -> Any:
      return self.network.apply({'params': params}, batch['tokens'], method='encode_text')

    image = Output(encode_image, 'embedding', encoder=self._encoder)
    return {'embed_image': image, 'embed_text': Output(encode_text, 'embedding', ('tokens',)), 'features': image}

  def _encoder(self, params: Params, extra: Any) -> ImageEncoder:
    statistics = extra.get(BATCH_STATS, {}).get('image')
    of_image = {} if statistics is None else {BATCH_STATS: statistics}
    return ImageEncoder(self.network.image, flax_variables(params['image'], of_image), self.normalize)
