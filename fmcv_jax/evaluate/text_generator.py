"""Captions and answers about images from a trained language model."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.data.prompts import Prompted
from fmcv_jax.data.sources.base import Example, Source
from fmcv_jax.data.tokenizers import Tokenizer
from fmcv_jax.decoding.choices import score
from fmcv_jax.decoding.generation import generate
from fmcv_jax.decoding.options import DecodingOptions
from fmcv_jax.errors import UserError
from fmcv_jax.evaluate.base import EvaluatedModel
from fmcv_jax.objectives.outputs import Batch, Output, Params, encoder_of, language_of

CAPTION_PROMPT = 'caption en'  # PaliGemma's (Beyer et al. 2024, section 3.2.4)
QUESTION_TEMPLATE = 'answer en {}'


def caption_prompt(tokenizer: Tokenizer | None) -> str:
  """The default prompt of captions; '' for a model that reads no prompts."""
  return CAPTION_PROMPT if isinstance(tokenizer, Prompted) else ''


def decode_generated(tokenizer: Tokenizer, tokens: np.ndarray) -> list[str]:
  """Texts of generated tokens int [N, L], which lack the start id of the tokenizer's own rows."""
  start = [] if tokenizer.start_id is None else [np.full((len(tokens), 1), tokenizer.start_id, tokens.dtype)]
  return tokenizer.decode(np.concatenate([*start, tokens], axis=1))


class Text(NamedTuple):
  """Text about one image.

  number          of the image in the source
  text            the text; None for an image that cannot be read
  log_likelihood  of the text, the end included; of a closed list, the log of the probability within the list
  """

  number: int
  text: str | None
  log_likelihood: float


