"""Options of text generation."""

import dataclasses
import math

from fmcv_jax.bounds import Finite, NonNegativeFloat, NonNegativeInt, PositiveFraction, PositiveInt, Seed
from fmcv_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class DecodingOptions:
  """Search or sampling of texts.

  max_tokens      int, default 64. Largest number of tokens, the end included
  min_tokens      int, default 0. Tokens before the end may follow
  temperature     float, default 0. 0 takes the most likely token; otherwise logits are divided by it, and sampled
  top_k           int, default None. Samples from the K most likely tokens (Fan et al. 2018)
  top_p           float, default None. Samples from the fewest tokens whose probabilities reach P (Holtzman et al. 2020)
  beams           int, default 1. Number of beams; with more than 1 the text of the best score is searched
  length_penalty  float, default 1. Beams are ranked by log-probability / length ** length_penalty
  seed            int, default 0. Samples depend on it and on the number of the example, not on the batch or the mesh
  """

  max_tokens: PositiveInt = 64
  min_tokens: NonNegativeInt = 0
  temperature: NonNegativeFloat = 0.0
  top_k: PositiveInt | None = None
  top_p: PositiveFraction | None = None
  beams: PositiveInt = 1
  length_penalty: Finite = 1.0
  seed: Seed = 0

  def __post_init__(self) -> None:
    if self.max_tokens < 1:
      raise UserError(f'max_tokens: expected at least 1, got {self.max_tokens}')
    if not 0 <= self.min_tokens < self.max_tokens:
      raise UserError(f'min_tokens: expected 0 to max_tokens - 1 = {self.max_tokens - 1}, got {self.min_tokens}')
    if not (self.temperature >= 0 and math.isfinite(self.temperature)):
      raise UserError(f'temperature: expected at least 0, got {self.temperature}')
    if self.top_k is not None and self.top_k < 1:
      raise UserError(f'top_k: expected at least 1, got {self.top_k}')
    if self.top_p is not None and not 0 < self.top_p <= 1:
      raise UserError(f'top_p: expected above 0 and at most 1, got {self.top_p}')
    if self.beams < 1:
      raise UserError(f'beams: expected at least 1, got {self.beams}')
    if not math.isfinite(self.length_penalty):
      raise UserError(f'length_penalty: expected a finite number, got {self.length_penalty}')
    if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
      raise UserError('top_k and top_p: these are options of sampling; set a temperature above 0')
    if self.beams > 1 and self.temperature > 0:
      raise UserError('beams: a beam search does not sample; set temperature to 0')
