"""Language modeling of texts about images: captions and answers (PaliGemma, Beyer et al. 2024), and captions as
pretraining of an image encoder (Cap and CapPa, Tschannen et al. 2023)."""

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
from fmcv_jax.bounds import Fraction, PositiveInt
from fmcv_jax.data.tokenizers import Tokenizer
from fmcv_jax.decoding.generation import generate
from fmcv_jax.decoding.language_model import LanguageModel, State
from fmcv_jax.decoding.options import DecodingOptions
from fmcv_jax.models.multimodal.captioner import Captioner
from fmcv_jax.models.multimodal.prefix_lm import PrefixLM
from fmcv_jax.objectives.base import Loss, Mean, Objective, image_field
from fmcv_jax.objectives.outputs import Batch, ImageEncoder, Output, Params, encoder_outputs


class SpecialIds(NamedTuple):
  """Ids of padding, of the end, and of the separator that ends a prefix (None: the prefix is the first token)."""

  pad: int
  end: int
  separator: int | None


@dataclasses.dataclass(frozen=True)
class Language(Objective):
  """Mean cross-entropy of the tokens after the prefix of each row, the end included.

  A row is start, prompt, separator, answer, end, padding (the tokenizer `prompted`); rows of other tokenizers, without
  a separator, are captions after the start token.

  label_smoothing    fraction of the target distribution that is uniform over the vocabulary
  token_weights      True: the batch field 'token_weights', float [length], weights the loss of each token of 'tokens'
  parallel_fraction  fraction of the examples, drawn at random, whose tokens are predicted in parallel: all inputs are
                     the mask token, without a causal mask. CapPa: 0.75; Cap: 0
  max_tokens         largest number of tokens of the output 'caption'; a network with a table of positions generates at
                     most length - 1
  special            set by the run, from its tokenizer
  """

  network: nn.Module
  label_smoothing: Fraction = 0.0
  token_weights: bool = False
  parallel_fraction: Fraction = 0.0
  max_tokens: PositiveInt = 64
  augment: tuple[Augment, ...] = ()
  normalize: Normalize = Normalize()
  special: SpecialIds | None = None

  def __post_init__(self) -> None:
    if not hasattr(self.network, 'prefill'):
      known = 'prefix_lm, paligemma, captioner, cappa, contrastive_captioner or coca'
      raise ValueError(f'network: language needs one that reads images and writes texts, {known}')
    masks = isinstance(self.network, Captioner) and self.network.text.mask_token
    if self.parallel_fraction and not masks:
      raise ValueError('parallel_fraction: parallel prediction needs a captioner with mask_token=True, such as cappa')
    if not 0 <= self.label_smoothing < 1:
      raise ValueError(f'label_smoothing: expected 0 to below 1, got {self.label_smoothing}')

  @override
  def with_tokenizer(self, tokenizer: Tokenizer) -> 'Language':
    text = self._network.text
    if tokenizer.vocab_size > text.vocab_size:
      raise ValueError(f'network.text: the tokenizer has {tokenizer.vocab_size} ids, the network {text.vocab_size}')
    if tokenizer.length != text.length:
      raise ValueError(f'network.text.length: {text.length}, but the rows of the tokenizer have {tokenizer.length} ids')
    if tokenizer.start_id is None or tokenizer.end_id is None:
      raise ValueError('a language model needs a tokenizer with a start and an end, such as prompted or clip_bpe')
    separator = getattr(tokenizer, 'separator_id', None)
    if separator is not None and not isinstance(self.network, PrefixLM):
      raise ValueError('tokenizer: prompts need a prefix_lm or paligemma; for this network leave out prompted')
    return dataclasses.replace(self, special=SpecialIds(tokenizer.pad_id, tokenizer.end_id, separator))

  @property
  @override
  def example_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
    length = self._network.text.length
    batch = {
      'image': image_field(self._network.image),
      'tokens': jax.ShapeDtypeStruct((length,), jnp.int32),
    }
    return batch | ({'token_weights': jax.ShapeDtypeStruct((length,), jnp.float32)} if self.token_weights else {})

  @override
  def init(self, rng: jax.Array) -> tuple[Params, Any]:
    image, tokens = (jnp.zeros((1, *x.shape), x.dtype) for x in list(self.example_batch.values())[:2])
    return self.network.init(rng, image.astype(jnp.float32), tokens, jnp.ones(1, jnp.int32))['params'], {}

  @override
  def loss(self, params: Params, batch: Batch, rng: jax.Array, extra: Any) -> Loss:
    augment_rng, dropout_rng = jax.random.split(rng)
    images = self.normalize(apply_augments(batch['image'], self.augment, augment_rng))
    drawn: dict[str, jax.Array] = {}
    if self.parallel_fraction:
      dropout_rng, parallel_rng = jax.random.split(dropout_rng)
      drawn['parallel'] = jax.random.bernoulli(parallel_rng, self.parallel_fraction, (len(images),))
    logits = self._logits(params, images, batch['tokens'], train=True, rngs={'dropout': dropout_rng}, **drawn)
    losses, weights, correct = self.token_losses(logits, batch['tokens'], self.label_smoothing)
    if self.token_weights:
      weights = weights * batch['token_weights'][:, 1:]
    weight = weights.sum()
    accuracy = Mean(jnp.sum(weights * correct), weight)
    return Loss(jnp.sum(weights * losses), weight, {'accuracy': accuracy}, {})

  @override
  def outputs(self) -> Mapping[str, Output]:
    """Outputs of the image encoder, and:

    caption         int32 [B, at most max_tokens], the most likely continuation of the prefixes in 'tokens', token by
                    token
    log_likelihood  float32 [B], of the answer in 'tokens' after its prefix
    """
    return {
      **encoder_outputs(self._network.image, self._encoder),
      'caption': Output(self._caption, 'tokens', ('image', 'tokens'), language=self.language_model),
      'log_likelihood': Output(self._log_likelihood, reads=('image', 'tokens')),
    }

  def language_model(self, params: Params, extra: Any) -> LanguageModel:
    """The trained model, for a search; it reads 'image' uint8 [B, H, W, 3] and the prefixes in 'tokens' [B, T]."""
    network = self._network

    def prefill(batch: Batch, capacity: int) -> tuple[jax.Array, State]:
      tokens, images = batch['tokens'], self._images(batch['image'])
      (logits, prefix), variables = network.apply(
        {'params': params},
        images,
        tokens,
        self._prefix_lengths(tokens),
        capacity,
        mutable=['cache'],
        method='prefill',
      )
      return logits, (variables['cache'], prefix)

    def extend(tokens: jax.Array, state: State, step: jax.Array) -> tuple[jax.Array, State]:
      cache, prefix = state
      capacity = _cache_size(cache) - prefix.shape[1]
      variables = {'params': params, 'cache': cache}
      logits, variables = network.apply(variables, tokens, prefix, step, capacity, mutable=['cache'], method='extend')
      return logits, (variables['cache'], prefix)

    def select(state: State, rows: jax.Array) -> State:
      cache, prefix = state
      return jax.tree.map(lambda x: jnp.take(x, rows, axis=1), cache), prefix[rows]

    limit = None if isinstance(network, PrefixLM) else network.text.length - 1
    return LanguageModel(prefill, extend, select, self._ids.pad, self._ids.end, limit)

  def _caption(self, params: Params, extra: Any, batch: Batch) -> jax.Array:
    options = DecodingOptions(max_tokens=self.max_tokens)
    return generate(self.language_model(params, extra), batch, options).tokens

  def _log_likelihood(self, params: Params, extra: Any, batch: Batch) -> jax.Array:
    logits = self._logits(params, self._images(batch['image']), batch['tokens'])
    losses, weights, _ = self.token_losses(logits, batch['tokens'])
    return -jnp.sum(losses, axis=1, where=weights > 0)

  def _logits(self, params: Params, images: jax.Array, tokens: jax.Array, **options: Any) -> jax.Array:
    """Logits of the next token after each but the last, float32 [B, T - 1, V]."""
    lengths = self._prefix_lengths(tokens)
    logits: Any = self.network.apply({'params': params}, images, tokens[:, :-1], lengths, **options)
    return logits

  def token_losses(
    self, logits: jax.Array, tokens: jax.Array, smoothing: float = 0.0
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Loss, weight (0 for tokens that are not predicted) and correctness of each next token, float32 [B, T - 1].

    logits  float32 [B, T - 1, V], of the token after each but the last of `tokens` int32 [B, T]
    """
    after, lengths = tokens[:, 1:], self._prefix_lengths(tokens)
    losses = cross_entropy(logits, after, smoothing)
    answer = jnp.arange(1, tokens.shape[1]) >= lengths[:, None]
    ended = jnp.cumsum(answer & (after == self._ids.end), axis=1)
    weights = (answer & (ended - (after == self._ids.end) <= 0)).astype(jnp.float32)
    return losses, weights, (logits.argmax(-1) == after).astype(jnp.float32)

  def _prefix_lengths(self, tokens: jax.Array) -> jax.Array:
    """Number of tokens up to the first separator, int32 [B]."""
    if self._ids.separator is None:
      return jnp.ones(len(tokens), jnp.int32)
    return jnp.argmax(tokens == self._ids.separator, axis=1).astype(jnp.int32) + 1

  def _images(self, images: jax.Array) -> jax.Array:
    return self.normalize(images.astype(jnp.float32) / 255)

  def _encoder(self, params: Params, extra: Any) -> ImageEncoder:
    return ImageEncoder(self._network.image, {'params': params['image']}, self.normalize)

  @property
  def _network(self) -> Any:
    return self.network

  @property
  def _ids(self) -> SpecialIds:
    if self.special is None:
      raise ValueError('a language model needs the ids of its tokenizer; set config.tokenizer')
    return SpecialIds(*self.special)


def _cache_size(cache: Any) -> int:
  """Number of places of a cache of keys and values [layers, B, places, heads, K]."""
  leaves = jax.tree_util.tree_leaves_with_path(cache)
  return next(leaf.shape[2] for path, leaf in leaves if path[-1].key == 'cached_key')


def cross_entropy(logits: jax.Array, targets: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
  """Cross-entropy of logits float32 [..., V] and the targets int [...], smoothed with the uniform distribution.

  With smoothing s the target distribution is (1 - s) * one-hot + s / V (Szegedy et al. 2016, section 7).
  """
  own = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  expected = (1 - label_smoothing) * own + label_smoothing * logits.mean(axis=-1) if label_smoothing else own
  return jax.nn.logsumexp(logits, axis=-1) - expected
