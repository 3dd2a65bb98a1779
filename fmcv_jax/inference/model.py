"""Python API of a trained or imported model: embeddings, classification, texts and generation."""

import functools
import logging
import math
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from fmcv_jax.config import paths_of
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.data.sources.base import NoData, Source
from fmcv_jax.data.sources.in_memory import ImageLike, InMemoryImages, image_list
from fmcv_jax.data.tokenizers import truncated_texts
from fmcv_jax.decoding.options import DecodingOptions
from fmcv_jax.diffusion.options import SamplingOptions
from fmcv_jax.errors import UserError, did_you_mean
from fmcv_jax.evaluate.text_generator import QUESTION_TEMPLATE, TextGenerator, caption_prompt
from fmcv_jax.evaluate.zero_shot import ZeroShot, class_embeddings
from fmcv_jax.inference.detector import Detector, check_queries
from fmcv_jax.inference.generator import ImageGenerator
from fmcv_jax.models.common.layers import Dtype
from fmcv_jax.models.multimodal.dual_encoder import MAX_LOG_SCALE
from fmcv_jax.objectives.outputs import Output, listed
from fmcv_jax.pretrained import packaged
from fmcv_jax.run import CLASSES, Run, evaluated_as

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
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    step: int | None = None,
    dtype: str | None = None,
    batch: int = 64,
    unreadable: Literal['error', 'nan'] = 'error',
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
    texts = _text_list('texts', texts)
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
    labels = _text_list('labels', labels)
    if blank := [at for at, label in enumerate(labels) if not label.strip()]:
      raise UserError(f'labels: label {blank[0]} is empty; remove it')
    if twice := [label for label in dict.fromkeys(labels) if labels.count(label) > 1]:
      raise UserError(f'labels: {twice[0]!r} is given twice, which would share its probability; remove one')
    if not labels and 'logits' in self.outputs:
      return _softmax(self._of_images('logits', images))
    if not (labels := labels or self.class_names):
      raise UserError(f'{self._workdir}: this model has no classifier head; pass labels')
    self._check_reads_texts()
    if 'embed_image' not in self.outputs:
      raise UserError(f'{self._workdir}: this model has no embedding of a whole image to compare with labels')
    templates = _checked_templates(self.templates if templates is None else templates)
    texts = class_embeddings(self._subject, labels, templates, self._batch)
    self._warn_of_truncation('labels', [template.replace('{}', label) for label in labels for template in templates])
    objective = self._run.experiment.objective
    log_scale = objective.full_params(self._subject.params, self._subject.extra)['temperature']
    return _softmax(math.exp(min(float(log_scale), MAX_LOG_SCALE)) * self.encode_image(images) @ texts.T)

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
    questions = _text_list('question', [question] if isinstance(question, str) else question)
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
    source = _source(several)
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
    texts = _text_list('texts', [texts] if isinstance(texts, str) else texts)
    examples = None if isinstance(like, (tuple, list)) and not like else _source(image_list(like)[0])
    if not texts and examples is None:
      raise UserError('texts: give at least one text to find, or an example image as `like`')
    labels = [*texts, *(() if examples is None else map(examples.key_of, range(len(examples))))]
    check_queries(labels, threshold)
    data = self._run.experiment.data
    usual = ('{}',) if data.queries is None else data.queries.templates
    detector, queries = Detector(self._subject, self._batch), []
    if texts:
      queries.append(detector.embed_texts(texts, _checked_templates(usual if templates is None else templates)))
    if examples is not None:
      queries.append(detector.embed_examples(image_pipeline(self._run, examples, max_bad=1.0)))
    several, is_one = image_list(images)
    pipeline = image_pipeline(self._run, _source(several), max_bad=1.0)
    found = list(detector.detect(pipeline, np.concatenate(queries), labels, threshold))
    if self._unreadable == 'error' and None in found:
      raise UserError(f'images: {pipeline.source.key_of(found.index(None))} cannot be read')
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
    return ImageGenerator(self._workdir, step=self._step, batch=self._batch, overrides=overrides)

  def _overrides(self, folder: str) -> tuple[str, ...]:
    return () if self._dtype is None else _computing_in(self._dtype, folder)

  def _of_images(self, name: str, images: ImageLike | Sequence[ImageLike]) -> np.ndarray:
    """An output of one image, or of a list of them."""
    several, is_one = image_list(images)
    rows = self._of_source(name, _source(several))
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


