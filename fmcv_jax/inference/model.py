"""A trained or imported model for use from Python: images and texts in, arrays out."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from fmcv_jax.config import paths_of
from fmcv_jax.data.loader import Pipeline
from fmcv_jax.data.pillow_resize import PillowResize
from fmcv_jax.data.sources.in_memory import ImageLike, InMemoryImages
from fmcv_jax.data.transforms import ImageTransform, Resize, ResizeCrop
from fmcv_jax.errors import UserError
from fmcv_jax.evaluate.zero_shot import class_embeddings
from fmcv_jax.inference.generator import ImageGenerator
from fmcv_jax.run import Run


class Model:
  """The model of a workdir, jitted over all devices; what it does not offer is a UserError.

  dtype   of the computation: 'float32' or 'bfloat16'; by default as it was trained
  batch   pictures or texts that go through it at once
  """

  def __init__(
    self, workdir: str | pathlib.Path, *, step: int | None = None, dtype: str | None = None, batch: int = 64
  ):
    self._workdir = workdir
    self._run = Run.reopen(workdir, () if dtype is None else tuple(f'{path}={dtype}' for path in dtypes_of(workdir)))
    self._step = step
    self._painter: ImageGenerator | None = None
    ways = self._run.placement.mesh.size
    self._batch = -(-batch // ways) * ways
    self._subject, _ = self._run.restored_model(step)

  def encode_image(self, images: Sequence[ImageLike]) -> np.ndarray:
    """Embeddings float32 [N, E]: of unit length where the model knows texts, features of the network elsewhere.

    Images are arrays uint8 [H, W, 3], files, encoded bytes or Pillow's. They are scaled and cut as those were on which
    the model was published; without such a rule their short side is scaled to the network's, and the centre cut out.
    """
    return self._over('embed_image' if 'embed_image' in self._subject.functions else 'features', images)

  def encode_text(self, texts: Sequence[str]) -> np.ndarray:
    """Embeddings of unit length, float32 [N, E]."""
    if not texts:
      raise UserError('give at least one text')
    if 'embed_text' not in self._subject.functions:
      raise UserError(f'{self._workdir}: this model knows no texts; it offers {", ".join(self._subject.functions)}')
    return self._subject.embed_texts(texts, self._batch)

  def classify(
    self, images: Sequence[ImageLike], labels: Sequence[str] = (), *, templates: Sequence[str] = ('a photo of a {}.',)
  ) -> np.ndarray:
    """Probabilities float32 [N, classes]: of `labels` for a model that knows texts, else of its own classes."""
    if 'logits' in self._subject.functions and not labels:
      return _softmax(self._over('logits', images))
    if not labels:
      raise UserError(f'{self._workdir}: this model has no classes of its own; give labels')
    if bad := [template for template in templates if template.count('{}') != 1]:
      raise UserError(f"templates: each needs one '{{}}' for the label, got {bad[0]!r}")
    self.encode_text(labels[:1])
    texts = class_embeddings(self._subject, labels, templates, self._batch)
    scale = np.exp(np.asarray(self._subject.params['temperature']))
    return _softmax(scale * self.encode_image(images) @ texts.T)

  def generate(self, prompts: Sequence[str | int], **options: Any) -> np.ndarray:
    """Images uint8 [N, H, W, 3], one for each prompt; options as those of `ImageGenerator.generate`."""
    if self._painter is None:
      self._painter = ImageGenerator(self._workdir, step=self._step, batch=self._batch)
    return self._painter.generate(prompts, **options)

  def _over(self, name: str, images: Sequence[ImageLike]) -> np.ndarray:
    if len(images) == 0 or (isinstance(images, np.ndarray) and images.ndim == 3):
      raise UserError('give a list of at least one image')
    shape = self._run.experiment.objective.example_batch.get('image')
    if name not in self._subject.functions or shape is None:
      raise UserError(f'{self._workdir}: offers no {name}; it has {", ".join(self._subject.functions) or "nothing"}')
    pipeline = Pipeline(InMemoryImages(images), evaluated_as(self._run), max_bad=0.0)
    return self._subject.map_dataset(name, pipeline, self._batch).values


def evaluated_as(run: Run) -> ImageTransform | None:
  """How a model is shown images: as the config's data says, if by no chance, and else the short side is made to fit.

  None for a model that is shown none.
  """
  if isinstance(run.experiment.data.image, PillowResize):
    return run.experiment.data.image
  objective: Any = run.experiment.objective
  image, given = objective.example_batch.get('image'), run.experiment.data.image
  size = image.shape[0] if image is not None else getattr(getattr(objective, 'network', None), 'image_size', None)
  if size is None:
    return None
  return dataclasses.replace(given, size=size) if isinstance(given, Resize | ResizeCrop) else ResizeCrop(size, crop=1.0)


def dtypes_of(workdir: str | pathlib.Path) -> list[str]:
  """The config paths of all that computes in a dtype of its choice."""
  return paths_of(Run.reopen(workdir).config['objective'], 'dtype', 'objective')


def _softmax(scores: np.ndarray) -> np.ndarray:
  shifted = np.exp(scores - scores.max(axis=1, keepdims=True))
  return shifted / shifted.sum(axis=1, keepdims=True)
