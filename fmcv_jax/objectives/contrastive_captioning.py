"""Contrast and captions of the same pairs (CoCa, Yu et al. 2022)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from typing_extensions import override

from fmcv_jax.augment.apply import apply_augments
from fmcv_jax.augment.base import Augment
from fmcv_jax.augment.normalize import Normalize
from fmcv_jax.bounds import Decay, NonNegativeFloat, PositiveFloat, PositiveInt
from fmcv_jax.data.tokenizers import Tokenizer
from fmcv_jax.models.multimodal.captioner import ContrastiveCaptioner
from fmcv_jax.models.multimodal.dual_encoder import Pairs
from fmcv_jax.objectives.base import CoupledObjective, Loss, Mean, mean_loss
from fmcv_jax.objectives.contrastive import Contrastive
from fmcv_jax.objectives.language import Language, SpecialIds
from fmcv_jax.objectives.outputs import Batch, Output, Params


class Embedded(NamedTuple):
  """Embeddings of pairs, and for each text the sums over its predicted tokens, float32 [B].

  losses  cross-entropies
  tokens  number of predicted tokens
  right   number of tokens that are the most likely ones
  """

  pairs: Pairs
  losses: jax.Array
  tokens: jax.Array
  right: jax.Array


@dataclasses.dataclass(frozen=True)
class ContrastiveCaptioning(CoupledObjective):
  """contrastive_weight * (loss of `contrastive`) + caption_weight * (loss of `language`) of a CoCa.

  The first is that of all pairs of the batch, the second the mean over all tokens of all texts of the batch; both are
  the same in any number of microbatches. CoCa is trained with weights 1 and 2; OpenCLIP fine-tunes it for captions with
  0 and 1.

  label_smoothing  of the captions
  max_tokens       largest number of tokens of the output 'caption'
  special          set by the run, from its tokenizer
  """

  network: nn.Module
  contrastive_weight: NonNegativeFloat = 1.0
  caption_weight: PositiveFloat = 2.0
  label_smoothing: Decay = 0.0
  max_tokens: PositiveInt = 64
  augment: tuple[Augment, ...] = ()
  normalize: Normalize = Normalize()
  special: SpecialIds | None = None

  def __post_init__(self) -> None:
    if not isinstance(self.network, ContrastiveCaptioner):
      raise ValueError('network: contrastive_captioning needs coca or contrastive_captioner')

  @override
  def with_tokenizer(self, tokenizer: Tokenizer) -> 'ContrastiveCaptioning':
    return dataclasses.replace(self, special=self._language.with_tokenizer(tokenizer).special)

  @property
  @override
  def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
    return self._language.example_batch

  @override
  def init(self, rng: jax.Array) -> tuple[Params, Any]:
    return self._language.init(rng)

  @override
  def embed(self, params: Params, batch: Batch, rng: jax.Array, extra: Any) -> tuple[Embedded, dict[str, Any]]:
    augment_rng, dropout_rng = jax.random.split(rng)
    images, tokens = self.normalize(apply_augments(batch['image'], self.augment, augment_rng)), batch['tokens']
    outputs: Any = self.network.apply(
      {'params': params}, images, tokens, train=True, rngs={'dropout': dropout_rng}, method='embed_and_predict'
    )
    losses, weights, correct = self._language.token_losses(outputs.logits[:, :-1], tokens, self.label_smoothing)
    sums = (jnp.sum(weights * x, axis=1) for x in (losses, jnp.ones_like(losses), correct))
    return Embedded(outputs.pairs, *sums), {}

  @override
  def couple(self, params: Params, embeddings: Embedded, batch: Batch, extra: Any) -> Loss:
    contrast = self._contrastive.couple(params, embeddings.pairs, batch, extra)
    losses, tokens, right = (jnp.sum(x) for x in embeddings[1:])
    caption = Mean(losses, tokens)
    loss = mean_loss(self.contrastive_weight * contrast.value + self.caption_weight * caption.value)
    own = {
      'contrastive_loss': Mean(contrast.total, contrast.weight),
      'caption_loss': caption,
      'caption_accuracy': Mean(right, tokens),
    }
    return loss._replace(metrics={**contrast.metrics, **own})

  @override
  def outputs(self) -> Mapping[str, Output]:
    """Outputs of `contrastive` and of `language`; 'features' are those of the image network."""
    return {**self._contrastive.outputs(), **self._language.outputs()}

  @property
  def _contrastive(self) -> Contrastive:
    network: Any = self.network
    return Contrastive(network.towers, normalize=self.normalize)

  @property
  def _language(self) -> Language:
    return Language(
      self.network,
      self.label_smoothing,
      max_tokens=self.max_tokens,
      normalize=self.normalize,
      special=self.special,
    )