class TextGenerator:
  """The language model of an `EvaluatedModel`, over all of its devices and with its current parameters.

  batch  global batch size

  UserError for a model that does not generate texts, or has no tokenizer.
  """

  def __init__(self, subject: EvaluatedModel, batch: int):
    self._language, self._batch = language_of(subject.outputs), batch
    if subject.tokenizer is None:
      raise UserError(
        'config.tokenizer: the model has no tokenizer; import it with its tokenizer.json, or set one with '
        '--config.tokenizer.name=prompted'
      )
    self._tokenizer: Tokenizer = subject.tokenizer
    self._subject = subject

  def texts(
    self,
    data: Pipeline,
    prompts: Sequence[str],
    options: DecodingOptions = DecodingOptions(),
    answers: Sequence[str] = (),
    numbers: Sequence[int] | None = None,
    *,
    withhold_images: bool = False,
  ) -> Iterator[Text]:
    """A text for each image of a pipeline, in the order of its source.

    prompts          one prompt per image, or one for all of them
    answers          closed list: the most likely one is taken, and `options` are not used
    numbers          number of each image, on which its samples depend; default 0 to N - 1
    withhold_images  True: every pixel is the mean color of the model's normalization, so that the text depends on the
                     prompt alone. The images are read all the same, and one that cannot be read has no text
    """
    if not isinstance(options, DecodingOptions):
      raise UserError(f'options: expected DecodingOptions, got {type(options).__name__}')
    count = len(data.source)
    numbers = range(count) if numbers is None else numbers
    if len(prompts) not in (1, count):
      raise UserError(f'prompts: {len(prompts)} for {count} images; give one, or one per image')
    data = dataclasses.replace(data, source=_Prompts(data.source, self.rows(prompts), tuple(numbers)))
    call, decode = self._listed(answers) if answers else self._free(options)
    name = f'{answers or options}' + (' without images' if withhold_images else '')
    output = Output(self._blind(call) if withhold_images else call, 'tokens', ('image', 'prompt', 'number'))
    done = 0
    for values, fields in self._subject.map_batches((name,), data, self._batch, own={name: output}):
      rows = min(self._batch, count - done)
      found = zip(decode(values[name], rows), fields['mask'][:rows], strict=True)
      for index, ((text, log_likelihood), is_read) in enumerate(found, done):
        yield Text(numbers[index], text if is_read else None, log_likelihood if is_read else float('nan'))
      done += rows

  def rows(self, prompts: Sequence[str]) -> np.ndarray:
    """Token rows of prompts, int32 [N, length]. UserError for one that does not fit, or that the model cannot take."""
    _check_texts('prompt', prompts)
    if isinstance(self._tokenizer, Prompted):
      return self._tokenizer.prompts(prompts)
    if any(prompts):
      raise UserError('prompt: this model was trained without prompts; leave it out')
    return self._tokenizer([''] * len(prompts))

  def answer_rows(self, answers: Sequence[str]) -> np.ndarray:
    """Token rows of a closed list of answers, int32 [N, T].

    UserError for a model without prompts, and for an answer that is empty or given twice.
    """
    _check_texts('answers', answers)
    if any(not answer.strip() for answer in answers):
      raise UserError('answers: one of them is empty; remove it')
    if twice := [answer for answer in dict.fromkeys(answers) if list(answers).count(answer) > 1]:
      raise UserError(f'answers: {twice[0]!r} is given twice, which would share its probability; remove one')
    if not isinstance(self._tokenizer, Prompted):
      raise UserError('answers: a closed list needs a model with the tokenizer prompted')
    return self._tokenizer.answers(answers)

  def _free(self, options: DecodingOptions) -> tuple[Any, Callable[[Any, int], list[tuple[str, float]]]]:
    """The call of an output that generates with these options, and the reader of its values."""

    def call(params: Params, extra: Any, batch: Batch) -> Any:
      return generate(self._language(params, extra), _with_tokens(batch), options)._asdict()

    def decode(values: dict[str, np.ndarray], count: int) -> list[tuple[str, float]]:
      texts = decode_generated(self._tokenizer, values['tokens'][:count])
      return list(zip(texts, map(float, values['log_likelihood'][:count]), strict=True))

    return call, decode

  def _listed(self, answers: Sequence[str]) -> tuple[Any, Callable[[Any, int], list[tuple[str, float]]]]:
    """The call of an output that scores the answers, and the reader of its values."""
    tokens = jnp.asarray(self.answer_rows(answers))

    def call(params: Params, extra: Any, batch: Batch) -> Any:
      return score(self._language(params, extra), _with_tokens(batch), tokens)

    def decode(values: np.ndarray, count: int) -> list[tuple[str, float]]:
      scores = values[:count].astype(np.float64)
      best = scores.argmax(axis=1)
      total = np.logaddexp.reduce(scores, axis=1)
      return [(answers[i], float(row[i] - whole)) for i, row, whole in zip(best, scores, total, strict=True)]

    return call, decode

  def _blind(self, call: Any) -> Any:
    """A call of an output that gets images of the mean color in place of its own."""
    encoder = encoder_of(self._subject.outputs)

    def blind(params: Params, extra: Any, batch: Batch) -> Any:
      image = batch['image']
      mean = jnp.asarray(encoder(params, extra).normalize.mean)
      color = jnp.round(255 * mean).astype(image.dtype)
      return call(params, extra, {**batch, 'image': jnp.broadcast_to(color, image.shape)})

    return blind


def _check_texts(argument: str, texts: Sequence[object]) -> None:
  if other := [text for text in texts if not isinstance(text, str)]:
    raise UserError(f'{argument}: expected a text, got {type(other[0]).__name__}')


def _with_tokens(batch: Batch) -> Batch:
  return {**batch, 'tokens': batch['prompt'], 'index': batch['number']}


@dataclasses.dataclass(frozen=True)
class _Prompts(Source):
  """Images with the tokens of a prompt, `rows` int32 [N or 1, T], and their numbers."""

  images: Source
  rows: np.ndarray = dataclasses.field(repr=False)
  numbers: tuple[int, ...] = dataclasses.field(repr=False)

  def __len__(self) -> int:
    return len(self.images)

  def __getitem__(self, index: int) -> Example:
    number = np.array(self.numbers[index], np.int32)
    return {'image': self.images[index]['image'], 'prompt': self.rows[index % len(self.rows)], 'number': number}

  def key_of(self, index: int) -> str:
    return self.images.key_of(index)
