"""Python API of a trained or imported model: embeddings, classification, texts and generation."""

import functools
import logging
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.data.sources.base import NoData, Source
from fmcv_jax.data.sources.in_memory import ImageLike, InMemoryImages, image_list
from fmcv_jax.data.tokenizers import truncated_texts
from fmcv_jax.decoding.options import DecodingOptions
from fmcv_jax.diffusion.options import SamplingOptions
from fmcv_jax.errors import UserError
from fmcv_jax.evaluate.text_generator import QUESTION_TEMPLATE, TextGenerator, caption_prompt
from fmcv_jax.evaluate.zero_shot import ZeroShot, class_embeddings
from fmcv_jax.inference.adapters import Adapters, add_adapters
from fmcv_jax.inference.class_names import class_names_of
from fmcv_jax.inference.depth import DepthEstimator
from fmcv_jax.inference.detector import Detector, check_queries
from fmcv_jax.inference.generator import ImageGenerator
from fmcv_jax.inference.model_arguments import checked_templates, computing_in, image_source, softmax, text_list
from fmcv_jax.inference.prompted_segmenter import PromptedImage, PromptedSegmenter
from fmcv_jax.inference.segmenter import Segmenter
from fmcv_jax.models.multimodal.dual_encoder import MAX_LOG_SCALE
from fmcv_jax.objectives.mask_prediction import Task
from fmcv_jax.objectives.outputs import Output, listed
from fmcv_jax.pretrained import packaged
from fmcv_jax.run import Run, evaluated_as

logger = logging.getLogger(__name__)

CLIP_TEMPLATE = 'a photo of a {}.'  # Radford et al. 2021, section 3.1.4


