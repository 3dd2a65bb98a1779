"""Captions of an evaluation set, compared with those of people: CIDEr, BLEU, ROUGE-L and CLIPScore."""

import dataclasses
import itertools
import logging
from collections.abc import Sequence

import numpy as np
from typing_extensions import override

from fmcv_jax.bounds import NonNegativeInt, PositiveInt
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.data.sources.subset import Subset
from fmcv_jax.data.tokenizers import truncated_texts
from fmcv_jax.decoding.options import DecodingOptions
from fmcv_jax.errors import BadRecord, UserError
from fmcv_jax.evaluate.annotated import read_annotations, sample_annotations
from fmcv_jax.evaluate.base import EvaluatedModel, Evaluator, Metrics
from fmcv_jax.evaluate.caption_metrics import caption_scores
from fmcv_jax.evaluate.caption_words import caption_words
from fmcv_jax.evaluate.clip_score import clip_score, ref_clip_score
from fmcv_jax.evaluate.feature_extractor import FeatureExtractor
from fmcv_jax.evaluate.text_generator import TextGenerator, caption_prompt
from fmcv_jax.evaluate.zero_shot import check_label_room

logger = logging.getLogger(__name__)

_NAME = 'captioning'
References = Sequence[tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Captioning(Evaluator):
  """Captions images, and compares each caption with all texts of its record: 'cider' (CIDEr-D, 0 to 10), 'bleu1' to
  'bleu4', 'rouge_l' and 'exact_match' (0 to 1).

  The formulas are those of pycocoevalcap. Words are those of `fmcv_jax.evaluate.caption_words`, which restates
  Stanford's PTBTokenizer: scores depend on the tokenizer.

  data              images with captions, any number of each
  prompt            default 'caption en', PaliGemma's; '' for a tokenizer without prompts
  decoding          search of the captions, as in `fmcv caption`
  image_text_model  workdir of an image-text model or 'demo', which adds 'clip_score' (CLIPScore, 0 to 2.5) and
                    'ref_clip_score' (RefCLIPScore)
  clip_template     sentence for this model, with a '{}' for the caption; default that of the paper
  blind             also gives all metrics as 'blind_...' for captions that are generated without the images, from
                    pixels of the mean color of the model's normalization: a model scores above them by what it sees
  """

  data: Pipeline
  prompt: str | None = None
  decoding: DecodingOptions = DecodingOptions()
  image_text_model: str | None = None
  clip_template: str = 'A photo depicts {}'
  blind: bool = True
  batch_size: PositiveInt = 256
  every: NonNegativeInt = 0

  def __post_init__(self) -> None:
    if self.clip_template.count('{}') != 1:
      raise ValueError(f"clip_template: needs one '{{}}' for the caption, got {self.clip_template!r}")

  @override
  def prepare(self, subject: EvaluatedModel) -> None:
    TextGenerator(subject, self.batch_size).rows([self._prompt(subject)])
    captions = sample_annotations(self.data, self._captions, _NAME)
    _check_several(len(self.data.source))
    if (scorer := self._scorer(subject)) is not None:
      scorer.check([text for own in captions for text in own])

  @override
  def __call__(self, subject: EvaluatedModel) -> Metrics:
    references = read_annotations(self.data, self._captions, _NAME)
    _check_several(len(references))
    scorer = self._scorer(subject)
    metrics: Metrics = {}
    for prefix, withheld in (('', False), ('blind_', True))[: 1 + self.blind]:
      data = self._records(list(references))
      texts = TextGenerator(subject, self.batch_size).texts(
        data, [self._prompt(subject)], self.decoding, numbers=list(references), withhold_images=withheld
      )
      captions = {text.number: text.text for text in texts if text.text is not None}
      references = {number: references[number] for number in captions}  # of the images that can be read
      words = [[caption_words(text) for text in own] for own in references.values()]
      scores = caption_scores([caption_words(text) for text in captions.values()], words)
      if scorer is not None:
        scores |= scorer.scores(self._records(list(captions)), list(captions.values()), list(references.values()))
      metrics |= {f'{prefix}{name}': score for name, score in scores.items()}
    return metrics

  def _records(self, numbers: Sequence[int]) -> Pipeline:
    return dataclasses.replace(self.data, source=Subset(self.data.source, np.array(numbers)))

  def _prompt(self, subject: EvaluatedModel) -> str:
    return caption_prompt(subject.tokenizer) if self.prompt is None else self.prompt

  def _captions(self, number: int) -> tuple[str, ...]:
    texts = self.data.source.texts_of(number)
    if not texts:
      raise BadRecord('has no caption')
    return texts

  def _scorer(self, subject: EvaluatedModel) -> '_ClipScorer | None':
    if self.image_text_model is None:
      return None
    extractor = FeatureExtractor(subject, self.image_text_model, self.batch_size)
    if not extractor.reads:
      raise UserError(
        f'config.evaluators: {_NAME}.image_text_model: {self.image_text_model} does not embed texts; give the workdir '
        f"of an image-text model, or 'demo'"
      )
    return _ClipScorer(extractor, self.clip_template)


def _check_several(images: int) -> None:
  if images < 2:
    raise UserError(f'config.evaluators: {_NAME}: CIDEr weighs words by how few images have them; give several images')


class _ClipScorer:
  """CLIPScore by an image-text model; images and references are embedded once for all captions of them."""

  def __init__(self, extractor: FeatureExtractor, template: str):
    self._extractor, self._template = extractor, template
    self._embedded: tuple[np.ndarray, list[np.ndarray]] | None = None

  def check(self, captions: Sequence[str]) -> None:
    """Raises UserError if captions have no room in the texts of the model."""
    check_label_room(self._extractor.tokenizer, captions, (self._template,))

  def scores(self, images: Pipeline, captions: Sequence[str], references: References) -> Metrics:
    """Means over the images of a pipeline, which are the same in every call."""
    if self._embedded is None:
      flat = self._read(list(itertools.chain.from_iterable(references)), 'references')
      ends = np.cumsum([len(own) for own in references])
      self._embedded = self._extractor.of_records(images), np.split(flat, ends[:-1])
    pixels, own = self._embedded
    texts = self._read(captions, 'captions')
    return {
      'clip_score': float(clip_score(pixels, texts).mean()),
      'ref_clip_score': float(ref_clip_score(pixels, texts, own).mean()),
    }

  def _read(self, captions: Sequence[str], what: str) -> np.ndarray:
    """Unit embeddings [N, E]; warns of texts that the tokenizer of the model cuts."""
    texts, tokenizer = [self._template.replace('{}', caption) for caption in captions], self._extractor.tokenizer
    if cut := len(truncated_texts(tokenizer, sorted(set(texts)))):
      logger.warning(
        '%s: %d of %d %s are cut to the %d tokens of the image-text model',
        _NAME, cut, len(set(texts)), what, tokenizer.length,
      )  # fmt: skip
    return self._extractor.read(texts)