def _checked_templates(templates: str | Sequence[str]) -> Sequence[str]:
  templates = [templates] if isinstance(templates, str) else templates
  if not templates or (bad := [template for template in templates if template.count('{}') != 1]):
    raise UserError(f"templates: each needs one '{{}}' for the label, got {bad[0] if templates else templates!r}")
  return templates


def _source(images: Sequence[ImageLike] | np.ndarray) -> InMemoryImages:
  """Several images as a source; UserError for none, and for a file that does not exist."""
  if len(images) == 0:
    raise UserError('images: give at least one image')
  for image in images:
    if isinstance(image, (str, os.PathLike)) and not os.path.isfile(image):
      if os.path.isdir(image):
        raise UserError(f'images: {os.fspath(image)!r} is a folder; give the files in it')
      raise UserError(f'images: no file {os.fspath(image)!r} (relative to {os.getcwd()})')
  return InMemoryImages(images)


def image_pipeline(run: Run, source: Source, max_bad: float) -> Pipeline:
  """The images of a source as the model takes them; UserError for a model of images that are not RGB."""
  image = run.experiment.objective.example_batch.get('image')
  if image is not None and image.shape[-1] != 3:
    raise UserError(
      f'{run.workdir}: the network takes images of {image.shape[-1]} channels; inputs are converted to RGB here, '
      f'evaluate it on a data source with data.channels={image.shape[-1]}'
    )
  return Pipeline(source, evaluated_as(run), max_bad=max_bad)


def class_names_of(run: Run) -> tuple[str, ...]:
  """Names of the classes that a model names without labels, by index.

  Those kept in its workdir; of a model with class labels the training classes; of an image-text model the classes of
  its zero_shot evaluator, the one with the most if it has several; without one the training classes. () for other
  models, and where the data is missing.
  """
  objective, evaluators = run.experiment.objective, run.experiment.evaluators.values()
  if objective.class_counts or (run.workdir / CLASSES).exists():
    return tuple(run.class_names())
  if 'embed_text' not in objective.outputs():
    return ()
  zero_shot = [evaluator for evaluator in evaluators if isinstance(evaluator, ZeroShot)]
  if not zero_shot:
    return tuple(run.class_names())
  try:
    return max((tuple(evaluator.data.source.names) for evaluator in zero_shot), key=len)
  except (UserError, OSError):
    return ()


def dtypes_of(workdir: str | pathlib.Path) -> list[str]:
  """Config paths of all `dtype` fields of the objective."""
  return paths_of(Run.reopen(workdir).config['objective'], 'dtype', 'objective')


def _computing_in(dtype: str, workdir: str) -> tuple[str, ...]:
  """The config overrides that set the computation dtype. Raises UserError where a model cannot compute in it."""
  known = get_args(Dtype)
  if dtype not in known:
    raise UserError(f'dtype: {dtype!r} is not one of {", ".join(map(repr, known))}; {did_you_mean(dtype, known)}')
  paths = dtypes_of(workdir)
  if not paths and dtype != 'float32':
    raise UserError(f'dtype: the network of {workdir} computes in float32 only, got {dtype!r}')
  return tuple(f'{path}={dtype}' for path in paths)


def _text_list(argument: str, texts: Any) -> list[str]:
  """Texts as a list; UserError for anything that is not a text."""
  if not isinstance(texts, Iterable):
    raise UserError(f'{argument}: expected a list of texts, got {type(texts).__name__}')
  listed_texts = list(texts)
  for at, text in enumerate(listed_texts):
    if not isinstance(text, str):
      raise UserError(f'{argument}: item {at} is {type(text).__name__}, not a text')
  return listed_texts


def _softmax(scores: np.ndarray) -> np.ndarray:
  shifted = np.exp(scores - scores.max(axis=-1, keepdims=True))
  return shifted / shifted.sum(axis=-1, keepdims=True)