class Model:
  """The model of a workdir, or of the package ('demo'), jitted over all devices.

  A method that the model does not support raises UserError.

  Images are files (str or path), encoded bytes, Pillow images or uint8 arrays [H, W, 3] of NumPy, JAX or PyTorch. Where
  a method takes images, texts or prompts, a list of N returns an array [N, ...], and a single one an array without that
  axis.

  step    checkpoint step, default the latest
  dtype   computation dtype, 'float32' or 'bfloat16', of every network that has a choice; default that of training
  batch   global batch size, in images or texts
  unreadable  'error' raises UserError for an image that cannot be read; 'nan' logs a warning and returns NaN for it
              ([] from `predict`), and raises UserError if no image can be read, or if an output is not finite
  lora    adapter files (LoRA and its relatives) to merge into the weights, each a path or (path, scale)
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    step: int | None = None,
    dtype: str | None = None,
    batch: int = 64,
    unreadable: Literal['error', 'nan'] = 'error',
    lora: Adapters = (),
  ):
    if batch < 1:
      raise UserError(f'batch: expected at least 1, got {batch}')
    if unreadable not in ('error', 'nan'):
      raise UserError(f"unreadable: {unreadable!r} is not 'error' or 'nan'")
    self._unreadable = unreadable
    self._workdir = os.fspath(workdir)
    self._step, self._dtype = step, dtype
    folder = packaged.locate(self._workdir)
    self._run = Run.reopen(folder, self._overrides(folder))
    ways = self._run.placement.mesh.size
    self._batch = -(-batch // ways) * ways
    self._subject, _ = self._run.restored_model(step)
    self._lora = tuple(lora)
    add_adapters(self._run, self._subject, self._lora)

  @property
  def outputs(self) -> Mapping[str, Output]:
    """The outputs of the model by name, each with its `kind` and the batch fields that it `reads`."""
    return self._subject.outputs

  @functools.cached_property
  def class_names(self) -> tuple[str, ...]:
    """Names of the classes of `classify` without labels, by index; () if they are not known."""
    return class_names_of(self._run)

  @functools.cached_property
  def templates(self) -> tuple[str, ...]:
    """Prompt templates of `classify`: those of the first zero_shot evaluator in the config; without one, the caption
    templates of the training data (data.caption_templates); 'a photo of a {}.' for an imported model."""
    e = self._run.experiment
    evaluated = [evaluator.templates for evaluator in e.evaluators.values() if isinstance(evaluator, ZeroShot)]
    trained = () if isinstance(e.data.source, NoData) else (e.data.caption_templates,)
    return tuple(next(iter([*evaluated, *trained, (CLIP_TEMPLATE,)])))

  def encode_image(self, images: ImageLike | Sequence[ImageLike]) -> np.ndarray:
    """Embeddings float32 [N, E]: unit length for an image-text model, otherwise the pooled features of the network.

    Images are resized and cropped as in the evaluation of the published model; without such a rule the short side is
    resized to the image size of the network, followed by a center crop.
    """
    return self._of_images('embed_image' if 'embed_image' in self.outputs else 'features', images)

  def encode_text(self, texts: str | Sequence[str]) -> np.ndarray:
    """Embeddings of unit length, float32 [N, E]. Texts beyond the maximum length are truncated, with a warning."""
    if isinstance(texts, str):
      return self.encode_text([texts])[0]
    texts = text_list('texts', texts)
    if not texts:
      raise UserError('texts: give at least one text')
    self._check_reads_texts()
    self._warn_of_truncation('texts', texts)
    return self._subject.embed_texts(texts, self._batch)

  def classify(
    self,
    images: ImageLike | Sequence[ImageLike],
    labels: Sequence[str] = (),
    *,
    templates: str | Sequence[str] | None = None,
  ) -> np.ndarray:
    """Probabilities float32 [N, classes]: of `labels` for an image-text model, otherwise of the model's own classes.

    labels     default `self.class_names`
    templates  sentences with a '{}' for the label, whose embeddings are averaged; default `self.templates`

    Label texts beyond the maximum text length are truncated, with a warning. UserError for a template that leaves no
    room for a label.
    """
    if isinstance(labels, str):
      raise UserError(f'labels: {labels!r} is one text; give a list of labels')
    labels = text_list('labels', labels)
    if blank := [at for at, label in enumerate(labels) if not label.strip()]:
      raise UserError(f'labels: label {blank[0]} is empty; remove it')
    if twice := [label for label in dict.fromkeys(labels) if labels.count(label) > 1]:
      raise UserError(f'labels: {twice[0]!r} is given twice, which would share its probability; remove one')
    if not labels and 'logits' in self.outputs:
      return softmax(self._of_images('logits', images))
    if not (labels := labels or self.class_names):
      raise UserError(f'{self._workdir}: this model has no classifier head; pass labels')
    self._check_reads_texts()
    if 'embed_image' not in self.outputs:
      raise UserError(f'{self._workdir}: this model has no embedding of a whole image to compare with labels')
    templates = checked_templates(self.templates if templates is None else templates)
    texts = class_embeddings(self._subject, labels, templates, self._batch)
    self._warn_of_truncation('labels', [template.replace('{}', label) for label in labels for template in templates])
    objective = self._run.experiment.objective
    log_scale = objective.full_params(self._subject.params, self._subject.extra)['temperature']
    return softmax(math.exp(min(float(log_scale), MAX_LOG_SCALE)) * self.encode_image(images) @ texts.T)

  def predict(
    self,
    images: ImageLike | Sequence[ImageLike],
    labels: Sequence[str] = (),
    *,
    count: int = 5,
    templates: str | Sequence[str] | None = None,
  ) -> Any:
    """The `count` most probable classes of each image, as (name, probability) pairs, best first; see `classify`.

    A list for one image, and a list of lists for several. Classes without names are named by their index, '0', '1', ...
    """
    if count < 1:
      raise UserError(f'count: expected at least 1, got {count}')
    labels = labels if isinstance(labels, str) else tuple(labels)
    probabilities = self.classify(images, labels, templates=templates)
    names = tuple(labels) or self.class_names or tuple(map(str, range(probabilities.shape[-1])))
    if len(names) != probabilities.shape[-1]:
      raise UserError(
        f'{self._workdir}: has {len(names)} class names, but the network has {probabilities.shape[-1]} classes'
      )

    def best(row: np.ndarray) -> list[tuple[str, float]]:
      order = () if np.isnan(row).any() else np.argsort(-row, kind='stable')[:count]
      return [(names[at], float(row[at])) for at in order]

    return best(probabilities) if probabilities.ndim == 1 else [best(row) for row in probabilities]

  def caption(
    self,
    images: ImageLike | Sequence[ImageLike],
    prompt: str | None = None,
    options: DecodingOptions = DecodingOptions(),
  ) -> Any:
    """Captions of the images: a list of N texts, or one text for a single image.

    prompt  text before the caption, by default PaliGemma's 'caption en', or none for a model without prompts

    UserError for an image that cannot be read, a prompt that is too long, and a model that does not generate texts.
    """
    return self._texts(images, [caption_prompt(self._subject.tokenizer) if prompt is None else prompt], options)

  def ask(
    self,
    images: ImageLike | Sequence[ImageLike],
    question: str | Sequence[str],
    *,
    answers: Sequence[str] = (),
    template: str = QUESTION_TEMPLATE,
    options: DecodingOptions = DecodingOptions(),
  ) -> Any:
    """Answers to a question about each image, or to one question per image: N texts, or one for a single image.

    answers   closed list of answers, of which the most likely is taken
    template  prompt with a '{}' for the question, by default PaliGemma's 'answer en {}'
    """
    questions = text_list('question', [question] if isinstance(question, str) else question)
    if isinstance(answers, str):
      raise UserError(f'answers: {answers!r} is one text; give a list')
    if template.count('{}') != 1:
      raise UserError(f"template: needs one '{{}}' for the question, got {template!r}")
    return self._texts(images, [template.replace('{}', text) for text in questions], options, answers)

  def _texts(
    self,
    images: ImageLike | Sequence[ImageLike],
    prompts: Sequence[str],
    options: DecodingOptions,
    answers: Sequence[str] = (),
  ) -> Any:
    several, is_one = image_list(images)
    source = image_source(several)
    texts = []
    pipeline = Pipeline(source, self._subject.image, max_bad=1.0)
    for found in self._text_generator.texts(pipeline, prompts, options, answers):
      if found.text is None and self._unreadable == 'error':
        raise UserError(f'images: {source.key_of(found.number)} cannot be read')
      texts.append(found.text)
    return texts[0] if is_one else texts

  @functools.cached_property
  def _text_generator(self) -> TextGenerator:
    return TextGenerator(self._subject, self._batch)

  def detect(
    self,
    images: ImageLike | Sequence[ImageLike],
    texts: str | Sequence[str] = (),
    *,
    like: ImageLike | Sequence[ImageLike] = (),
    threshold: float = 0.2,
    templates: str | Sequence[str] | None = None,
  ) -> Any:
    """Objects in each image, a list of `DetectedObject`, best first; one list for a single image.

    texts      what to find; `like`: images that each show an example of it, labeled by their names
    threshold  least score, from 0 to 1
    templates  sentences with a '{}' for the text, whose embeddings are averaged; default those of the training data
    """
    texts = text_list('texts', [texts] if isinstance(texts, str) else texts)
    examples = None if isinstance(like, (tuple, list)) and not like else image_source(image_list(like)[0])
    if not texts and examples is None:
      raise UserError('texts: give at least one text to find, or an example image as `like`')
    labels = [*texts, *(() if examples is None else map(examples.key_of, range(len(examples))))]
    check_queries(labels, threshold)
    data = self._run.experiment.data
    usual = ('{}',) if data.queries is None else data.queries.templates
    detector, queries = Detector(self._subject, self._batch), []
    if texts:
      queries.append(detector.embed_texts(texts, checked_templates(usual if templates is None else templates)))
    if examples is not None:
      queries.append(detector.embed_examples(image_pipeline(self._run, examples, max_bad=1.0)))
    several, is_one = image_list(images)
    pipeline = image_pipeline(self._run, image_source(several), max_bad=1.0)
    found = list(detector.detect(pipeline, np.concatenate(queries), labels, threshold))
    return self._readable(found, pipeline.source, is_one)

  def segment(
    self,
    images: ImageLike | Sequence[ImageLike],
    task: Task | None = None,
    *,
    threshold: float | None = None,
    **prompts: Any,
  ) -> Any:
    """Segments of each image at its own size, `Segments`; one for a single image.

    task       'semantic', 'instance' or 'panoptic'; default what the model was trained for
    threshold  least score of an instance or a panoptic segment, from 0 to 1; default 0.8
    prompts    for a promptable model and a single image: `points`, `boxes` and so on of `PromptedImage.segment`

    UserError for a model that does not segment, and for a task that it does not have.
    """
    if prompts or 'prompted_masks' in self.outputs:
      if task is not None or threshold is not None:
        raise UserError('task, threshold: a promptable model has neither; give points or boxes')
      return self.encode_for_prompts(images).segment(**prompts)
    several, is_one = image_list(images)
    pipeline = image_pipeline(self._run, image_source(several), max_bad=1.0)
    ways = self._run.placement.mesh.size
    batch = min(self._batch, -(-len(several) // ways) * ways)  # masks are large
    segmenter = Segmenter(self._subject, self._run.experiment.objective, self.class_names, batch)
    return self._readable(list(segmenter.segment(pipeline, task, threshold)), pipeline.source, is_one)

  def encode_for_prompts(self, image: ImageLike | Sequence[ImageLike]) -> PromptedImage:
    """A single image, encoded once for several prompts, each a call of its `segment`."""
    pipeline = image_pipeline(self._run, image_source(image_list(image)[0]), max_bad=1.0)
    return PromptedSegmenter(self._subject).encode_single(pipeline)

  def depth(self, images: ImageLike | Sequence[ImageLike]) -> Any:
    """Depth of each image in its own size: a list of N arrays float32 [H, W] (None: unreadable), or one array.

    In meters for a model with the output 'depth'; for 'inverse_depth', up to scale and shift, and larger is nearer.
    """
    several, is_one = image_list(images)
    estimator, source = (
      DepthEstimator(self._subject, self._run.experiment.data.image, self._batch),
      image_source(several),
    )
    return self._readable(estimator.in_order(source), source, is_one)

  def _readable(self, found: list[Any], source: Source, is_one: bool) -> Any:
    """Results of images, None for one that cannot be read: a UserError where `unreadable` says so."""
    if self._unreadable == 'error' and (lost := [number for number, own in enumerate(found) if own is None]):
      raise UserError(f'images: {source.key_of(lost[0])} cannot be read')
    return found[0] if is_one else found

  def generate(
    self, prompts: str | int | Sequence[str | int], options: SamplingOptions = SamplingOptions(), **changes: Any
  ) -> np.ndarray:
    """Images uint8 [N, H, W, 3], one per prompt; takes the arguments of `ImageGenerator.generate`."""
    if isinstance(prompts, (str, int, np.integer)):
      return self._generator.generate([prompts], options, **changes)[0]
    return self._generator.generate(prompts, options, **changes)

  @functools.cached_property
  def _generator(self) -> ImageGenerator:
    overrides = self._overrides(packaged.locate(self._workdir, 'generate'))
    return ImageGenerator(self._workdir, step=self._step, batch=self._batch, overrides=overrides, lora=self._lora)

  def _overrides(self, folder: str) -> tuple[str, ...]:
    return () if self._dtype is None else computing_in(self._dtype, folder)

  def _of_images(self, name: str, images: ImageLike | Sequence[ImageLike]) -> np.ndarray:
    """An output of one image, or of a list of them."""
    several, is_one = image_list(images)
    rows = self._of_source(name, image_source(several))
    return rows[0] if is_one else rows

  def _of_source(self, name: str, source: InMemoryImages) -> np.ndarray:
    if name not in self.outputs:
      raise UserError(f'{self._workdir}: this model has no {name}; its outputs are {listed(self.outputs)}')
    pipeline = image_pipeline(self._run, source, max_bad=float(self._unreadable == 'nan'))
    values, indices, _ = self._subject.map_dataset(name, pipeline, self._batch)
    if self._unreadable == 'error':
      return values
    finite = np.isfinite(values.reshape(len(values), -1)).all(axis=1)
    if not finite.all():  # NaN stands for unreadable images only
      first = source.key_of(int(indices[~finite][0]))
      raise UserError(f'{self._workdir}: {name} is not finite for {(~finite).sum()} images, first {first}')
    rows = np.full((len(source), *values.shape[1:]), np.nan, values.dtype)
    rows[indices] = values
    return rows

  def _check_reads_texts(self) -> None:
    if 'embed_text' not in self.outputs:
      raise UserError(f'{self._workdir}: this model has no text encoder; its outputs are {listed(self.outputs)}')

  def _warn_of_truncation(self, argument: str, texts: Sequence[str]) -> None:
    tokenizer = self._subject.tokenizer
    assert tokenizer is not None
    if cut := truncated_texts(tokenizer, texts):
      first, left = next(iter(cut.items()))
      logger.warning(
        '%s: %d of %d texts are longer than %d tokens and are truncated, the first from %r to %r',
        argument, len(cut), len(texts), tokenizer.length, first, left,
      )  # fmt: skip


def image_pipeline(run: Run, source: Source, max_bad: float) -> Pipeline:
  """The images of a source as the model takes them; UserError for a model of images that are not RGB."""
  image = run.experiment.objective.example_batch.get('image')
  if image is not None and image.shape[-1] != 3:
    raise UserError(
      f'{run.workdir}: the network takes images of {image.shape[-1]} channels; inputs are converted to RGB here, '
      f'evaluate it on a data source with data.channels={image.shape[-1]}'
    )
  return Pipeline(source, evaluated_as(run), max_bad=max_bad)
