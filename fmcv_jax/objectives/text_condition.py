"""Texts as the condition of a denoiser: embeddings of the tokens, their mask, and an embedding of the whole text."""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from fmcv_jax.bounds import NonNegativeInt
from fmcv_jax.data.tokenizers import Tokenizer
from fmcv_jax.diffusion.condition import make_condition
from fmcv_jax.models.backbones.text import TextTransformer

KEYS = ('text', 'text_mask', 'pooled_text')


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
  """Ids of a tokenizer that are not text: padding, and what precedes and ends every text; None where there is none."""

  pad: NonNegativeInt = 0
  start: NonNegativeInt | None = None
  end: NonNegativeInt | None = None


@dataclasses.dataclass(frozen=True)
class TextCondition:
  """Captions, read by a text transformer. Without an encoder there is no text condition.

  encoder      frozen, its parameters at 'extra/text' (by init_from)
  train        the encoder is trained as well, its parameters at 'params/text'
  precomputed  the batch holds, next to `tokens`, the encoder's outputs for the first text of each record, `words`
               [B, L, E] and `whole_text` [B, P], written by `fmcv precompute words whole_text`
  padding      'masked': the network does not attend to it; 'zeros': it does (Stable Diffusion 2); 'end': the end id
               takes its place, and the network attends to it (Stable Diffusion 1)
  special      ids of the tokenizer; a run fills them in from its own. Without them rows are taken to begin with a start
               id and to end with the largest id of the row, and 0 is padding
  """

  encoder: nn.Module | None = None
  train: bool = False
  precomputed: bool = False
  padding: Literal['masked', 'zeros', 'end'] = 'masked'
  special: SpecialTokens | None = None

  def __post_init__(self) -> None:
    if self.encoder is not None and not isinstance(self.encoder, TextTransformer):
      raise ValueError('encoder: needs encoder.name=text_transformer')
    if self.train and self.encoder is None:
      raise ValueError('train: there is no text encoder; set encoder')
    if self.precomputed and (self.encoder is None or self.train):
      raise ValueError('precomputed: needs a frozen text encoder; set encoder, and leave out train')

  @property
  def keys(self) -> tuple[str, ...]:
    """The keys of the condition that it provides."""
    return () if self.encoder is None else KEYS

  def with_tokenizer(self, tokenizer: Tokenizer) -> 'TextCondition':
    """A copy with the ids of padding, start and end of the tokenizer; itself if it has them or no encoder."""
    if self.encoder is None or self.special is not None:
      return self
    special = SpecialTokens(tokenizer.pad_id, tokenizer.start_id, tokenizer.end_id)
    return dataclasses.replace(self, special=special)

  def check(self, condition_keys: tuple[str, ...]) -> None:
    """ValueError for an encoder whose texts the network does not read."""
    if self.encoder is not None and not {'text', 'pooled_text'} & set(condition_keys):
      raise ValueError('text_condition: the network reads no text; leave the encoder out')

  def example_fields(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the batch fields of one example: tokens, and precomputed embeddings."""
    encoder: Any = self.encoder
    if encoder is None:
      return {}
    fields = {'tokens': jax.ShapeDtypeStruct((encoder.length,), jnp.int32)}
    if self.precomputed:
      fields['words'] = jax.ShapeDtypeStruct((encoder.length, encoder.width), jnp.float16)
      fields['whole_text'] = jax.ShapeDtypeStruct((encoder.width,), jnp.float16)
    return fields

  def init(self, rng: jax.Array) -> dict[str, Any]:
    """Parameters of the text encoder: {'text': ...}."""
    encoder: Any = self.encoder
    return {'text': encoder.init(rng, jnp.zeros((1, encoder.length), jnp.int32))['params']}

  def parameters(self, params: Any, extra: Any) -> Any:
    """`extra` with the encoder's parameters in it, wherever they are kept."""
    return {**extra, 'text': params['text']} if self.train else extra

  def __call__(self, extra: Any, batch: Any, keep: jax.Array | None = None) -> dict[str, jax.Array]:
    """The condition of a batch; that of an empty text for examples whose `keep` (bool [B]) is false."""
    if self.encoder is None:
      return {}
    if 'words' in batch:
      words, pooled = (batch[name].astype(jnp.float32) for name in ('words', 'whole_text'))
      given = words, (words != 0).any(axis=-1) if self.padding == 'masked' else None, pooled
      if keep is not None:
        empty = self.encode(extra, self.empty_text(batch['tokens'][:1]))
        given = jax.tree.map(lambda a, b: jnp.where(keep.reshape(-1, *(1,) * (a.ndim - 1)), a, b), given, empty)
    else:
      tokens = batch['tokens']
      if keep is not None:
        tokens = jnp.where(keep[:, None], tokens, self.empty_text(tokens))
      given = self.encode(extra, tokens)
    return make_condition(**dict(zip(KEYS, given, strict=True)))

  def encode(self, extra: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Of tokens [B, L]: embeddings [B, L, E], which of them are attended to (bool [B, L], None: all), pooled [B, P]."""
    encoder: Any = self.encoder
    after = self._padding_of(tokens)
    if self.padding == 'end':
      tokens = jnp.where(after, self._end_of(tokens), tokens)
    features = encoder.apply({'params': extra['text']}, tokens)
    return features.tokens, ~after if self.padding == 'masked' else None, features.pooled

  def empty_text(self, tokens: jax.Array) -> jax.Array:
    """An empty text in place of each of the tokens int32 [B, L]: start, end, padding."""
    if self.special is None:
      return jnp.concatenate([tokens[:, :1], self._end_of(tokens), jnp.zeros_like(tokens[:, 2:])], axis=1)
    ids = [i for i in (self.special.start, self.special.end) if i is not None]
    row = jnp.full(tokens.shape[1:], self.special.pad, tokens.dtype).at[: len(ids)].set(jnp.array(ids, tokens.dtype))
    return jnp.broadcast_to(row, tokens.shape)

  def _padding_of(self, tokens: jax.Array) -> jax.Array:
    """bool [B, L], true after the end of each text."""
    if self.special is None:
      end = jnp.argmax(tokens, axis=1)
    elif self.special.end is None:
      return tokens == self.special.pad
    else:
      ends = tokens == self.special.end
      end = jnp.where(ends.any(axis=1), jnp.argmax(ends, axis=1), tokens.shape[1])
    return jnp.arange(tokens.shape[1]) > end[:, None]

  def _end_of(self, tokens: jax.Array) -> jax.Array | int:
    """The end id: int32 [B, 1], or one for all."""
    if self.special is None:
      return tokens.max(axis=1, keepdims=True)
    return self.special.pad if self.special.end is None else self.special.end
